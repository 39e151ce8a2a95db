"""Evaluation of a policy, alone or with its acting strategy, on problems it does not train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from etude.audits.estimators import accuracy, accuracy_by_category, entropy, length, majority_at_k, parts, pass_at_k
from etude.audits.report import Evaluation
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Acting, Clock, Roles, Score, World
from etude.experience.types import Group


def evaluate(
    roles: Roles,
    world: World,
    split: str,
    problems: int,
    samples: int,
    act: Acting,
    keys: Keys,
    clock: Clock | None = None,
) -> Evaluation:
    """Acts on the first `problems` of a split (or as many as it has), `samples` times each, and judges.

    The same `keys` give the same samples of the same policy, whatever else was drawn; nothing is
    written anywhere. `clock` is what `act` is told (default: the end of training). Raises UserError
    where there is nothing to evaluate.
    """
    if problems < 1 or samples < 1:
        raise UserError(f"an evaluation needs at least 1 problem and 1 sample, not {problems} and {samples}")
    size = world.size(split)
    count = problems if size is None else min(problems, size)
    if count == 0:
        raise UserError(f"world {world.name!r} has no problems in its split {split!r}")
    drawn = [world.problem(split, i) for i in range(count)]
    groups = act(roles, drawn, samples, world.score, clock or Clock(1, 1, "evaluation"), keys)
    return measure([judged(g, world.score) for g in groups], world.name, split, samples)


def measure(groups: Sequence[Group], world: str, split: str, samples: int) -> Evaluation:
    """Everything the audits can say of judged groups: pass@k for the powers of two up to `samples`
    and for `samples`, majority@`samples` where answers were parsed, part/NAME for the named parts of outcomes."""
    fewest = min((len(g.members) for g in groups), default=0)
    metrics = {"accuracy": accuracy(groups)}
    for k in sorted({2**i for i in range(1, max(fewest, 1).bit_length())} | {fewest}):
        if 1 < k <= fewest:
            metrics[f"pass@{k}"] = pass_at_k(groups, k)
    if fewest > 2 and any(m.outcome and m.outcome.parsed is not None for g in groups for m in g.members):
        metrics[f"majority@{fewest}"] = majority_at_k(groups, fewest)
    metrics |= {"length": length(groups), "entropy": entropy(groups)}
    metrics |= {f"part/{name}": e for name, e in parts(groups).items()}
    items = {g.problem.id: g.solved for g in groups}
    return Evaluation(world, split, len(groups), samples, metrics, accuracy_by_category(groups), items)


def judged(group: Group, score: Score) -> Group:
    """The group with an outcome for every member that acting left without one."""
    members = (m if m.outcome is not None else m.judged(score(m.problem, m.text)) for m in group.members)
    return replace(group, members=tuple(members))
