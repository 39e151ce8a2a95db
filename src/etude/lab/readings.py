"""What a claim reads from a run's store: one number a metric, scored items, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from etude.experience.types import NOTHING


@dataclass(frozen=True)
class Reading:
    """One arm at one seed.

    `values` holds a number for every metric of the claim (nan where the run has none); `censored` names
    those that stopped at the end of their axis; `items` holds, for metrics that are a mean over
    scored problems, the score of each problem by its id; `cost` is the meter at the end.
    """

    seed: int
    values: Mapping[str, float]
    censored: tuple[str, ...] = ()
    items: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: NOTHING)
    cost: Mapping[str, float] = field(default_factory=lambda: NOTHING)
