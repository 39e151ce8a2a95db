"""Oracles: what solves a world's problems step by step, checks, hints, demonstrates, and errs on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.protocols import Oracle, World
from etude.experience.types import Problem
from etude.worlds.chain import ChainWorld
from etude.worlds.choice import ChoiceOracle, ChoiceWorld
from etude.worlds.maze import MazeWorld
from etude.worlds.mixture import MixOracle, MixWorld
from etude.worlds.oracle_countdown import CountdownOracle
from etude.worlds.oracle_grid import MiniSudokuOracle
from etude.worlds.oracle_maze import MazeOracle
from etude.worlds.oracle_sort import SortOracle
from etude.worlds.oracle_sum import chain_oracle, chain_sum_oracle
from etude.worlds.points import PointsWorld
from etude.worlds.sections import SectionsOracle, SectionsWorld
from etude.worlds.star import StarOracle, StarWorld
from etude.worlds.teachers import PointsOracle, teaches
from etude.worlds.textworld import TextWorld, TextWorldOracle
from etude.worlds.working import Demonstration, Fault, Solution, StepOracle

TASKS: dict[str, Callable[[str], StepOracle]] = {
    "chain_sum": chain_sum_oracle,
    "countdown": CountdownOracle,
    "mini_sudoku": MiniSudokuOracle,
    "number_sorting": SortOracle,
}


def load_oracle(world: World, rate: float = 0.0, kinds: Sequence[str] = ()) -> Oracle:
    """The oracle of a world; with a `rate` above 0 one whose demonstrations err (see `FaultyOracle`).

    Raises UserError for a world that has none, naming those that have one.
    """
    oracle = step_oracle(world)
    return faulty(oracle, rate, kinds) if rate > 0 else oracle


def step_oracle(world: World) -> StepOracle:
    """The oracle of a world, never erring, with all that it can do. Raises UserError if there is none."""
    oracle = find_oracle(world)
    if oracle is None:
        known = ", ".join(("chain", "choice", "grid_maze", "points", "sections", "star", "textworld", *TASKS))
        raise UserError(f"world {world.name!r} has no oracle; worlds with one: {known}")
    return oracle


def find_oracle(world: World) -> StepOracle | None:
    """The oracle of a world, or None."""
    inner: World | None = getattr(world, "inner", None)
    if inner is not None:  # a world around another, as retry is
        return find_oracle(inner)
    if isinstance(world, MixWorld):
        parts = {name: oracle for name, part in world.parts.items() if (oracle := find_oracle(part)) is not None}
        return MixOracle(world, parts) if len(parts) == len(world.parts) else None
    if isinstance(world, ChainWorld):
        return chain_oracle(world)
    if isinstance(world, ChoiceWorld):
        return ChoiceOracle(world)
    if isinstance(world, TextWorld):
        return TextWorldOracle(world)
    if isinstance(world, MazeWorld):
        return MazeOracle(world.text)
    if isinstance(world, StarWorld):
        return StarOracle()
    if isinstance(world, PointsWorld) and teaches(world):
        return PointsOracle(world)
    if isinstance(world, SectionsWorld):
        return SectionsOracle(world)
    build = TASKS.get(world.name)
    return build(getattr(world, "notation", "natural")) if build else None


@dataclass(frozen=True)
class FaultyOracle:
    """An oracle whose demonstrations err. What is not a demonstration stays right.

    With `per` "solution" a share `rate` of the demonstrations holds one fault, its kind drawn uniformly
    from those that can strike somewhere in the problem (where none can, there is none), then its place;
    with `per` "step" every step errs with probability `rate`. The draws depend on the problem and the
    keys alone.
    """

    oracle: StepOracle
    rate: float
    kinds: tuple[str, ...]
    per: Literal["solution", "step"] = "solution"

    @property
    def styles(self) -> tuple[str, ...]:
        """Those of the oracle."""
        return self.oracle.styles

    def trace(self, problem: Problem, style: str, keys: Keys) -> Demonstration:
        """A demonstration with its faults: kind, step, and where they stand in the text."""
        planned = self._plan_faults(problem, keys)
        solution = self.oracle.work(problem, planned, keys.at("fault"))
        shown = self.oracle.write(problem, solution, style, keys)
        return replace(shown, faults=tuple(_fault(shown, step, kind) for step, kind in sorted(planned.items())))

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """The text of `trace`."""
        return self.trace(problem, style, keys).text

    def solve(self, problem: Problem) -> Solution:
        """The right solution."""
        return self.oracle.solve(problem)

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """As the oracle."""
        return self.oracle.check_step(problem, steps, step)

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """As the oracle."""
        return self.oracle.hints(problem)

    def _plan_faults(self, problem: Problem, keys: Keys) -> dict[int, str]:
        draw = keys.at("plan", problem.id).numpy()
        if self.per == "solution" and draw.random() >= self.rate:
            return {}
        options = [(step, kind) for kind in self.kinds for step in self.oracle.places(problem, kind)]
        if self.per == "solution":
            kinds = sorted({kind for _, kind in options})
            if not kinds:
                return {}
            kind = kinds[int(draw.integers(len(kinds)))]
            steps = [step for step, k in options if k == kind]
            return {steps[int(draw.integers(len(steps)))]: kind}
        planned = {}
        for step in sorted({step for step, _ in options}):
            kinds = sorted(kind for s, kind in options if s == step)
            if draw.random() < self.rate:
                planned[step] = kinds[int(draw.integers(len(kinds)))]
        return planned


def faulty(
    oracle: StepOracle, rate: float, kinds: Sequence[str] = (), per: Literal["solution", "step"] = "solution"
) -> FaultyOracle:
    """The oracle, erring at `rate` with faults of `kinds` (none given: all that it knows).

    Raises UserError for a rate outside 0 to 1 or a kind the oracle does not know.
    """
    if not 0 <= rate <= 1:
        raise UserError(f"a fault rate lies between 0 and 1, not at {rate}")
    for kind in kinds:
        if kind not in oracle.kinds:
            raise unknown("fault", kind, oracle.kinds)
    return FaultyOracle(oracle, rate, tuple(kinds) or oracle.kinds, per)


def inject(oracle: StepOracle, problem: Problem, kind: str, at: int, style: str, keys: Keys) -> Demonstration:
    """A demonstration with one fault of a kind at one step. Raises UserError where it cannot strike."""
    places = oracle.places(problem, kind)
    if at not in places:
        raise UserError(f"problem {problem.id}: a fault {kind!r} can strike at steps {list(places)}, not {at}")
    shown = oracle.write(problem, oracle.work(problem, {at: kind}, keys), style, keys)
    return replace(shown, faults=(_fault(shown, at, kind),))


def _fault(shown: Demonstration, step: int, kind: str) -> Fault:
    """Where the style leaves the step out, the fault stands in the answer."""
    step = min(step, len(shown.steps) - 1)
    return Fault(kind, step, shown.steps[step] or shown.steps[-1])
