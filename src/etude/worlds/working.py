"""Written solutions: how steps and an answer become a completion, and a completion steps again.

What all oracles share. A completion in compact notation is segments parted by ";" (or newlines), the
last of which is the answer; in natural notation it is lines, the answer in <answer></answer> tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from etude.experience.errors import unknown
from etude.experience.keys import Keys
from etude.experience.parse import shows
from etude.experience.protocols import Oracle
from etude.experience.types import Problem

Span = tuple[int, int]  # characters [start, end) of a completion
Piece = tuple[str, int | None]  # text, and the index of the step it states (len(steps): the answer)
Solution = tuple[tuple[str, ...], str]  # (steps, answer)

MISSING = "?"  # what an answer that breaks the format says


@dataclass(frozen=True)
class Fault:
    """An error that was put in: what kind, at which step (the number of steps: the answer), where."""

    kind: str
    step: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Demonstration:
    """A completion, where each step stands in it (the answer last), and the errors put into it."""

    text: str
    steps: tuple[tuple[Span, ...], ...]
    faults: tuple[Fault, ...] = ()


class StepOracle(Oracle, Protocol):
    """An oracle that goes on from any state, and can err on demand."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of faults it can make."""
        ...

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The next step after `steps`; None when they are done, or lead nowhere."""
        ...

    def parse(self, text: str) -> Solution:
        """The steps and the answer of a completion; what is not there is empty."""
        ...

    def explain(self, problem: Problem, text: str) -> str:
        """What is wrong with a completion, in a few words that do not give the answer away."""
        ...

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """The steps at which a fault of this kind can strike; the number of steps means the answer."""
        ...

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """A solution in which each step of `faults` errs, and what follows builds on it."""
        ...

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """The completion that states a solution, right or wrong, in one of `styles`."""
        ...


def lay_out(pieces: Sequence[Piece], count: int, notation: str, sep: str = ";") -> Demonstration:
    """Joins pieces and notes where each of the `count` steps and the answer stand.

    Raises ValueError if no piece states the answer.
    """
    joiner = sep if notation == "compact" else "\n"
    text = ""
    spans: list[list[Span]] = [[] for _ in range(count + 1)]
    for i, (piece, step) in enumerate(pieces):
        text += joiner if i else ""
        tagged = notation == "natural" and step == count
        start = len(text) + (len("<answer>") if tagged else 0)
        text += f"<answer>{piece}</answer>" if tagged else piece
        if step is not None:
            spans[step].append((start, start + len(piece)))
    if not spans[count]:
        raise ValueError("a completion must state its answer")
    return Demonstration(text, tuple(tuple(s) for s in spans))


def parse(text: str, notation: str) -> Solution:
    """The steps and the answer that a completion states."""
    if notation == "compact":
        segments = [s.strip() for s in re.split(r"[;\n]", text) if s.strip()]
        return tuple(segments[:-1]), segments[-1] if segments else ""
    head, tag, tail = text.rpartition("<answer>")
    steps = tuple(line.strip() for line in (head if tag else text).splitlines() if "=" in line)
    return steps, tail.partition("</answer>")[0].strip() if tag else ""


def stated(steps: Sequence[str], style: str, styles: Sequence[str], keys: Keys) -> list[Piece]:
    """The steps as pieces in one of `styles`: none in "direct", each several times over in "verbose" (see `repeated`),
    else each once. Raises UserError for another style."""
    if style not in styles:
        raise unknown("style", style, styles)
    pieces: list[Piece] = [] if style == "direct" else [(step, i) for i, step in enumerate(steps)]
    return repeated(pieces, keys) if style == "verbose" else pieces


def repeated(steps: Sequence[Piece], keys: Keys) -> list[Piece]:
    """Every step stated two to four times over: re-checked one to three times."""
    again = keys.at("repeat").numpy().integers(2, 5, len(steps))
    return [piece for piece, n in zip(steps, again, strict=True) for _ in range(n)]


def ladder(solution: Solution, plan: str, notation: str, sep: str = ";") -> tuple[tuple[str, ...], ...]:
    """Tiers of hints: the plan in words (natural notation only), then the first step, the first two, ... but not the
    last, less whatever shows the answer."""
    steps, answer = solution
    joiner = sep if notation == "compact" else "; "
    begun = [(joiner.join(steps[:j]),) for j in range(1, len(steps))]
    return without_answer([(plan,), *begun] if notation == "natural" else begun, answer)


def without_answer(tiers: Sequence[Sequence[str]], answer: str) -> tuple[tuple[str, ...], ...]:
    """The tiers of hints, less every hint in which the answer can be read."""
    kept = (tuple(h for h in tier if not shows(h, answer)) for tier in tiers)
    return tuple(tier for tier in kept if tier)


def squeeze(text: str) -> str:
    """Text without white space."""
    return "".join(text.split())
