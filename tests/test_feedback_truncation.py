"""Truncation: what is cut or too long gets nothing, and limits follow difficulty."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.experience.plugs import Plug, check, plug
from etude.experience.protocols import Clock, Limits
from etude.experience.types import Group, Outcome, Problem, Trajectory, given_call
from etude.feedback.truncation import Truncation

LIMITS = Limits(max_tokens=4000)
CLOCK = Clock(0, 1)


def answer(length, right=True, stop="stop", **more):
    """An answer of `length` tokens as its verifier judged it, whether or not it came to an end."""
    call = given_call("actor", [1], np.zeros(length, np.int32), stop=stop)
    problem = Problem("p", "")
    return Trajectory(problem, (call,), outcome=Outcome(float(right), right, "7", **more))


def shaped(plan, *answers):
    (group,) = plan([Group(Problem("p", ""), tuple(answers))], CLOCK)
    return group


@pytest.mark.parametrize("stop", ["length", "context"])
def test_a_part_of_an_answer_counts_for_nothing_whatever_a_verifier_read_in_it(stop):
    (cut,) = shaped(Truncation(LIMITS), answer(4000, stop=stop)).members
    assert cut.outcome == Outcome(0.0, False, None, {"in_time": 0.0})
    assert not cut.correct


def test_answers_that_end_keep_what_they_have():
    answers = [answer(1), answer(4000, right=False), answer(4000, parts={"format": 0.5})]
    kept = shaped(Truncation(LIMITS), *answers)
    assert [m.reward for m in kept.members] == [1, 0, 1]
    assert [m.correct for m in kept.members] == [True, False, True]
    assert kept.members[2].outcome.parts == {"format": 0.5, "in_time": 1.0}


def test_a_cut_answer_may_keep_a_tenth_of_its_reward():
    (cut,) = shaped(Truncation(LIMITS, stop_properly=0.1), answer(9, stop="length")).members
    assert cut.reward == pytest.approx(0.1)
    assert cut.correct
    assert cut.outcome.parts == {"in_time": 0.0}


@pytest.mark.parametrize(
    ("right", "rewards"),
    [
        ([1, 1, 1, 0], [1, 0, 0, 0]),  # c = 0.75: 2000 tokens
        ([1, 1, 0, 0], [1, 1, 0, 0]),  # c = 0.5 is not above the threshold: 4000
        ([1, 0, 0, 0], [1, 0, 0, 0]),
    ],
)
def test_an_easy_problem_gets_the_shorter_limit(right, rewards):
    plan = Truncation(LIMITS, thresholds=(0.5,), lengths=(4000, 2000))
    lengths = (1500, 2500, 2001, 100)
    group = shaped(plan, *(answer(n, bool(r)) for n, r in zip(lengths, right, strict=True)))
    assert [m.reward for m in group.members] == rewards
    assert [m.correct for m in group.members] == [bool(r) for r in right]  # the verifier's word on whole answers


def test_at_a_quarter_right_both_lengths_keep_their_reward():
    plan = Truncation(LIMITS, thresholds=(0.5,), lengths=(4000, 2000))
    hard = [answer(n, False) for n in (10,) * 6]
    assert [m.reward for m in shaped(plan, answer(1500), answer(2500), *hard).members][:2] == [1, 1]


def test_cut_answers_are_none_of_the_right_ones_that_decide_the_limit():
    plan = Truncation(LIMITS, thresholds=(0.5,), lengths=(4000, 2000))
    seeming = [answer(4000, True, "length") for _ in range(2)]
    group = shaped(plan, answer(2500), answer(2500), *seeming)  # c = 0.5, not 1
    assert [m.reward for m in group.members] == [1, 1, 0, 0]


def test_the_longest_answer_is_a_limit_of_each_turn():
    turns = Trajectory(Problem("p", ""), answer(4000).calls * 2, outcome=Outcome(1.0, True))
    last_cut = Trajectory(
        Problem("p", ""), (*answer(9).calls, *answer(4000, stop="length").calls), outcome=Outcome(1.0)
    )
    assert shaped(Truncation(LIMITS), turns, last_cut).rewards.tolist() == [1, 0]
    assert shaped(Truncation(LIMITS, lengths=(4000,)), turns).rewards.tolist() == [0]


def test_several_thresholds():
    plan = Truncation(LIMITS, thresholds=(0.0, 0.4, 0.8), lengths=(4000, 3000, 2000, 10))
    assert [plan.limit(c) for c in (0, 0.1, 0.4, 0.41, 0.8, 0.9, 1)] == [4000, 3000, 3000, 2000, 2000, 10, 10]


def test_rewards_of_single_calls_go_the_same_way():
    plan = Truncation(LIMITS, lengths=(100,))
    late, kept = shaped(plan, answer(101, per_call=(1.0,)), answer(100, per_call=(1.0,))).members
    assert (late.outcome.per_call, kept.outcome.per_call) == ((0.0,), (1.0,))


ANSWERS = st.lists(
    st.tuples(st.integers(1, 40), st.booleans(), st.sampled_from(["stop", "length"])), min_size=1, max_size=8
)


@given(ANSWERS, st.integers(1, 40), st.integers(1, 40))
def test_a_longer_limit_never_costs_a_reward(drawn, a, b):
    answers = [answer(*one) for one in drawn]
    short, long = (shaped(Truncation(LIMITS, lengths=(n,)), *answers).rewards for n in (min(a, b), max(a, b)))
    assert (short <= long).all()


@given(ANSWERS)
def test_one_limit_at_the_longest_answer_is_plain_truncation(drawn):
    answers = [answer(*one) for one in drawn]
    one = shaped(Truncation(LIMITS, lengths=(4000,)), *answers)
    plain = shaped(Truncation(LIMITS), *answers)
    assert [m.outcome for m in one.members] == [m.outcome for m in plain.members]
    easy = shaped(Truncation(LIMITS, thresholds=(0.5,), lengths=(4000, 4000)), *answers)
    assert [m.outcome for m in easy.members] == [m.outcome for m in plain.members]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lengths": (4001,)}, "truncation at 4001 tokens is beyond the longest answer: lower it, or set max_tokens="),
        ({"thresholds": (0.5,)}, "1 thresholds part problems by difficulty into 2, which need as many lengths, not 0"),
        ({"thresholds": (0.5,), "lengths": (4000,)}, "into 2, which need as many lengths, not 1"),
        ({"lengths": (4000, 2000)}, "0 thresholds part problems by difficulty into 1, which need as many"),
        ({"thresholds": (0.8, 0.5), "lengths": (30, 20, 10)}, "thresholds are rising shares of right answers"),
        ({"thresholds": (1.0,), "lengths": (30, 20)}, "from 0 to below 1, not"),
        ({"thresholds": (float("nan"),), "lengths": (30, 20)}, "thresholds are rising shares"),
        ({"thresholds": (0.5,), "lengths": (20, 30)}, "the longest first"),
        ({"lengths": (0,)}, "lengths are tokens, at least 1"),
        ({"stop_properly": 1.5}, "stop_properly is a factor from 0 to 1, not 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        Truncation(LIMITS, **options)


def test_an_answer_that_nobody_judged_is_a_mistake():
    with pytest.raises(ValueError, match="no outcome to shape"):
        shaped(Truncation(LIMITS), Trajectory(Problem("p", ""), ()))


def test_a_bonus_for_length_beside_it_is_refused():
    bonus = Plug("credit", "rambling", lambda: None, gives=frozenset({"length-bonus"}))
    with pytest.raises(
        UserError, match="reward 'truncation' cannot be used with length-bonus, which credit 'rambling'"
    ):
        check([plug("reward", "truncation"), bonus])
