"""The chain world: what it asks, how it judges, and that its splits never meet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import World
from etude.worlds.chain import ChainWorld, Rule, hint, last_number
from etude.worlds.oracles import step_oracle

CLIFF = ChainWorld(
    kinds={
        "short": {"terms": (3, 4), "marker": "N", "share": 0.2},
        "long": {"terms": (7, 7), "marker": "N", "share": 0.2},
        "wide": {"terms": (7, 7), "marker": "W", "share": 0.3, "show": 1.0},
        "bridge": {"terms": (5, 7), "marker": "N", "share": 0.3, "keep": 2},
    },
    numbers=(0, 4),
    modulus=50,
    scale=7,
    shift=3,
    plus="",
)


def test_it_is_a_world() -> None:
    assert isinstance(ChainWorld(), World)


@given(st.lists(st.integers(0, 99), min_size=2, max_size=12), st.integers(1, 9), st.integers(0, 9))
def test_totals_follow_the_rule(terms: list[int], scale: int, shift: int) -> None:
    totals = Rule(scale, shift, 50).totals(terms)
    assert len(totals) == len(terms) - 1
    assert totals[-1] == (terms[0] + sum(scale * z + shift for z in terms[1:])) % 50
    assert Rule().totals(terms)[-1] == sum(terms)


@given(st.sampled_from(["train", "test"]), st.integers(0, 10**6), st.sampled_from([None, *CLIFF.categories]))
def test_a_problem_depends_on_its_arguments_alone(split: str, index: int, category: str | None) -> None:
    first = CLIFF.problem(split, index, category)
    CLIFF.problem(split, index + 1, category)
    again = ChainWorld(**{k: getattr(CLIFF, k) for k in ("kinds", "numbers", "modulus", "scale", "shift", "plus")})
    assert again.problem(split, index, category) == first
    assert CLIFF.score(first, first.answer or "").correct


def test_splits_never_meet() -> None:
    world = ChainWorld(kinds={"short": (2, 3)}, numbers=(0, 9))
    contents = {s: {world.problem(s, i).meta["terms"] for i in range(3000)} for s in ("train", "test")}
    assert not contents["train"] & contents["test"]
    assert len(contents["test"]) > 100
    assert 0.15 < len(contents["test"]) / len(contents["train"] | contents["test"]) < 0.25


def test_shares_of_categories() -> None:
    drawn = [CLIFF.problem("train", i).category for i in range(2000)]
    assert drawn.count("wide") / 2000 == pytest.approx(0.3, abs=0.04)
    assert drawn.count("short") / 2000 == pytest.approx(0.2, abs=0.04)


def test_options_shape_the_text() -> None:
    assert str(CLIFF.problem("train", 0, "wide").prompt).startswith("W")
    padded = ChainWorld(numbers=(1, 99), width=3, plus="", modulus=1000, sep="\n").problem("train", 5, "short")
    prompt = str(padded.prompt).removesuffix("=")
    assert len(prompt) == 3 * len(padded.meta["terms"])
    natural = ChainWorld(notation="natural", modulus=10).problem("train", 0)
    assert "division by 10" in str(natural.prompt)
    assert "<answer>" in str(natural.prompt)


def test_hints_are_first_totals_and_never_the_last() -> None:
    given_counts = set()
    for i in range(200):
        problem = CLIFF.problem("train", i, "bridge")
        totals, text = problem.meta["totals"], problem.meta.get("hint", "")
        given_ = [int(t) for t in text.split(";") if t]
        assert given_ == list(totals[: len(given_)])
        assert len(given_) <= len(totals) - 2
        assert (f"H{text}=" in str(problem.prompt)) == bool(text)
        given_counts.add(len(given_))
        steps, answer = step_oracle(CLIFF).solve(problem)  # goes on from the hint
        assert list(steps) == [str(t) for t in totals[len(given_) :]]
        assert answer == problem.answer
    assert given_counts == {0, 1, 2, 3, 4}
    problem = CLIFF.problem("train", 0, "long")
    assert CLIFF.hinted(problem, 0) is problem
    assert CLIFF.hinted(problem, 2).id != problem.id
    with pytest.raises(UserError, match="a hint may give 0 to 5"):
        CLIFF.hinted(problem, 6)


def test_marker_and_foreign_hint() -> None:
    problem = CLIFF.problem("train", 0, "long")
    assert str(CLIFF.marked(problem, "W").prompt) == "W" + str(problem.prompt).removeprefix("N")
    chat = hint(ChainWorld(notation="natural").problem("train", 0), "add slowly")
    assert str(chat.prompt).endswith("\n\nHint: add slowly")


def test_bridged_demonstrations_show_work_by_what_is_left() -> None:
    oracle = step_oracle(CLIFF)

    def shown(category: str, least: int, most: int) -> float:
        problems = [CLIFF.problem("train", i, category) for i in range(400)]
        kept = [p for p in problems if least <= len(oracle.solve(p)[0]) <= most]
        return sum(";" in oracle.demonstrate(p, "bridged", Keys(0).at(p.id)) for p in kept) / len(kept)

    assert shown("short", 2, 3) == 1.0
    assert shown("wide", 6, 6) == 1.0
    assert shown("long", 6, 6) < 0.03
    assert shown("bridge", 4, 4) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    ("text", "number"),
    [("7;15", "15"), ("a 007.", "7"), ("-0", "0"), ("x-12", "-12"), ("", None), ("no", None), ("9" * 5000, "9" * 5000)],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@given(st.text(max_size=40))
def test_any_text_is_scored(text: str) -> None:
    problem = CLIFF.problem("train", 0)
    outcome = CLIFF.score(problem, text)
    assert outcome.correct == (last_number(text) == problem.answer)
    assert outcome.reward == float(bool(outcome.correct))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"notation": "roman"}, "unknown notation"),
        ({"modulus": 1}, "modulus 1"),
        ({"plus": "", "numbers": (1, 99)}, "need width=2"),
        ({"kinds": {"short": {"terms": (4, 3)}}}, "must be \\(fewest, most\\)"),
        ({"kinds": {"short": {"length": 3}}}, "fields of Kind"),
        ({"kinds": {}}, "a share above 0"),
        ({"numbers": (5, 2)}, "smallest, largest"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChainWorld(**options)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="unknown split 'tset': did you mean test"):
        CLIFF.problem("tset", 0)
    with pytest.raises(UserError, match="did you mean short"):
        CLIFF.problem("train", 0, "shrt")
    one = ChainWorld(kinds={"one": (2, 2)}, numbers=(1, 1))
    with pytest.raises(UserError, match="allow more numbers or terms"):
        print(one.problem("train", 0), one.problem("test", 0))
