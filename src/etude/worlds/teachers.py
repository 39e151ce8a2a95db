"""Weak teachers of labelled points: linear rules whose cosine with the truth is chosen, and whose errors are shared.

In a logistic world of two classes with unit true direction u = (W_1 - W_0) / |W_1 - W_0|, a teacher of alignment a
labels a point x by the sign of (a u + sqrt(1 - a^2) e) . x, with an error e of unit length across u, so that its
accuracy on x ~ N(0, I) is 1 - arccos(a) / pi. Teachers of one family share most of their errors (arXiv 2507.06187,
section 6): e = sqrt(rho) b + sqrt(1 - rho) b_a with b common to all, b_a the teacher's own and rho = 0.9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from etude.experience.errors import unknown
from etude.experience.keys import Keys
from etude.experience.types import Problem
from etude.worlds.points import PointsWorld
from etude.worlds.working import Demonstration, Solution

SHARED = 0.9  # rho, the common share of the errors within a family
APART = "-apart"  # how the style of a teacher ends that shares its errors with nobody


@dataclass(frozen=True)
class PointsOracle:
    """The label of a point, and what teachers take it for. Its only step is its answer; it makes no other faults.

    A run's seed (that of the keys) draws the errors of its teachers, the same for all points.
    """

    world: PointsWorld
    kinds: tuple[str, ...] = ()

    @property
    def styles(self) -> tuple[str, ...]:
        """plain: the label. 0.00, 0.05, ... 0.95: a teacher of that alignment. 0.00-apart, ...: one of no family."""
        alignments = [f"{percent / 100:.2f}" for percent in range(0, 100, 5)]
        return ("plain", *alignments, *(a + APART for a in alignments))

    def teacher(self, style: str, seed: int) -> NDArray[np.float64]:
        """f64[D]: the direction, of unit length, by which the teachers of a run with that seed label points."""
        truth = self.world.weights @ (-1.0, 1.0)
        truth = truth / np.linalg.norm(truth)
        alignment = float(style.removesuffix(APART))
        across = [self._across(truth, Keys(seed).at("teacher", name)) for name in ("family", style)]
        shared = 0.0 if style.endswith(APART) else SHARED
        error = np.sqrt(shared) * across[0] + np.sqrt(1 - shared) * across[1]
        return alignment * truth + np.sqrt(1 - alignment**2) * error / np.linalg.norm(error)

    def _across(self, truth: NDArray[np.float64], keys: Keys) -> NDArray[np.float64]:
        """f64[D]: a direction across the true one, of unit length."""
        drawn = keys.numpy().normal(size=len(truth))
        drawn -= (drawn @ truth) * truth
        return drawn / np.linalg.norm(drawn)

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """A class."""
        return self.write(problem, self.solve(problem), style, keys).text

    def solve(self, problem: Problem) -> Solution:
        """No steps, and the label."""
        return (), problem.answer or ""

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
        """No steps."""
        return (), text.strip()

    def explain(self, problem: Problem, text: str) -> str:
        """That it is the wrong class."""
        return "the other class"

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """Nowhere."""
        return ()

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """As `solve`."""
        return self.solve(problem)

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """What a teacher takes the point for; in the style "plain" the solution's answer. Raises UserError for a style
        that is not one of `styles`."""
        if style not in self.styles:
            raise unknown("style", style, self.styles)
        text = solution[1]
        if style != "plain":
            text = str(int(self.teacher(style, keys.seed) @ problem.meta["point"] > 0))
        return Demonstration(text, (((0, len(text)),),))


def teaches(world: PointsWorld) -> bool:
    """Whether the world has teachers: two classes, parted by a true direction, points alike in all directions."""
    return (world.kind, world.classes, world.condition) == ("logistic", 2, 1)
