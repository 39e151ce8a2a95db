"""Mazes on a grid of n x n cells: walls at random, or a tree of passages in which every way is unique.

The configurable world behind experiments on planning: a problem is a maze with a start and a goal, an answer is a
shortest way, perhaps after the trace of the search that found it (arXiv 2402.14083, section 3). Cells are counted row
by row; the way of a plan holds both its ends. `maze_text` has the notations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.types import Floats, Outcome, Problem
from etude.worlds.maze_text import LARGEST, MazeText
from etude.worlds.search import Clause, astar, distances, is_way

SPLITS = ("train", "test")
DRAWS = 2000  # how often a maze is redrawn until it falls into the split and its way is long enough
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
