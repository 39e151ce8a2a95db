"""The retry world: a problem of any one-turn world, with feedback and further attempts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from etude.experience.errors import UserError
from etude.experience.protocols import World
from etude.experience.types import Outcome, Problem
from etude.worlds.textenv import TextEnv, Turn

if TYPE_CHECKING:
    from etude.worlds.working import StepOracle


@dataclass(frozen=True)
class RetryWorld:
    """Problems of `inner`, answered in up to `attempts` turns.

    A right answer at attempt k (from 1) ends the episode with the reward discount^(k-1); a wrong one
    earns nothing and hears what was wrong, from the inner world's oracle if it has one. `score`
    judges a lone answer as the inner world does.
    """

    inner: World
    attempts: int = 3
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UserError(f"retry: attempts {self.attempts} must be at least 1")
        if not 0 < self.discount <= 1:
            raise UserError(f"retry: discount {self.discount} must lie above 0 and not above 1")
        if hasattr(self.inner, "env"):
            raise UserError(f"retry: world {self.inner.name!r} has turns of its own; give a world of one turn")

    @property
    def name(self) -> str:
        """retry: and the inner name."""
        return f"retry:{self.inner.name}"

    @property
    def categories(self) -> tuple[str, ...]:
        """Those of the inner world."""
        return self.inner.categories

    @property
    def notation(self) -> str:
        """That of the inner world, natural where it does not say."""
        return getattr(self.inner, "notation", "natural")

    def size(self, split: str) -> int | None:
        """As the inner world."""
        return self.inner.size(split)

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """The inner problem, with how it may be retried among its options."""
        problem = self.inner.problem(split, index, category)
        options = {**problem.options, "attempts": self.attempts, "discount": self.discount}
        return replace(problem, options=options)

    def score(self, problem: Problem, text: str) -> Outcome:
        """As the inner world: one attempt."""
        return self.inner.score(problem, text)

    def env(self, problem: Problem) -> RetryEnv:
        """The episode. `reset` shows nothing: the question is the problem's prompt."""
        return RetryEnv(self, problem)


class RetryEnv(TextEnv):
    """Attempts at one problem; every action is an answer."""

    def __init__(self, world: RetryWorld, problem: Problem) -> None:
        from etude.worlds.oracles import find_oracle

        super().__init__(problem, int(problem.options.get("attempts", world.attempts)))
        self.world = world
        self.discount = float(problem.options.get("discount", world.discount))
        self.oracle: StepOracle | None = find_oracle(world.inner)
        self.tried = 0

    def begin(self, seed: int | None) -> tuple[str, dict[str, Any]]:
        """Nothing to see yet."""
        self.tried = 0
        return "", {}

    def act(self, action: str) -> Turn:
        """Judges an attempt. The last one ends the episode, right or wrong."""
        self.tried += 1
        correct = bool(self.world.inner.score(self.problem, action).correct)
        last = self.tried == self.max_turns
        reward = self.discount ** (self.tried - 1) if correct else 0.0
        info = {"correct": correct, "events": ("right" if correct else "wrong",)}
        return self._feedback(action, correct, last), reward, correct or last, info

    def _feedback(self, action: str, correct: bool, last: bool) -> str:
        compact = self.world.notation == "compact"
        if correct:
            return "right" if compact else "That is right."
        reason = self.oracle.explain(self.problem, action) if self.oracle else ""
        if compact:
            return f"wrong: {reason}" if reason else "wrong"
        again = "" if last else " Try again."
        return f"That is wrong{f': {reason}' if reason else ''}.{again}"
