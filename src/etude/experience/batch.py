"""Packed batches: rows laid end to end, columns declared by axis, links that are never split.

Axes: `T` packed input positions, `N` packed actions, `B` rows. Normalisation is written into
`actions["weight"]` from the whole batch before it is split, so accumulating gradients over any split
gives the gradient of the whole: every loss is a sum of weight x per-action term.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from etude.experience.rows import COLUMNS, Row
from etude.experience.types import Law

RowColumn: TypeAlias = "Tensor | tuple[str, ...]"
By = Literal["token", "sequence", "group", "row", "constant"]


@dataclass(frozen=True)
class Link:
    """Rows that belong together: `kind` is pair, triplet, block or group; one role a row."""

    kind: str
    rows: tuple[int, ...]
    roles: tuple[str, ...] = ()


@dataclass
class Batch:
    """`inputs` is int64[T] token ids or float[T, D]; `lengths` int64[B] sums to T; `at` int64[N]
    indexes the packed inputs; `actions` holds [N] columns, `row` [B] columns (or B strings)."""

    inputs: Tensor
    lengths: Tensor
    at: Tensor
    actions: dict[str, Tensor]
    row: dict[str, RowColumn] = field(default_factory=dict)
    links: tuple[Link, ...] = ()
    laws: tuple[Law, ...] = ()
    positions: Tensor | None = None  # int64[T]; None: 0, 1, ... within each row
    branch: Tensor | None = None  # int64[T]

    @property
    def size(self) -> int:
        """B, how many rows."""
        return len(self.lengths)

    @property
    def starts(self) -> Tensor:
        """int64[B]: where each row begins in the packed inputs."""
        return torch.cumsum(self.lengths, 0) - self.lengths

    @property
    def row_of(self) -> Tensor:
        """int64[N]: the row of each action."""
        return self.actions["row"]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in self.row.items()}
        return replace(
            self,
            inputs=self.inputs.to(device),
            lengths=self.lengths.to(device),
            at=self.at.to(device),
            actions={n: v.to(device) for n, v in self.actions.items()},
            row=moved,
            positions=None if self.positions is None else self.positions.to(device),
            branch=None if self.branch is None else self.branch.to(device),
        )

    def with_actions(self, **columns: Tensor) -> Batch:
        """A batch with more or other per-action columns. Raises ValueError on a wrong length."""
        for name, value in columns.items():
            if len(value) != len(self.at):
                raise ValueError(f"column {name!r} has {len(value)} values for {len(self.at)} actions")
        return replace(self, actions={**self.actions, **columns})

    def per_row(self, value: Tensor) -> Tensor:
        """Sums per-action values by row: [N] -> [B]."""
        return torch.zeros(self.size, dtype=value.dtype, device=value.device).index_add(0, self.row_of, value)

    def select(self, keep: Sequence[int]) -> Batch:
        """The batch of these rows, in this order, with the links that lie wholly inside.

        Raises ValueError if a row is named twice.
        """
        if len(set(keep)) != len(keep):
            raise ValueError("a batch cannot hold the same row twice: pack it twice")
        device = self.lengths.device
        picked = torch.as_tensor(keep, dtype=torch.int64, device=device)
        new = torch.full((self.size,), -1, dtype=torch.int64, device=device)
        new[picked] = torch.arange(len(picked), device=device)
        starts, lengths = self.starts, self.lengths[picked]
        tokens = _ranges(starts[picked], lengths)
        counts = torch.bincount(self.row_of, minlength=self.size)
        first = torch.cumsum(counts, 0) - counts
        chosen = _ranges(first[picked], counts[picked])
        actions = {n: v[chosen] for n, v in self.actions.items()}
        actions["row"] = new[self.row_of[chosen]]
        shift = torch.cumsum(lengths, 0) - lengths - starts[picked]
        where = {old: i for i, old in enumerate(picked.tolist())}
        return replace(
            self,
            inputs=self.inputs[tokens],
            lengths=lengths,
            at=self.at[chosen] + shift[actions["row"]],
            actions=actions,
            row={n: v[picked] if isinstance(v, Tensor) else tuple(v[i] for i in where) for n, v in self.row.items()},
            links=tuple(
                replace(link, rows=tuple(where[r] for r in link.rows))
                for link in self.links
                if all(r in where for r in link.rows)
            ),
            positions=None if self.positions is None else self.positions[tokens],
            branch=None if self.branch is None else self.branch[tokens],
        )


def pack(rows: Sequence[Row], links: Iterable[Link] = ()) -> Batch:
    """Lays rows end to end. Raises ValueError for no rows, rows whose `info` differs in its names, and a
    link to no row or to one that is not there."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    for r in rows:
        if r.info.keys() != rows[0].info.keys():
            raise ValueError(f"rows differ in their info: {sorted(rows[0].info)} and {sorted(r.info)}")
    lengths = np.array([len(r) for r in rows], np.int64)
    starts = np.cumsum(lengths) - lengths
    laws: dict[Law, int] = {}
    recode = [np.array([laws.setdefault(law, len(laws)) for law in r.laws], np.int16) for r in rows]
    columns = {name: np.concatenate([r.columns[name] for r in rows]) for name in COLUMNS}
    columns["law"] = np.concatenate([m[r.columns["law"]] for r, m in zip(rows, recode, strict=True)])
    columns["row"] = np.repeat(np.arange(len(rows)), [len(r.at) for r in rows])
    links = tuple(links)
    for link in links:
        if not link.rows or any(not 0 <= r < len(rows) for r in link.rows):
            raise ValueError(f"{link.kind} link to rows {link.rows} in a batch of {len(rows)}")
    return Batch(
        inputs=torch.from_numpy(np.concatenate([r.ids for r in rows]).astype(np.int64)),
        lengths=torch.from_numpy(lengths),
        at=torch.from_numpy(np.concatenate([r.at + s for r, s in zip(rows, starts, strict=True)]).astype(np.int64)),
        actions={n: torch.from_numpy(v) for n, v in columns.items()},
        row={n: _row_column([r.info[n] for r in rows]) for n in rows[0].info},
        links=links,
        laws=tuple(laws),
        positions=_overrides([r.pos for r in rows], lengths, positions=True),
        branch=_overrides([r.branch for r in rows], lengths, positions=False),
    )


