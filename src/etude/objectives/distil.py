"""Distillation on whole distributions: the student's at each action against a frozen policy's.

With a teacher it is knowledge distillation (on demonstrations, or on the student's own samples); with the
starting policy in the teacher's place it is an exact KL leash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.plugs import register
from etude.experience.protocols import Loss, Outputs, Policy
from etude.objectives.kl import js_divergence, kl_divergence
from etude.objectives.terms import counted, weighted


@register("objective", "distil", needs={"teacher"})
@dataclass(frozen=True)
class Distil:
    """loss = sum over actions of weight x D(teacher, student), over the vocabulary, nats.

    `kind` "forward" is KL(teacher || student) (arXiv:1503.02531, section 2, at temperature 1), "reverse"
    KL(student || teacher), "jsd" the generalised Jensen-Shannon divergence with `beta` of the teacher in
    the mixture (GKD, arXiv:2306.13649, equation 1). The teacher runs beside the student, micro-batch by
    micro-batch and chunk by chunk: of each, one chunk of logits is alive at a time. Its inputs are charged
    to `meter` as `scored`. Raises UserError if the vocabularies differ in size.
    """

    teacher: Policy
    kind: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float = 0.5  # share of the teacher in jsd's mixture
    meter: Meter | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        if self.kind not in ("forward", "reverse", "jsd"):
            raise UserError(f"distillation must be forward, reverse or jsd, not {self.kind!r}")
        if not 0 < self.beta < 1:
            raise UserError(f"beta must lie between 0 and 1, not {self.beta}: the ends are forward and reverse")

    def prepare(self, policy: Policy, batch: Batch, keys: Keys) -> Batch:
        """The batch as it is; what the teacher will read is charged."""
        if self.meter is not None:
            self.meter.charge("scored", len(batch.inputs))
        return batch

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """See `Objective`."""
        with torch.no_grad():
            teacher = self.teacher.forward(batch, self.needs)

        def term(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                target = teacher.logits(part).to(logits.dtype)
            if target.shape != logits.shape:
                raise UserError(f"the teacher has {target.shape[-1]} tokens and the student {logits.shape[-1]}")
            return self._divergence(target, logits)

        divergence = out.map_logits(term)
        return Loss(weighted(batch, divergence), counted(batch, **{f"{self.kind}_divergence": divergence}))

    def _divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """f[n] from logits f[n, V]."""
        if self.kind == "forward":
            return kl_divergence(teacher, student)
        if self.kind == "reverse":
            return kl_divergence(student, teacher)
        return js_divergence(teacher, student, self.beta)
