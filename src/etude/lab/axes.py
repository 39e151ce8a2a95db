"""Axes of charts: how far they reach, their round ticks, and numbers in few characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

LARGEST = 1e150  # what lies beyond is not drawn


def short(value: float, percent: bool = False, digits: int = 4) -> str:
    """A number as an axis shows it: 1.5k, 2M, 40%."""
    if percent:
        return f"{100 * value:.{digits}g}%"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and math.isfinite(value):
            return f"{value / size:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def labels(ticks: Sequence[float], percent: bool = False) -> list[str]:
    """Ticks in as many digits as tell them apart."""
    tried = ([short(t, percent, digits) for t in ticks] for digits in range(4, 13))
    return next((found for found in tried if len(set(found)) == len(ticks)), [f"{t:g}" for t in ticks])


def room(low: float, high: float, percent: bool) -> tuple[float, float]:
    """Shares up to 100% once one is past the half; zero wherever it is near."""
    if percent and low >= 0 and 0.5 < high <= 1:
        return 0.0, 1.0
    return (0.0 if 0 <= low <= high / 2 else low), high


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers, of which the first and last enclose low and high. Ends that can hardly be told
    apart are one value, in the middle between zero and the other end."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-290):
        low, high = min(0.0, 2 * low), max(0.0, 2 * low)
        if high - low <= 1e-290:
            low, high = 0.0, 1.0
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def finite(*values: float) -> bool:
    """Whether all can be drawn."""
    return all(abs(v) < LARGEST for v in values)
