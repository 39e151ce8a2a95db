"""The hints of a world, as a ladder that acting can climb."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from etude.acting.hints import ColumnTiers, Ladder, Tiers
from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.protocols import World
from etude.experience.types import Problem
from etude.worlds.chain import hint
from etude.worlds.oracles import find_oracle, step_oracle

Whose = Literal["own", "other", "none"]
LOOK = 64  # problems that are looked at for a column of hints
FAR = 1 << 20  # indices among which another problem is drawn


def ladder_of(world: World, column: str | None = None, whose: Whose = "own") -> Ladder:
    """The ladder over a world's hints: those in a `column` of its problems, else those of its oracle.

    `whose` "other" gives each problem the hints of another one of its category, and "none" leaves the
    prompt as it is, so that a level is one more plain try: the controls under which hints say nothing. Raises
    UserError where the world has no such column, or neither column nor oracle.
    """
    if whose not in get_args(Whose):
        raise unknown("hints", whose, get_args(Whose))
    tiers: Tiers = OracleTiers(world)
    if column is not None:
        _look_for(world, column)
        tiers = ColumnTiers(column)
    elif find_oracle(world) is None:
        raise UserError(
            f"world {world.name!r} has no oracle to give hints: name the column of its data that holds them with "
            "column=..."
        )
    return Ladder(OtherTiers(world, tiers) if whose == "other" else tiers, unhinted if whose == "none" else hint)


@dataclass(frozen=True)
class OracleTiers:
    """The hints of a world's oracle."""

    world: World

    def __call__(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        return step_oracle(self.world).hints(problem)


@dataclass(frozen=True)
class OtherTiers:
    """The hints of another training problem of the same category, always the same one; none where there is
    no other."""

    world: World
    tiers: Tiers

    def __call__(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        first = Keys(0).at("another", problem.id).digest() % FAR
        for i in (first, first + 1):
            other = self.world.problem("train", i, problem.category)
            if other.prompt != problem.prompt:
                return tuple(map(tuple, self.tiers(other)))
        return ()


def unhinted(problem: Problem, text: str) -> Problem:
    """The same problem once more, without the hint; the id differs, and with it random streams."""
    return replace(problem, id=f"{problem.id}+{text}")


def _look_for(world: World, column: str) -> None:
    size = world.size("train")
    problems = [world.problem("train", i) for i in range(LOOK if size is None else min(LOOK, size))]
    if not any(column in p.meta or column in p.options for p in problems):
        has = ", ".join(sorted({name for p in problems for name in (*p.meta, *p.options)})) or "none"
        raise UserError(f"problems of world {world.name!r} have no column {column!r} to give hints; they have: {has}")
