"""SFT: supervised fine-tuning, the negative log-likelihood of demonstrations.

    L = - sum_t log pi(y_t | x, y_<t) / number of tokens in the batch

over prompts x and completions y; prompts carry no loss. Demonstrations are a file of prompts and completions or of
chats, or, without one, what the world's own oracle writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from etude.learning.imitation import Imitation, imitate
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.nll import NLL


@dataclass(frozen=True)
class SFT(Imitation):
    """SFT's hyperparameters."""


def train(s: Setting, config: SFT) -> None:
    """One `fit` over the demonstrations, in epochs."""
    imitate(s, config, NLL())


METHOD = Method("sft", SFT, train, start="random")
