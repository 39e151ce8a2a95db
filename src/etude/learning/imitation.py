"""`imitate`: the preset of `fit` for demonstrations, with the objective as its plug point.

Demonstrations are those of `learning.demonstrations`: a data file, or what the world's own oracle writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from etude.acting.agent import PolicyAgent, greedily
from etude.acting.sample import sample
from etude.curation.examples import pack_groups
from etude.experience.batch import By, normalise
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Objective, Policy, Probe
from etude.experience.types import RAW
from etude.learning.demonstrations import demonstrations
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting, acting_for
from etude.objectives.distil import Distil

PROBED = 128  # held-out problems on which the distance from the start is measured, at most


@dataclass(frozen=True)
class Imitation:
    """Learning from demonstrations."""

    steps: int = 200  # updates
    batch: int = 32  # demonstrations an update
    data: str | None = None  # .jsonl or .parquet; None: the world's oracle demonstrates
    columns: tuple[str, ...] = ()  # ours=theirs, e.g. prompt=question
    demonstrations: int = 2000  # how many the oracle writes
    style: str = "plain"  # of the oracle's demonstrations
    noise: float = 0.0  # share of the oracle's demonstrations that hold a fault
    faults: tuple[str, ...] = ()  # kinds of those faults; none: all that the oracle knows
    audit: bool = False  # evaluations also act greedily (greedy/...) and measure kl, the distance from the start
    normalise: By = "token"  # what the loss is a mean over
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, schedule="cosine", warmup=0.05))

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "demonstrations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.noise <= 1:
            raise UserError(f"noise is a share from 0 to 1, not {self.noise}")


def imitate(s: Setting, config: Imitation, objective: Objective) -> None:
    """One `fit` over the demonstrations, in epochs."""
    if config.faults and not config.noise > 0:
        raise UserError("faults name what goes wrong in a share of the demonstrations: give noise above 0")
    where = (config.data, config.columns, config.demonstrations, config.style)
    source = examples(demonstrations(s, *where, config.noise, config.faults), config.batch, s.run)
    if config.audit:
        s.views["greedy"] = greedily(s.act)
        s.probes["kl"] = distance(s)
    seat = Seat(s.policy, config.optim, config.steps)
    fit(s.run, seat, source, objective, config.steps, by=config.normalise, watch=s.watch)


def distance(s: Setting) -> Probe:
    """KL(policy || start) in nats an answer, the start being the policy as the run began: exact over the vocabulary at
    each token of answers to held-out problems that the policy samples itself."""
    start = s.reference()
    asked = [s.world.problem("test", i) for i in range(min(PROBED, s.common.eval_problems))]
    leash = Distil(start, "reverse")

    @torch.no_grad()
    def kl(policy: Policy, keys: Keys) -> float:
        roles = {"actor": PolicyAgent(policy, "actor", RAW, s.limits)}
        groups = acting_for(s.world, sample, room=s.common.max_tokens)(roles, asked, 1, s.score, Clock(1, 1), keys)
        batch = normalise(pack_groups(groups), "row").to(policy.device)
        return float(leash.loss(policy.forward(batch, leash.needs), batch).total)

    return kl
