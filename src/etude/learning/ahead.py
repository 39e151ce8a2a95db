"""Collecting ahead of the learner: with `ray.lag` K, experience may come from weights up to K steps old.

Acting and learning then go on at the same time, as in IMPALA (Espeholt et al. 2018, arXiv:1802.01561), and the ratio
of the objective to the policy that acted, whose log-probabilities are in the batch, corrects for the difference.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Clock, Curriculum, Report
from etude.experience.types import Problem

if TYPE_CHECKING:
    from etude.learning.loops import Collected
    from etude.learning.rollouts import Rollouts
    from etude.learning.run import Run

Gather = Callable[[Clock], "Collected"]


class Ahead:
    """`gather` for the steps to come, in order and in the thread of `rollouts`, each with the newest weights when it
    begins. Called with the clock of a step, once a step, from the thread that learns; logs `lag`, the steps between the
    weights that acted and those that learn, which is at most `rollouts.options.lag`.

    What a step's experience cost is charged with that step. A run that is killed loses what was collected ahead:
    resumed, it collects those steps anew, with newer weights and with the problems that come next, so that it ends
    alike in distribution, not bit for bit.
    """

    def __init__(self, gather: Gather, rollouts: Rollouts, costs: Meter, run: Run) -> None:
        self.gather, self.rollouts, self.costs, self.run = gather, rollouts, costs, run
        self._newest = (0, rollouts.weights)  # the step that learns next, and with which weights
        self._begun: deque[Future[tuple[Collected, int, Mapping[str, float]]]] = deque()

    def __call__(self, clock: Clock) -> Collected:
        self._newest = clock.step, self.rollouts.snapshot()
        last = min(clock.step + self.rollouts.options.lag, clock.total - 1)
        for step in range(clock.step + len(self._begun), last + 1):
            self._begun.append(self.rollouts.thread.submit(self._collect, replace(clock, step=step)))
        found, acted, costs = self._begun.popleft().result()
        for kind, n in costs.items():
            self.run.meter.charge(kind, n)
        self.run.log({"lag": clock.step - acted})
        return found

    def _collect(self, clock: Clock) -> tuple[Collected, int, Mapping[str, float]]:
        """A step's experience, the step whose weights acted, and the costs."""
        step, self.rollouts.weights = self._newest
        before = self.costs.read()
        return self.gather(clock), step, self.costs.since(before)


class Locked:
    """A curriculum that one thread draws from while another tells it what came of its draws."""

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        self._lock = threading.Lock()

    def draw(self, n: int, clock: Clock, keys: Keys) -> list[Problem]:
        """The next `n` problems."""
        with self._lock:
            return self.curriculum.draw(n, clock, keys)

    def observe(self, report: Report) -> None:
        """What came of a step, by then some steps ago."""
        with self._lock:
            self.curriculum.observe(report)

    def state_dict(self) -> Mapping[str, Any]:
        with self._lock:
            return self.curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            self.curriculum.load_state_dict(state)
