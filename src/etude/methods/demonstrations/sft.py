"""SFT: supervised fine-tuning, the negative log-likelihood of demonstrations.

    L = - sum_t log pi(y_t | x, y_<t) / number of tokens in the batch

over prompts x and completions y; prompts carry no loss. Demonstrations are a file of prompts and completions or of
chats, or, without one, what the world's own oracle writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from etude.curation.examples import Examples, completion
from etude.experience.batch import By
from etude.experience.errors import UserError
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting
from etude.learning.shown import shown
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
    normalise: By = "token"  # what the loss is a mean over
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, schedule="cosine", warmup=0.05))

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "demonstrations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")


def train(s: Setting, config: SFT) -> None:
    """One `fit` over the demonstrations, in epochs."""
    pairs = shown(s, config.data, config.columns, config.demonstrations, config.style)
    data = Examples([completion(s.policy.tokenizer, prompt, text, s.policy.limit) for prompt, text in pairs])
    source = examples(data, config.batch, s.run)
    seat = Seat(s.policy, config.optim, config.steps)
    fit(s.run, seat, source, NLL(), config.steps, by=config.normalise, watch=s.watch)


METHOD = Method("sft", SFT, train, start="random")
