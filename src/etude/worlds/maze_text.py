"""How mazes, searches in them and plans are written and read.

Compact notation writes a cell as one letter (two, row and column, above 7 x 7) and a number as one digit in base 62
(two above 7 x 7):

    prompt       start goal "#" walls "="             or   start goal ":" passages as pairs of cells "="
    completion   "+" cell cost estimate (create), "-" cell cost estimate (close), ..., then ">" cell for each step

Natural notation writes "create ROW COLUMN cCOST cESTIMATE", "close ..." and "plan ROW COLUMN" on lines. Costs may be
left out. Whatever stands before the first plan clause is the trace, and is measured but not judged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters, digits
from typing import TYPE_CHECKING, Literal

from etude.worlds.search import Clause

if TYPE_CHECKING:
    from etude.worlds.maze import Maze

SMALL = 7  # side of the largest maze whose cells have one letter each
LARGEST = 26
NUMERALS = digits + ascii_letters


@dataclass(frozen=True)
class MazeText:
    """How mazes of one size are written. `grammar` has for each kind of clause a pattern whose group `cell` is where it
    is and whose group `cost`, which may be missing, is what it costs."""

    n: int
    notation: str

    @property
    def joiner(self) -> str:
        """What stands between two clauses."""
        return "" if self.notation == "compact" else "\n"

    @cached_property
    def grammar(self) -> Mapping[str, str]:
        """Patterns of create, close and plan clauses, each with what joins it to the next."""
        if self.notation == "natural":
            cell, cost = r"(?P<cell>\d{1,2} \d{1,2})", r"(?P<cost> c\d{1,3} c\d{1,3})?"
            return {k: rf"{k} {cell}{'' if k == 'plan' else cost}(?:\n|\Z)" for k in ("create", "close", "plan")}
        w = self._width
        cell, cost = rf"(?P<cell>[a-zA-Z]{{{w}}})", rf"(?P<cost>[0-9a-zA-Z]{{{2 * w}}})?"
        return {"create": rf"\+{cell}{cost}", "close": rf"-{cell}{cost}", "plan": rf">{cell}"}

    @property
    def modes(self) -> Mapping[str, str]:
        """What a completion begins with that goes straight to the plan ("fast") or searches first ("slow")."""
        return {"fast": ">", "slow": "+"} if self.notation == "compact" else {"fast": "plan", "slow": "create"}

    def cell(self, cell: int) -> str:
        """A cell's name."""
        row, column = divmod(cell, self.n)
        if self.notation == "natural":
            return f"{row} {column}"
        return ascii_letters[cell] if self._width == 1 else ascii_letters[row] + ascii_letters[column]

    def clause(self, clause: Clause[int]) -> str:
        """A clause of a trace."""
        costs = (clause.cost, clause.estimate)
        if self.notation == "natural":
            return f"{clause.kind} {self.cell(clause.node)} c{costs[0]} c{costs[1]}"
        return ("+" if clause.kind == "create" else "-") + self.cell(clause.node) + "".join(map(self._numeral, costs))

    def plan(self, way: Sequence[int]) -> str:
        """A plan."""
        return self.joiner.join(f"{'>' if self.notation == 'compact' else 'plan '}{self.cell(c)}" for c in way)

    def prompt(self, maze: Maze) -> str:
        """What is asked."""
        start, goal = self.cell(maze.start), self.cell(maze.goal)
        if self.notation == "compact":
            if maze.passages is None:
                return f"{start}{goal}#{''.join(map(self.cell, maze.walls))}="
            return f"{start}{goal}:{''.join(self.cell(a) + self.cell(b) for a, b in maze.passages)}="
        if maze.passages is None:
            where = f"Walls: {', '.join(map(self.cell, maze.walls)) or 'none'}."
        else:
            where = f"Passages: {', '.join(f'{self.cell(a)} - {self.cell(b)}' for a, b in maze.passages)}."
        return (
            f"Find a shortest way through a maze of {self.n} x {self.n} cells from {start} to {goal} (row and column, "
            f"counted from 0). {where} You may first search, on lines `create ROW COLUMN cCOST cESTIMATE` and `close "
            "ROW COLUMN cCOST cESTIMATE`. End with the way, start and goal included, on lines `plan ROW COLUMN`."
        )

    def read(self, text: str) -> tuple[str, tuple[int, ...] | None]:
        """(trace, way): what stands before the first plan clause, and the plan; None where there is no plan, or more
        than plan clauses follow."""
        mark = ">" if self.notation == "compact" else "plan"
        trace, found, rest = text.partition(mark)
        rest = (found + rest).rstrip()
        cells: list[int] = []
        at = 0
        pattern = re.compile(self.grammar["plan"])
        while clause := pattern.match(rest, at):
            cells.append(self._number(clause["cell"]))
            at = clause.end()
        return trace, tuple(cells) if cells and at == len(rest) else None

    def symbols(self, text: str) -> int:
        """How long a text is: characters, or words in natural notation."""
        return len(text) if self.notation == "compact" else len(text.split())

    @cached_property
    def clauses(self) -> re.Pattern[str]:
        """One clause of a trace, with or without its costs."""
        return re.compile("|".join(re.sub(r"\?P<\w+>", "?:", self.grammar[kind]) for kind in ("create", "close")))

    def follows_grammar(self, trace: str) -> bool:
        """Whether a trace is made of whole create and close clauses."""
        return re.fullmatch(f"(?:{self.clauses.pattern})*", trace) is not None

    def parse_clause(self, text: str) -> Clause[int] | None:
        """The clause that `text` is, with its costs; None if it is none."""
        kinds: tuple[Literal["create", "close"], ...] = ("create", "close")
        for kind in kinds:
            found = re.fullmatch(self.grammar[kind], text)
            if found and found["cost"]:
                return Clause(kind, self._number(found["cell"]), *self._costs(found["cost"]))
        return None

    @property
    def _width(self) -> int:
        return 1 if self.n <= SMALL else 2

    def _numeral(self, value: int) -> str:
        out = ""
        for _ in range(self._width):
            value, digit = divmod(value, len(NUMERALS))
            out = NUMERALS[digit] + out
        return out

    def _costs(self, text: str) -> tuple[int, int]:
        if self.notation == "natural":
            cost, estimate = map(int, re.findall(r"\d+", text))
            return cost, estimate
        half = len(text) // 2
        return _base62(text[:half]), _base62(text[half:])

    def _number(self, cell: str) -> int:
        """The cell of a name; -1 for one outside the maze."""
        if self.notation == "natural":
            row, column = map(int, cell.split())
        elif self._width == 2:
            row, column = map(ascii_letters.index, cell)
        else:
            row, column = divmod(ascii_letters.index(cell), self.n)
        return row * self.n + column if row < self.n and column < self.n else -1


def _base62(text: str) -> int:
    value = 0
    for character in text:
        value = value * len(NUMERALS) + NUMERALS.index(character)
    return value
