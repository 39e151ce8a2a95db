"""Draws held-out accuracy against steps, with its 95% interval, from a run directory: RUN OUT.svg."""

from __future__ import annotations

import sys
from pathlib import Path

from etude.experience.store import Store
from etude.lab.charts import Line, line_chart


def draw(run: str) -> str:
    """The curve as SVG text."""
    with Store(run, read_only=True) as store:
        found = store.evaluations("accuracy")
    step, value, low, high = ([e[name] for e in found] for name in ("step", "value", "low", "high"))
    world = found[0]["world"] if found else "no world yet"
    return line_chart(
        [Line("accuracy", step, value, low, high)],
        title=f"held-out accuracy on {world}, with 95% interval",
        x_label="steps of learning",
        y_label="held-out accuracy",
        percent=True,
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(sys.argv[1]))
