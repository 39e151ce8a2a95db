"""A learning-rate schedule computed from gradient norms: arXiv 2310.07831.

For convex f and steps x_{t+1} = x_t - eta_t g_t from a distance D of the optimum, any weights w_t > 0 that do not
depend on g_t give the *last* iterate a bound, if they are made into steps by the share of weight still to come:

    eta_t = w_t (sum_{p>t} w_p) / (sum_p w_p),    E[f(x_T)] - f* <= (D^2 + sum_t w_t^2 |g_t|^2) / (2 sum_t w_t)

With |g_t| <= G for all t the best weights are constant, and eta is exactly linear decay. With norms known from an
earlier run of the same length they are w_t ~ |g_t|^-2. For updates of about unit size in every coordinate, as Adam's,
the authors take the l1 norm and w_t ~ |g_t|_1^-1. Everything here is a pure function of f64[T] arrays, T updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from etude.experience.errors import UserError

Floats = NDArray[np.float64]
Norm = Literal["l2", "l1"]
POWERS: dict[Norm, float] = {"l2": 2.0, "l1": 1.0}
SMOOTHING = 0.1  # share of the run that the median filter sees at once
LATEST = 0.9  # a shape that peaks later than this share of the run is degenerate
FEWEST = 0.1  # and so is one whose weight lies on fewer than this share of its updates
USABLE = 0.5  # and one of which a smaller share of the norms can be used


@dataclass(frozen=True)
class Refined:
    """A `shape` f64[T] in [0, 1], which times a peak rate is a schedule; its last entry is 0.

    `fallback` says why the shape is linear decay instead of what the norms gave; it is empty where it is not.
    `weights` are what the norms gave, whether they are used or not, the largest 1.
    """

    shape: Floats
    weights: Floats
    norms: Floats  # smoothed
    fallback: str = ""

    @property
    def peak(self) -> float:
        """Where the shape is largest, as a share of the run."""
        return (int(self.shape.argmax()) + 1) / len(self.shape)


def refine(norms: Sequence[float] | Floats, norm: Norm, smoothing: float = SMOOTHING) -> Refined:
    """The schedule for a run whose T updates had these gradient norms.

    What is not a number above 0 is filled in from its neighbours (an update that was skipped, or that had no
    gradient); the first norm is kept within the range of those after it (see `smooth`). Where the weight gathers on a
    few late updates, as when gradients vanish, the rest of the run would stand still: then, and where less than
    half of the norms can be used, it falls back to linear decay. Raises UserError for fewer than 2 norms, none that
    can be used, or a smoothing outside 0 to 1.
    """
    given = np.asarray(norms, np.float64)
    if len(given) < 2:
        raise UserError(f"a schedule is refined from the gradient norms of at least 2 updates, not {len(given)}")
    if not 0 <= smoothing <= 1:
        raise UserError(f"smoothing is a share of the run, from 0 to 1, not {smoothing}")
    usable = np.isfinite(given) & (given > 0)
    if not usable.any():
        raise UserError(
            f"none of {len(given)} gradient norms is a number above 0: no schedule can be refined from them"
        )
    steps = np.arange(len(given))
    filled = np.interp(steps, steps[usable], given[usable])
    smoothed = smooth(filled, smoothing)
    weights = (smoothed.min() / smoothed) ** POWERS[norm]
    shape = decayed(weights)
    refined = Refined(shape, weights, smoothed)
    fallback = _degenerate(refined, float(usable.mean()))
    return Refined(decayed(np.ones_like(weights)), weights, smoothed, fallback) if fallback else refined


def smooth(norms: Floats, smoothing: float) -> Floats:
    """f64[T]: the running median over 2 floor(smoothing T / 2) + 1 norms, padded by the first norm at the start and
    by reflection at the end.

    So padded, the first norm is never smoothed, and one that is far too small would take all the weight: where there
    is a filter it is first brought into the range of the norms that the filter sees after it.
    """
    half = int(smoothing * len(norms) // 2)
    if half == 0:
        return norms
    norms = norms.copy()
    norms[0] = norms[0].clip(norms[1 : half + 1].min(), norms[1 : half + 1].max())
    return running_median(norms, half)


def running_median(norms: Floats, half: int) -> Floats:
    """f64[T]: the median of each norm and `half` on either side of it, with the padding of `smooth`."""
    from scipy.ndimage import median_filter

    padded = np.concatenate([np.full(half, norms[0]), np.pad(norms, (0, half), mode="reflect")])
    return median_filter(padded, size=2 * half + 1, mode="nearest")[half : half + len(norms)]


def decayed(weights: Floats) -> Floats:
    """f64[T]: eta_t = w_t x the weight still to come, the largest made 1; all 0 where float64 cannot hold it.

    >>> decayed(np.ones(4)).round(4).tolist()
    [1.0, 0.6667, 0.3333, 0.0]
    """
    later = np.append(np.cumsum(weights[::-1])[-2::-1], 0.0)
    steps = weights * later
    return steps / steps.max() if steps.max() > 0 else steps


def bound(weights: Floats, norms: Floats, distance: float = 1.0) -> float:
    """The bound on E[f(x_T)] - f*, in units of f, for these weights under their best common factor:
    D sqrt(sum w^2 G^2) / sum w."""
    return float(distance * np.sqrt((weights**2 * norms**2).sum()) / weights.sum())


def effective(weights: Floats) -> float:
    """How many updates share the weight: (sum w)^2 / sum w^2, from 1 to T."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _degenerate(refined: Refined, usable: float) -> str:
    count, total = effective(refined.weights), len(refined.weights)
    if usable < USABLE:
        return f"only {usable:.0%} of the gradient norms are numbers above 0"
    if refined.peak > LATEST or not refined.shape.any():
        return f"the rate would peak at {refined.peak:.0%} of the run: the gradients vanish towards its end"
    if count < FEWEST * total:
        return f"the weight would lie on {count:.0f} of {total} updates"
    return ""
