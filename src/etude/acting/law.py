"""Sampling laws as maps on logits, and draws from them with one uniform a token.

The order is that of `transformers`: processors, temperature, top-k, top-p, min-p, each seeing what the
one before left. A law's log-probabilities are those of the renormalised distribution it draws from.
Shapes: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude.experience.errors import UserError
from etude.experience.types import Law

NEVER = float("-inf")


def check(law: Law) -> None:
    """Raises UserError for a law that is none."""
    if not law.temperature >= 0:
        raise UserError(f"temperature {law.temperature} is not a number of at least 0 (0: greedy)")
    if law.top_k < 0:
        raise UserError(f"top_k {law.top_k} is below 0 (0: off)")
    if not 0 < law.top_p <= 1:
        raise UserError(f"top_p {law.top_p} is not in (0, 1] (1: off)")
    if not 0 <= law.min_p <= 1:
        raise UserError(f"min_p {law.min_p} is not in [0, 1] (0: off)")


def warp(logits: Tensor, law: Law) -> Tensor:
    """f32[R, V] -> f32[R, V]: scaled by a temperature above 0, -inf outside the law's support."""
    if law.temperature != 1:
        logits = logits / law.temperature
    if law.top_k:
        least = logits.topk(min(law.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, NEVER)
    if law.top_p < 1:
        logits = _nucleus(logits, law.top_p)
    if law.min_p:
        floor = logits.softmax(-1)
        logits = logits.masked_fill(floor < law.min_p * floor.amax(-1, keepdim=True), NEVER)
    return logits


def _nucleus(logits: Tensor, p: float) -> Tensor:
    """Top-p (Holtzman et al. 2020, section 3.1): the fewest likeliest tokens with a mass of at least `p`."""
    ascending, order = logits.sort(dim=-1)
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[..., -1] = False
    return logits.masked_fill(tail.scatter(-1, order, tail), NEVER)


def log_law(logits: Tensor, law: Law) -> Tensor:
    """f32[R, V] -> f32[R, V]: log-probabilities under `law`; greedy puts everything on the first
    maximum."""
    if law.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, NEVER).scatter(-1, best, 0.0)
    return warp(logits, law).log_softmax(-1)


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """f32[R, V] log-probabilities and f64[R] in [0, 1) -> int64[R]: tokens by inverse CDF.

    Sums are in float64; a token of probability 0 is never drawn, since `uniform` x total stays below
    the total.
    """
    cdf = logp.exp().double().cumsum_(-1)  # in place: no second buffer of R x V doubles
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp_max(logp.shape[-1] - 1)  # NaN would fall outside


def choose(logits: Tensor, law: Law, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """f32[R, V], f64[R] -> tokens int64[R] and their log-probabilities f32[R] under `law`."""
    if law.temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    logp = log_law(logits, law)
    token = draw(logp, uniform)
    return token, at(logp, token)


def at(values: Tensor, token: Tensor) -> Tensor:
    """[R, V], int64[R] -> [R]: one value a row."""
    return values.gather(-1, token[:, None])[:, 0]
