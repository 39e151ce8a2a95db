"""Numbers that change over a run: learning rates as torch schedulers, everything else as `Schedule`s."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etude.experience.errors import UserError, unknown
from etude.experience.plugs import register
from etude.experience.protocols import Clock

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

OWNS = frozenset({"learning-rate"})


def lr_schedule(name: str, optimizer: Optimizer, total: int, warmup: int = 0) -> LRScheduler:
    """The learning-rate schedule called constant, linear, cosine or wsd.

    `total` and `warmup` count updates. During the warm-up the rate is peak x step / warmup, as in
    `transformers`: the first update has rate 0. Raises UserError for an unknown name or a warm-up that
    does not fit.
    """
    if name not in _LR:
        raise unknown("learning-rate schedule", name, _LR)
    if total < 1 or not 0 <= warmup <= total:
        raise UserError(f"{warmup} warm-up steps do not fit into {total} steps")
    return _LR[name](optimizer, total, warmup)


@register("schedule", "constant", owns=OWNS)
def constant(optimizer: Optimizer, total: int, warmup: int = 0) -> LRScheduler:
    """The peak rate to the end."""
    return _scaled(optimizer, total, warmup, lambda progress: 1.0)


@register("schedule", "linear", owns=OWNS)
def linear(optimizer: Optimizer, total: int, warmup: int = 0) -> LRScheduler:
    """From the peak to 0 in a straight line."""
    return _scaled(optimizer, total, warmup, lambda progress: 1 - progress)


@register("schedule", "cosine", owns=OWNS)
def cosine(optimizer: Optimizer, total: int, warmup: int = 0) -> LRScheduler:
    """From the peak to 0 along half a cosine: arXiv:1608.03983, equation 5, without restarts."""
    return _scaled(optimizer, total, warmup, lambda progress: (1 + math.cos(math.pi * progress)) / 2)


@register("schedule", "wsd", owns=OWNS)
def wsd(optimizer: Optimizer, total: int, warmup: int = 0, decay: float = 0.2) -> LRScheduler:
    """Warm-up, stable, decay: the peak, then a straight line to 0 over the last `decay` (share) of all
    `total` updates (arXiv:2404.06395, section 4.2, with a linear decay)."""
    rest = max(1, total - warmup)  # updates after the warm-up
    left = min(max(1, round(decay * total)), rest) / rest  # the share of them that decays
    return _scaled(optimizer, total, warmup, lambda progress: min(1.0, (1 - progress) / left))


_LR: dict[str, Callable[[Optimizer, int, int], LRScheduler]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}


def _scaled(optimizer: Optimizer, total: int, warmup: int, shape: Callable[[float], float]) -> LRScheduler:
    """The peak rate times a warm-up, then times `shape` of the progress (0 to 1) after it."""
    from torch.optim.lr_scheduler import LambdaLR

    def scale(step: int) -> float:
        if step < warmup:
            return step / warmup
        return shape((step - warmup) / (total - warmup) if step < total else 1.0)

    return LambdaLR(optimizer, scale)


@dataclass(frozen=True)
class Constant:
    """Always `value`."""

    value: float

    def __call__(self, clock: Clock) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in a straight line over the loop."""

    start: float
    end: float

    def __call__(self, clock: Clock) -> float:
        return self.start + (self.end - self.start) * clock.progress


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine over the loop."""

    start: float
    end: float

    def __call__(self, clock: Clock) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * clock.progress)) / 2


@dataclass(frozen=True)
class Window:
    """`inside` while progress is in [start, end), else `outside`."""

    start: float
    end: float
    inside: float = 1.0
    outside: float = 0.0

    def __call__(self, clock: Clock) -> float:
        return self.inside if self.start <= clock.progress < self.end else self.outside


@dataclass(frozen=True)
class Threshold:
    """`before` until progress reaches `at`, then `after`."""

    at: float
    before: float = 0.0
    after: float = 1.0

    def __call__(self, clock: Clock) -> float:
        return self.after if clock.progress >= self.at else self.before
