"""Trajectory rewards to advantages: group-relative, leave-one-out, whitened over the batch.

Statistics are taken once a trajectory, from the groups themselves, so a trajectory whose context slid
and which fills several rows counts once. Every action of a trajectory gets its advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.plugs import register
from etude.experience.types import Group

Center = Literal["mean", "loo"]
Scale = Literal["std", "batch-row", "batch-token"]


def degenerate(group: Group) -> bool:
    """Whether all members have the same reward, so that nothing can be told between them."""
    rewards = group.rewards
    return bool((rewards == rewards[:1]).all())


@dataclass(frozen=True)
class Advantage:
    """Credit that writes `advantage` (f32[N]) from the rewards of each group.

    With r_i the G rewards of a group, `center` takes off their mean, or for "loo" the mean of the
    other G - 1, or nothing. `scale` then divides by std + eps: "std" that of the group's rewards;
    "batch-row" and "batch-token" whiten (mean and std) over all trajectories, or over all weighted
    actions, of the batch. `ddof` 1 is the sample std, 0 the population's.

    A group with equal rewards (a group of 1 included) has advantage exactly 0 under any `center`, and
    is left out of batch statistics. Raises UserError on a reward that is not finite.
    """

    center: Center | None = "mean"
    scale: Scale | None = "std"
    ddof: int = 1
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.center not in (None, *get_args(Center)):
            raise UserError(f"advantage: center must be mean, loo or None, not {self.center!r}")
        if self.scale not in (None, *get_args(Scale)):
            raise UserError(f"advantage: scale must be std, batch-row, batch-token or None, not {self.scale!r}")
        if self.ddof not in (0, 1) or self.eps < 0:
            raise UserError("advantage: ddof must be 0 or 1, and eps at least 0")

    def __call__(self, groups: Sequence[Group], batch: Batch) -> Batch:
        value = torch.from_numpy(np.concatenate([self._in_group(g) for g in groups]))
        live = torch.from_numpy(np.repeat([not self._tied(g) for g in groups], [len(g.members) for g in groups]))
        trajectory = trajectory_of(batch)
        if self.scale == "batch-row":
            value = torch.where(live, self._whiten(value, value[live]), 0.0)
        advantage, live = value[trajectory], live[trajectory]
        if self.scale == "batch-token":
            weighted = live & (batch.actions["weight"] != 0)
            advantage = torch.where(live, self._whiten(advantage, advantage[weighted]), 0.0)
        return batch.with_actions(advantage=advantage.float())

    def _tied(self, group: Group) -> bool:
        return self.center is not None and degenerate(group)

    def _in_group(self, group: Group) -> NDArray[np.float64]:
        """f64[G]: centred rewards, divided by the group's own std where that is asked for."""
        rewards = group.rewards
        if not np.isfinite(rewards).all():
            raise UserError(f"problem {group.problem.id}: rewards must be finite numbers, not {rewards.tolist()}")
        if self._tied(group):
            return np.zeros(len(rewards))
        value = rewards
        if self.center == "mean":
            value = rewards - rewards.mean()
        elif self.center == "loo":
            value = rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
        if self.scale == "std":
            std = rewards.std(ddof=self.ddof) if len(rewards) > self.ddof else 0.0
            value = value / (std + self.eps) if std > 0 else value
        return value

    def _whiten(self, value: Tensor, sample: Tensor) -> Tensor:
        """`value` by the mean and std of `sample`; only centred where fewer than two differ."""
        if not len(sample):
            return value
        std = sample.std(correction=self.ddof) if len(sample) > self.ddof else sample.new_zeros(())
        return (value - sample.mean()) / (std + self.eps if std > 0 else 1.0)


def trajectory_of(batch: Batch) -> Tensor:
    """int64[N]: the trajectory of each action, counted over all members of all groups in order.

    Raises ValueError where the batch was not packed from groups.
    """
    column = batch.row.get("trajectory")
    if not isinstance(column, Tensor):
        raise ValueError("credit needs the row column 'trajectory': pack the batch from groups")
    return column.long()[batch.row_of]


@register("credit", "grpo", needs={"group"}, gives={"advantage"}, owns={"advantage"})
def grpo(ddof: int = 1, eps: float = 1e-6) -> Advantage:
    """(r - mean) / std within the group: GRPO, arXiv:2402.03300, section 4.1.2."""
    return Advantage("mean", "std", ddof, eps)


@register("credit", "dr-grpo", needs={"group"}, gives={"advantage"}, owns={"advantage"})
def dr_grpo() -> Advantage:
    """r - mean within the group, on the rewards' own scale: Dr. GRPO, arXiv:2503.20783, section 3.2."""
    return Advantage("mean", None)


@register("credit", "rloo", needs={"group"}, gives={"advantage"}, owns={"advantage"})
def rloo() -> Advantage:
    """r minus the mean of the other members: RLOO, arXiv:2402.14740, section 3 (after Kool et al. 2019)."""
    return Advantage("loo", None)


@register("credit", "batch-row", needs={"group"}, gives={"advantage"}, owns={"advantage", "whitening"})
def batch_row(center: Center | None = "mean", ddof: int = 1, eps: float = 1e-6) -> Advantage:
    """Whitened over the trajectories of the batch, after `center` within the group."""
    return Advantage(center, "batch-row", ddof, eps)


@register("credit", "batch-token", needs={"group"}, gives={"advantage"}, owns={"advantage", "whitening"})
def batch_token(center: Center | None = "mean", ddof: int = 1, eps: float = 1e-6) -> Advantage:
    """Whitened over the actions of the batch, so that long trajectories weigh more.

    REINFORCE++ with a group baseline (arXiv:2501.03262); `center` None is REINFORCE++
    without one.
    """
    return Advantage(center, "batch-token", ddof, eps)


@register("credit", "reward", gives={"advantage"}, owns={"advantage"})
def identity() -> Advantage:
    """The reward itself, without a baseline: REINFORCE."""
    return Advantage(None, None)


@register("credit", "none")
def nothing() -> None:
    """No advantage, for objectives that weigh answers themselves."""
