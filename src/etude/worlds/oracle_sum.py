"""The oracle of sums: running totals from left to right, for `chain` and reasoning-gym's `chain_sum`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from etude.experience.errors import unknown
from etude.experience.keys import Keys
from etude.experience.types import Problem
from etude.worlds.chain import ChainWorld, Rule
from etude.worlds.working import (
    MISSING,
    Demonstration,
    Piece,
    Solution,
    ladder,
    lay_out,
    parse,
    repeated,
    squeeze,
)

CHECK = "wait"  # what a check opens with
EVERY = 3  # steps between two checks in the style "check"


@dataclass(frozen=True)
class SumOracle:
    """Solves problems whose state is one running total.

    `read` gives a problem's (numbers, totals that the prompt already holds). Steps are totals
    ("19") in compact notation and equations ("12 + 7 = 19") in natural notation.
    """

    read: Callable[[Problem], tuple[tuple[int, ...], tuple[int, ...]]]
    notation: str
    rule: Rule = field(default_factory=Rule)
    width: int = 0
    sep: str = ";"
    habit: tuple[float, ...] | None = None  # gives the style "bridged"; see ChainWorld
    kinds: tuple[str, ...] = ("arithmetic", "carry", "wrong-operator", "left-out", "wrong-answer", "format")

    @property
    def styles(self) -> tuple[str, ...]:
        """plain: the totals. direct: the answer only. verbose: every step re-checked one to three
        times. check: every third step re-adds the last three numbers and repairs what was wrong.
        bridged: plain or, the likelier the more is left to do, a random guess (often wrong)."""
        return ("plain", "direct", "verbose", "check", *(() if self.habit is None else ("bridged",)))

    def solve(self, problem: Problem) -> Solution:
        """The totals after those that the prompt holds, and the last one."""
        return self.work(problem, {}, Keys(0))

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The next total, reckoned from the last one written. None if that is no number."""
        numbers, c = self._state(problem, steps)
        if c is None or not numbers:
            return None
        return self._step(c, numbers[0])

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether `step` follows from the last total written (right or not)."""
        right = self.plan(problem, steps)
        return right is not None and squeeze(right) == squeeze(step)

    def parse(self, text: str) -> Solution:
        """Compact: every total is a step, the last also the answer."""
        steps, answer = parse(text, self.notation)
        return ((*steps, answer) if self.notation == "compact" and answer else steps), answer

    def explain(self, problem: Problem, text: str) -> str:
        """The first step that does not follow. Stating a step again is no error, and a check may
        repair the step before it."""
        steps, answer = self.parse(text)
        good: list[str] = []
        for i, step in enumerate(steps):
            if step.startswith(CHECK):
                good[-1:] = [step.rpartition("=")[2].removesuffix(" yes")]
            elif self.check_step(problem, good, step):
                good.append(step)
            elif not good or squeeze(step) != squeeze(good[-1]):
                return f"step {i + 1} is wrong"
        if not answer:
            return "no answer"
        return "a step is missing" if self.plan(problem, good) else "wrong answer"

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """How to go about it (natural notation only), then the first total, the first two, ..."""
        plan = "Go from left to right and write down the total after every number."
        return ladder(self.solve(problem), plan, self.notation, self.sep)

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """A completion; right in every style but "bridged"."""
        return self.write(problem, self.solve(problem), style, keys).text

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """Steps where the slip changes the total (a carry only where there is one to drop)."""
        numbers, c = self._state(problem, ())
        if kind in ("wrong-answer", "format"):
            return (len(numbers),)
        found = []
        for i, z in enumerate(numbers):
            assert c is not None
            if any(self._slips(kind, c, z)):
                found.append(i)
            c = self.rule.next(c, z)
        return tuple(found)

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """Totals of which those in `faults` slip; all later ones follow from what is written."""
        numbers, c = self._state(problem, ())
        assert c is not None
        steps = []
        for i, z in enumerate(numbers):
            slips = self._slips(faults[i], c, z) if i in faults else ()
            written = int(keys.at("slip", i).numpy().choice(slips)) if slips else self.rule.next(c, z)
            shown = -z if faults.get(i) == "wrong-operator" else z
            steps.append(self._step(c, shown, written))
            c = written
        answer = self._number(c)
        if kind := faults.get(len(numbers)):
            off = int(keys.at("slip", len(numbers)).numpy().choice(self._near(c)))
            answer = MISSING if kind == "format" else self._number(off)
        return tuple(steps), answer

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """Raises UserError for a style that is not one of `styles`."""
        steps, answer = solution
        n = len(steps)
        if style not in self.styles:
            raise unknown("style", style, self.styles)
        if style == "bridged" and not self._shows(problem, n, keys):
            answer = self._guess(problem, keys)
            style = "direct"
        pieces: list[Piece] = [(step, i) for i, step in enumerate(steps)]
        if style == "direct":
            pieces = []
        elif style == "check":
            pieces, answer = self._checked(problem, solution)
        elif style == "verbose":
            pieces = repeated(pieces, keys)
        shared = self.notation == "compact" and bool(pieces) and style != "check"
        if shared:  # the last total is the answer
            pieces.pop()
        done = lay_out([*pieces, (answer, n)], n, self.notation, self.sep)
        if shared:
            return Demonstration(done.text, (*done.steps[:-2], done.steps[-2] + done.steps[-1], done.steps[-1]))
        return done

    def _checked(self, problem: Problem, solution: Solution) -> tuple[list[Piece], str]:
        """The steps with a check after every third and the last: it goes back to the total before the
        last checked numbers, re-adds them, says "yes" or the repaired total, and the next step goes on
        from there. A step that was wrong is wrong here by as much."""
        steps, answer = solution
        numbers, c = self._state(problem, ())
        assert c is not None
        pieces: list[Piece] = []
        written, before, since = c, c, 0  # the totals as given, as written here, and at the last check
        checked = c
        for i, (step, z) in enumerate(zip(steps, numbers, strict=True)):
            value = _last(step)
            slip = (value if value is not None else written) - self.rule.next(written, z)
            written = value if value is not None else written
            total = self.rule.start(self.rule.next(before, z) + slip)
            pieces.append((self._step(before, z, total), i))
            before = total
            if (i + 1) % EVERY and i + 1 < len(numbers):
                continue
            redone = (checked, *numbers[since : i + 1])
            right = self.rule.totals(redone)[-1]
            equals = "=" if self.notation == "compact" else " = "
            verdict = " yes" if right == total else ""
            pieces.append((f"{CHECK} {self._sum(redone)}{equals}{self._number(right)}{verdict}", None))
            before, checked, since = right, right, i + 1
        implied = self._number(written)
        return pieces, self._number(before) if answer == implied else answer

    def _state(self, problem: Problem, steps: Sequence[str]) -> tuple[tuple[int, ...], int | None]:
        """(numbers still to be added, the total written last)."""
        numbers, given = self.read(problem)
        done = len(given) + len(steps)
        start = given[-1] if given else self.rule.start(numbers[0])
        return numbers[1 + done :], _last(steps[-1]) if steps else start

    def _slips(self, kind: str, c: int, z: int) -> tuple[int, ...]:
        """The wrong totals that a fault of this kind could put in place of the right one."""
        right = self.rule.next(c, z)
        if kind == "arithmetic":
            wrong: tuple[int, ...] = self._near(right)
        elif kind == "carry":  # units that add up past nine, or are borrowed from
            part = self.rule.scale * z + self.rule.shift
            carries = (c % 10 + part % 10 > 9) if part >= 0 else (c % 10 - (-part) % 10 < 0)
            wrong = (self.rule.start(right - 10 if part >= 0 else right + 10),) if carries else ()
        elif kind == "wrong-operator":
            wrong = (self.rule.next(c, -z),)
        elif kind == "left-out":
            wrong = (c,)
        else:
            raise unknown("fault", kind, self.kinds)
        return tuple(w for w in wrong if w != right)

    def _near(self, right: int) -> tuple[int, ...]:
        near = [self.rule.start(right + d) for d in (-3, -2, -1, 1, 2, 3)]
        return tuple(w for w in near if w != right)

    def _step(self, c: int, z: int, total: int | None = None) -> str:
        total = self.rule.next(c, z) if total is None else total
        if self.notation == "compact":
            return self._number(total)
        return f"{self._sum((c, z))} = {self._number(total)}"

    def _sum(self, numbers: Sequence[int]) -> str:
        """The sum written out: "12 + 7 - 3", "12 + 7*5 + 3 mod 50"; compact without spaces."""
        scale = "" if self.rule.scale == 1 else f"{self.rule.scale}*"
        shift = f" + {self.rule.shift}" if self.rule.shift else ""
        added = (f" {'-' if z < 0 else '+'} {scale}{self._number(abs(z))}{shift}" for z in numbers[1:])
        text = self._number(numbers[0]) + "".join(added)
        if self.notation == "compact":
            return squeeze(text)
        return f"{text} mod {self.rule.modulus}" if self.rule.modulus else text

    def _shows(self, problem: Problem, left: int, keys: Keys) -> bool:
        assert self.habit is not None
        show = problem.meta.get("show")
        chance = self.habit[min(left, len(self.habit) - 1)] if show is None else show
        return bool(keys.at("show").numpy().random() < chance)

    def _guess(self, problem: Problem, keys: Keys) -> str:
        numbers, _ = self.read(problem)
        high = self.rule.modulus or 1 + sum(abs(z) for z in numbers)
        return self._number(int(keys.at("guess").numpy().integers(high)))

    def _number(self, value: int) -> str:
        return f"{value:0{self.width}d}"


def chain_oracle(world: ChainWorld) -> SumOracle:
    """The oracle of the chain world. A hinted problem is solved from its hint on."""

    def read(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
        given = re.findall(r"\d+", problem.meta.get("hint", ""))
        return problem.meta["terms"], tuple(int(g) for g in given)

    return SumOracle(read, world.notation, world.rule, world.width, world.sep, world.habit)


def chain_sum_oracle(notation: str) -> SumOracle:
    """The oracle of reasoning-gym's `chain_sum`."""

    def read(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
        parts = problem.meta["entry"]["metadata"]["expression"].split()
        signs = [1, *(-1 if op == "-" else 1 for op in parts[1::2])]
        return tuple(sign * int(z) for sign, z in zip(signs, parts[::2], strict=True)), ()

    return SumOracle(read, notation)


def _last(step: str) -> int | None:
    """The number a step ends in, ignoring "mod m"; None if it has none. Longer ones than 18 digits
    count as none."""
    found = re.findall(r"-?\d+", step.split("=")[-1])
    return int(found[-1]) if found and len(found[-1]) <= 18 else None
