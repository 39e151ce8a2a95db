"""Mazes on a grid of n x n cells: walls at random, or a tree of passages in which every way is unique.

The configurable world behind experiments on planning: a problem is a maze with a start and a goal, an answer is a
shortest way, perhaps after the trace of the search that found it (arXiv 2402.14083, section 3). Cells are counted row
by row; the way of a plan holds both its ends.

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
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from string import ascii_letters, digits
from typing import Literal, get_args

import numpy as np

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.types import Floats, Outcome, Problem
from etude.worlds.search import Clause, astar, distances, is_way

SPLITS = ("train", "test")
DRAWS = 2000  # how often a maze is redrawn until it falls into the split and its way is long enough
SMALL = 7  # side of the largest maze whose cells have one letter each
LARGEST = 26
NUMERALS = digits + ascii_letters
STEPS = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left
Walls = Literal["random", "dfs"]


@dataclass(frozen=True)
class Maze:
    """n x n cells of which `walls` are blocked. With `passages`, pairs (a, b) of cells, a < b, one can go between
    those alone; without (None), between all free neighbours."""

    n: int
    start: int
    goal: int
    walls: tuple[int, ...] = ()
    passages: tuple[tuple[int, int], ...] | None = None

    @cached_property
    def ways(self) -> Mapping[int, tuple[int, ...]]:
        """The neighbours of every free cell: up, right, down, left."""
        blocked, joined = set(self.walls), None if self.passages is None else set(self.passages)
        found = {}
        for cell in sorted(set(range(self.n * self.n)) - blocked):
            near = [c for c in _beside(cell, self.n) if c not in blocked]
            found[cell] = tuple(c for c in near if joined is None or (min(c, cell), max(c, cell)) in joined)
        return found

    def neighbours(self, cell: int) -> tuple[int, ...]:
        """Where one can go from a cell."""
        return self.ways.get(cell, ())

    def estimate(self, cell: int) -> int:
        """Rows and columns between a cell and the goal."""
        (a, b), (c, d) = divmod(cell, self.n), divmod(self.goal, self.n)
        return abs(a - c) + abs(b - d)

    def search(self, draw: np.random.Generator | None = None) -> tuple[tuple[Clause[int], ...], tuple[int, ...]]:
        """(trace, plan) of A*, with random ties and order of children if there is a `draw`. Raises ValueError where
        there is no way."""
        clauses, plan = astar(self.start, self.goal, self.neighbours, self.estimate, draw)
        if plan is None:
            raise ValueError("the goal of this maze cannot be reached")
        return clauses, plan

    @cached_property
    def shortest(self) -> int | None:
        """Steps of a shortest way; None if there is no way."""
        return distances(self.start, self.neighbours).get(self.goal)

    def planes(self) -> Floats:
        """f32[6, n, n]: whether one can go up, right, down and left from each cell, where the start is, and the
        goal. A wall is a cell that lets one go nowhere."""
        out = np.zeros((6, self.n, self.n), np.float32)
        for cell, near in self.ways.items():
            row, column = divmod(cell, self.n)
            for i, (down, right) in enumerate(STEPS):
                inside = 0 <= row + down < self.n and 0 <= column + right < self.n
                out[i, row, column] = inside and (row + down) * self.n + column + right in near
        for i, cell in ((4, self.start), (5, self.goal)):
            out[i].flat[cell] = 1
        return out


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


@dataclass(frozen=True)
class MazeWorld:
    """Mazes of n x n cells whose start and goal are at least `least` steps apart.

    `kind` "random": a share of the cells, drawn from `density`, are walls; mazes without a way, or with one that is
    too short, are drawn again. `kind` "dfs": a spanning tree of passages, by depth-first search from a random cell, so
    that the way is unique. A fifth of all mazes, by the hash of walls, passages, start and goal, are test mazes.

    An answer is correct if its way is valid and of least length. `parts`: `valid`, `optimal`, `plan` (steps of the
    way), `trace` (symbols before the plan: characters, or words in natural notation), `fast` (1 without a trace),
    `grammar` (1 if the trace is made of whole clauses), and `swc`, success weighted by cost: shortest / actual steps
    of a valid way, else 0. Raises UserError on options that cannot be.
    """

    n: int = 5
    kind: Walls = "random"
    density: tuple[float, float] = (0.3, 0.5)  # smallest and largest share of walls
    least: int = 4  # steps from start to goal
    notation: str = "compact"
    seed: int = 0
    name: str = field(default="grid_maze", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", tuple(self.density))
        if self.notation not in ("compact", "natural"):
            raise unknown("notation", self.notation, ("compact", "natural"))
        if self.kind not in get_args(Walls):
            raise unknown("kind of maze", self.kind, get_args(Walls))
        if not 2 <= self.n <= LARGEST:
            raise UserError(f"grid_maze: n must be 2 to {LARGEST}, not {self.n}")
        if len(self.density) != 2 or not 0 <= self.density[0] <= self.density[1] < 1:
            raise UserError(f"grid_maze: density {self.density} must be (smallest, largest) share of walls, below 1")
        if not 1 <= self.least < self.n * self.n:
            raise UserError(f"grid_maze: least must be 1 to {self.n * self.n - 1} steps, not {self.least}")

    @property
    def categories(self) -> tuple[str, ...]:
        """The kind of mazes."""
        return (self.kind,)

    @property
    def text(self) -> MazeText:
        """How this world writes."""
        return MazeText(self.n, self.notation)

    @property
    def grammar(self) -> Mapping[str, str]:
        """The clauses of a completion; see `MazeText`."""
        return self.text.grammar

    def size(self, split: str) -> int | None:
        """None: mazes are drawn afresh for ever."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """The problem `index` of a split; `meta` holds what `maze_of` reads. Raises UserError where no such maze
        turns up."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if category not in (None, self.kind):
            raise unknown("maze category", category, self.categories)
        maze = _drawn(self, split, index)
        assert maze.shortest is not None
        meta = {
            "n": maze.n,
            "start": maze.start,
            "goal": maze.goal,
            "walls": maze.walls,
            "passages": maze.passages,
            "shortest": maze.shortest,
            "modes": dict(self.text.modes),
        }
        answer = self.text.plan(maze.search()[1])
        return Problem(f"{split}/{index}", self.text.prompt(maze), answer, self.kind, float(maze.shortest), meta=meta)

    def score(self, problem: Problem, text: str) -> Outcome:
        """Reward 1 if the plan that ends `text` is a shortest way, else 0."""
        maze, shortest = maze_of(problem), int(problem.meta["shortest"])
        trace, way = self.text.read(text)
        valid = way is not None and is_way(way, maze.start, maze.goal, maze.neighbours)
        taken = len(way) - 1 if way is not None else 0
        optimal = valid and taken == shortest
        parts = {
            "valid": float(valid),
            "optimal": float(optimal),
            "plan": float(taken),
            "trace": float(self.text.symbols(trace)),
            "fast": float(not trace),
            "grammar": float(self.text.follows_grammar(trace)),
            "swc": shortest / max(taken, shortest) if valid else 0.0,
        }
        return Outcome(float(optimal), optimal, self.text.plan(way) if valid and way else None, parts)


