"""Compact notation: the same problems and the same verifier, in a few characters."""

from functools import lru_cache

import pytest

from etude.policies.tokenizers import ALPHABET
from etude.worlds import compact
from etude.worlds.reasoning import ReasoningWorld

MANY = 210
SLOW = {"sudoku": 40}  # a generator of 25 ms an item


@lru_cache
def problems(task: str, notation: str):
    world = ReasoningWorld(task, notation=notation)
    return world, [world.problem("train", i) for i in range(SLOW.get(task, MANY))]


@pytest.mark.parametrize("task", sorted(compact.NOTATIONS))
def test_the_same_problems_and_verifier_as_in_natural_notation(task: str) -> None:
    terse, short = problems(task, "compact")
    wordy, long = problems(task, "natural")
    for a, b in zip(short, long, strict=True):
        assert a.id == b.id
        assert a.meta == b.meta
        assert a.prompt.endswith("=")
        assert len(a.prompt) < len(b.prompt)
        if task != "letter_counting":  # its words come from a book, accents and all
            assert set(a.prompt + a.answer) <= set(ALPHABET)
        assert ";" not in a.prompt + a.answer
        right = terse.score(a, a.answer)
        assert (right.correct, right.reward) == (True, 1.0)
        assert wordy.score(b, f"<answer>{right.parsed}</answer>").correct
        steps = f"1+1=2;why;{a.answer}"
        assert terse.score(a, steps).correct
        assert not terse.score(a, "").correct
        assert not terse.score(a, "?;").correct
        assert not terse.score(a, f"{a.answer};0=?").correct


def test_prompts_are_short() -> None:
    for task in ("chain_sum", "countdown"):
        world, short = problems(task, "compact")
        assert max(len(p.prompt) for p in short) < 30
    assert world.problem("train", 0).meta["entry"]["question"] not in short[0].prompt


def test_prompts_say_what_the_problem_is() -> None:
    _, drawn = problems("countdown", "compact")
    for p in drawn[:20]:
        numbers, target = p.prompt.rstrip("=").split(">")
        metadata = p.meta["entry"]["metadata"]
        assert [int(n) for n in numbers.split(",")] == metadata["numbers"]
        assert int(target) == metadata["target"]
    _, drawn = problems("chain_sum", "compact")
    for p in drawn[:20]:
        assert eval(p.prompt.rstrip("=")) == int(p.answer)


def test_countdown_wants_every_number_once() -> None:
    world = ReasoningWorld("countdown", notation="compact", partial=False)
    problem = world.problem("train", 0)
    target = problem.meta["entry"]["metadata"]["target"]
    assert world.score(problem, f"{problem.answer}={target}").correct
    for wrong in (str(target), f"{problem.answer}+0", f"{problem.answer}*1", f"{target}={problem.answer}"):
        assert world.score(problem, wrong).reward == 0.0


@pytest.mark.parametrize(
    ("text", "segment"),
    [
        ("", ""),
        (";;", ""),
        ("a;b", "b"),
        ("a;b;", "b"),
        ("a\nb\n\n", "b"),
        (" 7 ", "7"),
        ("12+7=19;19-3=16", "19-3=16"),
    ],
)
def test_the_last_segment_answers(text: str, segment: str) -> None:
    assert compact.last_segment(text) == segment


def test_a_last_step_may_be_the_answer() -> None:
    world = ReasoningWorld("chain_sum", notation="compact")
    problem = world.problem("train", 1)
    assert world.score(problem, f"1+1=2;2+5={problem.answer}").correct
    assert not world.score(problem, f"1+1=2;{problem.answer}+1=1{problem.answer}").correct


def test_grids_are_drawn_as_they_are() -> None:
    _, drawn = problems("maze", "compact")
    for p in drawn:
        m = p.meta["entry"]["metadata"]
        rows = p.prompt.rstrip("=").split("/")
        assert len(rows) == m["grid_size"] - 2  # the outer wall is left out
        outer = m["grid"][0] + m["grid"][-1] + "".join(r[0] + r[-1] for r in m["grid"])
        assert set(outer) == {m["wall"]}
        assert p.prompt.count("S") == p.prompt.count("G") == 1
    _, drawn = problems("mini_sudoku", "compact")
    for p in drawn:
        puzzle, solved = p.prompt.rstrip("="), p.answer
        assert all(a in (b, ".") for a, b in zip(puzzle, solved, strict=True))
