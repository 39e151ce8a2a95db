"""One comparison with a peer: the same work, done alternately, and how far from the machine's limits it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """What one piece of work cost here and at a peer's, in pairs that were taken one after the other.

    `floor` is the least that the machine could do it for, in the same unit; `same` says what was found equal
    between both.
    """

    work: str
    peer: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    bar: float | None = None  # the ratio that is aimed at
    unit: str = "s"
    floor: float | None = None
    same: str = ""
    note: str = ""

    @property
    def ratio(self) -> float:
        """Their median over ours: above 1 where Etude is better."""
        return median(self.theirs) / median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and largest ratio of a pair."""
        ratios = [t / o for o, t in zip(self.ours, self.theirs, strict=True)]
        return min(ratios), max(ratios)

    @property
    def met(self) -> bool | None:
        """Whether the bar is; None without one."""
        return None if self.bar is None else self.ratio >= self.bar

    head: ClassVar[str] = (
        "| work | against | Etude | peer | ratio (pairs) | bar | floor | checked |\n|---|---|---|---|---|---|---|---|"
    )

    def row(self) -> str:
        """A line of the table; the floor with how many times it our cost is."""
        ours, (low, high) = median(self.ours), self.spread
        cells = (
            f"{self.work} ({self.note})" if self.note else self.work,
            self.peer,
            f"{ours:.3g} {self.unit}",
            f"{median(self.theirs):.3g} {self.unit}",
            f"**{self.ratio:.2f}** ({low:.2f} to {high:.2f})",
            "" if self.bar is None else f"{self.bar:.1f}",
            "" if self.floor is None else f"{self.floor:.3g} {self.unit} ({ours / self.floor:.1f}x)",
            self.same,
        )
        return f"| {' | '.join(cells)} |"

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "work": self.work, "peer": self.peer, "unit": self.unit, "ours": list(self.ours),
            "theirs": list(self.theirs), "ratio": self.ratio, "spread": list(self.spread), "bar": self.bar,
            "met": self.met, "floor": self.floor, "same": self.same, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True)
class Growth:
    """How a cost of ours grows with the size of the work: `costs` at each of `sizes`, medians of several."""

    work: str
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    limit: float = 1.15  # cost over its line, at most

    @property
    def worst(self) -> float:
        """The largest cost over the line through the origin and the smallest size's."""
        return max(c / (self.costs[0] * s / self.sizes[0]) for s, c in zip(self.sizes, self.costs, strict=True))

    @property
    def met(self) -> bool:
        """Whether it grows no faster than its line, within the limit."""
        return self.worst <= self.limit

    head: ClassVar[str] = "| work | at 1x | at 16x | over its line, at most | bar |\n|---|---|---|---|---|"

    def row(self) -> str:
        """A line of the table."""
        first, last = self.costs[0], self.costs[-1]
        return f"| {self.work} | {first:.3g} s | {last:.3g} s | {self.worst:.2f} | {self.limit:.2f} |"

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "work": self.work, "sizes": list(self.sizes), "costs": list(self.costs), "worst": self.worst,
            "limit": self.limit, "met": self.met,
        }  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What this machine can do at most, as measured: arithmetic from a large product, memory from a large copy."""

    flops: float  # a second, float32
    bytes: float  # a second, read and written
    threads: int

    def floor(self, flops: float, bytes: float = 0.0) -> float:
        """Seconds below which no program with this much arithmetic and this much memory traffic can be."""
        return max(flops / self.flops, bytes / self.bytes)


def machine() -> Machine:
    """Measures it, in about a second."""
    a = torch.randn(2048, 2048)
    b = torch.ones(1 << 26)  # 256 MiB: beyond any cache
    c = torch.empty_like(b)
    return Machine(
        flops=2 * len(a) ** 3 / fastest(lambda: a @ a),
        bytes=2 * b.nbytes / fastest(lambda: c.copy_(b)),
        threads=torch.get_num_threads(),
    )


def fastest(work: Work, repeats: int = 5) -> float:
    """Seconds of the fastest of a few runs."""
    return min(seconds(work) for _ in range(repeats))


def seconds(work: Work) -> float:
    """How long one run takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(ours: Work, theirs: Work, pairs: int = 7, warm: int = 1) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of both, run in turn so that whatever else the machine does weighs on both alike; each side goes first
    in half of the pairs."""
    for _ in range(warm):
        ours()
        theirs()
    a: list[float] = []
    b: list[float] = []
    for i in range(pairs):
        for side, out in ((ours, a), (theirs, b))[:: 1 if i % 2 == 0 else -1]:
            out.append(seconds(side))
    return tuple(a), tuple(b)
