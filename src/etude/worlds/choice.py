"""The choice world: a few possible responses to each context, and preferences that need not be transitive.

Which response is better is a matter of pairs: three good ones beat one another in a cycle, so that no ranking of them
exists and whoever settles on one of them loses to another. It isolates what learning from general preferences is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import exp

import numpy as np
from numpy.typing import NDArray

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.types import Outcome, Problem
from etude.worlds.working import Demonstration, Solution

SPLITS = ("train", "test")
RESPONSES = ("00", "01", "02", "10", "11", "12")
GOOD = 3  # how many of them are in the cycle
DOMINATED = (0.0, -0.5, -1.0)  # qualities of the others
TOP, TRANSITIVE = (2.0, 2.0, 2.0), (4.0, 3.0, 2.0)  # of the good ones, in a cycle or ranked
HABIT = 2.0  # evenness of the habits (Dirichlet)
NONE = -2.0  # quality of whatever is no response
EDGE = 0.9  # how often a response beats its successor in the cycle


@dataclass(frozen=True)
class ChoiceWorld:
    """`contexts` prompts ("ab=" and the like), each with the responses 00 to 12; what begins with none of these is as
    good as any other such text, and worse than all.

    Three responses are good: each beats the next with probability 0.9, the last the first. With `cycle` false they have
    a best and a second best instead. In all other pairs P(a > b) = sigmoid(quality of a - quality of b). Which response
    is which is drawn anew for every context. Both splits have the same contexts, under other names: what is measured
    is what was learnt, as in a game. Raises UserError on sizes that cannot be.
    """

    contexts: int = 20
    cycle: bool = True
    seed: int = 0  # of which response is which
    name: str = field(default="choice", init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.contexts <= 26 * 26:
            raise UserError(f"choice: contexts must be 1 to {26 * 26}, not {self.contexts}")

    @property
    def categories(self) -> tuple[str, ...]:
        """One."""
        return ("choice",)

    def size(self, split: str) -> int | None:
        """None: a context may be met for ever."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """The contexts in turn."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if category not in (None, *self.categories):
            raise unknown("choice category", category or "", self.categories)
        context = index % self.contexts
        prompt = f"{chr(97 + context // 26)}{chr(97 + context % 26)}="
        return Problem(f"{split}/{index}", prompt, category="choice", meta={"context": context})

    def score(self, problem: Problem, text: str) -> Outcome:
        """Reward 1 for a good response, with `cycle` false only for the best one; `parts` name what beat it."""
        kind = self._kind(problem, text)
        good = kind < GOOD if self.cycle else kind == 0
        parsed = text[:2] if kind < len(RESPONSES) else None
        return Outcome(float(good), good, parsed, {"dominated": float(kind >= GOOD)})

    def prefer(self, problem: Problem, a: str, b: str) -> float:
        """The probability that a beats b: P(a, b) + P(b, a) = 1, and 1/2 for two of the same response."""
        i, j = self._kind(problem, a), self._kind(problem, b)
        if self.cycle and i < GOOD and j < GOOD:
            return (0.5, EDGE, 1 - EDGE)[(j - i) % GOOD]
        quality = (*(TOP if self.cycle else TRANSITIVE), *DOMINATED, NONE)
        return 1 / (1 + exp(quality[j] - quality[i]))

    def responses(self, problem: Problem) -> tuple[str, ...]:
        """00 to 12."""
        return RESPONSES

    def _kind(self, problem: Problem, text: str) -> int:
        """0 to 2 for the good responses, up to 5 for the others, 6 for what is none."""
        kinds = _kinds(self.seed, int(problem.meta["context"]))
        return int(kinds[RESPONSES.index(text[:2])]) if text[:2] in RESPONSES else len(RESPONSES)


@lru_cache(maxsize=4096)
def _kinds(seed: int, context: int) -> NDArray[np.int64]:
    return Keys(seed).at("choice", context).numpy().permutation(len(RESPONSES))


@dataclass(frozen=True)
class ChoiceOracle:
    """Knows a good response, and writes what is usually said: every context has habits of its own, shares of the
    responses drawn once, which have nothing to do with what is good. There are no steps and no faults."""

    world: ChoiceWorld
    styles: tuple[str, ...] = field(default=("plain",), init=False)  # by habit
    kinds: tuple[str, ...] = field(default=(), init=False)

    def habits(self, problem: Problem) -> NDArray[np.float64]:
        """f64[6]: how often each response is given, in the order of `responses`."""
        draw = Keys(self.world.seed).at("habits", int(problem.meta["context"])).numpy()
        return draw.dirichlet(np.full(len(RESPONSES), HABIT))

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """A response by habit."""
        return self.write(problem, ((), ""), style, keys).text

    def solve(self, problem: Problem) -> Solution:
        """No steps, and a good response."""
        return (), next(r for r in RESPONSES if self.world.score(problem, r).correct)

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """None: there are no steps."""
        return None

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """No."""
        return False

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """None."""
        return ()

    def parse(self, text: str) -> Solution:
        """The response that a text begins with."""
        return (), text[:2] if text[:2] in RESPONSES else ""

    def explain(self, problem: Problem, text: str) -> str:
        """Whether it is a response at all."""
        return "another response is better" if self.parse(text)[1] else "no response"

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """None."""
        return ()

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """As `solve`."""
        return self.solve(problem)

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """A given answer, or one by habit where there is none. Raises UserError for an unknown style."""
        if style not in self.styles:
            raise unknown("style", style, self.styles)
        drawn = keys.at("habit").numpy().choice(len(RESPONSES), p=self.habits(problem))
        text = solution[1] or RESPONSES[int(drawn)]
        return Demonstration(text, (((0, len(text)),),))