def maze_of(problem: Problem) -> Maze:
    """The maze of a problem."""
    m = problem.meta
    passages = None if m["passages"] is None else tuple((int(a), int(b)) for a, b in m["passages"])
    return Maze(m["n"], m["start"], m["goal"], tuple(m["walls"]), passages)


@lru_cache(maxsize=16384)
def _drawn(world: MazeWorld, split: str, index: int) -> Maze:
    draw = Keys(world.seed).at("grid_maze", split, index).numpy()
    for _ in range(DRAWS):
        maze = _random(world, draw) if world.kind == "random" else _tree(world, draw)
        if _split_of(maze) == split and maze.shortest is not None and maze.shortest >= world.least:
            return maze
    raise UserError(
        f"grid_maze: no {split} maze of {world.n} x {world.n} cells with a way of {world.least} steps or more turned "
        "up: ask for shorter ways or fewer walls"
    )


def _random(world: MazeWorld, draw: np.random.Generator) -> Maze:
    """Walls, start and goal drawn uniformly, for a density drawn uniformly."""
    cells = world.n * world.n
    count = min(round(draw.uniform(*world.density) * cells), cells - 2)
    order = draw.permutation(cells).tolist()
    return Maze(world.n, order[count], order[count + 1], tuple(sorted(order[:count])))


def _tree(world: MazeWorld, draw: np.random.Generator) -> Maze:
    """Passages by depth-first search: from the newest cell to a random new neighbour, or back where there is none."""
    order = draw.permutation(world.n * world.n).tolist()
    stack, seen, passages = [order[0]], {order[0]}, []
    while stack:
        fresh = [c for c in _beside(stack[-1], world.n) if c not in seen]
        if not fresh:
            stack.pop()
            continue
        cell = fresh[int(draw.integers(len(fresh)))]
        passages.append((min(cell, stack[-1]), max(cell, stack[-1])))
        seen.add(cell)
        stack.append(cell)
    start, goal = draw.permutation(world.n * world.n)[:2].tolist()
    return Maze(world.n, start, goal, (), tuple(sorted(passages)))


def _beside(cell: int, n: int) -> list[int]:
    """The cells above, right, below and left of a cell of the grid."""
    row, column = divmod(cell, n)
    near = [(row + down, column + right) for down, right in STEPS]
    return [r * n + c for r, c in near if 0 <= r < n and 0 <= c < n]


def _split_of(maze: Maze) -> str:
    content = repr((maze.n, maze.walls, maze.passages, maze.start, maze.goal))
    return "train" if blake2b(content.encode(), digest_size=4).digest()[0] % 5 else "test"


def _base62(text: str) -> int:
    value = 0
    for character in text:
        value = value * len(NUMERALS) + NUMERALS.index(character)
    return value
