"""Cross-entropy, plain or weighted by a function of the model's own confidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from etude.experience.batch import Batch
from etude.experience.plugs import register
from etude.experience.protocols import Loss, Outputs
from etude.objectives.terms import Pure, counted, weighted

Weight = Callable[[Tensor, Batch], Tensor | None]


@register("objective", "nll", refuses={"advantage"}, why="it imitates every answer alike: use credit=none")
@dataclass(frozen=True)
class NLL(Pure):
    """loss = sum of weight x w x (-log p), over actions.

    `weight(logp f[N], batch)` gives w (f[N], or None for 1). Its log-probabilities carry no gradient, so
    any loss whose gradient is w(p) grad log p is one line: a mask, a coverage factor, a clipped
    importance weight. The metric `nll` does not include w.
    """

    weight: Weight | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"logp"})

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """See `Objective`."""
        term = -out.logp
        w = self.weight(out.logp.detach(), batch) if self.weight else None
        total = weighted(batch, term if w is None else w * term)
        return Loss(total, counted(batch, nll=term))
