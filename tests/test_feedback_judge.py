"""Judges: what they say, how positions cancel, what is counted, and replies that name neither side."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.acting.agent import PolicyAgent
from etude.experience.endpoint import Endpoint
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Limits, Verdict
from etude.experience.types import Outcome, Problem
from etude.feedback.judge import (
    TIE,
    UNREAD,
    About,
    AskedJudge,
    Fair,
    Judging,
    OracleJudge,
    ScoredJudge,
    by_outcome,
    endpoint_replies,
    policy_replies,
    text_of,
)
from etude.feedback.winrate import bradley_terry, compared, pooled, win_rates
from etude.policies.zoo import load_policy
from small import small_lm

PROBLEM = Problem("p", "q?")


def item(a, b, asking=""):
    return ("q?", a, b, About(PROBLEM, asking))


def longer(problem, a, b):
    return 0.5 if len(a) == len(b) else float(len(a) > len(b))


def says(*replies):
    """A judge that gives these replies in turn, and the questions it was asked."""
    told, asked = iter(replies), []

    def reply(questions):
        asked.extend(questions)
        return [next(told) for _ in questions]

    return AskedJudge(reply), asked


# --- replies in words ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("first", Verdict(1, 1)),
        (" Second.", Verdict(0, 0)),
        ("Verdict: tie", TIE),
        ("The first is worse than the second.\nVerdict: second", Verdict(0, 0)),
        ("", UNREAD),
        ("neither of them", UNREAD),
        ("the first or the second", UNREAD),
        ("42", UNREAD),
        ("firstly", UNREAD),
    ],
)
def test_a_reply_is_a_verdict_or_is_not_parsed(reply, wanted):
    judge, asked = says(reply)
    assert judge([item("one", "two {braces}")]) == [wanted]
    assert "one" in asked[0]
    assert asked[0].index("one") < asked[0].index("two {braces}")


def test_a_reply_that_names_neither_side_is_a_counted_tie_and_never_a_win():
    """In one order or in both; the other order's verdict does not win by default."""
    for replies in (("what?", "second"), ("first", "what?"), ("what?", "what?")):
        fair = Fair(says(*replies)[0])
        assert fair([item("a", "b")]) == [UNREAD]
        assert fair.unparsed == 1
    fair = Fair(OracleJudge(longer, Keys(0)), both=False)
    fair([item("a", "bb")])
    assert fair.unparsed == 0


def test_positions_cancel():
    assert Fair(says("first", "second")[0])([item("a", "b")]) == [Verdict(1, 1)]
    assert Fair(says("first", "first")[0])([item("a", "b")]) == [TIE]  # it likes whatever comes first
    assert Fair(says("second", "second")[0])([item("a", "b")]) == [TIE]
    assert Fair(says("first", "tie")[0])([item("a", "b")]) == [Verdict(0.75, 0.75)]


def test_a_pair_is_asked_in_both_orders_once_and_charged_for_both():
    judge, asked = says(*["first", "second"] * 2)
    meter = Meter()
    fair = Fair(judge, meter)
    assert fair([item("a", "b"), item("b", "a"), item("a", "b"), item("a", "a")]) == [(1, 1, True), (0, 0, True),
                                                                                      (1, 1, True), TIE]  # fmt: skip
    assert len(asked) == meter["judge"] == 2
    fair([item("b", "a")])
    assert meter["judge"] == 2  # remembered
    other = Fair(judge, meter)
    other.load_state_dict(json.loads(json.dumps(fair.state_dict())))
    assert other([item("b", "a")]) == [(0, 0, True)]
    assert meter["judge"] == 2
    other([item("b", "a", asking="again")])
    assert meter["judge"] == 2  # whoever is remembered is not asked again
    assert Fair(judge)([]) == []


# --- oracles -------------------------------------------------------------------------------------


