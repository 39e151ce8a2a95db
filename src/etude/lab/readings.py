"""What a claim reads from a run's store: one number a metric, scored items, curves, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from etude.experience.claims import Metric
from etude.experience.store import Store
from etude.experience.types import NOTHING
from etude.lab.statistics import paired

Floats = NDArray[np.float64]
GRID = 25  # points of a mean curve whose runs were looked at in different places


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


@dataclass(frozen=True)
class Curve:
    """A metric against an axis: f64[n] each."""

    x: Floats
    y: Floats


@dataclass(frozen=True)
class MeanCurve:
    """The mean over runs with its 95% interval (Student's t; infinite for one run): f64[n] each."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def read_run(folder: str | Path, metrics: Mapping[str, Metric], seed: int) -> Reading:
    """The reading of a finished run. Raises UserError where its store cannot be read."""
    with Store(folder, read_only=True) as store:
        steps = store.steps()
        cost = steps[-1]["meter"] if steps else {}
        values, censored, items = {}, [], {}
        for name, metric in metrics.items():
            if metric.source == "cost":
                values[name] = float(cost.get(metric.of, math.nan))
                continue
            values[name], cut = reduced(_curve(store, metric), metric)
            if cut:
                censored.append(name)
            if (metric.source, metric.of) == ("evaluation", "accuracy") and metric.reduce in ("first", "last"):
                at = store.evaluations("accuracy")
                items[name] = _items(store, at[0 if metric.reduce == "first" else -1]) if at else {}
    return Reading(seed, values, tuple(censored), {k: v for k, v in items.items() if v}, cost)


def read_curve(folder: str | Path, metric: Metric) -> Curve:
    """A metric's curve in one run, before it is reduced."""
    with Store(folder, read_only=True) as store:
        return _curve(store, metric)


def reduced(curve: Curve, metric: Metric) -> tuple[float, bool]:
    """The number that `metric` makes of a curve, and whether it is censored; nan of an empty one."""
    x, y = curve.x, curve.y
    if not len(y):
        return math.nan, False
    if metric.reduce == "steps":
        return _first_reach(curve, float(metric.threshold or 0.0))
    value = {
        "first": lambda: y[0],
        "last": lambda: y[-1],
        "best": lambda: y.max() if metric.better == "higher" else y.min(),
        "mean": lambda: y.mean(),
        "gain": lambda: y[-1] - y[0],
        "area": lambda: np.trapezoid(y, x) / (x[-1] - x[0]) if x[-1] > x[0] else y[-1],
        "dip": lambda: (np.maximum.accumulate(y) - y).max(),
    }[metric.reduce]()
    return float(value), False


def mean_curve(curves: Sequence[Curve]) -> MeanCurve:
    """Over runs, at their common places, or where these differ at GRID places of the range that all cover."""
    curves = [c for c in curves if len(c.x)]
    if not curves:
        empty = np.zeros(0)
        return MeanCurve(empty, empty, empty, empty)
    x = curves[0].x
    if not all(np.array_equal(c.x, x) for c in curves):
        x = np.linspace(max(c.x[0] for c in curves), min(c.x[-1] for c in curves), GRID)
    intervals = [paired(column) for column in np.array([np.interp(x, c.x, c.y) for c in curves]).T]
    mean, low, high = (np.array([getattr(i, name) for i in intervals]) for name in ("estimate", "low", "high"))
    return MeanCurve(x, mean, low, high)


def _curve(store: Store, metric: Metric) -> Curve:
    """Evaluations of a step are made before its update: they stand where the step before it ended."""
    steps = store.steps()
    place = {(row["stage"], row["step"]): i for i, row in enumerate(steps)}
    if metric.source == "evaluation":
        points = [(place[e["stage"], e["step"]], e["value"]) for e in store.evaluations(metric.of)]
        before = 1
    else:
        series = store.metrics(metric.of).get(metric.of)
        points = [] if series is None else [
            (place[str(stage), int(step)], value)
            for stage, step, value in zip(series.stage, series.step, series.value, strict=True)
        ]  # fmt: skip
        before = 0
    if metric.over == "step":
        axis = [float(i) for i in range(len(steps) + 1)]
    else:
        axis = [0.0, *(float(row["meter"].get(metric.over, math.nan)) for row in steps)]
    index = [i + 1 - before for i, _ in points]
    finite = [(axis[i], value) for i, (_, value) in zip(index, points, strict=True) if math.isfinite(value)]
    x, y = np.array(finite, np.float64).reshape(-1, 2).T
    return Curve(x, y)


def _first_reach(curve: Curve, threshold: float) -> tuple[float, bool]:
    reached = np.flatnonzero(curve.y >= threshold)
    if not len(reached):
        return float(curve.x[-1]), True
    i = int(reached[0])
    if i == 0:
        return float(curve.x[0]), False
    (x0, x1), (y0, y1) = curve.x[i - 1 : i + 1], curve.y[i - 1 : i + 1]
    return float(x0 + (x1 - x0) * (threshold - y0) / (y1 - y0)), False


def _items(store: Store, at: Mapping[str, object]) -> dict[str, float]:
    return store.items(str(at["stage"]), int(str(at["step"])), str(at["world"]), str(at["split"]))
