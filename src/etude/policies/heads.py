"""Small heads on the last hidden state: a value an action, a reward or class scores a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etude.experience.batch import Batch
from etude.experience.errors import UserError, unknown

PER_ACTION = frozenset({"values"})
PER_ROW = frozenset({"reward", "classes"})
HEADS = PER_ACTION | PER_ROW


class Heads(nn.Module):
    """Linear heads by name: `values` [D -> 1], `reward` [D -> 1], `classes` [D -> C]."""

    @property
    def names(self) -> list[str]:
        return sorted(self._modules)

    def add(self, name: str, width: int, size: int, generator: torch.Generator | None = None) -> nn.Linear:
        """Adds or replaces a head, with weights of standard deviation 1/(width + 1) and bias 0, or
        unset without a generator. Raises UserError for another name."""
        if name not in HEADS:
            raise unknown("head", name, HEADS)
        head = nn.Linear(width, size)
        if generator is not None:
            with torch.no_grad():
                head.weight.normal_(0.0, 1.0 / (width + 1), generator=generator)
                head.bias.zero_()
        self.add_module(name, head)
        return head

    def forward(self, wanted: frozenset[str], states: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What the wanted heads say, in float32, of hidden states [T, D].

        `values` [N] is read at each action's input; `reward` [B] and `classes` [B, C] at each row's
        last token. Raises UserError for a head that was not added.
        """
        said: dict[str, Tensor] = {}
        for name in sorted(wanted):
            if name not in self.names:
                raise UserError(f"this policy has no {name!r} head (it has: {', '.join(self.names) or 'none'})")
            at = batch.at if name in PER_ACTION else batch.starts + batch.lengths - 1
            scores = self.get_submodule(name)(states[at]).float()
            said[name] = scores if name == "classes" else scores.squeeze(-1)
        return said
