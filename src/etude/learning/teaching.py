"""A teacher that writes answers, and how often a policy's are preferred to its."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Policy, Probe
from etude.experience.types import RAW, Problem
from etude.learning.judging import preference_for
from etude.learning.setting import Setting
from etude.policies.zoo import load_policy
from etude.worlds.oracles import load_oracle

Teach = Callable[[Sequence[Problem], Keys], list[str]]  # an answer to each problem


def teacher_for(s: Setting, who: str) -> Teach:
    """`who` is oracle (the world's own demonstrations) or a policy's name or folder, whose answers are sampled at
    temperature 1. Nothing is charged here. Raises UserError where the world has no oracle, or the policy is unknown."""
    if who == "oracle":
        oracle = load_oracle(s.world)
        return lambda problems, keys: [oracle.demonstrate(p, "plain", keys.at(p.id)) for p in problems]
    policy = load_policy(who, device=s.common.device)
    return lambda problems, keys: _written(s, policy, "teacher", problems, keys)


def win_rate(s: Setting, teach: Teach) -> Probe:
    """The mean preference for a policy's answer over the teacher's, on the held-out problems."""
    asked = [s.world.problem("test", i) for i in range(s.common.eval_problems)]
    prefer = preference_for(s)
    given: list[str] = []  # written once

    def probe(policy: Policy, keys: Keys) -> float:
        if not given:
            given.extend(teach(asked, keys.at("teacher")))
        own = _written(s, policy, "actor", asked, keys.at("student"))
        return float(np.mean([prefer(p, a, b) for p, a, b in zip(asked, own, given, strict=True)]))

    return probe


def _written(s: Setting, policy: Policy, name: str, problems: Sequence[Problem], keys: Keys) -> list[str]:
    roles = {"actor": PolicyAgent(policy, name, RAW, s.limits)}
    return [g.members[0].text for g in sample(roles, problems, 1, s.score, Clock(1, 1), keys)]
