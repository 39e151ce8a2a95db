"""Path-star graphs: which of several arms leads to the goal cannot be told at the first step, only from the end.

From a centre go `arms` paths of equal length, all with random labels, listed as shuffled edges; asked for is the path
to the end of one of them. After the first step every step is the only edge that goes on, so that a model which learns
to continue a true path learns nothing about where to begin (Bachmann & Nagarajan 2024, arXiv 2403.06963, section 4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from string import ascii_letters

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.types import Outcome, Problem
from etude.worlds.working import MISSING, Demonstration, Solution, lay_out

SPLITS = ("train", "test")
DRAWS = 1000  # how often a graph is redrawn until it falls into the split
STEP = re.compile(r">([a-zA-Z])")
ANSWER = re.compile(r"(?:>[a-zA-Z])+")


@dataclass(frozen=True)
class StarWorld:
    """`arms` paths of `length` nodes, of which the centre is the first, with labels from the first `labels` letters.

    Compact prompts read centre, goal, ":", edges, "="; an answer is ">" and a label for each node after the centre.
    Without `goal` the prompt does not say where to, and nothing better than a guess is possible. A fifth of all graphs,
    by the hash of their arms, are test graphs, whatever goal is asked for and however edges are shuffled. `parts`:
    `first` (the first step is right), `chance` (how often a guess among the arms would have it right) and `valid`
    (every step follows an edge, from the centre on). Raises UserError on sizes that cannot be.
    """

    arms: int = 2
    length: int = 4
    labels: int = 10
    goal: bool = True
    notation: str = "compact"
    seed: int = 0
    name: str = field(default="star", init=False)

    def __post_init__(self) -> None:
        if self.notation not in ("compact", "natural"):
            raise unknown("notation", self.notation, ("compact", "natural"))
        if self.arms < 2 or self.length < 2:
            raise UserError(f"star: arms and length must be at least 2, not {self.arms} and {self.length}")
        nodes = 1 + self.arms * (self.length - 1)
        if not nodes <= self.labels <= len(ascii_letters):
            raise UserError(
                f"star: {self.arms} arms of {self.length} nodes need {nodes} to {len(ascii_letters)} labels, not "
                f"{self.labels}"
            )

    @property
    def categories(self) -> tuple[str, ...]:
        """One, named by arms and length."""
        return (f"{self.arms}x{self.length}",)

    def size(self, split: str) -> int | None:
        """None: graphs are drawn afresh for ever."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """The problem `index` of a split. `meta`: `arms`, each the string of its labels after the centre, and `goal`,
        the index of the arm that is asked for."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if category not in (None, *self.categories):
            raise unknown("star category", str(category), self.categories)
        draw = Keys(self.seed).at("star", split, index).numpy()
        steps = self.length - 1
        for _ in range(DRAWS):
            labels = [ascii_letters[i] for i in draw.permutation(self.labels)[: 1 + self.arms * steps].tolist()]
            centre, rest = labels[0], labels[1:]
            arms = ["".join(rest[i * steps : (i + 1) * steps]) for i in range(self.arms)]
            if _split_of(centre, arms) == split:
                break
        else:
            raise UserError(f"star: no {split} graph of {self.labels} labels turned up: allow more labels")
        goal = int(draw.integers(self.arms))
        edges = [a + b for arm in arms for a, b in zip(centre + arm, arm, strict=False)]
        shuffled = [edges[i] for i in draw.permutation(len(edges)).tolist()]
        prompt = self._prompt(centre, arms[goal][-1] if self.goal else None, shuffled)
        meta = {"centre": centre, "arms": tuple(arms), "goal": goal}
        return Problem(f"{split}/{index}", prompt, written(arms[goal]), self.categories[0], float(steps), meta=meta)

    def _prompt(self, centre: str, goal: str | None, edges: Sequence[str]) -> str:
        if self.notation == "compact":
            return f"{centre}{goal or ''}:{''.join(edges)}="
        asked = f"the path from {centre} to {goal}" if goal else f"a path from {centre}"
        listed = ", ".join(f"{edge[0]} -> {edge[1]}" for edge in edges)
        return f"A graph has the edges {listed}. Give {asked} as the nodes after {centre}, each with > before it."

    def score(self, problem: Problem, text: str) -> Outcome:
        """Reward 1 for the path to the goal, else 0."""
        parsed = text.strip() if ANSWER.fullmatch(text.strip()) else None
        path = "".join(STEP.findall(parsed)) if parsed else ""
        arms = problem.meta["arms"]
        right = arms[problem.meta["goal"]]
        valid = bool(path) and any(arm.startswith(path) for arm in arms)
        correct = path == right
        parts = {"first": float(path[:1] == right[0]), "chance": 1 / self.arms, "valid": float(valid)}
        return Outcome(float(correct), correct, parsed, parts)


