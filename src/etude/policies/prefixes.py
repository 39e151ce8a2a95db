"""Rows that begin alike, as the answers to one prompt do: what they share is computed once.

In a causal model the state of a token depends on nothing but the tokens up to it. So all but attention sees each shared
token once; for attention the rows are put together again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etude.experience.shards import common_prefix
from etude.policies.transformer import Mix

WORTH = 0.1  # share of the tokens that must be saved


@dataclass(frozen=True)
class Shared:
    """`kept` int64[U] are the packed tokens that are computed; `where` int64[T] says which of them stands for each."""

    kept: Tensor
    where: Tensor

    def mix(self, whole: Mix) -> Mix:
        """Attention over kept tokens, by one over all."""

        def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            full = (x.index_select(0, self.where) for x in (q, k, v))
            return whole(layer, *full).index_select(0, self.kept)

        return mix


def shared(ids: Tensor, lengths: Tensor) -> Shared | None:
    """What rows of token ids int64[T] share with the row before them; None where it is little."""
    tokens, sizes = ids.cpu().numpy(), lengths.tolist()
    where = np.empty(len(tokens), np.int64)
    kept: list[np.ndarray] = []
    count = begin = before = 0
    for i, size in enumerate(sizes):
        end = begin + size
        same = common_prefix(tokens[before:begin], tokens[begin:end]) if i else 0
        where[begin : begin + same] = where[before : before + same]
        where[begin + same : end] = np.arange(count, count + size - same)
        kept.append(np.arange(begin + same, end))
        count += size - same
        before, begin = begin, end
    if count > (1 - WORTH) * len(tokens):
        return None
    return Shared(*(torch.from_numpy(x).to(ids.device) for x in (np.concatenate(kept), where)))
