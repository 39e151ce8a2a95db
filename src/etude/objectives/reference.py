"""Log-probabilities under a reference policy: the action column `logp_ref`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor

from etude.experience.batch import Batch, pack, split
from etude.experience.meter import Meter
from etude.experience.protocols import Policy
from etude.experience.rows import Row


class ReferenceCache:
    """What a reference said of rows seen before; emptied when its fingerprint changes.

    For fixed data that is visited again and again. It can be recomputed, so no checkpoint holds it.
    """

    def __init__(self) -> None:
        self.fingerprint = ""
        self.rows: dict[bytes, Tensor] = {}

    def follow(self, fingerprint: str) -> None:
        """Forgets everything if the reference has moved."""
        if fingerprint != self.fingerprint:
            self.fingerprint, self.rows = fingerprint, {}


def with_reference(
    batch: Batch,
    policy: Policy,
    cache: ReferenceCache | None = None,
    *,
    max_tokens: int = 8192,
    meter: Meter | None = None,
) -> Batch:
    """The batch with `logp_ref` (f32[N]) under `policy`: a frozen copy, or the learner with its adapter
    off. Rows already in `cache` are not scored again; scored inputs are charged to `meter`."""
    if cache is None:
        return batch.with_actions(logp_ref=_logp(batch, policy, max_tokens, meter))
    cache.follow(policy.fingerprint())
    keys = _row_keys(batch)
    new = list({k: r for r, k in enumerate(keys) if k not in cache.rows}.values())
    if new:
        part = batch.select(new)
        counts = torch.bincount(part.row_of, minlength=part.size).tolist()
        values = _logp(part, policy, max_tokens, meter).split(counts)
        cache.rows.update(zip((keys[r] for r in new), (v.clone() for v in values), strict=True))
    logp = torch.cat([cache.rows[k] for k in keys])
    return batch.with_actions(logp_ref=logp.to(batch.inputs.device))


def reference_of(
    rows: Sequence[Row], policy: Policy, *, max_tokens: int = 8192, meter: Meter | None = None
) -> list[float]:
    """log pi_ref of every whole row: the sum over its actions with weight. What pair losses read as the row column
    `logp_ref`, for a reference that is at hand only while the rows are made (the policy itself, at that time)."""
    batch = pack(rows)
    logp = _logp(batch, policy, max_tokens, meter).double()
    found: list[float] = batch.per_row(torch.where(batch.actions["weight"] != 0, logp, 0.0)).tolist()
    return found


def _logp(batch: Batch, policy: Policy, max_tokens: int, meter: Meter | None) -> Tensor:
    """f32[N], scored in micro-batches. Without links, which would reorder rows, these keep their order."""
    unlinked = replace(batch, links=())
    parts = [policy.logp(micro.to(policy.device)).float() for micro in split(unlinked, max_tokens)]
    if meter is not None:
        meter.charge("scored", len(batch.inputs))
    return torch.cat(parts).to(batch.inputs.device)


def _row_keys(batch: Batch) -> list[bytes]:
    """A digest of all that decides a row's log-probabilities."""
    starts = batch.starts
    sizes = batch.lengths.tolist()
    counts = torch.bincount(batch.row_of, minlength=batch.size).tolist()
    per_input = [c.cpu().split(sizes) for c in (batch.inputs, batch.positions, batch.branch) if c is not None]
    local = (batch.at - starts[batch.row_of]).cpu()
    per_action = [c.split(counts) for c in (local, batch.actions["target"].cpu())]
    keys = []
    for r in range(batch.size):
        digest = blake2b(digest_size=16)
        for column in (*per_input, *per_action):
            digest.update(column[r].contiguous().numpy().tobytes() + b"|")
        keys.append(digest.digest())
    return keys
