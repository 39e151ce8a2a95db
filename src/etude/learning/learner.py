"""The learner: one optimiser step on several weighted terms; nothing else.

Gradients are accumulated over micro-batches that never split a link. Loss weights were normalised over
the whole batch before, so the sum over micro-batches is the gradient of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from etude.curricula.schedules import from_array, lr_schedule
from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Objective, Policy
from etude.learning.ranks import SOLO
from etude.learning.sharded import Sharded, full, placed_moments
from etude.learning.shares import micro_batches

ACTIVATIONS = 2**30  # bytes that a micro-batch may hold between its forward and backward pass, about
PATIENCE = 10  # updates in a row that may be skipped as not finite


@dataclass(frozen=True)
class Optim:
    """How a seat is optimised."""

    lr: float = 1e-3  # peak learning rate
    algorithm: Literal["adamw", "sgd"] = "adamw"  # sgd is plain: no momentum
    schedule: str = "constant"  # constant, linear, cosine, wsd, inverse-sqrt, inverse, or refined:RUN
    warmup: float = 0.0  # share of the updates over which the rate rises from 0
    weight_decay: float = 0.0  # decoupled, on matrices only
    beta1: float = 0.9  # adamw: decay of the mean gradient
    beta2: float = 0.999  # adamw: decay of the mean squared gradient
    clip: float = 1.0  # largest norm of the gradient
    tokens: int | None = None  # inputs in one micro-batch; None: as many as 1 GiB of activations allows

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"lr must be a number above 0, not {self.lr}")
        if not (self.clip > 0 and (self.tokens is None or self.tokens > 0) and self.weight_decay >= 0):
            raise UserError("clip and tokens must be above 0, and weight_decay at least 0")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"warmup is a share of the updates, from 0 to 1, not {self.warmup}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"beta1 and beta2 must lie in [0, 1), not at {self.beta1} and {self.beta2}")


class Seat:
    """A policy's parameters with their optimiser and schedule. The policy's weights are tracked by
    the run apart from it, so that several stages can seat the same policy. `shape`, a number in [0, 1] an update,
    takes the place of the schedule that `optim` names."""

    def __init__(self, policy: Policy, optim: Optim, steps: int, shape: Sequence[float] | None = None) -> None:
        self.policy = policy
        self.ranks = policy.ranks if isinstance(policy, Sharded) else SOLO  # who share the work of an update
        self.optim = optim
        params = [p for p in policy.parameters() if p.requires_grad]
        if not params:
            raise UserError("this policy has no parameters to train")
        self.params = params
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        used = [g for g in groups if g["params"]]
        self.optimizer: torch.optim.Optimizer
        if optim.algorithm == "sgd":
            self.optimizer = torch.optim.SGD(used, lr=optim.lr)
        else:
            self.optimizer = torch.optim.AdamW(used, lr=optim.lr, betas=(optim.beta1, optim.beta2))
        warmup = round(optim.warmup * steps)
        if shape is None:
            self.scheduler = lr_schedule(optim.schedule, self.optimizer, steps, warmup)
        else:
            self.scheduler = from_array(self.optimizer, shape, warmup)
        self.tokens = optim.tokens or max(1, ACTIVATIONS // policy.token_bytes)
        self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's and the schedule's state, without the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; `state` is not written to by later updates."""
        optimizer = deepcopy(state["optimizer"])
        if isinstance(self.policy, Sharded):
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            optimizer["state"] = placed_moments(optimizer["state"], params)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        self.skipped = state["skipped"]


@dataclass(frozen=True)
class Term:
    """One batch under one objective; its loss counts `weight` times."""

    batch: Batch
    objective: Objective
    weight: float = 1.0
    name: str = ""  # prefix of its metrics, where a step has several terms


Penalty = Callable[[Policy], Tensor]  # a scalar on parameters
Mask = Callable[[Sequence[torch.nn.Parameter]], Any]  # edits gradients in place, before clipping


@dataclass
class _Sums:
    """Metrics as sums and counts, exact over micro-batches."""

    total: dict[str, float] = field(default_factory=dict)
    count: dict[str, float] = field(default_factory=dict)

    def add(self, prefix: str, metrics: Mapping[str, tuple[float, float]]) -> None:
        for name, (value, n) in metrics.items():
            key = f"{prefix}{name}"
            self.total[key] = self.total.get(key, 0.0) + float(value)
            self.count[key] = self.count.get(key, 0.0) + float(n)

    @staticmethod
    def of(parts: Iterable[_Sums]) -> _Sums:
        both = _Sums()
        for part in parts:
            both.add("", {name: (value, part.count[name]) for name, value in part.total.items()})
        return both

    def means(self) -> dict[str, float]:
        return {k: self.total[k] / self.count[k] for k in self.total if self.count[k]}


def update(
    seat: Seat,
    terms: Sequence[Term],
    keys: Keys,
    meter: Meter,
    *,
    penalties: Iterable[Penalty] = (),
    mask: Mask | None = None,
) -> dict[str, float]:
    """One step of the seat's optimiser; returns metrics, with the l2 and l1 norm of the gradient before clipping.

    A gradient that is not finite is not applied: the update is skipped and counted. Raises
    UserError after `PATIENCE` of them in a row, and for penalties or masks on sharded parameters.
    """
    if seat.ranks.size > 1 and (mask is not None or (penalties := list(penalties))):
        raise UserError("penalties and masks on parameters need whole ones: run this method in one process")
    policy, device = seat.policy, seat.policy.device
    seat.optimizer.zero_grad(set_to_none=True)
    sums, loss = _Sums(), 0.0
    for i, term in enumerate(terms):
        prefix = f"{term.name}/" if term.name else ""
        batch = term.objective.prepare(policy, term.batch, keys.at("prepare", i))
        for micro, factor in micro_batches(batch, seat.tokens, seat.ranks):
            micro = micro.to(device)
            part = term.objective.loss(policy.forward(micro, term.objective.needs), micro)
            if part.total.requires_grad:
                (part.total * (term.weight * factor)).backward()
            if factor:
                loss += float(part.total.detach()) * term.weight
                sums.add(prefix, part.metrics)
        meter.charge("trained", int(batch.lengths.sum()))
    found = seat.ranks.together(lambda: (loss, sums))
    loss, sums = sum(part for part, _ in found), _Sums.of(part for _, part in found)
    for penalty in penalties:
        value = penalty(policy)
        value.backward()
        loss += float(value.detach())
    if mask is not None:
        mask(seat.params)
    gradients = [p.grad for p in seat.params if p.grad is not None]
    sizes = torch.nn.utils.get_total_norm(gradients, 1.0), torch.nn.utils.clip_grad_norm_(seat.params, seat.optim.clip)
    l1, norm = torch.stack([full(size) if seat.ranks.size > 1 else size for size in sizes]).tolist()
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        seat.optimizer.step()
        meter.charge("updates", 1)
        seat.skipped = 0
    else:
        seat.skipped += 1
        if seat.skipped >= PATIENCE:
            raise UserError(
                f"{PATIENCE} updates in a row had a loss or gradient that is not finite: lower lr ({seat.optim.lr})"
            )
    rate = seat.optimizer.param_groups[0]["lr"]
    seat.scheduler.step()
    return {
        "loss": loss, "grad_norm": norm, "grad_norm_l1": l1, "lr": rate, "skipped_update": float(not finite),
        **sums.means(),
    }  # fmt: skip
