"""The choice world: a few possible responses to each context, and preferences that need not be transitive.

Which response is better is a matter of pairs: three good ones beat one another in a cycle, so that no ranking of them
exists and whoever settles on one of them loses to another. It isolates what learning from general preferences is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import exp

import numpy as np
from numpy.typing import NDArray

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.types import Outcome, Problem

SPLITS = ("train", "test")
RESPONSES = ("00", "01", "02", "10", "11", "12")
GOOD = 3  # how many of them are in the cycle
DOMINATED = (0.0, -0.5, -1.0)  # qualities of the others
TOP, TRANSITIVE = (2.0, 2.0, 2.0), (4.0, 3.0, 2.0)  # of the good ones, in a cycle or ranked
NONE = -2.0  # quality of whatever is no response
EDGE = 0.9  # how often a response beats its successor in the cycle


@dataclass(frozen=True)
class ChoiceWorld:
    """`contexts` prompts ("ab=" and the like), each with the responses 00 to 12; what begins with none of these is as
    good as any other such text, and worse than all.

    Three responses are good: each beats the next with probability 0.9, the last the first. With `cycle` false they have
    a best and a second best instead. In all other pairs P(a > b) = sigmoid(quality of a - quality of b). Which responses
    are which is drawn anew for every context. Both splits have the same contexts, under other names: what is measured
    is what was learnt, as in a game. Raises UserError on sizes that cannot be.
    """

    contexts: int = 20
    cycle: bool = True
    seed: int = 0  # of which response is which
    name: str = field(default="choice", init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.contexts <= 26 * 26:
            raise UserError(f"choice: contexts must be 1 to {26 * 26}, not {self.contexts}")

    @property
    def categories(self) -> tuple[str, ...]:
        """One."""
        return ("choice",)

    def size(self, split: str) -> int | None:
        """None: a context may be met for ever."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """The contexts in turn."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if category not in (None, *self.categories):
            raise unknown("choice category", category or "", self.categories)
        context = index % self.contexts
        prompt = f"{chr(97 + context // 26)}{chr(97 + context % 26)}="
        return Problem(f"{split}/{index}", prompt, category="choice", meta={"context": context})

    def score(self, problem: Problem, text: str) -> Outcome:
        """Reward 1 for a good response, with `cycle` false only for the best one; `parts` name what beat it."""
        kind = self._kind(problem, text)
        good = kind < GOOD if self.cycle else kind == 0
        parsed = text[:2] if kind < len(RESPONSES) else None
        return Outcome(float(good), good, parsed, {"dominated": float(kind >= GOOD)})

    def prefer(self, problem: Problem, a: str, b: str) -> float:
        """The probability that a beats b: P(a, b) + P(b, a) = 1, and 1/2 for two of the same response."""
        i, j = self._kind(problem, a), self._kind(problem, b)
        if self.cycle and i < GOOD and j < GOOD:
            return (0.5, EDGE, 1 - EDGE)[(j - i) % GOOD]
        quality = (*(TOP if self.cycle else TRANSITIVE), *DOMINATED, NONE)
        return 1 / (1 + exp(quality[j] - quality[i]))

    def responses(self, problem: Problem) -> tuple[str, ...]:
        """00 to 12."""
        return RESPONSES

    def _kind(self, problem: Problem, text: str) -> int:
        """0 to 2 for the good responses, up to 5 for the others, 6 for what is none."""
        kinds = _kinds(self.seed, int(problem.meta["context"]))
        return int(kinds[RESPONSES.index(text[:2])]) if text[:2] in RESPONSES else len(RESPONSES)


@lru_cache(maxsize=4096)
def _kinds(seed: int, context: int) -> NDArray[np.int64]:
    return Keys(seed).at("choice", context).numpy().permutation(len(RESPONSES))
