"""Log-probabilities of given continuations, and what is read off them as confidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from etude.experience.batch import Batch, pack, split
from etude.experience.meter import Meter
from etude.experience.protocols import Outputs, Policy
from etude.experience.rows import example
from etude.experience.types import Floats, Ids

Want = Literal["logp", "entropy", "margin"]


def score(
    policy: Policy,
    contexts: Sequence[Ids],
    continuations: Sequence[Ids],
    want: Want = "logp",
    *,
    max_tokens: int = 8192,
    meter: Meter | None = None,
) -> list[Floats]:
    """Scores each continuation after its context, at temperature 1, without gradient.

    Returns one f32[T_i] a continuation, a value for each of its tokens: `logp` of the token, `entropy`
    of the distribution it was chosen from (nats), or its `margin` (the largest probability minus the
    second largest). An empty continuation gives an empty array. `max_tokens` bounds the inputs of one
    forward pass; all inputs, contexts too, are charged as `scored`. Raises ValueError for an empty
    context or for lists of different lengths.
    """
    rows, filled = [], []
    out: list[Floats] = [np.zeros(0, np.float32)] * len(continuations)
    for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        if not len(context):
            raise ValueError(f"continuation {i} has an empty context: begin with a start token")
        if len(continuation):
            rows.append(example(context, continuation))
            filled.append(i)
    if not rows:
        return out
    parts: list[Tensor] = []
    for micro in split(pack(rows), max_tokens):
        parts.append(_WANTED[want](policy, micro.to(policy.device)).float().cpu())
        if meter is not None:
            meter.charge("scored", len(micro.inputs))
    values = np.split(torch.cat(parts).numpy(), np.cumsum([len(r.at) for r in rows])[:-1])
    for i, value in zip(filled, values, strict=True):
        out[i] = value
    return out


def _entropy(policy: Policy, batch: Batch) -> Tensor:
    with torch.no_grad():
        return policy.forward(batch, frozenset({"entropy"})).entropy


def _margin(policy: Policy, batch: Batch) -> Tensor:
    def margin(logits: Tensor, part: slice) -> Tensor:
        top = logits.float().softmax(-1).topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]

    with torch.no_grad():
        outputs: Outputs = policy.forward(batch, frozenset({"logits"}))
        return outputs.map_logits(margin)


_WANTED: dict[str, Callable[[Policy, Batch], Tensor]] = {
    "logp": lambda policy, batch: policy.logp(batch),
    "entropy": _entropy,
    "margin": _margin,
}


# Reducers: f32[T] of one continuation to one number. They raise ValueError on an empty one, except
# `total`, whose empty sum is 0.


def total(logp: Floats) -> float:
    """log-probability of the whole continuation, nats."""
    return float(np.sum(logp, dtype=np.float64))


def mean(values: Floats) -> float:
    """Mean over tokens; of log-probabilities, the length-normalised score."""
    return float(np.mean(_some(values), dtype=np.float64))


def quantile(values: Floats, q: float) -> float:
    """The `q` quantile over tokens (0: the least confident token), as in language-model cascades,
    arXiv:2404.10136."""
    return float(np.quantile(_some(values), q))


def perplexity(logp: Floats) -> float:
    """exp of minus the mean log-probability."""
    return float(np.exp(-mean(logp)))


def _some(values: Floats) -> Any:
    if not len(values):
        raise ValueError("an empty continuation has no confidence")
    return values
