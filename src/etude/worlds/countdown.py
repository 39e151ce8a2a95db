"""Countdown arithmetic: which numbers can be made of others, and what an expression comes to."""

from __future__ import annotations

import ast
from fractions import Fraction
from functools import lru_cache

Tree = int | tuple[str, "Tree", "Tree"]  # an expression
Op = tuple[int, str, int, int]  # a, operator, b, and what is said to come out

OPERATORS = "+-*/"
LONGEST = 200  # characters of an expression that is still looked at


@lru_cache(maxsize=4096)
def search(numbers: tuple[int, ...], target: int) -> tuple[Op, ...] | None:
    """Operations that make `target` of all `numbers`, in whole numbers; None if there are none.

    Goes backwards from the target: one part of the numbers is enumerated, and what the rest must
    give follows. Ways whose every value is positive are preferred.
    """
    for positive in (True, False):
        tree = _Search(numbers, positive).reach((1 << len(numbers)) - 1, target)
        if tree is not None:
            ops: list[Op] = []
            _unfold(tree, ops)
            return tuple(ops)
    return None


class _Search:
    """Subsets of the numbers are bit masks."""

    def __init__(self, numbers: tuple[int, ...], positive: bool) -> None:
        self.numbers = numbers
        self.lowest = 1 if positive else -(10**9)
        self.known: dict[int, dict[int, Tree]] = {}
        self.tried: dict[tuple[int, int], Tree | None] = {}

    def values(self, mask: int) -> dict[int, Tree]:
        """Everything a subset can make."""
        if mask in self.known:
            return self.known[mask]
        found: dict[int, Tree] = {}
        if mask & (mask - 1) == 0:
            number = self.numbers[mask.bit_length() - 1]
            found[number] = number
        for part in _parts(mask):
            for a, left in self.values(part).items():
                for b, right in self.values(mask ^ part).items():
                    for op in OPERATORS:
                        for x, y, p, q in ((a, b, left, right), (b, a, right, left)):
                            value = result(x, op, y)
                            if value is not None and value >= self.lowest:
                                found.setdefault(value, (op, p, q))
        self.known[mask] = found
        return found

    def reach(self, mask: int, target: int) -> Tree | None:
        """A tree over exactly the subset with the value `target`."""
        if mask.bit_count() <= 3:
            return self.values(mask).get(target)
        if (mask, target) not in self.tried:
            self.tried[mask, target] = self._reach(mask, target)
        return self.tried[mask, target]

    def _reach(self, mask: int, t: int) -> Tree | None:
        for part in _parts(mask):
            for a, left in self.values(part).items():
                for op, b, first in _inverse(a, t):
                    if b >= self.lowest and (right := self.reach(mask ^ part, b)) is not None:
                        return (op, left, right) if first else (op, right, left)
        return None


def _inverse(a: int, t: int) -> list[tuple[str, int, bool]]:
    """(operator, b, whether a stands first) with a op b = t, or b op a = t."""
    found = [("+", t - a, True), ("-", a - t, True), ("-", t + a, False)]
    if a and t % a == 0:
        found.append(("*", t // a, True))
    if t and a and a % t == 0:
        found.append(("/", a // t, True))
    if a:
        found.append(("/", t * a, False))
    return found


def _parts(mask: int) -> list[int]:
    """The proper subsets with at most half of the members, smallest first."""
    half = mask.bit_count() // 2
    parts = []
    part = (mask - 1) & mask
    while part:
        if part.bit_count() <= half:
            parts.append(part)
        part = (part - 1) & mask
    return sorted(parts, key=lambda p: (p.bit_count(), p))


def evaluate(text: str) -> tuple[Fraction | None, list[int]]:
    """(value, the numbers used) of an expression in + - * / and brackets; (None, []) for other text."""
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return a + b
            if isinstance(node.op, ast.Sub):
                return a - b
            if isinstance(node.op, ast.Mult):
                return a * b
            if isinstance(node.op, ast.Div):
                return a / b
        raise ValueError("not arithmetic")

    if len(text) > LONGEST:
        return None, []
    try:
        return value(ast.parse(text.strip(), mode="eval").body), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None, []


def express(tree: Tree) -> str:
    """The expression with no more brackets than it needs."""
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    a, b = express(left), express(right)
    if op in "*/":
        a = f"({a})" if not isinstance(left, int) and left[0] in "+-" else a
        weak = not isinstance(right, int) and (right[0] in "+-" or op == "/" or right[0] == "/")
        b = f"({b})" if weak else b
    elif op == "-" and not isinstance(right, int) and right[0] in "+-":
        b = f"({b})"
    return f"{a} {op} {b}"


def _unfold(tree: Tree, ops: list[Op]) -> int:
    if isinstance(tree, int):
        return tree
    a, b = _unfold(tree[1], ops), _unfold(tree[2], ops)
    value = result(a, tree[0], b)
    assert value is not None
    ops.append((a, tree[0], b, value))
    return value


def result(a: int, op: str, b: int) -> int | None:
    """a op b; None for a division that leaves a remainder."""
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    return a // b if b and a % b == 0 else None
