"""The mixture: problems of several one-turn worlds, each judged and demonstrated by its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.protocols import World
from etude.experience.types import Outcome, Problem
from etude.worlds import working
from etude.worlds.working import Demonstration, Solution, StepOracle


@dataclass(frozen=True)
class MixWorld:
    """Problems of the worlds in `parts`, by name.

    In the split "train" the parts come by `shares`, whole numbers: with 1 and 3, of every four problems one is of the
    first and three are of the second. A part left out has 1, and one with 0 is never trained on. In every other
    split all parts take turns, so that what is no longer trained on is still looked at. A part's problems come
    in its own order, without gaps.

    A problem's category is the name of its part; with `levels` it is PART/CATEGORY, the category being the
    part's own. Raises UserError for parts of many turns or of several notations, and for shares that cannot be.
    """

    parts: Mapping[str, World]
    shares: Mapping[str, int] = field(default_factory=dict)
    levels: bool = False
    name: str = field(default="mix", init=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("mix: there must be at least one part")
        for name, world in self.parts.items():
            if hasattr(world, "env"):
                raise UserError(f"mix: {name!r} is a world of many turns; give worlds of one turn")
        if len(notations := self._notations()) > 1:
            raise UserError(f"mix: all parts must be in one notation, not in {' and '.join(notations)}")
        for name, share in self.shares.items():
            if name not in self.parts:
                raise unknown("part of the mixture,", name, self.parts)
            if not isinstance(share, int) or share < 0:
                raise UserError(f"mix: shares are whole numbers, at least 0, not {name}={share!r}")
        if not any(self._counts("train").values()):
            raise UserError("mix: at least one part needs a share above 0")

    @property
    def notation(self) -> str:
        """That of the parts, natural where none says."""
        return next(iter(self._notations()), "natural")

    @property
    def categories(self) -> tuple[str, ...]:
        """The names of the parts, or with `levels` those of their categories."""
        if not self.levels:
            return tuple(self.parts)
        return tuple(f"{name}/{category}" for name, world in self.parts.items() for category in world.categories)

    def size(self, split: str) -> int | None:
        """How many problems there are until a part has no more; None where no part ends."""
        cycle, counts = self._cycle(split), self._counts(split)
        ends = []
        for name, world in self.parts.items():
            size = world.size(split)
            if size is not None and counts[name]:
                whole, rest = divmod(size, counts[name])
                places = [i for i, part in enumerate(cycle) if part == name]
                ends.append(whole * len(cycle) + places[rest])
        return min(ends, default=None)

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """Problem `index` of the mixture, or of one category. Raises UserError for one that it does not have."""
        if category is not None:
            if category not in self.categories:
                raise unknown("category of the mixture,", category, self.categories)
            part, _, inner = category.partition("/") if self.levels else (category, "", "")
            return self._outer(part, self.parts[part].problem(split, index, inner or None))
        cycle = self._cycle(split)
        whole, at = divmod(index, len(cycle))
        part = cycle[at]
        before = whole * self._counts(split)[part] + cycle[:at].count(part)
        return self._outer(part, self.parts[part].problem(split, before))

    def score(self, problem: Problem, text: str) -> Outcome:
        """The word of the problem's own world."""
        return self.parts[problem.meta["part"]].score(self.inner_problem(problem), text)

    def inner_problem(self, problem: Problem) -> Problem:
        """The problem as its own world gave it."""
        part = problem.meta["part"]
        return replace(problem, id=problem.id.removeprefix(f"{part}:"), category=problem.meta["within"])

    def _outer(self, part: str, problem: Problem) -> Problem:
        category = f"{part}/{problem.category}" if self.levels else part
        meta = {**problem.meta, "part": part, "within": problem.category}
        return replace(problem, id=f"{part}:{problem.id}", category=category, meta=meta)

    def _notations(self) -> list[str]:
        return sorted({world.notation for world in self.parts.values() if hasattr(world, "notation")})

    def _counts(self, split: str) -> dict[str, int]:
        """How often each part comes in one cycle."""
        return {name: self.shares.get(name, 1) if split == "train" else 1 for name in self.parts}

    def _cycle(self, split: str) -> list[str]:
        """The parts in the order of one cycle, each spread evenly over it."""
        counts = self._counts(split)
        places = [((k + 0.5) / n, i, name) for i, (name, n) in enumerate(counts.items()) for k in range(n)]
        return [name for *_, name in sorted(places)]


@dataclass(frozen=True)
class MixOracle:
    """The oracles of a mixture's parts as one. A fault that only some of them know strikes in their problems alone."""

    world: MixWorld
    parts: Mapping[str, StepOracle]

    @property
    def styles(self) -> tuple[str, ...]:
        """Those that every part has."""
        first, *rest = self.parts.values()
        return tuple(s for s in first.styles if all(s in other.styles for other in rest))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that any part has."""
        return tuple(dict.fromkeys(kind for oracle in self.parts.values() for kind in oracle.kinds))

    def solve(self, problem: Problem) -> Solution:
        """As the part's oracle, and so in all that follows."""
        oracle, inner = self._of(problem)
        return oracle.solve(inner)

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        oracle, inner = self._of(problem)
        return oracle.plan(inner, steps)

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        oracle, inner = self._of(problem)
        return oracle.check_step(inner, steps, step)

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        oracle, inner = self._of(problem)
        return oracle.hints(inner)

    def explain(self, problem: Problem, text: str) -> str:
        oracle, inner = self._of(problem)
        return oracle.explain(inner, text)

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        oracle, inner = self._of(problem)
        return oracle.demonstrate(inner, style, keys)

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """None where the problem's own oracle does not know the kind."""
        oracle, inner = self._of(problem)
        return oracle.places(inner, kind) if kind in oracle.kinds else ()

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        oracle, inner = self._of(problem)
        return oracle.work(inner, faults, keys)

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        oracle, inner = self._of(problem)
        return oracle.write(inner, solution, style, keys)

    def parse(self, text: str) -> Solution:
        """The steps and the answer, without knowing of which part they are."""
        return working.parse(text, self.world.notation)

    def _of(self, problem: Problem) -> tuple[StepOracle, Problem]:
        return self.parts[problem.meta["part"]], self.world.inner_problem(problem)
