"""What a forward pass gives, with logits made and remade one chunk at a time.

Axes: `N` packed actions, `n` actions of one chunk, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits elements alive at once: 48 MiB in float32. Beyond 32 MiB glibc maps memory of its own, so that a
# chunk that is let go returns to the system instead of tearing holes in the heap.
CHUNK = 12 * 2**20


class Outputs:
    """The fields that `needs` names; reading another raises AttributeError.

    `hidden` is [N, D], what `head` turns into logits [n, V]; `target` is int64[N]. `logp` and
    `entropy` (nats) are f32[N] at temperature 1. `values` is f32[N]; `aux` holds whatever else the
    policy gives by name (`reward` f32[B], `classes` f32[B, C], ...).
    """

    logp: Tensor
    entropy: Tensor
    hidden: Tensor
    values: Tensor
    aux: dict[str, Tensor]

    def __init__(
        self,
        needs: frozenset[str],
        hidden: Tensor,
        target: Tensor,
        head: Callable[[Tensor], Tensor],
        vocab: int,
        values: Tensor | None = None,
        aux: Mapping[str, Tensor] | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.needs = needs
        self.aux = dict(aux or {})
        self._hidden, self._head = hidden, head
        self._rows = max(1, chunk // vocab)
        if "hidden" in needs:
            self.hidden = hidden
        if values is not None:
            self.values = values
        if "entropy" in needs:
            self.logp, self.entropy = self._map(lambda logits, at: _logp_entropy(logits, target[at]))
        elif "logp" in needs:
            self.logp = self._map(lambda logits, at: -F.cross_entropy(logits, target[at], reduction="none"))

    def __getattr__(self, name: str) -> Any:
        if name in Outputs.__annotations__:
            raise AttributeError(f"{name!r} was not asked of the forward pass: add it to needs")
        raise AttributeError(name)

    def map_logits(self, f: Callable[[Tensor, slice], Any]) -> Any:
        """Applies the pure function `f(logits f32[n, V], slice of the N actions)` chunk by chunk.

        `f` gives a tensor [n, ...] or a tuple of them; so does this, over all N. Logits are made anew
        in the backward pass, so never more than one chunk of them exists.
        """
        if "logits" not in self.needs:
            raise AttributeError("logits were not asked of the forward pass: add 'logits' to needs")
        return self._map(f)

    def logits(self, part: slice) -> Tensor:
        """f32[n, V]: the logits of these actions, for whoever keeps to a chunk at a time by other means."""
        return _at_least_float32(self._head(self._hidden[part]))

    def _map(self, f: Callable[[Tensor, slice], Any]) -> Any:
        if len(self._hidden) <= self._rows:  # one chunk: keeping it is cheaper than making it again
            return self._apply(f, slice(0, len(self._hidden)), self._hidden)
        parts = []
        start = 0
        for h in self._hidden.split(self._rows):
            at = slice(start, start + len(h))
            parts.append(_remade(partial(self._apply, f, at), h))
            start = at.stop
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return torch.cat(parts)

    def _apply(self, f: Callable[[Tensor, slice], Any], at: slice, h: Tensor) -> Any:
        return f(_at_least_float32(self._head(h)), at)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _remade(f: Callable[[Tensor], Any], h: Tensor) -> Any:
    """f(h), whose intermediates are not kept but computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return f(h)
    return checkpoint(f, h, use_reentrant=False, preserve_rng_state=False)


def _logp_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """f32[n] each: log-probability of the target, and entropy in nats."""
    logq = logits.log_softmax(-1)
    return logq.gather(-1, target[:, None]).squeeze(-1), -(logq.exp() * logq).sum(-1)