def test_an_oracle_draws_from_its_preference_whatever_the_order():
    judge = OracleJudge(lambda problem, a, b: 0.9 if a == "x" else 0.1, Keys(0))
    drawn = judge([item("x", "y", str(i)) for i in range(4000)])
    assert np.mean([v.value for v in drawn]) == pytest.approx(0.9, abs=0.015)
    turned = judge([item("y", "x", str(i)) for i in range(4000)])
    assert [v.value for v in turned] == [1 - v.value for v in drawn]
    assert {v.probability for v in drawn} == {0.9}
    again = judge([item("x", "y", str(i)) for i in reversed(range(4000))])
    assert again[::-1] == drawn  # keyed, not in a sequence
    assert len({judge([item("x", "y")])[0] for _ in range(5)}) == 1


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_noise_turns_a_share_of_verdicts_round_and_leaves_ties(noise):
    judge = OracleJudge(longer, Keys(1), noise)
    values = [v.value for v in judge([item("long", "s", str(i)) for i in range(4000)])]
    assert np.mean(values) == pytest.approx(1 - noise, abs=0.02)
    assert judge([item("a", "b")]) == [TIE]


def test_an_oracle_needs_the_problem():
    with pytest.raises(ValueError, match=r"give About\(problem\)"):
        OracleJudge(longer, Keys(0))([("q?", "a", "b", None)])


def test_a_verifier_prefers_what_is_right_and_then_the_fewer_steps():
    def score(problem, text):
        right = text.endswith("7")
        return Outcome(float(right), right)

    prefer = by_outcome(score)
    assert prefer(PROBLEM, "3;7", "3;8") == 1
    assert prefer(PROBLEM, "8", "3;4;7") == 0
    assert prefer(PROBLEM, "7", "3;4;7") == 1  # both right
    assert prefer(PROBLEM, "3\n4\n7", "3;7") == 0
    assert prefer(PROBLEM, "3;7", "4;7") == 0.5
    assert prefer(PROBLEM, "3", "3;4;5") == 0.5  # both wrong: nothing to prefer


# --- policies and endpoints ----------------------------------------------------------------------


def test_a_policy_is_asked_and_one_that_babbles_decides_nothing():
    policy = load_policy("tiny:width=16,depth=1,heads=2,ffn=16", Keys(0))
    agent = PolicyAgent(policy, limits=Limits(8))
    fair = Fair(AskedJudge(policy_replies(agent, Keys(0), Limits(8))))
    verdicts = fair([item("1", "2"), item("3", "4")])
    assert verdicts == [UNREAD, UNREAD]
    assert fair.unparsed == 2


def test_a_policy_is_scored_and_its_liking_for_a_position_cancels():
    policy = small_lm()
    judge = ScoredJudge(policy, question="{context}{a}{b}")
    one, other = judge([item("1", "2")])[0], judge([item("2", "1")])[0]
    assert 0 < one.probability < 1
    assert one.value == float(one.probability > 0.5)
    fair = Fair(judge)([item("1", "2")])[0]
    assert fair.probability == pytest.approx((one.probability + 1 - other.probability) / 2)
    assert fair.value == (one.value + 1 - other.value) / 2
    with pytest.raises(UserError, match=r"holds 32 tokens, and a question to it has \d+"):
        ScoredJudge(policy)([item("1", "2")])


class Chat:
    """An endpoint that answers every chat with what `reply` makes of the question."""

    def __init__(self, reply):
        self.reply, self.bodies = reply, []

    def ask(self, path, bodies, concurrency):
        assert (path, concurrency) == ("/v1/chat/completions", 3)
        self.bodies += bodies
        return [self.reply(b["messages"][0]["content"]) for b in bodies]


