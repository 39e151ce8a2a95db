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
from etude.curation.examples import Examples, completion, demonstration, pairs
from etude.experience.errors import UserError
from etude.experience.protocols import Clock
from etude.experience.rows import Row
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting
from etude.methods.method import Method
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
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-4, schedule="linear", warmup=10))

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "problems", "members", "pairs_each"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.beta <= 0:
            raise UserError(f"beta must be above 0, not {self.beta}")