def normalise(batch: Batch, by: By, constant: float | None = None) -> Batch:
    """Writes loss weights from the whole batch, so that loss = sum(weight x per-action term).

    `token`: mean over all weighted tokens. `sequence`: mean over rows of each row's token mean.
    `group`: mean over groups (row column `group`) of each group's token mean. `row`: token sums, divided
    by the number of rows. `constant`: token sums, divided by `constant`. Rows or groups without weight count as
    absent (except under `row` and `constant`); an empty set gives weights of 0, never nan.
    """
    weight = batch.actions["weight"].double()
    if by == "constant":
        if not constant or constant <= 0:
            raise ValueError(f"normalise by constant needs a constant above 0, not {constant}")
        scaled = weight / constant
    elif by == "row":
        scaled = weight / batch.size
    elif by == "token":
        scaled = weight / weight.sum().clamp_min(1e-12)
    elif by in ("sequence", "group"):
        unit = batch.row_of if by == "sequence" else _groups(batch)[batch.row_of]
        size = int(unit.max()) + 1 if len(unit) else 0
        totals = torch.zeros(size, dtype=torch.float64, device=weight.device).index_add(0, unit, weight)
        present = (totals > 0).sum().clamp_min(1)
        scaled = weight / (totals.clamp_min(1e-12)[unit] * present)
    else:
        raise ValueError(f"normalise by {by!r}; known: token, sequence, group, row, constant")
    return batch.with_actions(weight=scaled.float())


def split(batch: Batch, max_tokens: int) -> Iterator[Batch]:
    """Micro-batches of at most `max_tokens` inputs, in order, never splitting a link.

    A row or a set of linked rows larger than the budget becomes a micro-batch of its own.
    """
    if max_tokens < 1:
        raise ValueError(f"a micro-batch needs at least 1 token, not {max_tokens}")
    lengths = batch.lengths.tolist()
    if sum(lengths) <= max_tokens:
        yield batch
        return
    bin_rows: list[int] = []
    used = 0
    for unit in units(batch):
        size = sum(lengths[r] for r in unit)
        if bin_rows and used + size > max_tokens:
            yield batch.select(bin_rows)
            bin_rows, used = [], 0
        bin_rows += unit
        used += size
    yield batch.select(bin_rows)


def units(batch: Batch) -> list[list[int]]:
    """The rows in sets that may not be parted: those that are linked, through any chain of links."""
    root = list(range(batch.size))

    def find(r: int) -> int:
        while root[r] != r:
            root[r] = root[root[r]]
            r = root[r]
        return r

    for link in batch.links:
        first, *rest = (find(r) for r in link.rows)
        for r in rest:
            a, b = sorted((find(first), find(r)))
            root[b] = a
    found: dict[int, list[int]] = {}
    for row in range(batch.size):
        found.setdefault(find(row), []).append(row)
    return list(found.values())


def _groups(batch: Batch) -> Tensor:
    """int64[B]: the row column `group`, numbered from 0."""
    group = batch.row.get("group")
    if not isinstance(group, Tensor):
        raise ValueError("normalise by group needs the row column 'group'")
    return torch.unique(group, return_inverse=True)[1]


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenates arange(s, s + n) for each s, n."""
    offset = torch.cumsum(lengths, 0) - lengths
    return torch.arange(int(lengths.sum()), device=starts.device) + torch.repeat_interleave(starts - offset, lengths)


def _row_column(values: list[float | str]) -> RowColumn:
    if isinstance(values[0], str):
        return tuple(str(v) for v in values)
    return torch.tensor(values, dtype=torch.float64)


def _overrides(parts: list[np.ndarray | None], lengths: np.ndarray, positions: bool) -> Tensor | None:
    if all(p is None for p in parts):
        return None
    full = [
        p if p is not None else (np.arange(n) if positions else np.zeros(n))
        for p, n in zip(parts, lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(full).astype(np.int64))
