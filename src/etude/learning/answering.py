"""Answers to the same problems side by side: those of a policy, after a teacher's; and what judges say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import only_row
from etude.experience.protocols import Clock, Judge, Policy
from etude.experience.rows import Row
from etude.experience.types import Group, Problem
from etude.feedback.judge import text_of
from etude.feedback.winrate import compared, fitted_rewards
from etude.learning.setting import Setting
from etude.learning.sources import answers, taught

Floats = NDArray[np.float64]
Rewards = Mapping[str, Mapping[str, float]]  # of every answer to every question


@dataclass(frozen=True)
class Answered:
    """The answers to one problem, and the row that teaches each; `taught`: the first is the teacher's."""

    problem: Problem
    texts: list[str]
    rows: list[Row]
    taught: bool = False


def own_answers(s: Setting, clock: Clock, problems: int, members: int, other: Policy | None = None) -> list[Group]:
    """`members` answers of the policy, or of another one, to each of the `problems` of a round. Every round has other
    training problems; `clock` says which round it is, of how many."""
    asked = [s.world.problem("train", clock.step * problems + i) for i in range(problems)]
    keys = s.run.keys.at("answers", clock.step)
    if other is None:
        return s.acting(sample)(s.roles(), asked, members, s.score, clock, keys)
    roles = {"actor": PolicyAgent(other, "actor", s.law, s.limits, s.run.meter)}
    return sample(roles, asked, members, s.score, clock, keys)


def answered(s: Setting, groups: Sequence[Group], teacher: str | None = None) -> list[Answered]:
    """The groups' answers, after the teacher's (see `sources.answers`) where it gives one that fits. Charges `teacher`,
    one a problem."""
    found = [Answered(g.problem, [m.text for m in g.members], [only_row(m) for m in g.members]) for g in groups]
    if teacher is None:
        return found
    s.run.meter.charge("teacher", len(found))
    given = answers(s, teacher, "teacher", [a.problem for a in found])
    rows = [taught(s, a.problem, text) for a, text in zip(found, given, strict=True)]
    return [
        Answered(a.problem, [text, *a.texts], [row, *a.rows], True) if text and isinstance(row, Row) else a
        for a, text, row in zip(found, given, rows, strict=True)
    ]


def verdicts(judge: Judge, found: Sequence[Answered], asking: str) -> list[Floats]:
    """f64[G, G] a problem: every answer's value against every other (see `winrate.compared`)."""
    return compared(judge, [a.problem for a in found], [a.texts for a in found], asking)


def fitted(judge: Judge, rounds: Sequence[Sequence[Answered]]) -> dict[str, dict[str, float]]:
    """A Bradley-Terry reward for every answer to every question, from the verdicts of all rounds."""
    wins = [verdicts(judge, found, f"round{r}") for r, found in enumerate(rounds)]
    met = [(a, w) for found, of in zip(rounds, wins, strict=True) for a, w in zip(found, of, strict=True)]
    return fitted_rewards((text_of(a.problem.prompt), a.texts, w) for a, w in met)


def rewarded(rewards: Rewards, a: Answered) -> Floats:
    """f64[G]: the rewards of a problem's answers; of one that was never met the least."""
    known = rewards[text_of(a.problem.prompt)]
    return np.array([known.get(text, min(known.values())) for text in a.texts])
