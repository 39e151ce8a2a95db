"""Truncation as a length penalty, with one limit or with limits that follow difficulty: DLER and difficulty-aware
DLER (arXiv 2510.15110)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from etude.experience.errors import UserError
from etude.experience.plugs import register
from etude.experience.protocols import Clock, Limits
from etude.experience.types import Group, Trajectory

CUT = frozenset({"length", "context"})  # how a call stops that did not end by itself


@register(
    "reward",
    "truncation",
    gives={"length-penalty"},
    refuses={"length-bonus"},
    why="what is long is cut to reward 0, so nothing else may pay for length",
)
@dataclass(frozen=True)
class Truncation:
    """Reward 0 for answers that did not end within their limit; rewards are taken to be at least 0.

    An answer cut by the longest that `limits` allows has no final answer: whatever a verifier read in its part counts
    for nothing, and it is not correct. `stop_properly` above 0 is instead the factor on what the verifier says of that
    part (the authors' code: 0.1).

    `thresholds` (rising, of the share c of the group's answers that are right and were not cut) and `lengths` (tokens,
    one more than thresholds, falling) give easy problems a shorter limit: c above k of the thresholds means
    `lengths[k]`. An answer that is longer keeps the verifier's word and loses its reward. Raises UserError for
    thresholds and lengths that do not fit each other, or lengths beyond the longest answer.
    """

    limits: Limits
    thresholds: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()  # tokens; none: only what is cut is too long
    stop_properly: float = 0.0  # factor on the reward of an answer that was cut

    def __post_init__(self) -> None:
        check_limits(self.thresholds, self.lengths)
        if self.lengths and self.lengths[0] > self.limits.max_tokens:
            raise UserError(
                f"truncation at {self.lengths[0]} tokens is beyond the longest answer: lower it, or set "
                f"max_tokens={self.lengths[0]} instead of {self.limits.max_tokens}"
            )
        if not 0 <= self.stop_properly <= 1:
            raise UserError(f"stop_properly is a factor from 0 to 1, not {self.stop_properly}")

    def limit(self, right: float) -> float:
        """The limit in tokens of a problem of which this share of answers is right; infinite without `lengths`, since
        of several turns each may be as long as `limits` allows."""
        return self.lengths[sum(right > t for t in self.thresholds)] if self.lengths else math.inf

    def __call__(self, groups: Sequence[Group], clock: Clock) -> list[Group]:
        """The groups with these rewards; the part `in_time` says which answers ended within their limit."""
        return [self._shaped(g) for g in groups]

    def _shaped(self, group: Group) -> Group:
        group = replace(group, members=tuple(self._judged(m) for m in group.members))
        limit = self.limit(group.solved)
        return replace(group, members=tuple(self._paid(m, limit) for m in group.members))

    def _judged(self, member: Trajectory) -> Trajectory:
        """A part of an answer is none."""
        if member.outcome is None:
            raise ValueError(f"problem {member.problem.id}: no outcome to shape")
        if self.stop_properly or not cut(member):
            return member
        return member.judged(replace(member.outcome, correct=False, parsed=None))

    def _paid(self, member: Trajectory, limit: float) -> Trajectory:
        """The reward, and that of each call, as far as the answer ended within `limit` tokens."""
        outcome = member.outcome
        assert outcome is not None
        in_time = not cut(member) and member.tokens() <= limit
        factor = self.stop_properly if cut(member) else float(in_time)
        per_call = None if outcome.per_call is None else tuple(factor * r for r in outcome.per_call)
        parts = {**outcome.parts, "in_time": float(in_time)}
        return member.judged(replace(outcome, reward=factor * outcome.reward, parts=parts, per_call=per_call))


def cut(member: Trajectory) -> bool:
    """Whether a trajectory ended because its last call was out of room."""
    return bool(member.calls) and member.calls[-1].stop in CUT


def check_limits(thresholds: Sequence[float], lengths: Sequence[int]) -> None:
    """Raises UserError unless there are as many falling lengths as intervals between rising thresholds."""
    if (lengths or thresholds) and len(lengths) != len(thresholds) + 1:
        raise UserError(
            f"{len(thresholds)} thresholds part problems by difficulty into {len(thresholds) + 1}, "
            f"which need as many lengths, not {len(lengths)}"
        )
    if not all(math.isfinite(t) and 0 <= t < 1 for t in thresholds) or any(a >= b for a, b in pairwise(thresholds)):
        raise UserError(f"thresholds are rising shares of right answers, from 0 to below 1, not {list(thresholds)}")
    if any(n < 1 for n in lengths) or any(a < b for a, b in pairwise(lengths)):
        raise UserError(f"lengths are tokens, at least 1, the longest first (for hard problems), not {list(lengths)}")
