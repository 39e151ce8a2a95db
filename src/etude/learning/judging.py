"""The judge that a run's options name, with what it needs from the run."""

from __future__ import annotations

import os

from etude.acting.agent import PolicyAgent
from etude.experience.endpoint import KEY, Endpoint
from etude.experience.protocols import Limits, Preferring
from etude.experience.types import GREEDY
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
from etude.policies.zoo import load_policy


def preference_for(s: Setting) -> Prefer:
    """The world's own preference between two answers, or that of its verifier."""
    return s.world.prefer if isinstance(s.world, Preferring) else by_outcome(s.score)


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
