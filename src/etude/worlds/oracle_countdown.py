"""The oracle of countdown: a search for an expression that makes the target of all the numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from etude.experience.errors import unknown
from etude.experience.keys import Keys
from etude.experience.types import Problem
from etude.worlds.countdown import OPERATORS, Op, Tree, evaluate, express, result, search
from etude.worlds.working import MISSING, Demonstration, Piece, Solution, lay_out, parse, squeeze, stated

Pool = tuple[tuple[int, Tree], ...]  # the numbers at hand and how they were made

STEP = re.compile(r"(-?\d{1,12})([-+*/])(-?\d{1,12})=(-?\d{1,12})")
ABANDON = "x"  # the segment that gives an attempt up, compact notation
AGAIN = "try again"  # the same in natural notation
GIVEN_UP = re.compile(rf"(?:^|[;\n])\s*{ABANDON}\s*[;\n]|{AGAIN}")


@dataclass(frozen=True)
class CountdownOracle:
    """Steps combine two of the numbers at hand: "3*5=15" ("3 * 5 = 15" in natural notation). The
    answer is an expression in all the numbers."""

    notation: str
    kinds: tuple[str, ...] = ("arithmetic", "wrong-operator", "unfinished", "wrong-answer", "format")
    styles: tuple[str, ...] = ("plain", "direct", "verbose", "search", "search-1", "search-3", "search-6")
    """plain: the steps, then the answer. direct: the answer. verbose: every step re-checked one to
    three times. search: one to three attempts are tried and given up first; search-K: exactly K."""

    def solve(self, problem: Problem) -> Solution:
        """Found by search; the entry's own expression is not looked at."""
        return self._say(_start(problem), self._solved(problem))

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The first step of a way from here to the target; None if there is none."""
        pool = _played(_start(problem), [_read(s) for s in steps])
        ops = None if pool is None else search(tuple(v for v, _ in pool), _target(problem))
        return self._step(ops[0]) if ops else None

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether the step uses numbers at hand, is reckoned right, and leaves the target in reach."""
        pool = _played(_start(problem), [_read(s) for s in steps])
        op = _read(step)
        if pool is None or op is None or result(*op[:3]) != op[3]:
            return False
        after = _played(pool, [op])
        return after is not None and search(tuple(v for v, _ in after), _target(problem)) is not None

    def parse(self, text: str) -> Solution:
        """Attempts that were given up are left out of the steps."""
        return parse(GIVEN_UP.split(text)[-1], self.notation)

    def explain(self, problem: Problem, text: str) -> str:
        """What the answer comes to, or which numbers it misuses."""
        _, answer = self.parse(text)
        value, used = evaluate(answer)
        if value is None:
            return "not an expression"
        if sorted(used) != sorted(v for v, _ in _start(problem)):
            return "must use each number once"
        return f"gives {value}, not {_target(problem)}"

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """What to look for, which two numbers to begin with (natural notation only), then the first
        step, the first two, ... but not the last."""
        steps, _ = self.solve(problem)
        first = self._solved(problem)[0]
        joiner = ";" if self.notation == "compact" else "; "
        tiers: list[tuple[str, ...]] = []
        if self.notation == "natural":
            tiers.append(("Combine two numbers at a time, and use every number once.",))
            tiers.append((f"Begin with {first[0]} and {first[2]}.",))
        return tuple(tiers) + tuple((joiner.join(steps[:j]),) for j in range(1, len(steps)))

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """A right completion."""
        return self.write(problem, self.solve(problem), style, keys).text

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """Every step can slip; an unfinished solution or a wrong answer shows in the answer."""
        if kind not in self.kinds:
            raise unknown("fault", kind, self.kinds)
        n = len(_start(problem)) - 1
        return tuple(range(n)) if kind in ("arithmetic", "wrong-operator") else (n,)

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """A solution with the first of `faults` in it: what follows builds on the slip, and seems to
        reach the target where that can be."""
        pool, ops, target = _start(problem), self._solved(problem), _target(problem)
        if not faults:
            return self._say(pool, ops)
        at, kind = min(faults.items())
        draw = keys.at("slip", at).numpy()
        if kind == "arithmetic":
            return self._say(pool, _slipped(pool, ops, at, target, draw))
        if kind == "wrong-operator":
            return self._say(pool, _other_operator(pool, ops, at, target, draw))
        steps, _ = self._say(pool, ops)
        if kind == "format":
            return steps, MISSING
        if kind == "unfinished":
            return steps[:-1], self._say(pool, ops[:-1])[1]
        return steps, self._say(pool, _other_operator(pool, ops, len(ops) - 1, target, draw))[1]

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """Raises UserError for a style that is not one of `styles`."""
        steps, answer = solution
        n = len(steps)
        attempts = re.fullmatch(r"search(?:-(\d+))?", style)
        pieces = stated(steps, "plain" if attempts else style, self.styles, keys)
        if attempts:
            pieces = [*self._dead_ends(problem, attempts[1], keys), *pieces]
        return lay_out([*pieces, (answer, n)], n, self.notation)

    def _dead_ends(self, problem: Problem, number: str | None, keys: Keys) -> list[Piece]:
        """Attempts that use up all numbers and miss the target, each ended by giving up."""
        draw = keys.at("search").numpy()
        wanted = int(number) if number else int(draw.integers(1, 4))
        target = _target(problem)
        seen: list[tuple[Op, ...]] = []
        for _ in range(20 * wanted):
            if len(seen) == wanted:
                break
            ops = _random_ops(_start(problem), draw)
            if ops and ops[-1][3] != target and ops not in seen:
                seen.append(ops)
        pieces: list[Piece] = []
        for ops in seen:
            pieces += [(self._step(op), None) for op in ops]
            compact = self.notation == "compact"
            pieces.append((ABANDON if compact else f"{ops[-1][3]} is not {target}: {AGAIN}", None))
        return pieces

    def _solved(self, problem: Problem) -> tuple[Op, ...]:
        numbers = tuple(v for v, _ in _start(problem))
        ops = search(numbers, _target(problem))
        if ops is None:
            raise ValueError(f"problem {problem.id}: {_target(problem)} cannot be made of {numbers}")
        return ops

    def _say(self, pool: Pool, ops: Sequence[Op]) -> Solution:
        return tuple(self._step(op) for op in ops), self._expression(_tree(pool, ops))

    def _step(self, op: Op) -> str:
        text = f"{op[0]} {op[1]} {op[2]} = {op[3]}"
        return squeeze(text) if self.notation == "compact" else text

    def _expression(self, tree: Tree) -> str:
        text = express(tree)
        return squeeze(text) if self.notation == "compact" else text


