"""The judge that a run's options name, with what it needs from the run."""

from __future__ import annotations

import math
import os

import numpy as np

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.experience.endpoint import KEY, Endpoint
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Limits, Policy, Preferring, Probe
from etude.experience.types import GREEDY, RAW
from etude.feedback.judge import (
    AskedJudge,
    Fair,
    Judging,
    OracleJudge,
    Prefer,
    ScoredJudge,
    by_outcome,
    endpoint_replies,
    policy_replies,
)
from etude.learning.setting import Setting
from etude.learning.sources import answers
from etude.policies.zoo import load_policy


def preference_for(s: Setting) -> Prefer:
    """The world's own preference between two answers, or that of its verifier."""
    return s.world.prefer if isinstance(s.world, Preferring) else by_outcome(s.score)


def win_rate_over(s: Setting, source: str) -> Probe:
    """The mean preference for a policy's answers over those of a source (see `sources.answers`), on those held-out
    problems that it answers; nan where there are none. Nothing is charged."""
    asked = [s.world.problem("test", i) for i in range(s.common.eval_problems)]
    prefer = preference_for(s)
    given: dict[int, str] = {}  # written once

    def probe(policy: Policy, keys: Keys) -> float:
        if not given:
            found = answers(s, source, "held-out", asked, charged=False)
            given.update({i: text for i, text in enumerate(found) if text is not None})
        roles = {"actor": PolicyAgent(policy, "actor", RAW, s.limits)}
        groups = sample(roles, asked, 1, s.score, Clock(1, 1), keys)
        values = [prefer(asked[i], groups[i].members[0].text, text) for i, text in given.items()]
        return float(np.mean(values)) if values else math.nan

    return probe


def judge_for(s: Setting, how: Judging) -> Fair:
    """The judge, charged to the run's meter: for the run to track. An oracle sees no order and asks nobody, so it is
    asked in one and not remembered.

    Raises UserError for a policy or an endpoint that cannot be used.
    """
    meter = s.run.meter
    if how.who == "oracle":
        oracle = OracleJudge(preference_for(s), s.run.keys.at("judge"), how.noise)
        return Fair(oracle, meter, both=False, remember=False)
    if how.url:
        endpoint = Endpoint(how.who, os.environ.get(KEY), options="judge")
        model = how.model or endpoint.model(None).id
        return Fair(AskedJudge(endpoint_replies(endpoint, model, how.tokens, how.concurrency)), meter)
    policy = load_policy(how.who, s.run.keys.at("judge"), device=s.common.device)
    if how.by == "score":
        return Fair(ScoredJudge(policy), meter)
    agent = PolicyAgent(policy, "judge", GREEDY, Limits(how.tokens))
    return Fair(AskedJudge(policy_replies(agent, s.run.keys.at("judge"), Limits(how.tokens))), meter)
