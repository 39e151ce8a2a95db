"""DPO: direct preference optimisation (arXiv 2305.18290, section 4).

Problem: learning a reward model from comparisons and then optimising against it is two unstable steps. Idea: the
policy is its own reward model, r(x, y) = beta log(pi(y | x) / pi_ref(y | x)) up to a constant that cancels in a pair:

    L = - mean over pairs log sigmoid( beta [ log pi(y+)/pi_ref(y+) - log pi(y-)/pi_ref(y-) ] )

Log-probabilities are summed over an answer's tokens; beta has no unit; the reference is the policy as it starts.
Pairs are a file of (prompt, chosen, rejected), or, without one, the policy's own right and wrong answers to the
world's problems, at most `pairs_each` a problem.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from etude.acting.sample import sample
from etude.curation.examples import Examples, completion, only_row, pairs
from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock
from etude.experience.rows import Row
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting, named
from etude.methods.method import Method
from etude.objectives.pairs import PairLoss
from etude.objectives.reference import ReferenceCache, with_reference
from etude.worlds.data import load_examples


@dataclass(frozen=True)
class DPO:
    """DPO's hyperparameters."""

    steps: int = 200  # updates
    batch: int = 32  # pairs an update
    beta: float = 0.1  # how strongly the reference holds
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round
    data: str | None = None  # .jsonl or .parquet; None: the policy's own right and wrong answers
    columns: tuple[str, ...] = ()  # ours=theirs, e.g. chosen=preferred
    problems: int = 512  # asked for own pairs
    members: int = 8  # answers to each
    pairs_each: int = 2  # own pairs kept of one problem
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-4, schedule="linear", warmup=0.05))

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "problems", "members", "pairs_each"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.beta <= 0:
            raise UserError(f"beta must be above 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must lie in [0, 0.5), not at {self.label_smoothing}")


def train(s: Setting, config: DPO) -> None:
    """Pairs, from a file or collected once; then one `fit` against the starting policy."""
    if config.data:
        data = from_file(s, config)
    else:
        data = Examples.from_state(s.run.stage("collect", lambda: own_pairs(s, config).state_dict()))
    reference, seen = s.reference(), ReferenceCache()
    draw = examples(data, config.batch, s.run)

    def source(clock: Clock, keys: Keys) -> Batch:
        return with_reference(draw(clock, keys), reference, seen, meter=s.run.meter)

    objective = PairLoss("logistic", config.beta, label_smoothing=config.label_smoothing)
    fit(s.run, Seat(s.policy, config.optim, config.steps), source, objective, config.steps, by=None, watch=s.watch)


def from_file(s: Setting, config: DPO) -> Examples:
    """The pairs of a data file."""
    assert config.data is not None
    tokenizer, limit = s.policy.tokenizer, s.policy.limit
    loaded = load_examples(config.data, "preference", named(config.columns, "column"))
    chosen = [completion(tokenizer, e.prompt, e.chosen, limit) for e in loaded]
    rejected = [completion(tokenizer, e.prompt, e.rejected, limit) for e in loaded]
    return pairs(chosen, rejected)


def own_pairs(s: Setting, config: DPO) -> Examples:
    """A right and a wrong answer of the starting policy to the same problem."""
    asked = [s.world.problem("train", i) for i in range(config.problems)]
    groups = s.acting(sample)(s.roles(), asked, config.members, s.score, Clock(0, 1), s.run.keys.at("collect"))
    chosen: list[Row] = []
    rejected: list[Row] = []
    for group in groups:
        right = [m for m in group.members if m.correct]
        wrong = [m for m in group.members if not m.correct]
        for good, bad in list(zip(right, wrong, strict=False))[: config.pairs_each]:
            chosen.append(only_row(good))
            rejected.append(only_row(bad))
    s.run.keep(groups, [0 < g.solved < 1 for g in groups])
    s.run.log({"accuracy": sum(g.solved for g in groups) / len(groups), "pairs": float(len(chosen))})
    if not chosen:
        raise UserError(
            f"none of {config.problems} problems got both a right and a wrong answer: ask more, or start elsewhere"
        )
    return pairs(chosen, rejected)


METHOD = Method("dpo", DPO, train)
