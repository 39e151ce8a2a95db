"""Progress on a terminal: a bar with rate and remaining time, and for a run a live line of reward and accuracy.

Nothing is drawn into a pipe.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from etude.experience.keys import Keys
from etude.experience.protocols import Acting, Clock, Roles, Score
from etude.experience.types import Group, Problem
from etude.learning.ranks import leading

SHOWN = ("loss", "reward", "accuracy", "pass@1", "length")  # metrics in the live line, in this order


class _Quiet:
    """Draws nothing."""

    def step(self, clock: Clock, metrics: Mapping[str, float], run: Any) -> None:
        pass


class _Bar:
    """One bar a stage."""

    def __init__(self, bars: Any) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}
        self.last: dict[str, float] = {}

    def step(self, clock: Clock, metrics: Mapping[str, float], run: Any) -> None:
        if clock.stage not in self.tasks:
            self.tasks[clock.stage] = self.bars.add_task(clock.stage, total=clock.total, completed=clock.step, line="")
        self.last.update({k: v for k, v in metrics.items() if k in SHOWN})
        line = "  ".join(f"{k} {self.last[k]:.3g}" for k in SHOWN if k in self.last)
        done = min(clock.step + 1, clock.total)
        self.bars.update(self.tasks[clock.stage], completed=done, line=line)


@contextmanager
def progress() -> Iterator[Any]:
    """A `Reporter` for `learning.run`, drawn to the terminal while the context is open."""
    if not sys.stderr.isatty() or not leading():
        yield _Quiet()
        return
    with bars() as drawn:
        yield _Bar(drawn)


@contextmanager
def in_parts(act: Acting, title: str) -> Iterator[Acting]:
    """`act`, with a bar that counts the problems on a terminal: it is given them in some twenty parts,
    which changes nothing of what it does to each."""
    if not sys.stderr.isatty():
        yield act
        return
    with bars() as drawn:
        task = drawn.add_task(title, total=None, line="")

        def parts(
            roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
        ) -> list[Group]:
            size = -(-len(problems) // 20)
            groups: list[Group] = []
            drawn.update(task, total=len(problems))
            for first in range(0, len(problems), size):
                groups += act(roles, problems[first : first + size], n, score, clock, keys)
                drawn.update(task, completed=len(groups))
            return groups

        yield parts


def bars() -> Any:
    """Progress bars on the error stream, with rate and remaining time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class _Rate(ProgressColumn):
        """Steps or problems a second."""

        def render(self, task: Any) -> str:
            return f"{task.speed:.1f}/s" if task.speed else ""

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}"),
        console=Console(stderr=True),
    )
