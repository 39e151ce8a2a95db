"""Traces and what is dropped of them: the levels' numbers, a grammar that holds, examples made anew at every visit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.curation.examples import Examples, Visited
from etude.curation.traces import FINAL, Drop, joined, levels, parse, segments
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.rows import example
from etude.worlds.maze import MazeWorld
from etude.worlds.oracles import step_oracle

SEARCH = MazeWorld(notation="natural").grammar
R = "create 0 0 c0 c3\nclose 0 0 c0 c3\ncreate 0 1 c1 c2\nclose 0 1 c1 c2\n"
S = "plan 0 0\nplan 0 1"


def trace_of(trace):
    return joined([c for c in trace if c.tag not in FINAL])


def words(trace):
    """Tokens of the trace, one a word."""
    return trace_of(trace).split()


# --- the levels ----------------------------------------------------------------------------------


def test_what_each_level_keeps_of_a_search():
    whole = parse(R + S, SEARCH)
    none, closed, costs, some, plan = (drop(whole, Keys(0)) for drop in levels(0.3))
    assert len(words(none)) == 20
    assert len(words(closed)) == 10
    assert " ".join(words(costs)) == "create 0 0 create 0 1"
    assert words(plan) == []
    assert words(levels(0.0)[3](whole, Keys(0))) == words(costs)
    assert words(levels(1.0)[3](whole, Keys(0))) == words(plan)
    assert all(joined([c for c in t if c.tag in FINAL]) == S for t in (none, closed, costs, some, plan))


def test_level_3_keeps_70_percent_of_level_2():
    whole = parse(R * 10 + S, SEARCH)
    level2 = len(words(levels()[2](whole, Keys(0))))
    kept = [len(words(levels()[3](whole, Keys(i)))) for i in range(2000)]
    assert level2 == 60
    assert np.mean(kept) == pytest.approx(0.7 * level2, abs=4 * 3 * np.sqrt(20 * 0.21 / 2000))
    assert np.var(kept) == pytest.approx(9 * 20 * 0.21, rel=0.2)  # each clause of 3 words independently


def test_the_papers_law_keeps_62_percent_of_a_trace():
    """C creates and C closes of 5 words: 0.45 x 10 C + (5 C + 3 C + 2.1 C) / 6 = 6.183 C."""
    law, c = np.array([0.45, 1 / 6, 1 / 6, 1 / 6, 0.05]), 6
    assert law.sum() == pytest.approx(1)
    whole = parse(R * (c // 2) + S, SEARCH)
    exact = law @ [10 * c, 5 * c, 3 * c, 0.7 * 3 * c, 0]
    assert exact == pytest.approx(6.183 * c, abs=1e-2)
    draws = np.random.default_rng(0).choice(5, 4000, p=law)
    kept = [len(words(levels()[level](whole, Keys(i)))) for i, level in enumerate(draws)]
    assert np.mean(kept) == pytest.approx(exact, rel=0.03)


def test_dropping_whole_clauses_draws_no_less_for_the_others():
    """Which creates level 3 keeps does not depend on the closes that are dropped before."""
    whole = parse(R * 5 + S, SEARCH)
    bare = tuple(c for c in whole if c.tag != "close")
    places = [i for i, c in enumerate(whole) if c.tag == "create"]
    chance = Keys(3).numpy().random(len(whole))
    kept = [c for c, u in zip(whole, chance, strict=True) if c.tag == "create" and u >= 0.3]
    assert len(words(levels()[3](whole, Keys(3)))) == 3 * len(kept)
    assert len(bare) < len(whole)
    assert 0 < len(kept) < len(places)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([MazeWorld(), MazeWorld(notation="natural"), MazeWorld(kind="dfs"), MazeWorld(n=8)]),
    st.integers(0, 200), st.integers(0, 4), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_what_is_left_follows_the_grammar_and_ends_in_the_same_plan(world, index, level, rate, seed):
    problem = world.problem("train", index)
    text = step_oracle(world).demonstrate(problem, "plain", Keys(seed))
    whole = parse(text, world.grammar)
    assert joined(whole) == text
    left = levels(rate)[level](whole, Keys(seed))
    again = parse(joined(left), world.grammar)
    assert [(c.tag, c.text) for c in again] == [(c.tag, c.text) for c in left]
    assert world.text.read(joined(left))[1] == world.text.read(text)[1]
    outcome = world.score(problem, joined(left))
    assert outcome.correct
    assert outcome.parts["grammar"] == 1
    assert outcome.parts["trace"] <= world.score(problem, text).parts["trace"]
    if level == 4:
        assert outcome.parts["fast"] == 1


# --- chains of thought -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "separators", "steps", "answer"),
    [
        ("19;25;31", ";\n", ["19;", "25;"], "31"),
        ("31", ";\n", [], "31"),
        ("12 + 7 = 19\n19 + 6 = 25\n<answer>25</answer>", "\n", ["12 + 7 = 19\n", "19 + 6 = 25\n"],
         "<answer>25</answer>"),
        ("First; then.\n\nSo the grid is <answer>1 2\n3 4</answer>", "\n", ["First; then.\n\n"],
         "So the grid is <answer>1 2\n3 4</answer>"),
        ("a\n\nThe answer is 5.\n", "\n", ["a\n\n"], "The answer is 5.\n"),
    ],
)  # fmt: skip
def test_steps_and_an_answer(text, separators, steps, answer):
    trace = parse(text, segments(separators))
    assert [c.text for c in trace if c.tag == "step"] == steps
    assert [c.text for c in trace if c.tag == "answer"] == [answer]
    assert joined(trace) == text
    for level in (0, 1, 2):
        assert levels()[level](trace, Keys(0)) == trace
    assert joined(levels()[4](trace, Keys(0))) == answer


def test_each_step_is_dropped_with_one_probability_and_the_answer_never():
    trace = parse("1;2;3;4;5", segments(";"))
    left = [levels(0.2)[3](trace, Keys(i)) for i in range(3000)]
    assert all(t[-1].text == "5" for t in left)
    for step in "1234":
        kept = np.mean([any(c.text == f"{step};" for c in t) for t in left])
        assert kept == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    "text",
    ["", "create 0 0 c0 c3\n", "plan 0 0\ncreate 0 1\n", "plan 0 0\nhello", "hello\nplan 0 0", " plan 0 0"],
)
def test_what_has_not_the_form_is_none(text):
    assert parse(text, SEARCH) is None


@given(st.text(), st.sampled_from([SEARCH, MazeWorld().grammar, segments(), segments(";\n")]))
def test_no_text_raises_and_clauses_join_to_it(text, grammar):
    trace = parse(text, grammar)
    assert trace is None or joined(trace) == text


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(UserError, match="a rate of dropping lies between 0 and 1"):
        Drop(rate=rate)


# --- anew at every visit -----------------------------------------------------------------------------


def visited(n):
    def row(i, keys):
        return example([1], [2, 3], mark=float(i), drawn=float(keys.numpy().random()))

    return Visited(range(n), row)


def read(batch):
    return [(int(m), float(d)) for m, d in zip(batch.row["mark"], batch.row["drawn"], strict=True)]


def test_visits_come_in_the_order_of_fixed_examples_and_draw_anew_each_time():
    fixed = Examples([example([1], [2, 3], mark=float(i)) for i in range(7)])
    steps = [read(visited(7).draw(step, 3, Keys(0))) for step in range(14)]
    for step, drawn in enumerate(steps):
        assert [m for m, _ in drawn] == [int(m) for m in fixed.draw(step, 3, Keys(0)).row["mark"]]
    every = [pair for step in steps for pair in step]
    assert len({d for _, d in every}) == len(every) == 42  # six epochs of seven: no draw comes twice
    assert read(visited(7).draw(9, 3, Keys(0))) == steps[9]  # whatever was drawn before
    assert read(visited(7).draw(9, 3, Keys(1))) != steps[9]


def test_a_visit_draws_alike_whatever_the_size_of_a_step():
    """The stream of a visit is named by epoch and example."""
    small = [pair for step in range(12) for pair in read(visited(6).draw(step, 2, Keys(0)))]
    large = [pair for step in range(4) for pair in read(visited(6).draw(step, 6, Keys(0)))]
    assert small == large


def test_no_examples_are_refused():
    with pytest.raises(UserError, match="nothing to train on"):
        visited(0)
