"""An evaluation: what was measured of a policy in a world, to print, to store and to keep as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from etude.audits.estimators import Estimate
from etude.experience.store import Measured


@dataclass(frozen=True)
class Evaluation:
    """`metrics` by name (accuracy, pass@k, majority@k, length, entropy, part/NAME), and accuracy by category."""

    world: str
    split: str
    problems: int
    samples: int  # a problem
    metrics: Mapping[str, Estimate]
    categories: Mapping[str, Estimate]
    items: Mapping[str, float]  # share of correct samples of each problem, by its id

    @property
    def accuracy(self) -> Estimate:
        """Share of correct samples."""
        return self.metrics["accuracy"]

    @property
    def named(self) -> dict[str, Estimate]:
        """Every number by name; a category's accuracy is called `accuracy/CATEGORY`."""
        return {**self.metrics, **{f"accuracy/{c}": e for c, e in self.categories.items()}}

    def rows(self) -> Iterator[Measured]:
        """What a store keeps."""
        for name, e in self.named.items():
            yield Measured(self.world, self.split, name, e.value, e.low, e.high, e.n)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; numbers that are not finite become null."""
        return {
            "world": self.world,
            "split": self.split,
            "problems": self.problems,
            "samples": self.samples,
            "metrics": {name: _plain(e) for name, e in self.metrics.items()},
            "categories": {name: _plain(e) for name, e in self.categories.items()},
        }

    def __str__(self) -> str:
        """A table of all metrics with their intervals."""
        lines = [("metric", "value", "95% interval", "problems")]
        lines += [(row.metric, *_shown(row), str(row.n)) for row in self.rows()]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        title = f"{self.world} ({self.split}): {self.problems} problems, {self.samples} samples each"
        body = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        return "\n".join([title, *body])


def _shown(row: Measured) -> tuple[str, str]:
    """Shares as percentages, other numbers as they are."""
    percent = row.metric.startswith(("accuracy", "pass@", "majority@"))
    value, low, high = (f"{100 * x:.1f}%" if percent else f"{x:.3g}" for x in (row.value, row.low, row.high))
    return value, f"{low} to {high}"


def _plain(e: Estimate) -> dict[str, float | None]:
    return {name: x if math.isfinite(x) else None for name, x in asdict(e).items()}
