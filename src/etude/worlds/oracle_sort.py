"""The oracle of reasoning-gym's `number_sorting`: the number that is due, again and again, then the list."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from etude.experience.errors import unknown
from etude.experience.keys import Keys
from etude.experience.types import Problem
from etude.worlds.compact import short
from etude.worlds.working import (
    MISSING,
    Demonstration,
    Solution,
    ladder,
    lay_out,
    parse,
    squeeze,
    stated,
)

LEAD = "next = "  # what a step opens with in natural notation
FILLER = (2, 4)  # fewest and most letters of a detour


@dataclass(frozen=True)
class SortOracle:
    """Steps are the numbers in the order asked for: "12" ("next = 12.0" in natural notation). The answer is the list
    of what the steps wrote: "12,30,79", or ['12.0', '30.0', '79.0'].

    Faults: `order` takes a later number than the one that is due. `detour` begins with a few random letters in the
    place of the first number and ends the list with a wrong number; `wrong-answer` does only the second. `format`
    gives no list.
    """

    notation: str
    kinds: tuple[str, ...] = ("order", "detour", "wrong-answer", "format")
    styles: tuple[str, ...] = ("plain", "direct", "verbose")
    """plain: the steps, then the list. direct: the list. verbose: every step re-checked one to three times."""

    def solve(self, problem: Problem) -> Solution:
        """The numbers one by one, and the list."""
        return self.work(problem, {}, Keys(0))

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The number that is due among those not written yet. None when all are, or a step is none of them."""
        left = self._numbers(problem)
        for step in steps:
            number = squeeze(step).removeprefix(squeeze(LEAD))
            if number not in left:
                return None
            left.remove(number)
        return self._step(left[0]) if left else None

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether `step` is the number that is due after `steps`, themselves right or not."""
        right = self.plan(problem, steps)
        return right is not None and squeeze(right) == squeeze(step)

    def parse(self, text: str) -> Solution:
        """The steps and the list."""
        return parse(text, self.notation)

    def explain(self, problem: Problem, text: str) -> str:
        """The first step that is not the number due. Stating a step again is no error."""
        steps, answer = self.parse(text)
        good: list[str] = []
        for i, step in enumerate(steps):
            if self.check_step(problem, good, step):
                good.append(step)
            elif not good or squeeze(step) != squeeze(good[-1]):
                return f"step {i + 1} is wrong"
        if not answer:
            return "no answer"
        return "right" if squeeze(answer) == squeeze(self.solve(problem)[1]) else "wrong answer"

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """How to go about it (natural notation only), then the first number, the first two, ..."""
        plan = "Write down which of the numbers left comes first, then take it away."
        return ladder(self.solve(problem), plan, self.notation)

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """A right completion."""
        return self.write(problem, self.solve(problem), style, keys).text

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """A wrong order can begin wherever numbers that differ are left."""
        if kind not in self.kinds:
            raise unknown("fault", kind, self.kinds)
        numbers = self._numbers(problem)
        if kind == "order":
            return tuple(i for i, number in enumerate(numbers) if number != numbers[-1])
        return (0,) if kind == "detour" else (len(numbers),)

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """The numbers in order, the steps in `faults` erring, and the list of what was taken."""
        left = self._numbers(problem)
        steps, taken = [], []
        for i in range(len(left)):
            draw, kind = keys.at("slip", i).numpy(), faults.get(i)
            later = [j for j, number in enumerate(left) if number != left[0]]
            taken.append(left.pop(int(draw.choice(later)) if kind == "order" and later else 0))
            steps.append(self._step(_filler(draw) if kind == "detour" else taken[-1]))
        if {"detour", "wrong-answer"} & set(faults.values()):
            taken[-1] = _wrong(taken[-1], keys.at("end").numpy())
        answer = ",".join(taken) if self.notation == "compact" else str(taken)
        return tuple(steps), MISSING if faults.get(len(steps)) == "format" else answer

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """Raises UserError for a style that is not one of `styles`."""
        steps, answer = solution
        pieces = stated(steps, style, self.styles, keys)
        return lay_out([*pieces, (answer, len(steps))], len(steps), self.notation)

    def _numbers(self, problem: Problem) -> list[str]:
        """The numbers in the order asked for, as this notation writes them."""
        numbers = problem.meta["entry"]["metadata"]["sorted_numbers"]
        return [short(n) if self.notation == "compact" else n for n in numbers]

    def _step(self, number: str) -> str:
        return number if self.notation == "compact" else f"{LEAD}{number}"


def _wrong(number: str, draw: np.random.Generator) -> str:
    """The number with another first digit, by which it is off by more than the 1 that the verifier lets pass."""
    sign = "-" if number.startswith("-") else ""
    others = [f"{sign}{d}{number.removeprefix(sign)[1:]}" for d in string.digits]
    return str(draw.choice([n for n in others if abs(float(n) - float(number)) > 1]))


def _filler(draw: np.random.Generator) -> str:
    """A few random letters."""
    return "".join(draw.choice(list(string.ascii_lowercase), draw.integers(FILLER[0], FILLER[1] + 1)))
