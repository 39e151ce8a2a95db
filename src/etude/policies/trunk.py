"""What rows of a key-value cache share: contexts that several of them continue, each stored and read once.

Axes: `P` contexts, `R` rows that continue them, `G` the most rows of one context, `Hk` key-value heads, `g` query
heads of each, `C` columns, `d` head width. Rows of one context are the rows of one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Trunk:
    """`keys` and `values` hold [P, Hk, C, d] a layer; context `p` is in its columns from `start[p]` on; `group`
    int64[R] says which one each row continues."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], start: Tensor, group: Tensor) -> None:
        self.keys, self.values, self.start = list(keys), list(values), start
        self.columns = keys[0].shape[2]
        self.hidden = left_mask(start, self.columns, keys[0].dtype)
        self.select(group)

    def select(self, group: Tensor) -> None:
        """int64[R']: which context each row continues from now on. Contexts of no row are let go."""
        used, group = torch.unique(group, return_inverse=True)
        if len(used) < len(self.start):
            self.start = self.start[used]
            self.keys = [k.index_select(0, used) for k in self.keys]
            self.values = [v.index_select(0, used) for v in self.values]
            self.hidden = None if self.hidden is None else self.hidden[used]
        self.group = group
        counts = torch.bincount(group)
        self.P, self.G = len(counts), int(counts.max())
        order = torch.argsort(group, stable=True)
        rank = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group[order]]
        slot = torch.empty_like(group)
        slot[order] = group[order] * self.G + rank
        regular = bool((slot == torch.arange(len(slot), device=slot.device)).all()) and len(slot) == self.P * self.G
        self.slot = None if regular else slot  # int64[R]: the row's place among P x G

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """[R, Hk, g, d] -> [R, Hk, g, C]: of scaled queries with the shared keys."""
        scores = self._grid(q) @ self.keys[layer].transpose(-1, -2)  # [P, Hk, G g, C]
        if self.hidden is not None:
            scores += self.hidden
        return self._rows(scores, q.shape[2])

    def mix(self, layer: int, weights: Tensor) -> Tensor:
        """[R, Hk, g, C] -> [R, Hk, g, d]: shared values under these weights."""
        return self._rows(self._grid(weights) @ self.values[layer], weights.shape[2])

    def _grid(self, x: Tensor) -> Tensor:
        """[R, Hk, g, n] -> [P, Hk, G g, n], zeros where a context has fewer rows."""
        if self.slot is not None:
            x = x.new_zeros(self.P * self.G, *x.shape[1:]).index_copy_(0, self.slot, x)
        return x.unflatten(0, (self.P, self.G)).transpose(1, 2).flatten(2, 3)

    def _rows(self, x: Tensor, g: int) -> Tensor:
        """[P, Hk, G g, n] -> [R, Hk, g, n]."""
        x = x.unflatten(2, (self.G, g)).transpose(1, 2).flatten(0, 1)
        return x if self.slot is None else x.index_select(0, self.slot)


def left_mask(start: Tensor, columns: int, dtype: torch.dtype) -> Tensor | None:
    """[R, 1, 1, columns]: -inf before each row's first column, 0 from there on; None if there is nothing before any."""
    if not bool((start > 0).any()):
        return None
    hidden = torch.arange(columns, device=start.device) < start[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=start.device).masked_fill_(hidden, float("-inf"))[
        :, None, None
    ]
