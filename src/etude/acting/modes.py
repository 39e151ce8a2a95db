"""Modes: answers that must begin as a plan does, or as a trace does, where a world's answers tell the two apart.

A world says how in the `meta` of its problems: `modes` maps "fast" (straight to the plan) and "slow" (a trace first) to
the text of the tokens that are forced (arXiv 2410.09918, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from etude.acting.agent import Under
from etude.acting.hooks import Force, When, Writing
from etude.acting.sample import GIVES, answers
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import register
from etude.experience.protocols import Acting, Clock, Roles, Score
from etude.experience.types import Group, Ids, Problem

Mode = Literal["fast", "slow"]
MODELESS = "what an answer begins with must say whether a trace follows, as in a world of searches, such as grid_maze"


@dataclass(frozen=True)
class Moded:
    """Independent samples of the actor in one mode. Raises UserError for a problem without modes."""

    mode: Mode

    def __call__(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        actor = roles["actor"]
        begun = Begun([actor.tokenizer.encode(self._beginning(p)) for p in problems for _ in range(n)])
        drawn = answers({**roles, "actor": Under(actor, hooks=(begun,))}, problems, n, 1, score, keys)
        return [Group(problem, members) for problem, members in zip(problems, drawn, strict=True)]

    def _beginning(self, problem: Problem) -> str:
        if "modes" not in problem.meta:
            raise UserError(f"problem {problem.id} cannot be asked for a {self.mode} answer: {MODELESS}")
        return str(problem.meta["modes"][self.mode])


@register("acting", "fast", needs={"modes"}, gives=GIVES, why=MODELESS)
def fast() -> Acting:
    """Straight to the plan: its first token is forced."""
    return Moded("fast")


@register("acting", "slow", needs={"modes"}, gives=GIVES, why=MODELESS)
def slow() -> Acting:
    """First a search: the first token of its trace is forced."""
    return Moded("slow")


@dataclass(frozen=True)
class Begun:
    """A hook: row i of a call must begin with `beginnings[i]`, int32 tokens that count as given."""

    beginnings: Sequence[Ids]
    when: ClassVar[When] = When(counts=frozenset({0}))

    def __call__(self, row: Writing) -> Force:
        return Force(self.beginnings[row.row].tolist())
