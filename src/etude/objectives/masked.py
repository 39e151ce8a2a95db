"""Masked language modelling: some tokens of an answer are hidden, and predicted from those in sight on both sides.

The objective of masked encoders (Devlin et al. 2018, arXiv 1810.04805) with a share of hidden tokens that is drawn for
each sequence, which makes it a model of every order (Uria et al. 2014, arXiv 1310.1757; Nie et al. 2025, arXiv
2502.09992, whose bound weighs a sequence by 1 / that share).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from etude.acting.fill import hidden_token
from etude.experience.batch import Batch, By, normalise
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Loss, Outputs, Policy, Tokenizer
from etude.experience.rows import Row, example
from etude.experience.types import Prompt
from etude.objectives.terms import counted, weighted

Visible = Literal["any", "prefix"]


@dataclass(frozen=True)
class MaskedLM:
    """loss = sum over hidden actions of weight x (-log p(token | whatever is in sight)).

    `prepare` takes rows whose actions stand where their own tokens are (see `canvas`). It draws for each row a share
    r, uniform in `rates`, and leaves every action in sight with probability r; a row that would hide nothing hides one,
    any with the same chance. With `visible` "prefix" the row's first k actions are in sight, k uniform in 0 .. n - 1,
    and the next alone is predicted. Inputs of hidden actions become the mask token, actions in sight leave the batch,
    and weights are normalised over the hidden ones: by "token", the mean over all of them in the batch; by "sequence",
    the mean over rows of their means. Metrics: `nll` of hidden tokens, nats.
    """

    rates: tuple[float, float] = (0.0, 1.0)
    visible: Visible = "any"
    by: By = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"logp"})

    def __post_init__(self) -> None:
        if len(self.rates) != 2 or not 0 <= self.rates[0] <= self.rates[1] <= 1:
            raise UserError(f"rates must be the smallest and largest share of tokens in sight, not {self.rates}")
        if self.visible not in get_args(Visible):
            raise UserError(f"visible must be one of {', '.join(get_args(Visible))}, not {self.visible!r}")

    def prepare(self, policy: Policy, batch: Batch, keys: Keys) -> Batch:
        """The batch with some actions hidden. Raises UserError for a policy that does not look both ways or has no
        mask token, and for a row with nothing to hide."""
        mask = hidden_token(policy, "a masked objective")
        counts = torch.bincount(batch.row_of, minlength=batch.size)  # int64[B]
        if not bool((counts > 0).all()):
            raise UserError(
                f"row {int((counts == 0).nonzero()[0])} of the batch has nothing to hide: its answer is empty"
            )
        draw = keys.at("mask").numpy()
        if self.visible == "any":
            hidden = predicted = hide(counts, self.rates, draw)
        else:
            seen = torch.from_numpy(draw.integers(counts.numpy()))
            place = torch.arange(len(batch.at)) - (torch.cumsum(counts, 0) - counts)[batch.row_of]
            hidden, predicted = place >= seen[batch.row_of], place == seen[batch.row_of]
        inputs = batch.inputs.index_fill(0, batch.at[hidden], mask)
        actions = {name: column[predicted] for name, column in batch.actions.items()}
        return normalise(replace(batch, inputs=inputs, at=batch.at[predicted], actions=actions), self.by)

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """See `Objective`."""
        return Loss(weighted(batch, -out.logp), counted(batch, nll=-out.logp))


def hide(counts: Tensor, rates: tuple[float, float], draw: np.random.Generator) -> Tensor:
    """bool[N]: which of the actions of rows with `counts` int64[B] of them are hidden, at least one a row.

    An action is hidden if u >= r, with u of its own and r of its row. Lowering r to the row's largest u hides one
    action where none would be, and changes nothing where some are.
    """
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    rate = torch.from_numpy(draw.uniform(*rates, len(counts)))
    u = torch.from_numpy(draw.random(len(row)))
    largest = torch.zeros(len(counts), dtype=u.dtype).scatter_reduce(0, row, u, "amax")
    return u >= torch.minimum(rate, largest)[row]


def canvas(tokenizer: Tokenizer, prompt: Prompt, text: str, limit: int, length: int, filler: bool = True) -> Row:
    """The row that teaches `text` as the answer to `prompt` on a canvas of `length` tokens, of which nothing tells how
    long the answer is. With `filler` what is left of the canvas is taught too: more of the token that ends the answer.
    Without, it stays hidden for ever, and only the answer and its end are taught.

    Raises UserError for an answer longer than the canvas, and a row longer than `limit`.
    """
    context, out = tokenizer.prompt(prompt), tokenizer.completion(text)
    rest = length - len(out)
    if rest < 0:
        raise UserError(
            f"an answer of {len(out)} tokens does not fit a canvas of {length}: raise max_tokens: {text!r:.60}"
        )
    if len(context) + length > limit:
        raise UserError(
            f"a prompt of {len(context)} tokens and {length} to fill are longer than the policy's context of {limit}: "
            f"{prompt!r:.60}"
        )
    if filler:
        out = np.concatenate([out, np.full(rest, out[-1])])
    row = example(context, out)
    ids = row.ids if filler else np.concatenate([row.ids, np.full(rest, tokenizer.mask, np.int32)])
    return replace(row, ids=ids.astype(np.int32), at=row.at + 1)
