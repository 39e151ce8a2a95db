"""Dr. GRPO: GRPO without its two biases (arXiv 2503.20783, section 3).

Problem: dividing by each answer's length makes long wrong answers cheap, and dividing by the group's standard
deviation makes very easy and very hard questions heavy. Idea: divide by neither.

    A_it = r_i - mean(r),        L = - 1/(G C) sum_i sum_t min(R_it A_it, clip(R_it, 1 - e, 1 + e) A_it)

C is a constant number of tokens (the longest answer allowed), so that no answer's length enters. With tied lengths
and unit standard deviation this is GRPO times |o| / C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etude.experience.batch import By
from etude.experience.plugs import Kind
from etude.learning.group_rl import GroupRL, group_rl
from etude.methods.method import Method


@dataclass(frozen=True)
class DrGRPO(GroupRL):
    """Dr. GRPO's hyperparameters."""

    normalise: By = "constant"  # token sums, divided by G C (over all groups of an update)
    credit: str = "dr-grpo"  # how rewards become advantages (`etude list --parts`)
    objective: str = "dr-grpo"  # the loss (`etude list --parts`)
    clip: float = 0.2  # the ratio is clipped to 1 - clip and 1 + clip

    def options(self) -> Mapping[tuple[Kind, str], Mapping[str, Any]]:
        """Builds the objective with this clip."""
        return {("objective", "dr-grpo"): {"clip": self.clip}}


METHOD = Method("dr-grpo", DrGRPO, group_rl)
