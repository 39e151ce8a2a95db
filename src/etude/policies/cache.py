"""Incremental decoding over a preallocated key-value cache with ragged rows.

All rows end in the same column, so that a token is written as one slice and only what stands before a row is ever
masked. Rows that continue the same context share it (`Trunk`). Axes: `R` rows, `Hk` key-value heads, `d` head width,
`V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from etude.experience.errors import UserError
from etude.experience.shards import common_prefix
from etude.experience.types import Ids
from etude.policies.fused import Fused, fused
from etude.policies.layout import Layout
from etude.policies.transformer import Transformer
from etude.policies.trunk import Trunk, left_mask

_Pair = tuple[Tensor, Tensor]
PREFILL_TOKENS = 8192  # tokens of contexts run through the model at once
WORTH_APART = 64  # tokens that running a common beginning by itself must save
WORTH_SHARING = 2**19  # numbers of a layer's cache that sharing must save; below, a copy is read faster than two parts


class CacheDecoder:
    """A `Decoder` for a causal `Transformer`. Nothing here has a gradient.

    Row `r` stands in columns `start[r]` to `end` of its own cache, after what it has in the trunk. Memory is taken
    in `prefill` and, for rows that part, in `select`; a step takes none. Weights are those of `prefill`.
    """

    def __init__(self, model: Transformer, head: Callable[[Tensor], Tensor]) -> None:
        if not model.shape.causal:
            raise UserError("a bidirectional model has no left-to-right decoder")
        self.model, self.head = model, head
        self.device = model.norm.weight.device
        self.lengths = torch.zeros(0, dtype=torch.int64, device=self.device)  # int64[R], trunk included
        self.start = self.lengths  # int64[R]
        self.end = self.capacity = 0  # columns
        self.hidden: Tensor | None = None  # [R, 1, 1, capacity], see left_mask
        self.keys: list[Tensor] = []  # a layer each: [R, Hk, capacity, d]
        self.values: list[Tensor] = []
        self.trunk: Trunk | None = None

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
        small = fused(self.model)
        self.net: Fused | Transformer = small or self.model
        self.scale = 1.0 if small else self.model.shape.head_dim**-0.5  # of scores; fused queries are scaled
        sizes = [len(i) for i in ids]
        self.end, self.trunk = max(sizes), None
        self.lengths = torch.tensor(sizes, device=self.device)
        self.start = self.end - self.lengths
        self._allocate(len(ids), self.end + room)
        last = torch.empty(len(ids), self.model.shape.width, dtype=self.keys[0].dtype, device=self.device)
        shared = _common(ids)
        before = self._run_shared(ids[0][:shared]) if shared else None
        for chunk in _chunks([size - shared for size in sizes]):
            last[chunk] = self._run(ids, chunk, shared, before)
        where = torch.tensor(rows, device=self.device)
        if len(rows) > len(ids):
            self.select(where)
        return self.head(last)[where].float()

    def _allocate(self, rows: int, capacity: int) -> None:
        shape, like = self.model.shape, self.model.norm.weight
        full = (rows, shape.kv_heads, capacity, shape.head_dim)
        self.keys = [like.new_empty(full) for _ in range(shape.depth)]
        self.values = [like.new_empty(full) for _ in range(shape.depth)]
        self.capacity = capacity
        self.hidden = left_mask(self.start, capacity, like.dtype)
        if self.hidden is not None:  # a masked weight of 0 does not silence the nan that stray memory may hold
            for kept in (*self.keys, *self.values):
                kept[:, :, : int(self.start.max())] = 0

    def _run(self, ids: list[Ids], chunk: list[int], shared: int, before: list[_Pair] | None) -> Tensor:
        """Fills the cache for what these rows have after their first `shared` tokens, whose keys and values are
        `before`; returns the rows' last hidden states, [r, D]."""
        lengths = torch.tensor([len(ids[i]) - shared for i in chunk], device=self.device)
        layout = Layout(lengths)
        row = torch.repeat_interleave(torch.tensor(chunk, device=self.device), lengths)
        positions = layout.positions + shared
        column = positions + self.start[row]

        def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][row, :, column] = k
            self.values[layer][row, :, column] = v
            return layout(layer, q, k, v, self.scale, None if before is None else before[layer])

        tokens = torch.from_numpy(np.concatenate([ids[i][shared:] for i in chunk]).astype(np.int64)).to(self.device)
        states: Tensor = self.net(tokens, positions, mix)
        return states[torch.cumsum(lengths, 0) - 1]

    def _run_shared(self, ids: Ids) -> list[_Pair]:
        """Runs what all rows begin with once, and gives every row a copy: keys and values [c, Hk, d] of each layer."""
        layout = Layout(torch.tensor([len(ids)], device=self.device))
        row = torch.arange(len(self.start), device=self.device)[:, None]
        column = self.start[:, None] + layout.positions
        found: list[_Pair] = []

        def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found.append((k, v))
            self.keys[layer][row, :, column] = k
            self.values[layer][row, :, column] = v
            return layout(layer, q, k, v, self.scale)

        self.net(torch.from_numpy(ids.astype(np.int64)).to(self.device), layout.positions, mix)
        return found

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """int64[R] -> f32[R, V]: appends one token to each row. Raises ValueError without room."""
        if self.end == self.capacity:
            self._slide()
        at = self.end
        self.end = end = at + 1
        scale, trunk, hidden = self.scale, self.trunk, None if self.hidden is None else self.hidden[..., :end]

        def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][:, :, at] = k
            self.values[layer][:, :, at] = v
            keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
            # Query heads that share a key-value head are rows of one product: no key is copied.
            q = q.unflatten(1, (k.shape[1], -1))  # [R, Hk, g, d]
            q = q if scale == 1.0 else q * scale
            scores = q @ keys.transpose(-1, -2)
            if hidden is not None:
                scores += hidden
            if trunk is None:
                return (scores.softmax(-1) @ values).flatten(1, 2)
            both = torch.cat((trunk.scores(layer, q), scores), -1).softmax(-1)
            shared, own = both.split((trunk.columns, end), -1)
            return (trunk.mix(layer, shared) + own @ values).flatten(1, 2)

        states = self.net(tokens.to(self.device), self.lengths, mix)
        self.lengths = self.lengths + 1
        return self.head(states).float()

    def _slide(self) -> None:
        """Makes room where every row has some before its start, as after rewinding. Raises ValueError if not."""
        free = int(self.start.min())
        if not free:
            raise ValueError(f"no room for another token: a row holds {self.end} of {self.capacity}")
        for kept in (*self.keys, *self.values):
            kept[:, :, : self.end - free] = kept[:, :, free : self.end].clone()
        self.end -= free
        self.start = self.start - free
        self.hidden = left_mask(self.start, self.capacity, self.keys[0].dtype)

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """int64[R']: keeps, drops, reorders or repeats rows."""
        rows = rows.to(self.device)
        saved = (len(rows) - len(self.lengths)) * self.end * self.model.shape.kv_heads * self.model.shape.head_dim
        if self.trunk is None and saved >= WORTH_SHARING:
            self._share(rows)
            return
        if self.trunk is not None:
            self.trunk.select(self.trunk.group[rows])
        self.lengths, self.start = self.lengths[rows], self.start[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]
        if len(rows) > len(self.keys[0]):
            old = (*self.keys, *self.values)
            self._allocate(len(rows), self.capacity)
            for new, was in zip((*self.keys, *self.values), old, strict=True):
                new[:, :, : self.end] = was[:, :, : self.end].index_select(0, rows)
            return
        for tensors in (self.keys, self.values):
            for layer, kept in enumerate(tensors):  # moved to the front: what is dropped leaves no new memory behind
                kept[: len(rows), :, : self.end] = kept[:, :, : self.end].index_select(0, rows)
                tensors[layer] = kept[: len(rows)]

    def _share(self, rows: Tensor) -> None:
        """int64[R'], with repeats: the rows so far become what these share."""
        room = self.capacity - self.end
        keys, values = ([t[:, :, : self.end] for t in tensors] for tensors in (self.keys, self.values))
        self.trunk = Trunk(keys, values, self.start, rows)
        self.lengths, self.start, self.end = self.lengths[rows], torch.zeros_like(rows), 0
        self._allocate(len(rows), room)

    @torch.no_grad()
    def rewind(self, lengths: Tensor) -> None:
        """int64[R]: cuts each row back to that many tokens. Raises ValueError for a longer or empty one."""
        lengths = lengths.to(self.device)
        back = self.lengths - lengths
        if bool(((lengths < 1) | (back < 0)).any()):
            raise ValueError("rows can be cut back to between 1 token and their present length, not otherwise")
        if bool((back > self.end - self.start).any()):
            self._part()
        moved = back.nonzero()[:, 0]  # what these keep moves right, to end where all end
        source = (torch.arange(self.end, device=self.device) - back[moved, None]).clamp_min(0)[:, None, :, None]
        for kept in (*self.keys, *self.values):
            part = kept[moved, :, : self.end]
            kept[moved, :, : self.end] = part.gather(2, source.expand_as(part))
        self.lengths, self.start = lengths, self.start + back
        self.hidden = left_mask(self.start, self.capacity, self.keys[0].dtype)

    def _part(self) -> None:
        """Gives every row a copy of what it shares, to be cut into."""
        assert self.trunk is not None
        trunk, own, gap = self.trunk, (*self.keys, *self.values), self.start
        self.trunk, columns = None, trunk.columns
        self.start = trunk.start[trunk.group] + gap
        self._allocate(len(self.lengths), columns + self.capacity)
        # Where a row had a gap before its own part, the shared part moves up to close it.
        place = gap[:, None] + torch.arange(columns, device=self.device)
        row = torch.arange(len(place), device=self.device)[:, None]
        for new, shared, kept in zip((*self.keys, *self.values), (*trunk.keys, *trunk.values), own, strict=True):
            new[:, :, columns : columns + self.end] = kept[:, :, : self.end]
            new[row, :, place] = shared[trunk.group].transpose(1, 2)
        self.end += columns


def _common(ids: list[Ids]) -> int:
    """How many tokens all contexts begin with, short of the last of any; 0 where running them once saves little."""
    shared = min([len(i) - 1 for i in ids] + [common_prefix(ids[0], i) for i in ids[1:]])
    return shared if shared * (len(ids) - 1) >= WORTH_APART else 0


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
