"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476, section 3).

Problem: at scale GRPO loses entropy, wastes steps on groups that are all right or all wrong, weighs tokens of
long answers too little, and punishes answers that were merely cut off. Four changes to GRPO:

1. Clip-higher: the ratio may rise to 1 + 0.28 but fall only to 1 - 0.2, so rare tokens can grow (eq. 10).
2. Dynamic sampling: groups with accuracy 0 or 1 are dropped and others drawn until the batch is full (eq. 11).
3. Token-level loss: the mean is over all tokens of all answers (eq. 12).
4. Soft overlong punishment: an answer of |o| tokens, of at most L with a cache of c before it, is charged
   0 for |o| <= L - c, and ((L - c) - |o|) / c beyond, which is -1 where it was cut off at L (eq. 13).

No KL term. With clip_high = clip_low, selector = all, normalise = sequence and overlong_cache = 0 this is GRPO.
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
class DAPO(GroupRL):
    """DAPO's hyperparameters."""

    normalise: By = "token"  # what the loss is a mean over
    selector: str = "mixed"  # groups in which some answers are right and some wrong
    max_draws: int = 3  # at most three times the problems, then the step goes on with what there is
    objective: str = "dapo"  # the loss (`etude list --parts`)
    shaping: str = "overlong"  # answers near the limit are punished (reward in `etude list --parts`)
    clip_low: float = 0.2  # the ratio is not taken below 1 - clip_low
    clip_high: float = 0.28  # the ratio is not taken above 1 + clip_high
    overlong_cache: int | None = None  # tokens over which the punishment grows to 1; None: a fifth of the longest

    def options(self) -> Mapping[tuple[Kind, str], Mapping[str, Any]]:
        """Builds the objective with these clips and the punishment with this cache."""
        return {
            ("objective", "dapo"): {"clip_low": self.clip_low, "clip_high": self.clip_high},
            ("reward", "overlong"): {"cache": self.overlong_cache},
        }


METHOD = Method("dapo", DAPO, group_rl)
