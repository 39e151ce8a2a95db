"""Outlines of a few sections: a world in which what counts is how long an answer is, not whether it is right.

An answer is k lines "# word word". How many a demonstration has is drawn, or fixed with the same words
elsewhere, so that two demonstrations of one problem differ in nothing but their number of sections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate

import numpy as np

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.types import Outcome, Problem
from etude.worlds.working import Demonstration, Solution

SPLITS = ("train", "test")
WORDS = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
SECTION = re.compile(r"# ([a-z]+) ([a-z]+)")
REWORDED = "-reworded"  # how a style ends that writes other words than the problem's own
LAST = 0.18  # how often a section is the last one
SHARES = (*(LAST * (1 - LAST) ** k for k in range(11)), (1 - LAST) ** 11)  # of 1 to 12 sections, five on average


@dataclass(frozen=True)
class SectionsWorld:
    """A problem shows a topic of two words; any outline answers it.

    `shares[k-1]` is how often a demonstration in the style "drawn" has k sections, next to the other shares.
    An answer is correct (and its reward 1) if it is sections and nothing else; its part `sections` is how many
    it has. Raises UserError on shares that cannot be.
    """

    shares: tuple[float, ...] = SHARES
    seed: int = 0
    name: str = field(default="sections", init=False)
    categories: tuple[str, ...] = field(default=("outline",), init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        if not self.shares or min(self.shares) < 0 or not sum(self.shares) > 0:
            raise UserError(f"sections: shares {self.shares} must be at least 0, and one of them above")

    def size(self, split: str) -> int | None:
        """None: topics are drawn afresh for ever."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """The topic `index` of a split. A fifth of all topics, chosen by their hash, are test topics."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if category is not None and category not in self.categories:
            raise unknown("sections category", category, self.categories)
        draw = Keys(self.seed).at("sections", split, index).numpy()
        topic = _words(draw)
        while _split_of(topic) != split:
            topic = _words(draw)
        return Problem(f"{split}/{index}", f"{topic}:", None, self.categories[0])

    def score(self, problem: Problem, text: str) -> Outcome:
        """Whether `text` is an outline, and how many sections it has."""
        lines = text.strip().split("\n")
        count = sum(bool(SECTION.fullmatch(line)) for line in lines)
        correct = count == len(lines)
        return Outcome(float(correct), correct, str(count), {"sections": float(count)})


@dataclass(frozen=True)
class SectionsOracle:
    """Writes outlines. Its steps are sections, its answer is their number; there is no fault it could make."""

    world: SectionsWorld
    kinds: tuple[str, ...] = ()

    @property
    def styles(self) -> tuple[str, ...]:
        """drawn: as many sections as the world's shares say, of words that are drawn too. 1, 2, ...: so many, of the
        problem's own words. 1-reworded, 2-reworded, ...: so many, of words that are drawn."""
        counts = [str(k + 1) for k in range(len(self.world.shares))]
        return ("drawn", *counts, *(k + REWORDED for k in counts))

    def solve(self, problem: Problem) -> Solution:
        """The problem's own sections, as many as a demonstration has at most."""
        steps = self._sections(Keys(self.world.seed).at("own", problem.id))
        return steps, str(len(steps))

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The problem's own next section."""
        return next(iter(self.solve(problem)[0][len(steps) :]), None)

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether it is a section: one is as right as another."""
        return SECTION.fullmatch(step) is not None

    def parse(self, text: str) -> Solution:
        """Every line is a step."""
        lines = tuple(text.strip().split("\n"))
        return lines, str(len(lines))

    def explain(self, problem: Problem, text: str) -> str:
        """The first line that is no section."""
        return next((f"{line!r} is not a section" for line in self.parse(text)[0] if not SECTION.fullmatch(line)), "")

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """None: any outline will do."""
        return ()

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """An outline."""
        return self.write(problem, self.solve(problem), style, keys).text

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """Nowhere."""
        raise unknown("fault", kind, self.kinds)

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """As `solve`."""
        return self.solve(problem)

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """As many sections as the style says, of the solution or drawn. Raises UserError for a style that is not
        one of `styles`."""
        if style not in self.styles:
            raise unknown("style", style, self.styles)
        shares = np.array(self.world.shares, float)
        count, drawn = style.removesuffix(REWORDED), style.endswith(REWORDED)
        if style == "drawn":
            count, drawn = str(1 + keys.at("count").numpy().choice(len(shares), p=shares / shares.sum())), True
        steps = (self._sections(keys.at("words")) if drawn else solution[0])[: int(count)]
        ends = list(accumulate(len(step) + 1 for step in steps))
        spans = tuple(((end - len(step) - 1, end - 1),) for step, end in zip(steps, ends, strict=True))
        text = "\n".join(steps)
        return Demonstration(text, (*spans, ((0, len(text)),)))

    def _sections(self, keys: Keys) -> tuple[str, ...]:
        draw = keys.numpy()
        return tuple(f"# {_words(draw)}" for _ in self.world.shares)


def _words(draw: np.random.Generator) -> str:
    return " ".join(draw.choice(WORDS, 2).tolist())


def _split_of(topic: str) -> str:
    return "train" if blake2b(topic.encode(), digest_size=4).digest()[0] % 5 else "test"
