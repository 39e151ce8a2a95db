"""Regression of a value head on returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.plugs import register
from etude.experience.protocols import Loss, Outputs
from etude.objectives.terms import Pure, column, counted, weighted


@register("objective", "value", needs={"returns"})
@dataclass(frozen=True)
class ValueLoss(Pure):
    """loss = sum of weight x (v - returns)^2 / 2, over actions, with the column `returns`.

    With `clip` the term is the larger of this and the same for v kept within `clip` of the column
    `values_old` (PPO's value clipping, arXiv:2005.12729, section 3). Metrics: `value_error` (squared),
    `value`.
    """

    clip: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"value clip must be above 0, not {self.clip}")

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """See `Objective`."""
        returns = column(batch, "returns", "a value loss", "give the batch returns")
        error = (out.values - returns).square()
        term = error
        if self.clip is not None:
            old = column(batch, "values_old", "a clipped value loss", "store the values that the advantages came from")
            kept = old + (out.values - old).clamp(-self.clip, self.clip)
            term = error.maximum((kept - returns).square())
        return Loss(weighted(batch, term / 2), counted(batch, value_error=error, value=out.values))
