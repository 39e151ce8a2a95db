"""The loops: plain functions with callables as plug points. There is no trainer to subclass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from etude.curation.examples import Examples, Visited, pack_groups
from etude.experience.batch import Batch, By, normalise
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import (
    Acting,
    Clock,
    Credit,
    Curriculum,
    Listener,
    Objective,
    Policy,
    Report,
    Roles,
    Score,
    Select,
)
from etude.experience.types import NOTHING, Group, Problem
from etude.feedback.advantage import degenerate, trajectory_of
from etude.learning.ahead import Gather, Locked
from etude.learning.learner import Mask, Penalty, Seat, Term, update
from etude.learning.run import Run
from etude.objectives.reference import with_reference

Watch = Callable[[Clock], None]  # evaluates and logs, when it is time to
Source = Callable[[Clock, Keys], Batch]
Shape = Callable[[Sequence[Group], Clock], Sequence[Group]]  # a reward plug: outcomes rewritten


def fit(
    run: Run,
    seat: Seat,
    source: Source,
    objective: Objective,
    steps: int,
    *,
    by: By | None = "token",
    constant: float | None = None,
    watch: Watch | None = None,
    penalties: Sequence[Penalty] = (),
    mask: Mask | None = None,
) -> None:
    """Examples or linked rows through `steps` updates. `by` None: the source normalises."""
    run.track("seat", seat)
    for clock in run.steps(steps):
        if watch is not None:
            watch(clock)
        keys = run.stream(clock)
        batch = source(clock, keys)
        if by is not None:
            batch = normalise(batch, by, constant)
        run.log(update(seat, [Term(batch, objective)], keys, run.meter, penalties=penalties, mask=mask))
    if watch is not None:
        watch(Clock(steps, steps, run.stage_name))


def examples(data: Examples | Visited[Any], size: int, run: Run) -> Source:
    """The source that draws `size` units a step from data, in epochs."""
    epochs = run.keys.at(run.stage_name, "examples")
    return lambda clock, keys: data.draw(clock.step, size, epochs)


@dataclass(frozen=True)
class Collected:
    """What one step drew: every group in order, and which of them are trained on."""

    groups: list[Group]
    kept: list[bool]

    @property
    def chosen(self) -> list[Group]:
        """The groups that are trained on."""
        return [g for g, k in zip(self.groups, self.kept, strict=True) if k]


def collect(
    roles: Roles,
    act: Acting,
    score: Score,
    curriculum: Curriculum,
    clock: Clock,
    keys: Keys,
    *,
    problems: int,
    members: int,
    shape: Shape | None = None,
    select: Select | None = None,
    max_draws: int = 1,
) -> Collected:
    """Draws and acts until `problems` groups are selected, or `max_draws` times as many were drawn.

    Streams are keyed by problem and by how often it was drawn in this step, so neither the order nor
    the size of a refill changes what any group does.
    """
    groups: list[Group] = []
    kept: list[bool] = []
    seen: dict[str, int] = {}
    budget = problems * max_draws
    while sum(kept) < problems and len(groups) < budget:
        want = min(problems - sum(kept), budget - len(groups))
        drawn = curriculum.draw(want, clock, keys.at("draw", len(groups)))
        if not drawn:
            break
        for occurrence, batch in _by_occurrence(drawn, seen):
            new: Sequence[Group] = act(roles, batch, members, score, clock, keys.at("act", occurrence))
            if shape is not None:
                new = shape(new, clock)
            groups += new
            kept += [select is None or select(g) for g in new]
    return Collected(groups, kept)


def on_policy(
    run: Run,
    seat: Seat,
    roles: Roles,
    *,
    steps: int,
    curriculum: Curriculum,
    act: Acting,
    score: Score,
    credit: Credit | None,
    objective: Objective,
    problems: int = 16,
    members: int = 8,
    shape: Shape | None = None,
    select: Select | None = None,
    max_draws: int = 1,
    by: By = "token",
    constant: float | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    reference: Policy | None = None,
    extra: Callable[[Clock, Keys], Sequence[Term]] | None = None,
    watch: Watch | None = None,
    agent: str = "actor",
    ahead: Callable[[Gather], Gather] | None = None,
    listeners: Mapping[str, Listener] = NOTHING,
) -> None:
    """Draw, act, feedback, select with refill, credit, update; then the curriculum hears of all.

    With a `reference`, actions get their log-probability under it; without a `credit`, no advantage. `extra`
    adds terms on other batches to every update. A step in which nothing was selected makes no update and is
    counted (`empty_step`). `ahead` may collect steps before their turn, in another thread (see `Ahead`).
    `listeners` hear what the curriculum hears, and their state is the run's to keep, under their names.
    """
    if ahead is not None:
        curriculum = Locked(curriculum)

    def gather(clock: Clock) -> Collected:
        return collect(
            roles, act, score, curriculum, clock, run.stream(clock),
            problems=problems, members=members, shape=shape, select=select, max_draws=max_draws,
        )  # fmt: skip

    step = gather if ahead is None else ahead(gather)
    run.track("seat", seat)
    run.track("curriculum", curriculum)
    for name, listener in listeners.items():
        run.track(name, listener)
    for clock in run.steps(steps):
        if watch is not None:
            watch(clock)
        keys = run.stream(clock)
        found = step(clock)
        if found.groups:  # a curriculum may have nothing more to ask
            run.log(describe(found))
        run.keep(found.groups, found.kept)
        gain = [0.0] * len(found.groups)
        if any(m.tokens(agent) for g in found.chosen for m in g.members):
            batch = pack_groups(found.chosen, agent)
            if credit is not None:
                batch = credit(found.chosen, batch)
                gain = _gains(found, batch)
            if reference is not None:
                batch = with_reference(batch, reference, meter=run.meter)
            metrics: list[dict[str, float]] = []
            for i, part in enumerate(_minibatches(batch, epochs, minibatches, keys)):
                terms = [Term(normalise(part, by, constant), objective)]
                if extra is not None:
                    terms += extra(clock, keys.at("extra", i))
                metrics.append(update(seat, terms, keys.at("update", i), run.meter))
            run.log({name: float(np.mean([m[name] for m in metrics if name in m])) for name in metrics[0]})
        else:
            run.log({"empty_step": 1.0})
        report = Report(clock, found.groups, found.kept, gain)
        for listener in (curriculum, *listeners.values()):
            listener.observe(report)
    if watch is not None:
        watch(Clock(steps, steps, run.stage_name))


def rounds(
    run: Run,
    count: int,
    collect: Callable[[int], Examples | None],
    fit: Callable[[int, Examples], None],
    restart: Callable[[], None] | None = None,
) -> None:
    """Collect and curate, then fit, again and again.

    What a round collected is kept with the run, so that a resumed fit sees the same data; a round that
    collected nothing (None) has no fit. `restart` is called before each fit and may put the base weights
    back; None goes on from the last.
    """
    if count < 1:
        raise UserError(f"rounds must be at least 1, not {count}")
    for r in range(count):
        state = run.stage(f"round{r}/collect", lambda r=r: (found := collect(r)) and found.state_dict())  # type: ignore[misc]
        if state is None:
            continue
        data = Examples.from_state(state)
        if restart is not None:  # a stage of its own, so that a fit that is resumed does not begin anew
            run.stage(f"round{r}/restart", restart)
        run.stage(f"round{r}/fit", lambda r=r, data=data: fit(r, data))  # type: ignore[misc]


def describe(found: Collected) -> dict[str, float]:
    """What a step's experience looks like: reward, accuracy, length, how it was selected, and as `group/NAME` the
    mean of every number that acting noted in the tags of groups, over the groups that have it."""
    members = [m for g in found.groups for m in g.members]
    judged = [m.correct for m in members if m.outcome is not None and m.outcome.correct is not None]
    calls = [c for m in members for c in m.calls]
    out: dict[str, float] = {
        "reward": float(np.mean([m.reward for m in members])),
        "length": float(np.mean([m.tokens() for m in members])),
        "truncated": float(np.mean([c.stop in ("length", "context") for c in calls])) if calls else 0.0,
        "live": float(np.mean([not degenerate(g) for g in found.groups])),  # groups whose rewards differ
        "groups_drawn": float(len(found.groups)),
        "groups_kept": float(sum(found.kept)),
    }
    if judged:
        out["accuracy"] = float(np.mean(judged))
    parts = {name for m in members if m.outcome for name in m.outcome.parts}
    for name in sorted(parts):
        out[f"part/{name}"] = float(np.mean([m.outcome.parts.get(name, 0.0) for m in members if m.outcome]))
    for name in sorted({name for g in found.groups for name in g.tags}):
        noted = [g.tags[name] for g in found.groups if name in g.tags]
        if all(isinstance(value, int | float) for value in noted):
            out[f"group/{name}"] = float(np.mean(noted))
    return out


def _by_occurrence(drawn: Sequence[Problem], seen: dict[str, int]) -> Iterator[tuple[int, list[Problem]]]:
    """Splits a draw so that no problem is twice in one part; counts how often each was drawn."""
    parts: dict[int, list[Problem]] = {}
    for problem in drawn:
        occurrence = seen.get(problem.id, 0)
        seen[problem.id] = occurrence + 1
        parts.setdefault(occurrence, []).append(problem)
    yield from parts.items()


def _gains(found: Collected, batch: Batch) -> list[float]:
    """Of each drawn group the mean over its members of their mean |advantage| over actions; 0 where it was not kept
    or nobody acted."""
    sizes = [len(g.members) for g in found.chosen]
    of = trajectory_of(batch)
    total = torch.zeros(sum(sizes)).index_add(0, of, batch.actions["advantage"].abs().float())
    member = total / torch.bincount(of, minlength=sum(sizes)).clamp_min(1)
    means = iter([float(part.mean()) for part in member.split(sizes)])
    return [next(means) if kept else 0.0 for kept in found.kept]


def _minibatches(batch: Batch, epochs: int, count: int, keys: Keys) -> Iterator[Batch]:
    """`count` parts of the batch in each epoch, by shuffled rows; the batch itself where it is one."""
    if count == 1:
        for _ in range(epochs):
            yield batch
        return
    for epoch in range(epochs):
        order = keys.at("minibatches", epoch).numpy().permutation(batch.size)
        for part in np.array_split(order, min(count, batch.size)):
            yield batch.select(sorted(part.tolist()))
