"""Small heads on the last hidden state: a value an action, a reward or class scores a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etude.experience.batch import Batch
from etude.experience.errors import UserError

PER_ACTION = frozenset({"values"})
PER_ROW = frozenset({"reward", "classes"})
HEADS = PER_ACTION | PER_ROW


def head(width: int, size: int, generator: torch.Generator) -> nn.Linear:
    """A linear head [.., width] -> [.., size], normal with standard deviation 1/(width + 1), bias 0."""
    made = nn.Linear(width, size, device=generator.device)
    with torch.no_grad():
        made.weight.normal_(0.0, 1.0 / (width + 1), generator=generator)
        made.bias.zero_()
    return made


def apply(heads: nn.ModuleDict, wanted: frozenset[str], states: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What the wanted heads say, in float32, of hidden states [T, D].

    `values` [N] is read at each action's input; `reward` [B] and `classes` [B, C] at each row's last
    token. Raises UserError for a head the policy does not have.
    """
    said: dict[str, Tensor] = {}
    for name in sorted(wanted):
        if name not in heads:
            has = ", ".join(sorted(heads.keys())) or "none"
            raise UserError(f"this policy has no {name!r} head (it has {has}): add one with add_head")
        at = batch.at if name in PER_ACTION else batch.starts + batch.lengths - 1
        scores = heads[name](states[at]).float()
        said[name] = scores if name == "classes" else scores.squeeze(-1)
    return said
