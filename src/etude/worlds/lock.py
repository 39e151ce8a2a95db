"""The lock ladder: combination locks of one symbol and more, of which each rung holds the one below.

A lock of `c` symbols shows them one after another and wants the hidden partner of each; it opens only if
all are right. A rung is therefore out of reach until those below it are learnt, which isolates what a
curriculum is for: following the edge of competence as it moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.types import Outcome, Problem
from etude.worlds.textenv import TextEnv, Turn

SPLITS = ("train", "test")


@dataclass(frozen=True)
class LockWorld:
    """Locks of 1 to `rungs` symbols (a, b, ...), each of whose partners is one of `actions` digits.

    The categories are the rungs, "1" first. There are only as many locks as rungs: both splits hold the
    same ones under other names, and what is measured is what was learnt, as in a bandit. Raises
    UserError on sizes that cannot be.
    """

    rungs: int = 8
    actions: int = 6
    seed: int = 0  # of the hidden partners
    name: str = field(default="lock", init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.rungs <= len(ascii_lowercase):
            raise UserError(f"lock: rungs must be 1 to {len(ascii_lowercase)}, not {self.rungs}")
        if not 2 <= self.actions <= 10:
            raise UserError(f"lock: actions must be 2 to 10, not {self.actions}")

    @property
    def categories(self) -> tuple[str, ...]:
        """The rungs, shortest lock first."""
        return tuple(str(c) for c in range(1, self.rungs + 1))

    @property
    def partners(self) -> str:
        """The digit each symbol wants."""
        draws = Keys(self.seed).at("lock").numpy().integers(self.actions, size=self.rungs)
        return "".join(map(str, draws.tolist()))

    def size(self, split: str) -> int | None:
        """None: a lock may be tried for ever."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """The lock of the category; without one the rungs take turns."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        category = category or self.categories[index % self.rungs]
        if category not in self.categories:
            raise unknown("lock category", category, self.categories)
        answer = self.partners[: int(category)]
        return Problem(f"{split}/{category}/{index}", "", answer, category, float(category))

    def score(self, problem: Problem, text: str) -> Outcome:
        """Reward 1 if `text` begins with the partners of all symbols, else 0."""
        answer = problem.answer or ""
        correct = text.startswith(answer)
        return Outcome(float(correct), correct, text[: len(answer)])

    def env(self, problem: Problem) -> LockEnv:
        """The lock as an episode: a symbol a turn, an answer of one digit to each."""
        return LockEnv(problem)


class LockEnv(TextEnv):
    """Shows one symbol a turn, whatever was answered before; the last answer opens the lock or not."""

    def __init__(self, problem: Problem) -> None:
        self.answer = problem.answer or ""
        super().__init__(problem, max_turns=len(self.answer))

    def begin(self, seed: int | None) -> tuple[str, dict[str, Any]]:
        """The first symbol."""
        return ascii_lowercase[0], {}

    def act(self, action: str) -> Turn:
        """The next symbol; after the last one, whether all answers were right."""
        turn = len(self._actions)
        if turn < len(self.answer):
            return ascii_lowercase[turn], 0.0, False, {}
        correct = "".join(a[:1] or " " for a in self._actions) == self.answer
        return "", float(correct), True, {"correct": correct}
