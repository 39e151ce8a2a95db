"""The oracle of mazes: A* with random ties, its trace and then its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from etude.experience.errors import unknown
from etude.experience.keys import Keys
from etude.experience.types import Problem
from etude.worlds.maze import maze_of
from etude.worlds.maze_text import MazeText
from etude.worlds.search import AStar, is_way
from etude.worlds.working import MISSING, Demonstration, Solution, lay_out, stated


@dataclass(frozen=True)
class MazeOracle:
    """Steps are the clauses of a search, the answer is the plan. Which of equally good nodes is closed first, and in
    which order children are created, is drawn from the keys of a demonstration."""

    text: MazeText
    kinds: tuple[str, ...] = ("detour", "wrong-answer", "format")
    styles: tuple[str, ...] = ("plain", "direct")
    """plain: the complete trace, then the plan. direct: the plan."""

    def solve(self, problem: Problem) -> Solution:
        """One search and its plan."""
        return self.work(problem, {}, Keys(0))

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """A clause that may come next; None once the goal is closed, or if a step was not right."""
        search = self._replay(problem, steps)
        options = search.options() if search else []
        return self.text.clause(options[0]) if options else None

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether A* may go on with this clause, after clauses that were right."""
        return self._replay(problem, (*steps, step)) is not None

    def parse(self, text: str) -> Solution:
        """The clauses that a completion begins with, and what follows them."""
        steps = []
        at = 0
        while found := self.text.clauses.match(text, at):
            steps.append(found.group().strip())
            at = found.end()
        return tuple(steps), text[at:].strip()

    def explain(self, problem: Problem, text: str) -> str:
        """What is wrong with the plan."""
        maze = maze_of(problem)
        _, way = self.text.read(text)
        if way is None:
            return "no plan"
        if not is_way(way, maze.start, maze.goal, maze.neighbours):
            return "not a way from the start to the goal"
        return "right" if len(way) - 1 == maze.shortest else "there is a shorter way"

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """The plan up to its first step, its second, ... but not the last."""
        _, way = self.text.read(self.solve(problem)[1])
        assert way is not None
        return tuple((self.text.plan(way[:j]),) for j in range(2, len(way)))

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """A right completion."""
        return self.write(problem, self.work(problem, {}, keys), style, keys).text

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """Every fault is one of the plan, which comes after at most so many clauses."""
        if kind not in self.kinds:
            raise unknown("fault", kind, self.kinds)
        return (5 * self.text.n * self.text.n,)

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """A search, and its plan: with a step back and forth in it (detour), without one of its cells (wrong-answer),
        or in no form."""
        clauses, way = maze_of(problem).search(keys.at("search").numpy())
        steps = tuple(map(self.text.clause, clauses))
        kind = next(iter(faults.values()), None)
        draw = keys.at("slip").numpy()
        if kind == "format":
            return steps, MISSING
        if kind == "detour":
            at = int(draw.integers(len(way) - 1))
            way = (*way[: at + 2], *way[at:])
        if kind == "wrong-answer":
            at = int(draw.integers(len(way)))
            way = (*way[:at], *way[at + 1 :])
        return steps, self.text.plan(way)

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """Raises UserError for a style that is not one of `styles`."""
        steps, answer = solution
        pieces = stated(steps, style, self.styles, keys)
        return lay_out([*pieces, (answer, len(steps))], len(steps), "compact", self.text.joiner)

    def _replay(self, problem: Problem, steps: Sequence[str]) -> AStar[int] | None:
        """The search after clauses; None if one of them may not come where it stands."""
        maze = maze_of(problem)
        search = AStar(maze.start, maze.goal, maze.neighbours, maze.estimate)
        for step in steps:
            clause = self.text.parse_clause(step.strip())
            if clause is None or not search.take(clause):
                return None
        return search
