"""Work shared out over processes: the micro-batches of an update, the problems of a rollout, a reference's scores."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etude.experience.batch import Batch, split, units
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Acting, Clock, Policy, Roles, Score
from etude.experience.types import Group, Problem
from etude.learning.ranks import Ranks
from etude.learning.sharded import whole



def _read_only(values: dict[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(values)


# Problems and calls hold read-only mappings, which Python does not pickle by itself.
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


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


def shared_acting(act: Acting, policy: Policy, ranks: Ranks, meter: Meter | None = None) -> Acting:
    """`act`, with each process acting on a share of the problems, with all of the policy's weights; every process
    gets all groups, in the order of the problems, and `meter` is charged for all.

    Streams are keyed by problem, and a problem that is asked twice stays with one process, so that it does not
    matter who acts.
    """
    if ranks.size == 1:
        return act

    def acting(
        roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> Sequence[Group]:
        owner = {name: i % ranks.size for i, name in enumerate(dict.fromkeys(p.id for p in problems))}
        mine = [p for p in problems if owner[p.id] == ranks.rank]
        before = meter.read() if meter else {}

        def share() -> tuple[list[str], list[Group], dict[str, float]]:
            groups = list(act(roles, mine, n, score, clock, keys)) if mine else []
            return list(owner), groups, meter.since(before) if meter else {}

        with whole(policy):
            found = ranks.together(share)
        if any(asked != list(owner) for asked, _, _ in found):
            raise RuntimeError("processes of this job have drawn different problems")
        if meter:
            for r, (_, _, spent) in enumerate(found):
                for kind, amount in spent.items():
                    meter.charge(kind, amount if r != ranks.rank else 0.0)
        parts = [iter(groups) for _, groups, _ in found]
        return [next(parts[owner[p.id]]) for p in problems]

    return acting
