"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740, section 3; estimator of Kool et al. 2019).

Problem: PPO's critic, clipping and token-level actions are machinery that fine-tuning from a good start does not
need. Idea: the whole answer is one action, and the other G - 1 answers to the question are its baseline.

    A_i = r_i - 1/(G - 1) sum_{j != i} r_j,      L = - mean_i A_i log pi(o_i)

with log pi(o_i) summed over the answer's tokens. A_i = G/(G - 1) (r_i - mean(r)), so at one update a
batch its gradient is G/(G - 1) C times Dr. GRPO's, C being that method's constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from etude.experience.batch import By
from etude.learning.group_rl import GroupRL, group_rl
from etude.methods.method import Method


@dataclass(frozen=True)
class RLOO(GroupRL):
    """RLOO's hyperparameters."""

    normalise: By = "row"  # token sums, divided by the number of answers
    credit: str = "rloo"  # how rewards become advantages (`etude list --parts`)
    objective: str = "rloo"  # the loss (`etude list --parts`)


METHOD = Method("rloo", RLOO, group_rl)
