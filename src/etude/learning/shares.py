"""The micro-batches of an update, shared out over processes."""

from __future__ import annotations

from collections.abc import Iterator

from etude.experience.batch import Batch, split, units
from etude.learning.ranks import Ranks


def shares(batch: Batch, count: int) -> list[Batch | None]:
    """The batch in `count` consecutive parts of about as many inputs each, links whole. None where there was
    nothing left to give."""
    if count == 1:
        return [batch]
    lengths = batch.lengths.tolist()
    total, before = sum(lengths), 0
    rows: list[list[int]] = [[] for _ in range(count)]
    for unit in units(batch):
        size = sum(lengths[r] for r in unit)
        rows[(2 * before + size) * count // (2 * total)] += unit  # where the middle of the unit lies
        before += size
    return [batch.select(part) if part else None for part in rows]


def micro_batches(batch: Batch, max_tokens: int, ranks: Ranks) -> Iterator[tuple[Batch, float]]:
    """This process's micro-batches of an update, each with the factor of its loss.

    The factor makes up for gradients being averaged over processes. All processes get equally many, because each
    pass gathers weights from all of them: who has fewer computes one again, which counts 0.
    """
    if ranks.size == 1:
        for micro in split(batch, max_tokens):
            yield micro, 1.0
        return
    parts = [[] if share is None else list(split(share, max_tokens)) for share in shares(batch, ranks.size)]
    own = parts[ranks.rank]
    for micro in own:
        yield micro, float(ranks.size)
    idle = max(map(len, parts)) - len(own)
    least = min((micro for part in parts for micro in part), key=lambda micro: len(micro.inputs))
    for _ in range(idle):
        yield least, 0.0
