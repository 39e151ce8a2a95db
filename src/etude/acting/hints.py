"""Hints in the prompt: ladders of them, and the climb to the lowest that helps.

A ladder gives a problem's levels: the same problem with more and more help in its prompt, from abstract
to concrete. Where the help comes from is a `Tiers` (a world's oracle, a teacher, a column of the data);
how it is put into a prompt is the world's matter, an `Enter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from etude.acting.sample import answers
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.parse import shows
from etude.experience.protocols import Roles, Score, Teacher
from etude.experience.types import Message, Problem, Trajectory

Tiers = Callable[[Problem], Sequence[Sequence[str]]]  # classes of hints, from abstract to concrete, each in pieces
Enter = Callable[[Problem, str], Problem]  # the problem with a hint in its prompt, under an id of its own


class Levels(NamedTuple):
    """A problem's levels, from the least help to the most, and how many more there would be if they did
    not give the answer away."""

    problems: tuple[Problem, ...]
    leaks: int = 0


@dataclass(frozen=True)
class Ladder:
    """The levels of a problem. Each class of hints begins anew: its level j holds its own first j pieces and
    nothing of the classes before (Scaf-GRPO, arXiv:2510.19807, section 3).

    Empty pieces are skipped, and so is every level in which the answer can be read. A problem for which
    nothing is left has no levels.
    """

    tiers: Tiers
    enter: Enter
    joiner: str = "\n"  # between the pieces of a class

    def __call__(self, problem: Problem) -> Levels:
        levels, leaks = [], 0
        for tier in self.tiers(problem):
            pieces = [piece for piece in tier if piece.strip()]
            for j in range(len(pieces)):
                text = self.joiner.join(pieces[: j + 1])
                if shows(text, problem.answer or ""):
                    leaks += 1
                else:
                    levels.append(self.enter(problem, text))
        return Levels(tuple(levels), leaks)


@dataclass(frozen=True)
class ColumnTiers:
    """The tiers in a problem's own data: `meta` or `options` under `name`.

    Text is one hint, a list of texts the pieces of one class, a list or a mapping of such lists several
    classes in order. A problem without the column, or with null in it, has no tiers. Raises UserError for
    anything else.
    """

    name: str

    def __call__(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        value = problem.meta.get(self.name, problem.options.get(self.name))
        tiers = _tiers(value)
        if tiers is None:
            raise UserError(
                f"problem {problem.id}: {self.name!r} should hold hints, a list of texts or lists of texts from "
                f"abstract to concrete, not {value!r:.60}"
            )
        return tiers


def _tiers(value: Any) -> tuple[tuple[str, ...], ...] | None:
    """The value as tiers; None if it is none."""
    if value is None:
        return ()
    if isinstance(value, str):
        return ((value,),)
    classes = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(classes, list | tuple):
        return None
    if classes and all(isinstance(c, str) for c in classes):
        classes = classes if isinstance(value, Mapping) else [classes]
    classes = [[c] if isinstance(c, str) else c for c in classes if c is not None]
    if not all(isinstance(c, list | tuple) and all(isinstance(piece, str) for piece in c) for c in classes):
        return None
    return tuple(tuple(c) for c in classes)


ASKS = (
    "Name the concepts and formulas that are needed to solve this problem.",
    "Outline a plan for solving this problem.",
    "Write down the steps of the solution, but not the last one.",
)


@dataclass(frozen=True)
class TeacherTiers:
    """Tiers that a teacher writes, a request for each class of `asks`; the lines of a reply, in at most
    `pieces` parts, are the class. The teacher charges for itself, and remembers what it should not be
    asked twice."""

    teacher: Teacher
    asks: tuple[str, ...] = ASKS
    pieces: int = 4

    def __call__(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        return tuple(self._cut(self.teacher.reply(_request(problem, ask), problem)) for ask in self.asks)

    def _cut(self, reply: str) -> tuple[str, ...]:
        lines = [line.strip() for line in reply.splitlines() if line.strip()]
        parts = np.array_split(np.arange(len(lines)), min(self.pieces, len(lines)) or 1)
        return tuple("\n".join(lines[i] for i in part) for part in parts if len(part))


def _request(problem: Problem, ask: str) -> tuple[Message, ...]:
    closing = f"{ask} One point a line. Do not state the final answer."
    if isinstance(problem.prompt, str):
        return (Message(role="user", content=f"{problem.prompt}\n\n{closing}"),)
    return (*problem.prompt, Message(role="user", content=closing))


@dataclass(frozen=True)
class Climb:
    """What came of one problem's levels: of those tried, from the lowest, the scored attempts of each."""

    attempts: tuple[tuple[Trajectory, ...], ...]

    @property
    def level(self) -> int | None:
        """The lowest level with a right attempt, counted from 0; None if there is none."""
        return next((i for i, tried in enumerate(self.attempts) if any(t.correct for t in tried)), None)

    @property
    def success(self) -> Trajectory | None:
        """The first right attempt of that level."""
        return None if self.level is None else next(t for t in self.attempts[self.level] if t.correct)


def climb(
    roles: Roles, ladders: Sequence[Sequence[Problem]], n: int, score: Score, keys: Keys, at_once: bool = False
) -> list[Climb]:
    """For each ladder (the levels of one problem) `n` attempts of the actor a level, level by level until
    one is right; or with `at_once` all levels of all ladders in one batch, which costs more tokens and less
    waiting.

    A level whose prompt leaves the actor no room to answer is left out. The stream of an attempt is keys /
    problem, with its hint, / how often it came before / attempt, so that both ways find the same.
    """
    actor = roles["actor"]
    fitting = [[p for p in levels if len(actor.tokenizer.prompt(p.prompt)) < actor.limit] for levels in ladders]
    tried: list[list[tuple[Trajectory, ...]]] = [[] for _ in ladders]
    while True:
        asked = [
            (i, problem)
            for i, levels in enumerate(fitting)
            if not any(t.correct for attempts in tried[i] for t in attempts)
            for problem in levels[len(tried[i]) : None if at_once else len(tried[i]) + 1]
        ]
        if not asked:
            return [Climb(tuple(attempts)) for attempts in tried]
        drawn = answers(roles, [problem for _, problem in asked], n, 1, score, keys)
        for (i, _), attempts in zip(asked, drawn, strict=True):
            tried[i].append(attempts)
