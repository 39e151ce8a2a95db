"""A small world, policy and run that the learning tests share."""

from __future__ import annotations

import numpy as np

from etude.experience.keys import Keys
from etude.experience.protocols import Limits
from etude.experience.types import Outcome, Problem
from etude.policies.lm import LM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape


class Echo:
    """Say the digit you were shown. `slack` neighbours of it count as right too, so that a policy
    with random weights is sometimes right."""

    name = "echo"
    categories = ("low", "high")

    def __init__(self, slack: int = 1) -> None:
        self.slack = slack

    def size(self, split: str) -> int | None:
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        category = category or self.categories[index % 2]
        digit = int(Keys(7, (split, index)).numpy().integers(5)) + 5 * (category == "high")
        return Problem(f"{split}-{category}-{index}", f"{digit}=", str(digit), category)

    def score(self, problem: Problem, text: str) -> Outcome:
        said = text[:1]
        right = said.isascii() and said.isdigit() and abs(int(said) - int(problem.answer or 0)) <= self.slack
        return Outcome(float(right), right, said or None)


LIMITS = Limits(max_tokens=2)


def small_lm(seed: int = 0, width: int = 16, depth: int = 1) -> LM:
    """A transformer that answers in digits more often than not by chance alone."""
    tokenizer = CharTokenizer()
    shape = Shape(tokenizer.size, width, depth, heads=2, kv_heads=1, head_dim=8, ffn=2 * width, limit=32)
    policy = LM(shape, tokenizer, Keys(seed).torch())
    digits = tokenizer.encode("0123456789").tolist()
    import torch

    with torch.no_grad():
        policy.model.embed_tokens.weight[digits] *= 8.0
    return policy


def weights_of(policy: LM) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy().copy() for n, p in policy.named_parameters()}
