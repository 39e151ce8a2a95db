"""Acting, shared out over processes."""

from __future__ import annotations

from collections.abc import Sequence

from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Acting, Clock, Policy, Roles, Score
from etude.experience.types import Group, Problem
from etude.learning.ranks import Ranks
from etude.learning.sharded import whole


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
    ) -> list[Group]:
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
                for kind, amount in spent.items() if r != ranks.rank else ():
                    meter.charge(kind, amount)
        parts = [iter(groups) for _, groups, _ in found]
        return [next(parts[owner[p.id]]) for p in problems]

    return acting
