"""SEC: self-evolving curriculum (arXiv 2505.14970, section 3 and algorithm 1; the authors' released code).

Problem: reinforcement learning wastes rollouts on problems that are always or never solved. Idea: take the categories
of problems as the arms of a non-stationary bandit, and pay an arm by how much the update learns from it. The mean
absolute advantage says so for nothing: with right and wrong answers it is largest where half are right, so draws
follow the edge of competence as it moves.

With C categories, values Q in R^C that start at 0, step size alpha in (0, 1] and temperature tau > 0, step t draws the
category of each of the B problems independently from

    p_t(c) = exp(Q_t(c) / tau) / sum_c' exp(Q_t(c') / tau)

takes the next problem of that category, answers it G times, and pays every category that was drawn

    r_t(c) = mean over its answers of the mean over their tokens of |A|
    Q_t+1(c) = (1 - alpha) Q_t(c) + alpha r_t(c)

with A the advantage that the update is about to use (no unit; for GRPO (r - mean) / std within the group). A group of
equal rewards counts as 0, so if nothing can be learnt anywhere Q fades and draws become uniform again. No gradient
flows through any of this.

This file adds the curriculum; it combines with any credit rule. alpha = 0.5 is the authors' published setting, tau 1.0
theirs for Countdown (0.4 on MATH, 0.2 over several domains). Categories that were not drawn keep their value, as
in algorithm 1; the code lets them decay (unsampled = decay). Known limit: a category with chance success that nothing
improves keeps its |A| and goes on being drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from etude.curricula.bandit import Bandit, Unsampled
from etude.curricula.curriculum import OWNS, PoolCurriculum
from etude.curricula.pool import Pool
from etude.experience.claims import Arm, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import Kind, register
from etude.experience.protocols import Clock, Report, World
from etude.learning.group_rl import GroupRL, group_rl
from etude.learning.learner import Optim
from etude.methods.method import Method

Gain = Literal["advantage", "reward"]


@register("curriculum", "sec", owns=OWNS, needs={"advantage"}, why="its arms are paid the mean |advantage|")
class SelfEvolving(PoolCurriculum):
    """The bandit over a world's categories.

    `gain` "reward" pays the mean |r - group mean| instead, which keeps the scale of rewards. `permute`
    deals the payments to the drawn arms at random: the ablation under which nothing is followed. Raises
    UserError for groups of one answer, whose advantage is no measure of learning.
    """

    listens = True

    def __init__(
        self,
        world: World,
        alpha: float = 0.5,
        tau: float = 1.0,
        gain: Gain = "advantage",
        unsampled: Unsampled = "untouched",
        permute: bool = False,
        split: str = "train",
    ) -> None:
        super().__init__(Pool(world, split))
        self.pool.check(self.pool.names)
        self.bandit = Bandit(self.pool.names, alpha, tau, unsampled)
        self.gain, self.permute = gain, permute

    def shelf(self, clock: Clock, keys: Keys) -> str:
        """An arm of the bandit."""
        return self.bandit.draw(keys.numpy())

    def observe(self, report: Report) -> None:
        """Pays the arms that were drawn, from every group, kept or not."""
        self.bandit.pay(self._dealt(arm_rewards(report, self.gain), report.clock))

    def _dealt(self, rewards: dict[str, float], clock: Clock) -> dict[str, float]:
        if not self.permute:
            return rewards
        order = Keys(self.pool.seed).at("permute", clock.stage, clock.step).numpy().permutation(len(rewards))
        return dict(zip(rewards, np.array(list(rewards.values()))[order].tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bandit": self.bandit.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.bandit.load_state_dict(state["bandit"])


def arm_rewards(report: Report, gain: Gain = "advantage") -> dict[str, float]:
    """r_t of every category in the report."""
    paid: dict[str, list[float]] = {}
    for group, advantage in zip(report.groups, report.gain, strict=True):
        rewards = group.rewards
        if len(rewards) < 2:
            raise UserError("curriculum 'sec' needs at least 2 answers to each problem: set members=2 or more")
        value = advantage if gain == "advantage" else float(np.abs(rewards - rewards.mean()).mean())
        paid.setdefault(group.problem.category, []).append(value)
    return {category: float(np.mean(values)) for category, values in paid.items()}


@dataclass(frozen=True)
class SEC(GroupRL):
    """SEC's hyperparameters."""

    curriculum: str = "sec"  # which problems come next; names: `etude list --parts`
    alpha: float = 0.5  # step size of the values: weight of the newest payment
    tau: float = 1.0  # temperature of the draws, on the scale of |advantage|
    gain: Gain = "advantage"  # what an arm is paid: mean |advantage|, or |reward - group mean|
    unsampled: Unsampled = "untouched"  # values of arms that were not drawn: untouched, or decay towards 0
    permute: bool = False  # ablation: payments are dealt to the drawn arms at random
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4))

    def options(self) -> Mapping[tuple[Kind, str], Mapping[str, Any]]:
        """Builds the curriculum with these hyperparameters."""
        own = ("alpha", "tau", "gain", "unsampled", "permute")
        return {("curriculum", "sec"): {name: getattr(self, name) for name in own}}


CLAIM = Claim(
    says="Drawing where the mean |advantage| is largest learns the lock ladder faster than uniform draws or an "
    "easy-to-hard timetable, because more groups hold both right and wrong answers; dealt at random, its payments "
    "gain nothing.",
    world="lock",
    policy="table:order=2,rows=16,actions=6",  # one row of logits a symbol, shared by all rungs
    options={
        "steps": 150,
        "problems": 16,
        "members": 8,
        "max_tokens": 1,
        "normalise": "sequence",
        "optim": {"algorithm": "sgd", "clip": 1e9},
        "eval_every": 15,
    },
    arms=(
        Arm("sec", "sec", {"tau": 0.2}),
        Arm("uniform", "group-rl", role="baseline"),
        Arm("easy-to-hard", "group-rl", {"curriculum": "easy-to-hard"}, role="baseline"),
        Arm("permuted", "sec", {"tau": 0.2, "permute": True}, role="ablation"),
    ),
    metrics={
        "success": Metric("evaluation", "accuracy", unit="%"),
        "area": Metric("evaluation", "accuracy", "area", unit="%"),
        "half": Metric("evaluation", "accuracy", "steps", threshold=0.5, better="lower", unit="steps"),
        "live": Metric("log", "live", "mean", unit="%"),
    },
    endpoints=(
        Endpoint("success over uniform draws", "effect", "success", ("sec", "uniform"), 0.10, every=True),
        Endpoint("live groups over uniform draws", "effect", "live", ("sec", "uniform"), 1.5, ratio=True),
        Endpoint("area over the timetable", "effect", "area", ("sec", "easy-to-hard")),
        Endpoint("success over payments dealt at random", "vanish", "success", ("sec", "permuted"), 0.10),
        Endpoint("no gain left without the signal", "guard", "success", ("uniform", "permuted"), 0.03),
    ),
    tune="success",
    grid=(2.0, 4.0),
    seeds=tuple(range(10)),
    minutes=3.0,
)

METHOD = Method("sec", SEC, group_rl, claim=CLAIM)
