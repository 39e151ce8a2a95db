"""Whether the endpoints of a claim hold, by the rules that `Endpoint` states, and what follows for the claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from etude.experience.claims import MIN_SEEDS, Endpoint, Metric
from etude.experience.errors import UserError
from etude.lab.readings import Reading
from etude.lab.statistics import Interval, crossed, paired, ratio

Verdict = Literal["reproduced", "not reproduced at this scale", "opposite", "undecided"]
Table = NDArray[np.float64]  # f64[S, I]: a side's scores of I items at S seeds, or f64[S, 1]: its values


@dataclass(frozen=True)
class Judged:
    """An endpoint and what the seeds say of it; for an order, of its weakest pair.

    `values` are the contrasts, one a seed in the order of seeds, and `interval` is over them: in the unit of the
    metric, above 0 is good; or, with `ratio`, factors, above 1 is good. `opposite`: the arms of an effect differ
    the other way round, the whole interval lying on the wrong side. `why` says in a line what decided. `pair` has
    the two sides as the endpoint writes them.
    """

    endpoint: Endpoint
    interval: Interval
    values: tuple[float, ...]
    holds: bool
    opposite: bool
    why: str
    pair: tuple[str, str]


def judge(endpoint: Endpoint, readings: Mapping[str, Sequence[Reading]], metrics: Mapping[str, Metric]) -> Judged:
    """Judge one endpoint from the readings of its arms, by arm, of a claim's metrics.

    The two runs of a seed are paired. Where all readings of both sides score the same items the interval is for
    other seeds and other items (`crossed`), else for other seeds (`paired`, or `ratio`). Raises UserError if an arm
    has no readings, if the seeds of a pair differ, or if its metrics differ in direction or unit.
    """
    found = [
        _judge_pair(endpoint, pair, [_side(endpoint, arm, metric, readings) for arm, metric in sides], metrics)
        for pair, sides in zip(pairwise(endpoint.arms), endpoint.pairs, strict=True)
    ]
    # The weakest: what contradicts the order, else what fails, for want of a value first, else what lies lowest.
    return min(found, key=lambda j: (j.holds, not j.opposite, math.isfinite(j.interval.low), j.interval.low))


def verdict(judged: Sequence[Judged], seeds: int) -> Verdict:
    """What all endpoints of a claim, judged over `seeds` seeds, say of it. Raises UserError if there are none."""
    if not judged:
        raise UserError("a claim without endpoints has no verdict: give it at least one effect")
    if seeds < MIN_SEEDS:
        return "undecided"
    if all(j.holds for j in judged):
        return "reproduced"
    if any(j.opposite for j in judged if j.endpoint.role == "effect"):
        return "opposite"
    return "not reproduced at this scale"


@dataclass(frozen=True)
class _Side:
    """An arm's readings, in the order of seeds, and the metric they are taken for."""

    arm: str
    metric: str
    rows: list[Reading]

    @property
    def seeds(self) -> list[int]:
        return [r.seed for r in self.rows]

    def table(self, ids: Sequence[str], ratio: bool) -> Table:
        """f64[S, I] over items, or f64[S, 1] if there are none; nan where a number is of no use."""
        if ids:
            found = np.array([[r.items[self.metric][i] for i in ids] for r in self.rows], np.float64)
        else:
            found = np.array([[r.values.get(self.metric, math.nan)] for r in self.rows], np.float64)
        usable = (found > 0) & np.isfinite(found) if ratio else np.isfinite(found)
        return np.where(usable, found, math.nan)


def _side(endpoint: Endpoint, arm: str, metric: str, readings: Mapping[str, Sequence[Reading]]) -> _Side:
    if not readings.get(arm):
        raise UserError(f"endpoint {endpoint.name!r} contrasts arm {arm!r}, which has no readings")
    return _Side(arm, metric, sorted(readings[arm], key=lambda r: r.seed))


