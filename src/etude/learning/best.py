"""Early stopping by validation: of all the weights a run passes through, those that did best are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from etude.acting.agent import PolicyAgent
from etude.experience.errors import UserError
from etude.experience.protocols import Clock, Limits, Policy
from etude.experience.types import Law, Problem, Prompt
from etude.learning.setting import Setting, acting_for
from etude.learning.shared_acting import shared_acting
from etude.learning.weights import Weights
from etude.worlds.data import as_text

VALIDATION = 1 << 21  # training problems of an endless world from this index on are kept for validation


class Best:
    """The trainable weights of `policy` at the highest score that was heard, the first of equals.

    State for a run to track: what is kept survives a kill. One copy of the weights is held.
    """

    def __init__(self, policy: Policy) -> None:
        self.weights = Weights(policy)
        self.score, self.step = -math.inf, -1
        self.kept: Mapping[str, Any] = {}

    def hear(self, score: float, step: int) -> None:
        """What the policy scores as it stands at `step`. A score that is not a number is never the best."""
        if score > self.score:
            self.score, self.step = score, step
            self.kept = {name: value.clone() for name, value in self.weights.state_dict().items()}

    def restore(self) -> None:
        """Puts the kept weights back. Raises UserError where nothing was heard."""
        if self.step < 0:
            raise UserError("no weights were kept: the policy was never validated, or never had a score")
        self.weights.load_state_dict(self.kept)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "step": self.step, "kept": dict(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score, self.step, self.kept = state["score"], state["step"], state["kept"]


def keep_best(s: Setting, problems: Sequence[Problem]) -> tuple[Callable[[int], None], Callable[[], None]]:
    """What looks at the policy at a step, by validation on `problems`, logs it as `validation` and keeps the best; and
    what puts the best back. Both do nothing where there are no problems. The run tracks what is kept."""
    if not problems:
        return lambda step: None, lambda: None
    best, measure = s.run.track("best", Best(s.policy)), validation(s, problems)

    def look(step: int) -> None:
        score = measure()
        best.hear(score, step)
        s.run.log({"validation": score})

    return look, best.restore


def held_back(s: Setting, count: int, seen: Collection[Prompt]) -> list[Problem]:
    """`count` problems of the training split whose prompts are not among the `seen`: from far beyond those that are
    trained on in an endless world, from the end in a finite one. Raises UserError where there are not so many."""
    size = s.world.size("train")
    indices = range(VALIDATION, VALIDATION + 64 * count) if size is None else range(size - 1, -1, -1)
    known, found = set(map(as_text, seen)), dict[str, Problem]()
    for index in indices:
        problem = s.world.problem("train", index)
        if (prompt := as_text(problem.prompt)) not in known:
            found.setdefault(prompt, problem)
        if len(found) == count:
            return list(found.values())
    raise UserError(
        f"world {s.world.name!r} has {len(found)} training problems that are not trained on, too few to validate on "
        f"{count}: train on fewer problems, or validate on fewer"
    )


def validation(s: Setting, problems: Sequence[Problem]) -> Callable[[], float]:
    """What measures the policy as it stands: its mean reward on `problems`, answered once each as in an
    evaluation. The same random streams every time, and nothing is charged to the run."""
    room = s.common.eval_tokens or s.common.max_tokens
    act = shared_acting(acting_for(s.world, s.act, room=room), s.policy, s.run.ranks)
    roles = {"actor": PolicyAgent(s.policy, "actor", Law(temperature=s.common.eval_temperature), Limits(room))}

    def measure() -> float:
        groups = act(roles, problems, 1, s.score, Clock(1, 1, "validation"), s.run.keys.at("validate"))
        return float(np.mean([member.reward for group in groups for member in group.members]))

    return measure