@dataclass(frozen=True)
class StarOracle:
    """Steps are the moves before the last, the answer is the last. Its fault is the wrong arm, walked to its end."""

    kinds: tuple[str, ...] = ("wrong-arm", "format")
    styles: tuple[str, ...] = ("plain",)

    def solve(self, problem: Problem) -> Solution:
        """The path."""
        return self.work(problem, {}, Keys(0))

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The next move; None once there are no more, or if one was not right."""
        right = self._moves(problem)[:-1]
        return right[len(steps)] if tuple(steps) == right[: len(steps)] and len(steps) < len(right) else None

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether the moves are those of the path."""
        taken = (*steps, step)
        return taken == self._moves(problem)[: len(taken)]

    def parse(self, text: str) -> Solution:
        """The moves of a completion."""
        moves = tuple(f">{node}" for node in STEP.findall(text))
        return moves[:-1], moves[-1] if moves else ""

    def explain(self, problem: Problem, text: str) -> str:
        """What is wrong with the path."""
        path = "".join(STEP.findall(text))
        arms, goal = problem.meta["arms"], problem.meta["goal"]
        if not path:
            return "no path"
        if not any(arm.startswith(path) for arm in arms):
            return "not along the edges"
        return "right" if path == arms[goal] else "does not end at the goal"

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """The path up to its first move, its second, ... but not the last."""
        moves = self._moves(problem)
        return tuple(("".join(moves[:j]),) for j in range(1, len(moves)))

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """The path."""
        return self.write(problem, self.solve(problem), style, keys).text

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """The first move, or for a broken format the answer."""
        if kind not in self.kinds:
            raise unknown("fault", kind, self.kinds)
        return (0,) if kind == "wrong-arm" else (len(self._moves(problem)) - 1,)

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """The moves, on another arm where that is the fault."""
        arms, goal = problem.meta["arms"], problem.meta["goal"]
        if "wrong-arm" in faults.values():
            others = [i for i in range(len(arms)) if i != goal]
            goal = others[int(keys.at("arm").numpy().integers(len(others)))]
        moves = tuple(f">{node}" for node in arms[goal])
        return moves[:-1], MISSING if "format" in faults.values() else moves[-1]

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """Raises UserError for a style that is not one of `styles`."""
        if style not in self.styles:
            raise unknown("style", style, self.styles)
        steps, answer = solution
        return lay_out([*((step, i) for i, step in enumerate(steps)), (answer, len(steps))], len(steps), "compact", "")

    def _moves(self, problem: Problem) -> tuple[str, ...]:
        return tuple(f">{node}" for node in problem.meta["arms"][problem.meta["goal"]])


def written(path: str) -> str:
    """Nodes as an answer.

    >>> written("bdg")
    '>b>d>g'
    """
    return "".join(f">{node}" for node in path)


def _split_of(centre: str, arms: Sequence[str]) -> str:
    content = repr((centre, sorted(arms)))
    return "train" if blake2b(content.encode(), digest_size=4).digest()[0] % 5 else "test"
