"""The oracle of mini sudoku: cells filled one by one, forced ones first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from etude.experience.errors import unknown
from etude.experience.keys import Keys
from etude.experience.types import Problem
from etude.worlds.working import MISSING, Demonstration, Solution, lay_out, parse, stated

SIZE, BOX = 4, 2
DIGITS = range(1, SIZE + 1)
Grid = tuple[int, ...]  # row by row, 0 for an empty cell
STEP = re.compile(r"r(?:ow )?(\d) ?,? ?c(?:olumn )?(\d) ?= ?(\d)")


@dataclass(frozen=True)
class MiniSudokuOracle:
    """Steps fill one cell: "r1c2=4" ("row 1, column 2 = 4" in natural notation). The answer is the
    whole grid: rows on lines of their own, or joined by "/" in compact notation."""

    notation: str
    kinds: tuple[str, ...] = ("conflict", "wrong-answer", "format")
    styles: tuple[str, ...] = ("plain", "direct", "verbose")
    """plain: the steps, then the grid. direct: the grid. verbose: every step re-checked one to three times."""

    def solve(self, problem: Problem) -> Solution:
        """The empty cells in the order in which they are forced, and the filled grid."""
        return self.work(problem, {}, Keys(0))

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The next cell to fill; None when the grid is full, or cannot be filled."""
        grid = self._after(problem, steps)
        move = None if grid is None else _next(grid)
        return None if move is None else self._step(*move)

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether the step fills an empty cell so that the grid can still be filled."""
        before, after = self._after(problem, steps), self._after(problem, (*steps, step))
        return before is not None and after is not None and solve_grid(after) is not None

    def parse(self, text: str) -> Solution:
        """The steps and the grid."""
        return parse(text, self.notation)

    def explain(self, problem: Problem, text: str) -> str:
        """The first cell of the answer that breaks a rule or a clue."""
        digits = [int(d) for d in re.findall(r"\d", self.parse(text)[1])]
        if len(digits) != SIZE * SIZE:
            return f"needs {SIZE * SIZE} digits"
        for cell, (digit, clue) in enumerate(zip(digits, _puzzle(problem), strict=True)):
            row, column = divmod(cell, SIZE)
            if clue not in (0, digit):
                return f"r{row + 1}c{column + 1} was given"
            if digit in {digits[c] for c in _seen_from(cell)} or digit not in DIGITS:
                return f"r{row + 1}c{column + 1} breaks a rule"
        return "right"

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """How to go about it and where to begin (natural notation only), then the first steps: one,
        a quarter, half of them."""
        steps, _ = self.solve(problem)
        joiner = ";" if self.notation == "compact" else "; "
        counts = sorted({1, len(steps) // 4, len(steps) // 2} - {0, len(steps)})
        shown = tuple((joiner.join(steps[:n]),) for n in counts)
        if self.notation == "compact":
            return shown
        begin = steps[0].partition(" =")[0] if steps else "any row"
        return (("Look for a cell that only one digit fits.",), (f"Begin with {begin}.",), *shown)

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """A right completion."""
        return self.write(problem, self.solve(problem), style, keys).text

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """A conflict, a digit that its row, column or box already has, can come at any step."""
        if kind not in self.kinds:
            raise unknown("fault", kind, self.kinds)
        empty = _puzzle(problem).count(0)
        return tuple(range(empty)) if kind == "conflict" else (empty,) if empty else ()

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """The cells in order, those in `faults` filled wrongly, and the grid that comes of it."""
        grid = right = _puzzle(problem)
        moves = _fill(grid)
        steps = []
        for i, (cell, digit) in enumerate(moves):
            taken = sorted({right[c] for c in _seen_from(cell)} - {0})
            right = _put(right, cell, digit)
            if i in faults:
                digit = taken[int(keys.at("slip", i).numpy().integers(len(taken)))]
            steps.append(self._step(cell, digit))
            grid = _put(grid, cell, digit)
        if (kind := faults.get(len(moves))) == "wrong-answer":
            cell, digit = moves[-1]
            grid = _put(grid, cell, digit % SIZE + 1)
        return tuple(steps), MISSING if kind == "format" else self._answer(grid)

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """Raises UserError for a style that is not one of `styles`."""
        steps, answer = solution
        pieces = stated(steps, style, self.styles, keys)
        return lay_out([*pieces, (answer, len(steps))], len(steps), self.notation)

    def _after(self, problem: Problem, steps: Sequence[str]) -> Grid | None:
        """The grid after steps; None if one is no step or fills a full cell."""
        grid = _puzzle(problem)
        for step in steps:
            found = STEP.fullmatch(step.strip())
            if found is None:
                return None
            row, column, digit = (int(g) for g in found.groups())
            if not (row in DIGITS and column in DIGITS and digit in DIGITS):
                return None
            cell = (row - 1) * SIZE + column - 1
            if grid[cell]:
                return None
            grid = _put(grid, cell, digit)
        return grid

    def _step(self, cell: int, digit: int) -> str:
        row, column = divmod(cell, SIZE)
        if self.notation == "compact":
            return f"r{row + 1}c{column + 1}={digit}"
        return f"row {row + 1}, column {column + 1} = {digit}"

    def _answer(self, grid: Grid) -> str:
        rows = [grid[i : i + SIZE] for i in range(0, len(grid), SIZE)]
        if self.notation == "compact":
            return "/".join("".join(map(str, row)) for row in rows)
        return "\n".join(" ".join(map(str, row)) for row in rows)


@lru_cache(maxsize=4096)
def solve_grid(grid: Grid) -> Grid | None:
    """The grid filled, forced cells first and then by trial; None if it cannot be."""
    move = _forced(grid)
    if move is None:
        return grid if all(grid) and _consistent(grid) else None
    cell, digits = move
    for digit in digits:
        if (solved := solve_grid(_put(grid, cell, digit))) is not None:
            return solved
    return None


def _fill(grid: Grid) -> list[tuple[int, int]]:
    """(cell, digit) of every empty cell in the order of `_next`."""
    moves = []
    while (move := _next(grid)) is not None:
        moves.append(move)
        grid = _put(grid, *move)
    return moves


def _next(grid: Grid) -> tuple[int, int] | None:
    """The next cell and its digit."""
    move, solved = _forced(grid), solve_grid(grid)
    return None if move is None or solved is None else (move[0], solved[move[0]])


def _forced(grid: Grid) -> tuple[int, tuple[int, ...]] | None:
    """The empty cell with the fewest digits that fit, and those; None for a full grid."""
    empty = [cell for cell, digit in enumerate(grid) if not digit]
    if not empty:
        return None
    fits = {cell: _fits(grid, cell) for cell in empty}
    cell = min(empty, key=lambda c: (len(fits[c]), c))
    return cell, fits[cell]


def _fits(grid: Grid, cell: int) -> tuple[int, ...]:
    taken = {grid[c] for c in _seen_from(cell)}
    return tuple(d for d in DIGITS if d not in taken)


@lru_cache(maxsize=SIZE * SIZE)
def _seen_from(cell: int) -> tuple[int, ...]:
    """The other cells of the same row, column and box."""
    row, column = divmod(cell, SIZE)
    return tuple(
        c
        for c in range(SIZE * SIZE)
        if c != cell
        and (
            c // SIZE == row or c % SIZE == column or (c // SIZE // BOX, c % SIZE // BOX) == (row // BOX, column // BOX)
        )
    )


def _consistent(grid: Grid) -> bool:
    return all(grid[cell] not in {grid[c] for c in _seen_from(cell)} for cell in range(SIZE * SIZE))


def _put(grid: Grid, cell: int, digit: int) -> Grid:
    return (*grid[:cell], digit, *grid[cell + 1 :])


def _puzzle(problem: Problem) -> Grid:
    return tuple(d for row in problem.meta["entry"]["metadata"]["puzzle"] for d in row)
