"""Attention over packed rows: pad by similar length, attend, unpad. No mask over the pack exists.

Linear layers see the packed stream [T, ...]; only attention needs rows apart. Rows are sorted into
blocks of similar length, so a block's padding is less than a quarter of it and its cost is about that of the
rows alone. Causal attention needs no mask at all: padding stands to the right of every real token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Block:
    """`rows` rows padded to `width` tokens; `mask` is bool[rows, 1, width or 1, width], where needed."""

    rows: int
    width: int
    mask: Tensor | None


class Layout:
    """Where each packed token stands once rows are padded apart; calling it attends.

    `lengths` is int64[B]. With `branch` int64[T], a token sees only tokens whose branch is 0 (the
    trunk) or its own: branches that fork from one trunk are blind to one another. Under `causal` it
    also sees nothing that comes later in its row, in packed order, whatever the positions say.
    """

    def __init__(self, lengths: Tensor, causal: bool = True, branch: Tensor | None = None) -> None:
        sizes = lengths.tolist()
        device = lengths.device
        starts = torch.cumsum(lengths, 0) - lengths
        self.positions = torch.arange(sum(sizes), device=device) - torch.repeat_interleave(starts, lengths)
        self.causal = causal
        self.blocks: list[_Block] = []
        offset = torch.zeros(len(sizes), dtype=torch.int64)  # of each row in the padded stream
        padded = 0
        for rows in _similar(sizes):
            width = sizes[rows[0]]
            which = torch.tensor(rows)
            offset[which] = padded + width * torch.arange(len(rows))
            self.blocks.append(_Block(len(rows), width, self._mask(starts, lengths, which.to(device), width, branch)))
            padded += len(rows) * width
        self.padded = padded
        regular = len(self.blocks) == 1 and padded == sum(sizes)
        shift = torch.repeat_interleave(offset.to(device), lengths)
        self.slot = None if regular else self.positions + shift  # int64[T]: place in the padded stream

    def _mask(self, starts: Tensor, lengths: Tensor, rows: Tensor, width: int, branch: Tensor | None) -> Tensor | None:
        place = torch.arange(width, device=lengths.device)
        real = place < lengths[rows, None]  # [b, width]
        if branch is None:
            return None if self.causal or bool(real.all()) else real[:, None, None]
        token = (starts[rows, None] + place).clamp_max(len(branch) - 1)
        label = branch[token]
        seen = ((label[:, None] == 0) | (label[:, None] == label[:, :, None])) & real[:, None]
        if self.causal:
            seen = seen & (place <= place[:, None])
        return (seen | (place == place[:, None]))[:, None]  # padding sees itself, so that no softmax is empty

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [padded, ...], zeros between rows."""
        return x if self.slot is None else x.new_zeros(self.padded, *x.shape[1:]).index_copy(0, self.slot, x)

    def unpad(self, x: Tensor) -> Tensor:
        """[padded, ...] -> [T, ...]."""
        return x if self.slot is None else x.index_select(0, self.slot)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        before: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention within rows: q [T, H, d], k and v [T, Hk, d] -> [T, H, d]; scores are scaled by d^-0.5 unless told
        otherwise. `before` are keys and values [c, Hk, d] that every row, causal and unbranched, begins with."""
        cuts = [b.rows * b.width for b in self.blocks]
        parts = []
        for block, *qkv in zip(self.blocks, *(self.pad(x).split(cuts) for x in (q, k, v)), strict=True):
            query, key, value = (x.unflatten(0, (block.rows, block.width)).transpose(1, 2) for x in qkv)
            mask = block.mask
            if before is not None:
                key, value = (
                    torch.cat((b.transpose(0, 1).expand(block.rows, -1, -1, -1), x), 2)
                    for b, x in zip(before, (key, value), strict=True)
                )
                mask = torch.ones(block.width, key.shape[2], dtype=torch.bool, device=q.device)
                mask = mask.tril(key.shape[2] - block.width)
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=self.causal and mask is None,
                scale=scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
            parts.append(mixed.transpose(1, 2).flatten(0, 1))
        return self.unpad(parts[0] if len(parts) == 1 else torch.cat(parts))


def _similar(sizes: list[int]) -> list[list[int]]:
    """Rows by falling length, in blocks whose shortest row is more than three quarters of the longest: fewer would
    attend to more padding, more would be small.

    There are at most log(longest) / log(4 / 3) + 1 blocks.
    """
    blocks: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda r: -sizes[r]):
        if blocks and 4 * sizes[row] > 3 * sizes[blocks[-1][0]]:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    return blocks
