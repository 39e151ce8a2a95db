"""SFT: supervised fine-tuning, the negative log-likelihood of demonstrations.

    L = - sum_t log pi(y_t | x, y_<t) / number of tokens in the batch

over prompts x and completions y; prompts carry no loss. Demonstrations are a file of prompts and completions or of
chats, or, without one, what the world's own oracle writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from etude.experience.batch import By
from etude.experience.errors import UserError
from etude.learning.demonstrations import demonstrations
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.nll import NLL


@dataclass(frozen=True)
class SFT:
    """SFT's hyperparameters."""

    steps: int = 200  # updates
    batch: int = 32  # demonstrations an update
    data: str | None = None  # .jsonl or .parquet; None: the world's oracle demonstrates
    columns: tuple[str, ...] = ()  # ours=theirs, e.g. prompt=question
    demonstrations: int = 2000  # how many the oracle writes
    style: str = "plain"  # of the oracle's demonstrations
    noise: float = 0.0  # share of the oracle's demonstrations that hold a fault
    normalise: By = "token"  # what the loss is a mean over
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, schedule="cosine", warmup=0.05))

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "demonstrations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.noise <= 1:
            raise UserError(f"noise is a share from 0 to 1, not {self.noise}")


def train(s: Setting, config: SFT) -> None:
    """One `fit` over the demonstrations, in epochs."""
    data = demonstrations(s, config.data, config.columns, config.demonstrations, config.style, config.noise)
    source = examples(data, config.batch, s.run)
    seat = Seat(s.policy, config.optim, config.steps)
    fit(s.run, seat, source, NLL(), config.steps, by=config.normalise, watch=s.watch)


METHOD = Method("sft", SFT, train, start="random")
