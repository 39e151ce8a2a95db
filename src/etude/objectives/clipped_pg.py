"""The clipped policy-gradient family: PPO's surrogate as GRPO, DAPO, RLOO and GSPO use it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.plugs import register
from etude.experience.protocols import Loss, Outputs
from etude.objectives.kl import ESTIMATORS, Estimator
from etude.objectives.terms import Pure, column, counted, logp_old, weighted

LARGEST = 20.0  # log-ratios beyond this carry no gradient: exp would overflow


@dataclass(frozen=True)
class ClippedPG(Pure):
    """loss = sum of weight x (-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) + kl_coef KL - entropy_coef H).

    Per action: A is the column `advantage`, s = exp(logp - logp_old) (PPO, arXiv:1707.06347,
    equation 7). `dual_clip` c > 1 bounds the term from below by c A where A < 0 (arXiv:1912.09729,
    equation 5). With `ratio` "sequence" s is the geometric mean of the ratios over the actions of the
    row (GSPO, arXiv:2507.18071, equations 5 to 7). KL is an estimate against `logp_ref`, H the entropy in
    nats. Token, sequence or constant normalisation is `normalise`'s work: it is in the weights.

    Metrics: `ratio`, `ratio_max` (mean over micro-batches of the largest), `clip_fraction`, `kl_old`
    (k3 against the policy that acted), `entropy` (exact with `entropy_coef`, else estimated by -logp),
    `kl_ref`. Raises UserError on demonstrated actions, or a sampling law other than temperature 1.
    """

    clip_low: float = 0.2  # math.inf: no clipping
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    kl_coef: float = 0.0  # nats
    kl: Estimator = "k3"
    entropy_coef: float = 0.0  # nats

    def __post_init__(self) -> None:
        if not (self.clip_low >= 0 and self.clip_high >= 0 and self.kl_coef >= 0):
            raise UserError("clip_low, clip_high and kl_coef must be at least 0")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise UserError(f"dual_clip must be above 1, not {self.dual_clip}")
        if self.ratio not in ("token", "sequence") or self.kl not in ESTIMATORS:
            raise UserError(f"ratio must be token or sequence and kl k1, k2 or k3, not {self.ratio!r} and {self.kl!r}")

    @property
    def needs(self) -> frozenset[str]:
        """See `Objective`."""
        return frozenset({"logp", "entropy"} if self.entropy_coef else {"logp"})

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """See `Objective`."""
        name = "clipped policy gradient"
        advantage = column(batch, "advantage", name, "give the batch a credit rule")
        log_ratio = self._log_ratio(out.logp, logp_old(batch, name), batch)
        ratio = log_ratio.clamp(-LARGEST, LARGEST).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        if self.dual_clip is not None:
            surrogate = torch.where(advantage < 0, surrogate.maximum(self.dual_clip * advantage), surrogate)
        term = -surrogate
        entropy = out.entropy if self.entropy_coef else -out.logp
        values = {
            "ratio": ratio,
            "clip_fraction": (clipped * advantage < ratio * advantage).to(ratio.dtype),
            "kl_old": ratio - 1 - log_ratio,
            "entropy": entropy,
        }
        if self.entropy_coef:
            term = term - self.entropy_coef * entropy
        if self.kl_coef:
            ref = column(batch, "logp_ref", name, "kl_coef above 0 needs a reference; attach it with `with_reference`")
            kl = ESTIMATORS[self.kl](out.logp, ref)
            term = term + self.kl_coef * kl
            values["kl_ref"] = kl
        metrics = counted(batch, **values)
        active = batch.actions["weight"] != 0
        if metrics["ratio"][1]:
            metrics["ratio_max"] = (float(ratio.detach()[active].max()), 1.0)
        return Loss(weighted(batch, term), metrics)

    def _log_ratio(self, logp: Tensor, old: Tensor, batch: Batch) -> Tensor:
        """f[N]: of each action, or its row's mean over actions with weight."""
        if self.ratio == "token":
            return logp - old
        active = (batch.actions["weight"] != 0).to(logp.dtype)
        mean = batch.per_row((logp - old) * active) / batch.per_row(active).clamp_min(1)
        return mean[batch.row_of]


_NEEDS = {"advantage", "logp_old"}


@register("objective", "grpo", needs=_NEEDS, law="raw")
def grpo(clip: float = 0.2, kl_coef: float = 0.0, kl: Estimator = "k3") -> ClippedPG:
    """GRPO, arXiv:2402.03300, equation 3 (there kl_coef is 0.04); normalise by sequence."""
    return ClippedPG(clip, clip, kl_coef=kl_coef, kl=kl)


@register("objective", "dr-grpo", needs=_NEEDS, law="raw")
def dr_grpo(clip: float = 0.2) -> ClippedPG:
    """Dr. GRPO, arXiv:2503.20783, section 3.2: no KL; normalise by a constant, the token limit x rows."""
    return ClippedPG(clip, clip)


@register("objective", "dapo", needs=_NEEDS, law="raw")
def dapo(clip_low: float = 0.2, clip_high: float = 0.28) -> ClippedPG:
    """DAPO, arXiv:2503.14476, equation 8: a higher upper clip, no KL; normalise by token."""
    return ClippedPG(clip_low, clip_high)


@register("objective", "rloo", needs=_NEEDS, law="raw")
def rloo() -> ClippedPG:
    """REINFORCE, importance-weighted and never clipped; in the first update on a batch the ratio is 1
    and the gradient is that of A log p. RLOO, arXiv:2402.14740; normalise by row."""
    return ClippedPG(math.inf, math.inf)


@register("objective", "gspo", needs=_NEEDS, law="raw")
def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> ClippedPG:
    """GSPO, arXiv:2507.18071, section 4 and the ranges of section 5.1; normalise by sequence."""
    return ClippedPG(clip_low, clip_high, ratio="sequence")
