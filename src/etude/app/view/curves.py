"""A run's numbers: curves against steps, tokens or seconds, what it cost and how fast it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from etude.app.view.text import is_share, visible
from etude.experience.store import Store
from etude.lab.charts import Line, line_chart

AXES = {"step": "steps", "sampled": "tokens sampled", "seconds": "seconds of learning"}
FIRST = ("reward", "loss", "length", "entropy")  # of what is logged
RECENT = 20  # steps that the current throughput is taken over
WIDTH, HEIGHT = 420, 230  # of a chart, legible on a phone


class Log:
    """All that a run has logged, read once."""

    def __init__(self, store: Store) -> None:
        self.steps = store.steps()
        self.evaluations = store.evaluations()
        self.metrics = store.metrics()
        self._place = {(row["stage"], row["step"]): i for i, row in enumerate(self.steps)}

    def measured(self) -> list[str]:
        """The names of what evaluations measured, in order, without the categories."""
        return [n for n in dict.fromkeys(e["metric"] for e in self.evaluations) if "/" not in n]

    def logged(self) -> list[str]:
        """The names of what steps logged: the common ones first."""
        return sorted(self.metrics, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n))

    def categories(self) -> list[str]:
        """The categories that accuracy was measured in."""
        found = dict.fromkeys(e["metric"] for e in self.evaluations)
        return [name.partition("/")[2] for name in found if name.startswith("accuracy/")]

    def evaluated(self, metric: str, over: str = "step", name: str | None = None) -> list[Line]:
        """A held-out metric, a line for each world and split. Evaluations of a step are made before its
        update: they stand where the step before it ended."""
        axis = self._axis(over)
        found: dict[str, list[tuple[float, ...]]] = {}
        for e in self.evaluations:
            if e["metric"] == metric:
                point = (axis[self._place[e["stage"], e["step"]]], e["value"], e["low"], e["high"])
                found.setdefault(f"{e['world']} ({e['split']})", []).append(point)
        named = {name or where: points for where, points in found.items()} if len(found) == 1 else found
        return [Line(n, *(list(column) for column in zip(*p, strict=True))) for n, p in named.items()]

    def line(self, metric: str, over: str = "step", name: str | None = None) -> list[Line]:
        """A logged metric, standing where its step ended; no line where the run has none of this name."""
        series = self.metrics.get(metric)
        if series is None:
            return []
        axis = self._axis(over)
        places = [self._place[str(g), int(s)] + 1 for g, s in zip(series.stage, series.step, strict=True)]
        return [Line(name or metric, [axis[i] for i in places], [float(v) for v in series.value])]

    def last(self, metric: str) -> dict[str, Any] | None:
        """The last evaluation of a metric."""
        return next((e for e in reversed(self.evaluations) if e["metric"] == metric), None)

    @property
    def meter(self) -> Mapping[str, float]:
        """What the run has cost so far, by kind."""
        return self.steps[-1]["meter"] if self.steps else {}

    def rates(self, kind: str) -> tuple[float, float]:
        """Of a kind of the meter, per second: over the whole run, and over the last RECENT steps."""
        return self._rate(kind, len(self.steps)), self._rate(kind, RECENT)

    def _rate(self, kind: str, steps: int) -> float:
        rows = self.steps[-steps:]
        seconds = sum(row["seconds"] or 0.0 for row in rows)
        before = self.steps[-len(rows) - 1]["meter"].get(kind, 0.0) if len(rows) < len(self.steps) else 0.0
        return (rows[-1]["meter"].get(kind, 0.0) - before) / seconds if seconds > 0 else math.nan

    def _axis(self, over: str) -> list[float]:
        if over == "step":
            return [float(i) for i in range(len(self.steps) + 1)]
        return [0.0, *(float(row["meter"].get(over, math.nan)) for row in self.steps)]


def charts(log: Log) -> list[Markup]:
    """Every curve of a run, the most telling first."""
    names = log.measured()
    drawn = [chart(log.evaluated(n), f"held-out {n}", n) for n in names if n == "accuracy"]
    drawn += [chart(log.line(n), n, n) for n in log.logged() if n in FIRST]
    by_category = [line for c in log.categories() for line in log.evaluated(f"accuracy/{c}", name=c)]
    if by_category:
        drawn.append(chart(by_category, "held-out accuracy by category", "accuracy"))
    drawn += [chart(log.evaluated(n), f"held-out {n}", n) for n in names if n != "accuracy"]
    drawn += [chart(log.line(n), n, n) for n in log.logged() if n not in FIRST]
    return drawn


def chart(lines: Sequence[Line], title: str, metric: str, over: str = "step") -> Markup:
    """Lines of one metric as an <svg> for a page."""
    svg = line_chart(
        [replace(line, name=visible(line.name)) for line in lines], title=visible(title), x_label=AXES[over],
        y_label=visible(metric), percent=is_share(metric), width=WIDTH, height=HEIGHT,
    )  # fmt: skip
    return Markup(svg)  # charts escape all text