def content(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_an_endpoint_is_asked_at_temperature_0():
    chat = Chat(lambda question: content("first" if question.index("good") < question.index("bad") else "second"))
    fair = Fair(AskedJudge(endpoint_replies(chat, "m", tokens=5, concurrency=3)))
    assert fair([item("good", "bad"), item("bad", "good")]) == [Verdict(1, 1), Verdict(0, 0)]
    assert [(b["model"], b["temperature"], b["max_tokens"]) for b in chat.bodies] == [("m", 0.0, 5)] * 2


@pytest.mark.parametrize(
    "answer", [{}, [], {"choices": []}, content(None), content(3), {"choices": [{"text": "first"}]}]
)
def test_an_endpoint_that_answers_with_no_text_is_a_counted_tie(answer):
    fair = Fair(AskedJudge(endpoint_replies(Chat(lambda q: answer), "m", tokens=5, concurrency=3)))
    assert fair([item("a", "b")]) == [UNREAD]
    assert fair.unparsed == 1


def test_an_endpoint_that_is_not_there_is_refused_in_a_line(monkeypatch):
    pytest.importorskip("httpx")
    monkeypatch.setattr("etude.experience.endpoint.BACKOFF", 0.0)
    judge = AskedJudge(endpoint_replies(Endpoint("http://127.0.0.1:9", options="judge"), "m", 5, 3))
    with pytest.raises(UserError, match=r"server http://127\.0\.0\.1:9 cannot be reached"):
        judge([item("a", "b")])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": 0.6}, r"noise lies in \[0, 0.5\]"),
        ({"concurrency": 0}, "must be at least 1"),
        ({"who": "http://h:1", "noise": 0.1}, "noise is an option of the judge oracle"),
        ({"by": "score"}, "by=score is how a policy judges, not oracle"),
        ({"who": "http://h:1", "by": "score"}, "by=score is how a policy judges"),
        ({"who": "smollm2", "model": "m"}, "model is an option of an endpoint, not of smollm2"),
    ],
)
def test_judges_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        Judging(**options)


def test_a_chat_is_shown_with_its_roles():
    assert text_of("2+2=") == "2+2="
    assert text_of(({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"})) == (
        "user: 2+2?\nassistant: 4"
    )


# --- win rates -----------------------------------------------------------------------------------

CYCLE = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])


def test_win_rates_leave_each_answer_out():
    wins = np.array([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]])
    assert win_rates(wins).tolist() == [1.0, 0.5, 0.0]
    assert win_rates(np.array([[0.5]])).tolist() == [0.5]


def test_a_group_is_compared_pair_by_pair():
    meter = Meter()
    fair = Fair(OracleJudge(longer, Keys(0)), meter, both=False)
    a, b = compared(fair, [PROBLEM, Problem("r", "other?")], [["xx", "x", "xx"], ["y"]])
    assert a.tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    assert b.tolist() == [[0.5]]
    assert meter["judge"] == 1  # the two pairs of xx and x are one asking, equal answers none
    judge = Fair(OracleJudge(lambda *_: 0.6, Keys(0)), both=False, remember=False)
    drawn = compared(judge, [PROBLEM], [["x", "y"] * 8], "round0")[0]
    assert 0.5 < drawn[::2, 1::2].mean() < 0.75  # every comparison is drawn anew


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=8), st.integers(0, 99))
def test_the_mean_win_rate_is_one_half_whatever_the_verdicts_were(texts, seed):
    fair = Fair(OracleJudge(lambda problem, a, b: CYCLE["abc".index(a), "abc".index(b)], Keys(seed)), both=False)
    wins = compared(fair, [PROBLEM], [texts], "x")[0]
    assert np.allclose(wins + wins.T, 1)
    assert win_rates(wins).mean() == pytest.approx(0.5)
    shared = pooled(win_rates(wins), texts)
    assert shared.mean() == pytest.approx(0.5)
    assert len(set(zip(texts, shared.round(12).tolist(), strict=True))) == len(set(texts))


def test_bradley_terry_finds_the_rewards_behind_the_wins():
    rewards = np.array([1.0, 0.2, -0.4, -0.8])
    p = 1 / (1 + np.exp(rewards[None] - rewards[:, None]))
    found = bradley_terry(1e6 * p * (1 - np.eye(4)))
    assert found == pytest.approx(rewards, abs=1e-3)
    assert bradley_terry(100 * CYCLE * (1 - np.eye(3))) == pytest.approx(
        np.zeros(3), abs=1e-8
    )  # a cycle has no ranking
    never = bradley_terry(np.array([[0.0, 10.0], [0.0, 0.0]]))
    assert np.isfinite(never).all()
    assert never[0] > 2 > -2 > never[1]
    p = 1 / (1 + np.exp(-np.diff(never)[0]))
    assert 0 < p < 0.1


def test_bradley_terry_ranks_a_cycle_by_who_met_whom():
    """Met as often as pi = (0.6, 0.3, 0.1) says, three that beat one another in a circle still have a ranking."""
    pi = np.array([0.6, 0.3, 0.1])
    found = bradley_terry(1000 * CYCLE * np.outer(pi, pi) * (1 - np.eye(3)))
    assert found == pytest.approx([0.365, -0.909, 0.543], abs=1e-3)
