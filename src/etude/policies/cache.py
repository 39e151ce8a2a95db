"""Incremental decoding over a preallocated key-value cache with ragged rows.

Axes: `R` rows, `Hk` key-value heads, `d` head width, `C` capacity in tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from etude.experience.errors import UserError
from etude.experience.types import Ids
from etude.policies.layout import Layout
from etude.policies.transformer import Transformer

PREFILL_TOKENS = 8192  # tokens of contexts run through the model at once


class CacheDecoder:
    """A `Decoder` for a causal `Transformer`. Nothing here has a gradient.

    Each row has its own length; a row is extended at its own end. Memory is taken once, in `prefill`,
    and again only by `select`.
    """

    def __init__(self, model: Transformer, head: Callable[[Tensor], Tensor]) -> None:
        if not model.shape.causal:
            raise UserError("a bidirectional model has no left-to-right decoder")
        self.model, self.head = model, head
        self.device = model.norm.weight.device
        self.lengths = torch.zeros(0, dtype=torch.int64, device=self.device)  # int64[R]
        self.capacity = 0
        self.longest = 0  # lengths.max(), known without asking the device
        self.keys: list[Tensor] = []  # a layer each: [R, Hk, C, d]
        self.values: list[Tensor] = []

    @torch.no_grad()
    def prefill(self, contexts: Sequence[Ids], room: int) -> Tensor:
        """f32[R, V]: logits after each context; every row may then grow by `room` tokens.

        Equal contexts are run once. Raises UserError for an empty context or one beyond the limit.
        """
        limit = self.model.shape.limit
        unique: dict[bytes, int] = {}
        rows = [unique.setdefault(np.asarray(c, np.int32).tobytes(), len(unique)) for c in contexts]
        ids = [np.frombuffer(key, np.int32) for key in unique]
        for r, u in enumerate(rows):
            if not 0 < len(ids[u]) <= limit:
                raise UserError(f"context {r} has {len(ids[u])} tokens: a context has 1 to {limit} for this policy")
        sizes = [len(i) for i in ids]
        self.longest = max(sizes)
        self.capacity = min(self.longest + room, limit)
        self.lengths = torch.tensor(sizes, device=self.device)
        shape = self.model.shape
        like = self.model.norm.weight
        full = (len(ids), shape.kv_heads, self.capacity, shape.head_dim)
        # Zeros, because a masked weight of 0 does not silence the nan that stray memory may hold.
        self.keys = [like.new_zeros(full) for _ in range(shape.depth)]
        self.values = [like.new_zeros(full) for _ in range(shape.depth)]
        last = torch.empty(len(ids), shape.width, dtype=like.dtype, device=self.device)
        for chunk in _chunks(sizes):
            last[chunk] = self._run(ids, chunk)
        where = torch.tensor(rows, device=self.device)
        if len(rows) > len(ids):
            self.select(where)
        return self.head(last[where]).float()

    def _run(self, ids: list[Ids], chunk: list[int]) -> Tensor:
        """Fills the cache for these rows and returns their last hidden states, [r, D]."""
        lengths = torch.tensor([len(ids[i]) for i in chunk], device=self.device)
        layout = Layout(lengths)
        row = torch.repeat_interleave(torch.tensor(chunk, device=self.device), lengths)
        place = layout.positions

        def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][row, :, place] = k
            self.values[layer][row, :, place] = v
            return layout(layer, q, k, v)

        tokens = torch.from_numpy(np.concatenate([ids[i] for i in chunk]).astype(np.int64)).to(self.device)
        states: Tensor = self.model(tokens, place, mix)
        return states[torch.cumsum(lengths, 0) - 1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """int64[R] -> f32[R, V]: appends one token to each row. Raises ValueError without room."""
        if self.longest >= self.capacity:
            raise ValueError(f"no room for another token: a row holds {self.longest} of {self.capacity}")
        place = self.lengths
        row = torch.arange(len(place), device=self.device)
        self.longest += 1
        span = self.longest
        hidden = torch.zeros(len(place), 1, 1, span, dtype=self.keys[0].dtype, device=self.device)
        hidden.masked_fill_((torch.arange(span, device=self.device) > place[:, None])[:, None, None], float("-inf"))

        def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[row, :, place] = k
            values[row, :, place] = v
            # Query heads that share a key-value head are rows of one product: no key is copied.
            shared = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5  # [R, Hk, g, d]
            scores = shared @ keys[:, :, :span].transpose(-1, -2) + hidden
            return (scores.softmax(-1) @ values[:, :, :span]).flatten(1, 2)

        states = self.model(tokens.to(self.device), place, mix)
        self.lengths = place + 1
        return self.head(states).float()

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """int64[R']: keeps, drops, reorders or repeats rows."""
        rows = rows.to(self.device)
        self._cut(self.lengths[rows])
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.index_select(0, rows)

    def rewind(self, lengths: Tensor) -> None:
        """int64[R]: cuts each row back to that many tokens. Raises ValueError for a longer or empty one."""
        lengths = lengths.to(self.device)
        if bool(((lengths < 1) | (lengths > self.lengths)).any()):
            raise ValueError("rows can be cut back to between 1 token and their present length, not otherwise")
        self._cut(lengths)

    def _cut(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.longest = int(lengths.max()) if len(lengths) else 0


def _chunks(sizes: list[int]) -> list[list[int]]:
    """Rows in runs of at most PREFILL_TOKENS tokens (or one longer row)."""
    chunks: list[list[int]] = []
    used = 0
    for i, size in enumerate(sizes):
        if not chunks or used + size > PREFILL_TOKENS:
            chunks.append([])
            used = 0
        chunks[-1].append(i)
        used += size
    return chunks
