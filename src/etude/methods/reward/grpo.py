"""GRPO: group relative policy optimisation (arXiv 2402.03300, section 4.1).

Problem: a policy-gradient step wants a baseline, and a learned critic is as large as the policy. Idea: ask the
same question G times and take the group's own mean and standard deviation as baseline and scale.

For question q with answers o_1..o_G of rewards r_i (no unit), every token t of o_i gets the advantage

    A_it = (r_i - mean(r)) / (std(r) + eps)

and the loss to minimise is, with ratio R_it = pi(o_it) / pi_old(o_it),

    L = - mean_i 1/|o_i| sum_t [ min(R_it A_it, clip(R_it, 1 - clip, 1 + clip) A_it) - kl_coef k3_it ]

with k3 the estimator exp(d) - d - 1 of the divergence from the reference, d = log pi_ref - log pi (eq. 3-4).

Departures: kl_coef is 0 by default (the paper: 0.04), as in most later work with verifiable rewards; the standard
deviation is the sample's (n - 1), as in the public trainers.
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
class GRPO(GroupRL):
    """GRPO's hyperparameters."""

    normalise: By = "sequence"  # mean over answers of each answer's token mean
    clip: float = 0.2  # the ratio is clipped to 1 - clip and 1 + clip
    kl_coef: float = 0.0  # weight of the k3 divergence from the starting policy

    def options(self) -> Mapping[tuple[Kind, str], Mapping[str, Any]]:
        """Builds the objective with this clip and KL weight."""
        return {("objective", "grpo"): {"clip": self.clip, "kl_coef": self.kl_coef}}


METHOD = Method("grpo", GRPO, group_rl)
