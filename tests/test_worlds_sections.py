"""Outlines: what counts as one, how long demonstrations are, and that two lengths share their words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.worlds.oracles import step_oracle
from etude.worlds.registry import load_world
from etude.worlds.sections import SHARES, SectionsWorld

WORLD = SectionsWorld()
ORACLE = step_oracle(WORLD)


def written(index, style, seed=0):
    problem = WORLD.problem("train", index)
    return ORACLE.demonstrate(problem, style, Keys(seed).at(problem.id))


def sections(text):
    return WORLD.score(WORLD.problem("train", 0), text).parts["sections"]


@pytest.mark.parametrize(
    ("text", "count", "correct"),
    [
        ("# ba de", 1, True),
        ("# ba de\n# fi go\n", 2, True),
        ("# ba de\n# fi", 1, False),
        ("# ba de fi\n# ba de", 1, False),
        ("#ba de", 0, False),
        ("", 0, False),
        ("\n\n", 0, False),
        ("# ba de\n\n# fi go", 2, False),
        ("\N{SNOWMAN}", 0, False),
    ],
)
def test_an_answer_is_right_if_it_is_sections_and_nothing_else(text, count, correct):
    outcome = WORLD.score(WORLD.problem("test", 0), text)
    assert (outcome.parts["sections"], outcome.correct, outcome.reward) == (count, correct, float(correct))


@given(st.text(max_size=40))
def test_any_text_is_scored(text):
    assert WORLD.score(WORLD.problem("test", 0), text).parts["sections"] <= text.count("#")


@pytest.mark.parametrize("k", [1, 3, 12])
def test_a_style_fixes_how_many_sections(k):
    for i in range(20):
        assert sections(written(i, str(k))) == sections(written(i, f"{k}-reworded")) == k
        assert WORLD.score(WORLD.problem("train", i), written(i, str(k))).correct


def test_two_lengths_differ_in_nothing_but_their_number():
    for i in range(20):
        three, two = written(i, "3", seed=1), written(i, "2", seed=2)
        assert three.startswith(two + "\n")
        assert three.count("\n") == 2
        others = written(i, "3-reworded", seed=1)
        assert others not in (three, written(i, "3-reworded", seed=2))


def test_drawn_lengths_have_the_shares_of_the_world():
    counts = [sections(written(i, "drawn")) for i in range(2000)]
    assert np.mean(SHARES @ np.arange(1, 13)) == pytest.approx(5.04, abs=0.01)
    assert np.mean(counts) == pytest.approx(5.04, abs=0.25)
    world = SectionsWorld(shares=(0, 0, 1))
    problem = world.problem("train", 0)
    assert step_oracle(world).demonstrate(problem, "drawn", Keys(0)).count("\n") == 2


def test_splits_share_no_topic_and_problems_are_a_function_of_their_index():
    topics = {s: {WORLD.problem(s, i).prompt for i in range(300)} for s in ("train", "test")}
    assert not topics["train"] & topics["test"]
    assert WORLD.problem("train", 7) == load_world("sections").problem("train", 7)
    assert WORLD.problem("train", 7) != WORLD.problem("train", 8)


def test_every_step_of_a_solution_checks_and_is_planned():
    problem = WORLD.problem("train", 3)
    steps, answer = ORACLE.solve(problem)
    assert answer == "12" == str(len(steps))
    for i, step in enumerate(steps):
        assert ORACLE.plan(problem, steps[:i]) == step
        assert ORACLE.check_step(problem, steps[:i], step)
    assert ORACLE.plan(problem, steps) is None
    assert ORACLE.parse("\n".join(steps)) == (steps, answer)
    assert ORACLE.explain(problem, "# ba de\noh") == "'oh' is not a section"
    shown = ORACLE.write(problem, (steps, answer), "2", Keys(0))
    assert [shown.text[a:b] for (a, b), *_ in shown.steps] == [*steps[:2], shown.text]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SectionsWorld(shares=()), "must be at least 0, and one of them above"),
        (lambda: SectionsWorld(shares=(1, -1, 2)), "must be at least 0, and one of them above"),
        (lambda: SectionsWorld(shares=(0, 0)), "must be at least 0, and one of them above"),
        (lambda: WORLD.problem("dev", 0), "unknown split 'dev'"),
        (lambda: WORLD.problem("train", 0, "poem"), "unknown sections category 'poem'"),
        (lambda: written(0, "13"), "unknown style '13'"),
        (lambda: ORACLE.places(WORLD.problem("train", 0), "carry"), "unknown fault 'carry'"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
