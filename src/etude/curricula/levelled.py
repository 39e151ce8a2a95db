"""A schedule that hears: whether what the policy learns by itself has levelled off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etude.experience.errors import UserError
from etude.experience.protocols import Clock, Report


class Levelled:
    """0 until the share of failed groups no longer falls, then 1 for good.

    Counts the drawn groups, `window` of them at a time, and the share f of those that failed (`Group.failed`:
    every member wrong). Once f is no more than `fall` below the f of the window before, what still fails is not
    going to be solved by itself: the stagnation that Scaf-GRPO (arXiv:2510.19807, section 3) waits for, there
    as the rate at which the questions that failed at first come to be solved. Shares of fresh draws say the same
    where a question seldom comes twice, as long as the curriculum draws from the same mixture.
    """

    def __init__(self, window: int = 256, fall: float = 0.02) -> None:
        if window < 1 or not 0 <= fall < 1:
            raise UserError(f"window must be at least 1 group and fall a share below 1, not {window} and {fall}")
        self.window, self.fall = window, fall
        self.over = False
        self.before: float | None = None  # share of failed groups in the last full window
        self.recent: list[bool] = []  # of the window that is being filled

    def __call__(self, clock: Clock) -> float:
        """See `Schedule`."""
        return float(self.over)

    def observe(self, report: Report) -> None:
        """Hears of every drawn group."""
        for group in report.groups if not self.over else ():
            self.recent.append(group.failed)
            if len(self.recent) == self.window:
                share = sum(self.recent) / self.window
                self.over = self.over or (self.before is not None and self.before - share <= self.fall)
                self.before, self.recent = share, []

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {"over": self.over, "before": self.before, "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`."""
        self.over, self.before, self.recent = state["over"], state["before"], list(state["recent"])
