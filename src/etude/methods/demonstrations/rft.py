"""RFT: rejection-sampling fine-tuning (arXiv 2308.01825, section 3.3; also called expert iteration).

Problem: demonstrations run out. Idea: the policy writes its own. In each round every problem is answered `members`
times; the right answers are kept, each distinct one once, and the policy is fine-tuned on them:

    D_r = { (x, y) : y ~ pi_r(. | x), correct(x, y) },      L = - sum_t log pi(y_t | x, y_<t) / tokens

With one round and one answer a problem it is self-training on the model's own right answers.

Departure: the paper samples once, and then trains the pretrained model anew on the answers and its original data; with
more than one round this goes on from the last weights, on the answers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from etude.acting.sample import sample
from etude.curation.examples import Examples, demonstration
from etude.experience.batch import By
from etude.experience.errors import UserError
from etude.experience.protocols import Clock
from etude.experience.rows import Row
from etude.experience.types import Group
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit, rounds
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.nll import NLL


@dataclass(frozen=True)
class RFT:
    """RFT's hyperparameters."""

    rounds: int = 4  # of sampling and fitting
    problems: int = 256  # asked in each round
    members: int = 8  # answers to each
    steps: int = 50  # updates in each round
    batch: int = 32  # examples an update
    normalise: By = "token"  # what the loss is a mean over
    optim: Optim = field(default_factory=lambda: Optim(lr=5e-4))

    def __post_init__(self) -> None:
        for name in ("rounds", "problems", "members", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")


def train(s: Setting, config: RFT) -> None:
    """Rounds of sampling, keeping what is right, and fitting from the last weights."""

    def collect(r: int) -> Examples:
        asked = [s.world.problem("train", r * config.problems + i) for i in range(config.problems)]
        keys = s.run.keys.at("collect", r)
        groups = s.acting(sample)(s.roles(), asked, config.members, s.score, Clock(r, config.rounds), keys)
        rows = right_answers(groups)
        s.run.keep(groups, [any(m.correct for m in g.members) for g in groups])
        s.run.log({"accuracy": sum(g.solved for g in groups) / len(groups), "examples": float(len(rows))})
        if not rows:
            raise UserError(
                f"round {r}: none of {config.problems * config.members} answers was right: start from a better policy"
            )
        return Examples(rows)

    def step(r: int, data: Examples) -> None:
        seat = Seat(s.policy, config.optim, config.steps)
        source = examples(data, config.batch, s.run)

        def watch(clock: Clock) -> None:
            if r == 0 or clock.step:  # a later round begins with the weights that the last one was seen to end with
                s.watch(clock)

        fit(s.run, seat, source, NLL(), config.steps, by=config.normalise, watch=watch)

    rounds(s.run, config.rounds, collect, step)


def right_answers(groups: list[Group]) -> list[Row]:
    """The rows of every distinct right answer to each problem."""
    rows: list[Row] = []
    for group in groups:
        seen: set[str] = set()
        for member in group.members:
            if member.correct and member.text not in seen:
                seen.add(member.text)
                rows += demonstration(member)
    return rows


METHOD = Method("rft", RFT, train)
