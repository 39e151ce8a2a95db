"""Numbers that change over a run: learning rates as torch schedulers, everything else as `Schedule`s."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from etude.curricula.gradient_log import logged_norms
from etude.curricula.refine import Norm, refine
from etude.experience.errors import UserError, unknown
from etude.experience.plugs import register
from etude.experience.protocols import Clock

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

OWNS = frozenset({"learning-rate"})


def lr_schedule(name: str, optimizer: Optimizer, total: int, warmup: int = 0) -> LRScheduler:
    """The learning-rate schedule called constant, linear, cosine, wsd, inverse-sqrt or inverse, or "refined:" and
    the directory of a run of as many updates, whose gradient norms it is computed from.

    `total` and `warmup` count updates. During the warm-up the rate is peak x step / warmup, as in
    `transformers`: the first update has rate 0. Raises UserError for an unknown name, a warm-up that
    does not fit, and a run that no schedule can be refined from.
    """
    kind, colon, run = name.partition(":")
    if kind == "refined":
        if not run:
            raise UserError("schedule 'refined' needs the run whose gradient norms it reads: write refined:runs/NAME")
        return refined(optimizer, total, warmup, run)
    if colon or name not in _LR:
        raise unknown("learning-rate schedule", name, (*_LR, "refined"))
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


@register("schedule", "inverse-sqrt", owns=OWNS)
def inverse_sqrt(optimizer: Optimizer, total: int, warmup: int = 0) -> LRScheduler:
    """The peak times sqrt(s / (s + n)), n updates after a warm-up of s (1 without one): arXiv:1706.03762,
    section 5.3; without a warm-up, 1 / sqrt(t) at update t."""
    s, rest = max(1, warmup), total - warmup
    return _scaled(optimizer, total, warmup, lambda progress: math.sqrt(s / (s + progress * rest)))


@register("schedule", "inverse", owns=OWNS)
def inverse(optimizer: Optimizer, total: int, warmup: int = 0) -> LRScheduler:
    """The peak times s / (s + n), n updates after a warm-up of s (1 without one): without a warm-up, 1 / t at
    update t."""
    s, rest = max(1, warmup), total - warmup
    return _scaled(optimizer, total, warmup, lambda progress: s / (s + progress * rest))


@register("schedule", "refined", owns=OWNS)
def refined(optimizer: Optimizer, total: int, warmup: int = 0, run: str = "") -> LRScheduler:
    """What the gradient norms of the finished `run` recommend (see `curricula.refine`): of l2 norms for plain
    SGD, of l1 norms for any other optimiser. It has a warm-up of its own where there should be one.

    Where the norms recommend no schedule that could be used it is linear decay, and a warning says why. Raises
    UserError for a warm-up besides, and for a run that is not there, of another length, or without norms.
    """
    found = refine(logged_norms(run, norm_for(optimizer), total), norm_for(optimizer))
    if found.fallback:
        warnings.warn(f"schedule refined:{run} is linear decay: {found.fallback}", stacklevel=2)
    return from_array(optimizer, found.shape, warmup)


def norm_for(optimizer: Optimizer) -> Norm:
    """The norm that measures the gradient for an optimiser: l2 for SGD, l1 for those that rescale every coordinate."""
    from torch.optim import SGD

    return "l2" if isinstance(optimizer, SGD) else "l1"


def from_array(optimizer: Optimizer, shape: Sequence[float] | NDArray[np.floating], warmup: int = 0) -> LRScheduler:
    """The peak rate times `shape` f[T], one number in [0, 1] an update; after them the last goes on.

    Raises UserError for no or other numbers, and for a warm-up besides: the array says how the rate rises.
    """
    from torch.optim.lr_scheduler import LambdaLR

    scales = np.asarray(shape, np.float64)
    if scales.ndim != 1 or not len(scales) or not ((scales >= 0) & (scales <= 1)).all():
        raise UserError("a schedule given as an array is one or more numbers from 0 to 1, one an update")
    if warmup:
        raise UserError("a schedule given as an array says itself how the rate rises: leave out the warm-up (warmup=0)")
    return LambdaLR(optimizer, lambda step: float(scales[min(step, len(scales) - 1)]))


_LR: dict[str, Callable[[Optimizer, int, int], LRScheduler]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "inverse-sqrt": inverse_sqrt,
    "inverse": inverse,
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
