"""Acting through a server, against a real one on this machine: what comes back is what the engine would have given."""

from __future__ import annotations

import asyncio
import random
import sys

import numpy as np
import pytest
import torch

from acting_fakes import streams
from app_cli import refused, runner
from etude.acting.agent import PolicyAgent
from etude.acting.hooks import Stop, When
from etude.acting.server import connect
from etude.experience import endpoint as wire
from etude.experience.endpoint import Endpoint, Server, base_url
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Limits
from etude.experience.types import GREEDY, Author, Law
from etude.feedback.score import score
from etude.policies.zoo import load_policy, save_policy
from served_model import ServedModel, serving

pytestmark = pytest.mark.timeout(120)
LIMITS = Limits(max_tokens=12)
KEY = "sk-secret-42"


def small(seed=0, limit=48):
    policy = load_policy("tiny:depth=1,width=32,heads=2,ffn=48", Keys(seed), limit=limit)
    with torch.no_grad():
        policy.model.embed_tokens.weight[2] *= 6.0  # tied: answers end now and then
        policy.model.embed_tokens.weight[60:80] *= 4.0
    return policy


@pytest.fixture(scope="module")
def policy():
    return small()


@pytest.fixture
def served(policy, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("ETUDE_API_KEY", raising=False)
    monkeypatch.setattr(wire, "BACKOFF", 0.01)
    model = ServedModel(policy)
    with serving(model) as url:
        model.url = url
        yield model


def agent_of(served, policy, **more):
    more = {"limits": LIMITS, "limit": policy.limit, **more}
    return connect(Server(served.url, concurrency=more.pop("concurrency", 8)), policy.tokenizer, **more)


def contexts_of(policy, n):
    return [policy.tokenizer.prompt(f"{i}+{i * i}=") for i in range(n)]


# --- the same calls as the engine's ----------------------------------------------------------------


def test_greedy_calls_are_those_of_the_engine(served, policy):
    meter, own = Meter(), Meter()
    contexts = contexts_of(policy, 24) + contexts_of(policy, 3)
    calls = agent_of(served, policy, law=GREEDY, meter=meter).generate(contexts, streams(27))
    expected = PolicyAgent(policy, law=GREEDY, limits=LIMITS, meter=own).generate(contexts, streams(27))
    for a, b in zip(calls, expected, strict=True):
        assert a.agent == b.agent == "actor"
        assert a.context.tolist() == b.context.tolist()
        assert a.out.tolist() == b.out.tolist()
        assert a.out.dtype == a.context.dtype == np.int32
        assert a.author.tolist() == b.author.tolist() == [Author.SELF] * len(a.out)
        assert a.law == b.law == GREEDY
        assert a.stop == b.stop
        np.testing.assert_allclose(a.logp_raw, b.logp_raw, atol=1e-4)
        assert a.logp_sampled.tolist() == b.logp_sampled.tolist() == [0.0] * len(a.out)
    assert {c.stop for c in calls} == {"stop", "length"}
    assert {k: n for k, n in meter.read().items() if n} == {k: n for k, n in own.read().items() if n}


def test_sampled_tokens_have_the_policys_own_log_probabilities(served, policy):
    contexts = contexts_of(policy, 16)
    calls = agent_of(served, policy).generate(contexts, streams(16))
    own = score(policy, contexts, [c.out for c in calls])
    for call, logp in zip(calls, own, strict=True):
        np.testing.assert_allclose(call.logp_raw, logp, atol=1e-4)
        assert call.logp_sampled.tolist() == call.logp_raw.tolist()
        assert call.law.raw
        assert (call.out[-1] == policy.tokenizer.eos) == (call.stop == "stop")
        assert len(call.out) <= 12
        assert policy.tokenizer.eos not in call.out[:-1]
    assert {c.stop for c in calls} == {"stop", "length"}


def test_the_same_keys_ask_for_the_same_and_equal_prompts_for_different_draws(served, policy):
    agent, contexts = agent_of(served, policy), contexts_of(policy, 1) * 8
    first, again = (agent.generate(contexts, streams(8)) for _ in range(2))
    other = agent.generate(contexts, streams(8, seed=1))
    assert [c.out.tolist() for c in first] == [c.out.tolist() for c in again]
    assert len({tuple(c.out.tolist()) for c in first}) > 4
    assert [c.out.tolist() for c in first] != [c.out.tolist() for c in other]
    seeds = [body["seed"] for body in served.seen]
    assert sorted(seeds[:8]) == sorted(seeds[8:16])
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_nothing_is_lost_or_mixed_up_however_late_answers_come(served, policy):
    contexts, keys = contexts_of(policy, 120), streams(120)
    expected = PolicyAgent(policy, law=GREEDY, limits=LIMITS).generate(contexts, keys)
    dice = random.Random(0)
    delays = [dice.uniform(0, 0.04) for _ in range(121)]
    served.delay = lambda i: delays[i]
    calls = agent_of(served, policy, law=GREEDY, concurrency=16).generate(contexts, keys)
    assert [c.out.tolist() for c in calls] == [c.out.tolist() for c in expected]
    assert [c.context.tolist() for c in calls] == [c.tolist() for c in contexts]
    assert len(served.seen) == 120
    assert 8 < served.most <= 16


@pytest.mark.parametrize(
    "law", [Law(temperature=0.7), Law(top_k=3), Law(top_p=0.9), Law(min_p=0.1)], ids=["T", "k", "p", "m"]
)
def test_under_another_law_no_log_probability_is_claimed(served, policy, law):
    calls = agent_of(served, policy, law=law).generate(contexts_of(policy, 2), streams(2))
    for call in calls:
        assert call.law == law
        assert len(call.out)
        assert np.isnan(call.logp_raw).all()
        assert np.isnan(call.logp_sampled).all()
    body = served.seen[0]
    assert Law(body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == law
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)


def test_stop_ids_and_strings_end_an_answer_as_in_the_engine(served, policy):
    contexts, keys = contexts_of(policy, 12), streams(12)
    free = PolicyAgent(policy, law=GREEDY, limits=LIMITS).generate(contexts, keys)
    drawn = [t for c in free for t in c.out.tolist()[1:-1]]
    letter = max(set(drawn), key=drawn.count)
    for limits in (
        Limits(12, stop_ids=frozenset({letter})),
        Limits(12, stop=(policy.tokenizer.decode([letter]), "never this")),
    ):
        calls = agent_of(served, policy, law=GREEDY).generate(contexts, keys, limits)
        expected = PolicyAgent(policy, law=GREEDY).generate(contexts, keys, limits)
        assert [(c.out.tolist(), c.stop) for c in calls] == [(c.out.tolist(), c.stop) for c in expected]
        assert any(c.out[-1] == letter and c.stop == "stop" for c in calls)


def test_the_shorter_of_two_limits_ends_the_context(served, policy):
    long = [policy.tokenizer.prompt("1" * n) for n in (30, 40, 44, 47)]  # and the start token
    for limit, longest in ((policy.limit, 48), (None, 48), (40, 40)):
        fits = [c for c in long if len(c) <= longest]
        agent = agent_of(served, policy, law=GREEDY, limit=limit)
        assert agent.limit == longest
        calls = agent.generate(fits, streams(len(fits)))
        stub = small(limit=longest)
        expected = PolicyAgent(stub, law=GREEDY, limits=LIMITS).generate(fits, streams(len(fits)))
        assert [(c.out.tolist(), c.stop) for c in calls] == [(c.out.tolist(), c.stop) for c in expected]
    assert calls[-1].stop in ("context", "stop")
    assert agent_of(served, policy).generate(long[-1:], streams(1))[0].stop == "context"
    assert not len(agent_of(served, policy).generate(long[-1:], streams(1))[0].out)
    with pytest.raises(UserError, match="prompt 0 has 49 tokens, but the policy's limit is 48"):
        agent_of(served, policy).generate([policy.tokenizer.prompt("1" * 48)], streams(1))
    assert agent_of(served, policy).generate([], []) == []


def test_a_loop_that_is_running_is_no_hindrance(served, policy):
    async def notebook():
        return agent_of(served, policy, law=GREEDY).generate(contexts_of(policy, 2), streams(2))

    assert len(asyncio.run(notebook())) == 2


# --- what passes, and what does not ------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["busy", "too many", "reset"])
def test_what_passes_is_tried_again(served, policy, fault):
    contexts, keys = contexts_of(policy, 6), streams(6)
    expected = agent_of(served, policy).generate(contexts, keys)
    served.fault, served.failures, served.seen = fault, 4, []
    calls = agent_of(served, policy, concurrency=2).generate(contexts, keys)
    assert [c.out.tolist() for c in calls] == [c.out.tolist() for c in expected]
    assert served.failures == 0
    assert len(served.seen) == 6


@pytest.mark.parametrize(
    ("fault", "line"), [("busy", "is busy (503: later, please)"), ("reset", "cannot be reached (")]
)
def test_what_does_not_pass_is_a_line(served, policy, fault, line):
    agent = agent_of(served, policy)
    served.fault, served.failures = fault, 10**6
    with pytest.raises(UserError) as error:
        agent.generate(contexts_of(policy, 3), streams(3))
    assert str(error.value).startswith(f"server {served.url} {line}")
    assert "\n" not in str(error.value)
    assert 10**6 - served.failures <= 3 * wire.TRIES


FAULTS = {
    "refused": "refused /v1/completions (400: no such parameter as that)",
    "broken": "refused /v1/completions (500: Internal Server Error)",
    "no json": "answered /v1/completions with what is not JSON: <html> hello</html>",
    "a list": "does not hold exactly one choice: it must be vLLM 0.10.2 or later",
    "two choices": "does not hold exactly one choice",
    "no ids": "holds no token ids (return_token_ids): it must be vLLM 0.10.2 or later, or speak its protocol",
    "null ids": "holds no token ids",
    "other prompt": "is for another prompt than the one sent",
    "no logprobs": "holds no log-probabilities (logprobs): it must be vLLM",
    "fewer logprobs": "log-probabilities for",
    "null logprob": "holds the log-probability None",
    "nan logprob": "holds the log-probability nan",
    "positive logprob": "holds the log-probability 0.5",
    "never logprob": "holds the log-probability -9999.0",
    "beyond vocabulary": "holds the token 105 of a vocabulary of 105",
    "negative id": "holds the token -1 of a vocabulary of 105",
    "too long": "tokens where at most 12 were asked for",
    "cut short": "ends after 1 of 12 tokens, at none of the policy's stops (finish_reason 'stop')",
    "runs on": "goes on after the stop token 2 (stop_token_ids)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_not_what_was_asked_for_is_a_line(served, policy, fault):
    meter = Meter()
    agent = agent_of(served, policy, meter=meter)
    context = contexts_of(policy, 1)
    keys = next(k for k in streams(50) if len(agent.generate(context, [k])[0].out) > 4)
    meter.load_state_dict({})
    served.fault = fault
    with pytest.raises(UserError) as error:
        agent.generate(context * 5, [keys] * 5)
    assert FAULTS[fault] in str(error.value)
    assert f"server {served.url}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(meter.read().values())


def test_rounding_above_0_is_0(served, policy):
    served.fault = "rounded logprob"
    assert agent_of(served, policy).generate(contexts_of(policy, 1), streams(1))[0].logp_raw[0] == 0


def test_a_server_that_is_not_there_or_too_slow_is_a_line(served, policy):
    with pytest.raises(
        UserError, match=r"^server http://127\.0\.0\.1:9 cannot be reached \(.*see that it runs, as `vllm"
    ):
        connect(Server("http://127.0.0.1:9"), policy.tokenizer)
    served.delay = lambda i: 5.0
    agent = agent_of(served, policy, timeout=0.3)
    with pytest.raises(UserError, match=r"did not answer /v1/completions within 0\.3 s"):
        agent.generate(contexts_of(policy, 3), streams(3))


def test_models_are_found_or_named(served, policy):
    tokenizer = policy.tokenizer
    assert connect(Server(served.url + "/v1/"), tokenizer).model == "base"
    assert connect(Server(served.url, "base"), tokenizer).limit == 48
    with pytest.raises(UserError, match=r"has no model 'bass': it serves base$"):
        connect(Server(served.url, "bass"), tokenizer)
    served.policies["adapter"] = policy
    assert connect(Server(served.url), tokenizer).model == "base"
    assert connect(Server(served.url, "adapter"), tokenizer).limit == 48
    served.fault = "two models"
    with pytest.raises(UserError, match=r"serves adapter, base, other: name the model with --server\.model"):
        connect(Server(served.url), tokenizer)
    served.fault = "no models"
    with pytest.raises(UserError, match="lists no models"):
        connect(Server(served.url), tokenizer)
    served.fault = "no length"
    assert connect(Server(served.url), tokenizer, limit=20).limit == 20
    with pytest.raises(UserError, match="does not say how long sequences may be"):
        connect(Server(served.url), tokenizer)


def test_a_model_that_goes_away_is_named(served, policy):
    agent = agent_of(served, policy)
    served.policies = {"new": policy}
    with pytest.raises(UserError, match=r"\(404: The model `base` does not exist\.\)"):
        agent.generate(contexts_of(policy, 1), streams(1))


def test_the_key_is_sent_and_never_repeated(served, policy, monkeypatch):
    served.key = KEY
    with pytest.raises(UserError, match=r"refuses the API key \(401: .*\): set ETUDE_API_KEY to the one it wants"):
        connect(Server(served.url), policy.tokenizer)
    monkeypatch.setenv("ETUDE_API_KEY", KEY + "0")
    with pytest.raises(UserError) as error:
        connect(Server(served.url), policy.tokenizer)
    assert "wrong key Bearer ***" in str(error.value)
    monkeypatch.setenv("ETUDE_API_KEY", KEY)
    agent_of(served, policy).generate(contexts_of(policy, 3), streams(3))
    assert {h["authorization"] for h in served.headers} == {f"Bearer {KEY}"}


def test_hooks_laws_and_urls_that_cannot_be(served, policy):
    class Hook:
        when = When(every=1)

        def __call__(self, row):
            return Stop()

    agent = agent_of(served, policy)
    with pytest.raises(UserError, match="takes no hooks"):
        agent.generate(contexts_of(policy, 1), streams(1), hooks=[Hook()])
    with pytest.raises(UserError, match="top_p 2 is not in"):
        agent.generate(contexts_of(policy, 1), streams(1), law=Law(top_p=2))
    for url in ("localhost:8000", "ftp://a", "http://", "http://a:x"):
        with pytest.raises(UserError, match="a server's url is like"):
            Server(url)
    with pytest.raises(UserError, match="may hold no password"):
        Server("http://me:secret@host")
    with pytest.raises(UserError, match="needs the server's url"):
        Server(model="a")
    with pytest.raises(UserError, match="concurrency must be at least 1"):
        Server("http://a", concurrency=0)
    assert base_url("https://a/x/v1") == "https://a/x"


def test_a_missing_package_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r"a server over HTTP needs the package httpx: pip install 'etude\[server\]'"):
        Endpoint("http://127.0.0.1:9")


# --- the command -----------------------------------------------------------------------------------


def test_eval_of_a_served_model_is_eval_of_the_model(served, policy, capfd, tmp_path):
    etude = runner(capfd)
    save_policy(policy, tmp_path / "m")
    words = ("--problems", 12, "--max-tokens", 12, "--temperature", 0, "--json")
    here = etude("eval", "m", *words)
    there = etude("eval", "m", *words, "--server.url", served.url)
    assert here.code == there.code == 0, there
    assert there.out == here.out
    assert len(served.seen) == 12
    line = refused(etude("eval", "m", *words, "--server.url", "http://127.0.0.1:9"))
    assert "cannot be reached" in line
    assert "has no model 'x'" in refused(etude("eval", "m", "--server.url", served.url, "--server.model", "x"))