def _start(problem: Problem) -> Pool:
    return tuple((int(v), int(v)) for v in problem.meta["entry"]["metadata"]["numbers"])


def _target(problem: Problem) -> int:
    return int(problem.meta["entry"]["metadata"]["target"])


def _read(step: str) -> Op | None:
    found = STEP.fullmatch(squeeze(step))
    return (int(found[1]), found[2], int(found[3]), int(found[4])) if found else None


def _played(pool: Pool, ops: Sequence[Op | None]) -> Pool | None:
    """The numbers at hand after operations, taken at their word; None if one uses what is not there."""
    for op in ops:
        if op is None:
            return None
        a, sign, b, c = op
        left = next((i for i, (v, _) in enumerate(pool) if v == a), None)
        right = next((i for i, (v, _) in enumerate(pool) if v == b and i != left), None)
        if left is None or right is None:
            return None
        rest = tuple(item for i, item in enumerate(pool) if i not in (left, right))
        pool = (*rest, (c, (sign, pool[left][1], pool[right][1])))
    return pool


def _tree(pool: Pool, ops: Sequence[Op]) -> Tree:
    """The expression that the operations have made."""
    after = _played(pool, ops)
    assert after is not None
    return after[-1][1]


def _random_ops(pool: Pool, draw: np.random.Generator) -> tuple[Op, ...]:
    """Random positive whole-number operations until one number is left."""
    values = [v for v, _ in pool]
    ops: list[Op] = []
    while len(values) > 1:
        i, j = (int(k) for k in draw.permutation(len(values))[:2])
        a, b = max(values[i], values[j]), min(values[i], values[j])
        signs = [s for s in OPERATORS if (c := result(a, s, b)) is not None and c > 0]
        sign = signs[int(draw.integers(len(signs)))] if signs else "+"
        c = result(a, sign, b)
        assert c is not None
        ops.append((a, sign, b, c))
        values = [v for k, v in enumerate(values) if k not in (i, j)] + [c]
    return tuple(ops)


def _slipped(pool: Pool, ops: Sequence[Op], at: int, target: int, draw: np.random.Generator) -> Sequence[Op]:
    """The operations with a wrong result at step `at`, and a way on from there: to the target if one
    exists, else anywhere. The last step claims the target for other operations. In truth the
    expression misses the target."""
    before = _played(pool, ops[:at])
    assert before is not None
    last = len(before) == 2
    for _ in range(100):
        a, sign, b, right = _random_ops(before, draw)[0] if last else ops[at]
        wrong = target if last and right != target else right + int(draw.choice((-3, -2, -1, 1, 2, 3)))
        after = _played(before, [(a, sign, b, wrong)])
        assert after is not None
        rest = search(tuple(v for v, _ in after), target) or _random_ops(after, draw)
        slipped = (*ops[:at], (a, sign, b, wrong), *rest)
        if wrong > 0 and evaluate(express(_tree(pool, slipped)))[0] != target:
            return slipped
    return _other_operator(pool, ops, at, target, draw)  # another slip that is reckoned wrong


def _other_operator(pool: Pool, ops: Sequence[Op], at: int, target: int, draw: np.random.Generator) -> Sequence[Op]:
    """The operations with another operator at step `at`, its result left as it was; the expression
    misses the target where it can."""
    a, _, b, c = ops[at]
    wrong = [(*ops[:at], (a, s, b, c), *ops[at + 1 :]) for s in "+-*" if result(a, s, b) != c]
    missing = [w for w in wrong if evaluate(express(_tree(pool, w)))[0] != target]
    options = missing or wrong
    return options[int(draw.integers(len(options)))]