def _judge_pair(
    endpoint: Endpoint, pair: tuple[str, str], sides: Sequence[_Side], metrics: Mapping[str, Metric]
) -> Judged:
    metric, other = (metrics[s.metric] for s in sides)
    if (metric.better, metric.unit) != (other.better, other.unit):
        raise UserError(f"endpoint {endpoint.name!r}: {pair[0]!r} and {pair[1]!r} differ in direction or unit")
    first, second = sides
    seeds = first.seeds
    if seeds != second.seeds or len(set(seeds)) < len(seeds):
        has = " but ".join(f"{s.arm!r} has {s.seeds}" for s in sides)
        raise UserError(f"endpoint {endpoint.name!r} needs the same seeds of its arms, each once: {has}")
    upper, lower = (first, second) if metric.better == "higher" else (second, first)

    ids = () if endpoint.ratio else _common_items(sides)
    end = _common_end(sides)
    high, low = (np.minimum(side.table(ids, endpoint.ratio), end) for side in (upper, lower))
    if endpoint.ratio:
        contrasts, interval = high / low, ratio(high[:, 0], low[:, 0])
    else:
        contrasts = high - low
        interval = crossed(contrasts) if ids else paired(contrasts[:, 0])
    values = dict(zip(seeds, contrasts.mean(1).tolist(), strict=True))

    opposite = endpoint.role != "guard" and not endpoint.equal and interval.high < _none(endpoint)
    gap = _missing(endpoint, upper, high) or _missing(endpoint, lower, low) or _hidden(endpoint, lower, low, end)
    holds, why = (False, gap) if gap else _rule(endpoint, metric, interval, values)
    if not gap and end < math.inf:
        why += f", up to {end:g}, the common end of the axis"
    return Judged(endpoint, interval, tuple(values.values()), holds, opposite, why, pair)


def _rule(endpoint: Endpoint, metric: Metric, interval: Interval, values: Mapping[int, float]) -> tuple[bool, str]:
    """Whether the endpoint holds, and why, from its interval and the contrast of each seed."""
    points = metric.unit == "%" and not endpoint.ratio
    unit = "times" if endpoint.ratio else "points" if points else metric.unit

    def show(value: float) -> str:
        return f"{100 * value:z.1f}" if points else f"{value:z.4g}"

    most = endpoint.smallest
    least = 1 / most if endpoint.ratio else -most
    span = f"the interval {show(interval.low)} to {show(interval.high)}"
    if endpoint.equal:
        holds = least <= interval.low and interval.high <= most
        return holds, f"{span} {'lies' if holds else 'does not lie'} within {show(least)} to {show(most)}"

    guard = endpoint.role == "guard"
    floor, enough = (least, least) if guard else (_none(endpoint), most)
    bar = f"the guard's {show(floor)}" if guard else show(floor)
    estimate = f"estimate {show(interval.estimate)} {unit}".rstrip()
    if interval.high < floor:
        return False, f"{span} lies below {bar}"
    if not interval.low > floor:
        return False, f"the interval reaches down to {show(interval.low)}, which is not above {bar}"
    if interval.estimate < enough:
        return False, f"{estimate} is less than {show(enough)}"
    if endpoint.every:
        for seed, value in values.items():
            if value <= floor or value < enough:
                return False, f"seed {seed} alone has {show(value)}, too little where every seed must pass"
    why = f"{span} lies above {bar}"
    return True, why if guard else f"{estimate} is at least {show(enough)} and {why}"


def _none(endpoint: Endpoint) -> float:
    """The contrast of two arms that are the same."""
    return 1.0 if endpoint.ratio else 0.0


def _common_items(sides: Sequence[_Side]) -> tuple[str, ...]:
    """The items that every reading scores; none if any two readings score different ones."""
    scored = {frozenset(r.items.get(s.metric, ())) for s in sides for r in s.rows}
    return tuple(sorted(scored.pop())) if len(scored) == 1 else ()


def _common_end(sides: Sequence[_Side]) -> float:
    """The place on the axis up to which all runs of a pair are known; infinite if none was censored.

    One end for all seeds makes the contrast one of restricted means (Royston & Parmar 2013). With an end for each
    seed, the arm whose axis is shorter would look faster: the rival's late seeds would count only where it is early.
    """
    return min((r.values[s.metric] for s in sides for r in s.rows if s.metric in r.censored), default=math.inf)


def _missing(endpoint: Endpoint, side: _Side, table: Table) -> str | None:
    """The first seed at which a side has nothing to contrast, in words, if there is one."""
    gaps = np.isnan(table).any(1)
    if not gaps.any():
        return None
    kind = "positive value" if endpoint.ratio else "value"
    return f"arm {side.arm!r} has no {kind} of {side.metric!r} at seed {side.seeds[int(gaps.argmax())]}"


def _hidden(endpoint: Endpoint, lower: _Side, low: Table, end: float) -> str | None:
    """Why the end of an axis keeps an endpoint from holding that says how far apart arms are at most, in words.

    An effect up to the common end is an effect. But curves may part beyond it, so that none are shown to be equal,
    and a deficit of the side that should be lower is not seen whole where that side goes on.
    """
    beyond = low[:, 0] >= end
    if endpoint.equal and end < math.inf:
        return f"curves that stopped at {end:g}, the end of the axis, cannot be shown to be equal"
    if endpoint.role == "guard" and beyond.any():
        seed = lower.seeds[int(beyond.argmax())]
        return f"arm {lower.arm!r} at seed {seed} goes on beyond {end:g}, the end of the axis, so how far is not known"
    return None
