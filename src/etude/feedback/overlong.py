"""Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from etude.experience.errors import UserError
from etude.experience.plugs import register
from etude.experience.protocols import Clock, Limits
from etude.experience.types import Group, Trajectory


@register("reward", "overlong", gives={"length-penalty"})
@dataclass(frozen=True)
class Overlong:
    """Charges answers for the last `cache` tokens before the longest that `limits` allows: 0 where they
    begin, growing to 1 at their end. A cache of 0 charges nothing; None is a fifth of the longest answer, as in
    section 4.1 (4,096 of 20,480). Raises UserError for a cache longer than the longest answer."""

    limits: Limits
    cache: int | None = None  # tokens

    def __post_init__(self) -> None:
        if not 0 <= self.tokens <= self.limits.max_tokens:
            raise UserError(
                f"the overlong cache must be 0 to {self.limits.max_tokens} tokens, the longest answer, not {self.cache}"
            )

    @property
    def tokens(self) -> int:
        """The cache."""
        return self.limits.max_tokens // 5 if self.cache is None else self.cache

    def penalty(self, length: int) -> float:
        """-1 to 0, for an answer of `length` tokens."""
        if not self.tokens:
            return 0.0
        return max(-1.0, min(0.0, (self.limits.max_tokens - self.tokens - length) / self.tokens))

    def __call__(self, groups: Sequence[Group], clock: Clock) -> list[Group]:
        """The groups with the punishment in their rewards and named in their parts; `correct` stays."""
        return [replace(g, members=tuple(self._shaped(m) for m in g.members)) for g in groups]

    def _shaped(self, member: Trajectory) -> Trajectory:
        if member.outcome is None:
            raise ValueError(f"problem {member.problem.id}: no outcome to shape")
        penalty = self.penalty(member.tokens())
        outcome = member.outcome
        parts = {**outcome.parts, "overlong": penalty}
        return member.judged(replace(outcome, reward=outcome.reward + penalty, parts=parts))
