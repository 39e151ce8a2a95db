"""Every reasoning-gym task as a world: pure, split by content, scored by its own verifier, safe."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.worlds.reasoning import ReasoningWorld, split_of
from etude.worlds.registry import load_world, world_names
from etude.worlds.tasks import LEVELS, TASKS

SLOW = {  # settings that generate quickly, for tasks whose own take a second or more an item
    "acre": {},
    "futoshiki": {"min_board_size": 4, "max_board_size": 4},
    "intermediate_integration": {"problem_types": ("linear",), "problem_type_weights": [1.0]},
    "sokoban": {"min_boxes": 2, "max_boxes": 3},
    "zebra_puzzles": {"num_people": 2, "num_characteristics": 2},
}
WITHOUT_REFERENCE = {"boxnet", "rush_hour"}


def test_the_list_of_tasks_is_the_package_s() -> None:
    from reasoning_gym.factory import DATASETS

    assert sorted(DATASETS) == list(TASKS)
    assert len(TASKS) == 106
    assert set(LEVELS) <= set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task: str) -> None:
    world, again = (ReasoningWorld(task, **SLOW.get(task, {})) for _ in range(2))
    splits = ("train",) if task == "knight_swap" else ("train", "test")
    for split in splits:
        problem = world.problem(split, 0)
        if task != "knight_swap":  # a second an item
            world.problem(split, 1)
            assert again.problem(split, 0) == problem
        entry = problem.meta["entry"]
        assert json.loads(json.dumps(entry)) == entry
        assert split_of(entry) == split
        assert entry["question"].rstrip() in problem.prompt
        for text in ("", "nonsense", "<answer></answer>", "\x00" * 50, "9" * 10_000):
            outcome = world.score(problem, text)
            assert not outcome.correct
            assert 0 <= outcome.reward < 1
        if task in WITHOUT_REFERENCE:
            assert problem.answer is None
            continue
        for text in (problem.answer, f"It may be 7.\n<answer>{problem.answer}</answer>"):
            outcome = world.score(problem, text)
            assert (outcome.correct, outcome.reward) == (True, 1.0)


FINGERPRINT = """
import sys
from etude.worlds.reasoning import ReasoningWorld
for task in {tasks!r}:
    for i in range(3):
        p = ReasoningWorld(task).problem("train", i)
        print(repr((p.id, p.prompt, p.answer)))
"""


def test_problems_do_not_depend_on_the_process() -> None:
    """Sets of strings come in another order in every process; some generators iterate over them."""
    tasks = ["isomorphic_strings", "ransom_note", "polynomial_multiplication", "list_functions", "pool_matrix"]
    tasks += ["chain_sum", "countdown", "composite", "group_anagrams"]
    out = [
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT.format(tasks=tasks)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert out[0] == out[1]
    assert len(out[0].splitlines()) == 3 * len(tasks)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_numbers": 3, "max_numbers": 4, "max_value": 20, "min_target": 10, "max_target": 100},
        {"min_numbers": 3, "max_numbers": 3, "operators": ("/", "-"), "min_target": 1},
    ],
)
def test_countdown_s_quick_generator_gives_the_package_s_items(options) -> None:
    import reasoning_gym

    world = ReasoningWorld("countdown", levels={"default": options})
    theirs = reasoning_gym.create_dataset("countdown", seed=0, **options)
    for n in range(25):
        try:
            expected = theirs[n]
        except ValueError:
            with pytest.raises(ValueError, match="target"):
                world._dataset("default")[n]
        else:
            assert world._dataset("default")[n] == expected


def test_generation_leaves_the_global_streams_alone() -> None:
    import random

    random.seed(1)
    before = random.getstate()
    for task in ("list_functions", "pool_matrix", "chain_sum"):
        ReasoningWorld(task).problem("train", 0)
    assert random.getstate() == before


def test_splits_share_no_content_whatever_the_options() -> None:
    small = ReasoningWorld("countdown", min_numbers=3, max_numbers=3, max_value=4, min_target=1, max_target=20)
    other = ReasoningWorld("countdown", min_numbers=2, max_numbers=3, max_value=5, min_target=1, max_target=30, seed=5)

    def contents(world: ReasoningWorld, split: str) -> set[tuple[object, ...]]:
        entries = [world.problem(split, i).meta["entry"]["metadata"] for i in range(150)]
        return {(*sorted(m["numbers"]), "->", m["target"]) for m in entries}

    train = contents(small, "train") | contents(other, "train")
    test = contents(small, "test") | contents(other, "test")
    assert train
    assert test
    assert not train & test


def test_about_a_fifth_of_all_problems_are_test_problems() -> None:
    world = ReasoningWorld("chain_sum")
    entries = [world._entry("4-terms", n) for n in range(2000)]
    share = sum(split_of(e) == "test" for e in entries) / len(entries)
    assert abs(share - 0.2) < 0.04  # 4.5 standard deviations


def test_categories_take_turns_and_change_nothing_but_the_order() -> None:
    world = ReasoningWorld("chain_sum")
    assert world.categories == ("2-terms", "3-terms", "4-terms")
    drawn = [world.problem("train", i) for i in range(6)]
    assert [p.category for p in drawn] == [*world.categories] * 2
    assert drawn[4] == ReasoningWorld("chain_sum").problem("train", 1, "3-terms")
    assert [p.meta["entry"]["metadata"]["num_terms"] for p in drawn] == [2, 3, 4, 2, 3, 4]
    assert [p.difficulty for p in drawn[:3]] == [0.0, 1.0, 2.0]
    assert len({p.id for p in drawn}) == 6


def test_options_override_and_levels_make_categories() -> None:
    plain = ReasoningWorld("chain_sum", min_terms=5, max_terms=5)
    assert plain.categories == ("default",)
    assert plain.problem("train", 3).meta["entry"]["metadata"]["num_terms"] == 5
    levels = {"a": {"max_digits": 1}, "b": {"min_digits": 3}}
    own = ReasoningWorld("chain_sum", levels=levels, min_terms=2, max_terms=2)
    assert own.problem("test", 0, "a").meta["entry"]["metadata"]["num_digits"] == 1
    assert own.problem("test", 0, "b").meta["entry"]["metadata"]["num_digits"] >= 3
    curriculum = ReasoningWorld("chain_sum", levels=3)
    terms = [curriculum.problem("train", 0, c).meta["entry"]["metadata"]["num_terms"] for c in curriculum.categories]
    assert terms == [2, 3, 4]


def test_partial_credit_can_be_left_out() -> None:
    for partial, reward in ((True, 0.5), (False, 0.0)):
        world = ReasoningWorld("chain_sum", partial=partial)
        problem = next(p for p in (world.problem("train", i) for i in range(200)) if len(p.answer or "") == 1)
        outcome = world.score(problem, f"<answer>{problem.answer}x</answer>")
        assert (outcome.reward, outcome.correct, outcome.parts["score"]) == (reward, False, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, "did you mean chain_sum"),
        ("chain_sum", {"max_term": 3}, "did you mean max_terms"),
        ("chain_sum", {"max_terms": "3"}, "max_terms='3' should be int"),
        ("chain_sum", {"min_terms": 9}, "max_terms must be >= min_terms"),
        ("chain_sum", {"notation": "terse"}, "unknown notation"),
        ("chain_sum", {"levels": 99}, "1 to 11 levels"),
        ("gsm_symbolic", {"levels": 2}, "has no curriculum"),
        ("rearc", {"notation": "compact"}, "no compact notation"),
        ("chain", {"kind": {}}, "did you mean kinds"),
        ("data", {}, "needs the option path"),
        ("retry", {}, "write retry:countdown"),
        ("retry:countdwon", {}, "did you mean countdown"),
        ("nowhere.jsonl", {}, "no such file: nowhere.jsonl"),
    ],
)
def test_bad_names_and_options_are_one_clear_line(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_world(name, **options)
    assert "\n" not in str(error.value)


def test_unknown_splits_and_categories_and_splits_that_cannot_be_filled() -> None:
    world = ReasoningWorld("chain_sum")
    with pytest.raises(UserError, match="unknown split 'tests'"):
        world.problem("tests", 0)
    with pytest.raises(UserError, match="did you mean 2-terms"):
        world.problem("train", 0, "2-term")
    tiny = ReasoningWorld("gcd", min_value=1, max_value=2)  # three problems, of which none is a test problem
    assert {split_of(tiny._entry("default", n)) for n in range(50)} == {"train"}
    with pytest.raises(UserError, match="too few different problems"):
        tiny.problem("test", 0)
    few = ReasoningWorld("lcm", min_value=1, max_value=2)  # three problems too, but of both splits
    for split in ("train", "test"):
        assert split_of(few.problem(split, 10**6).meta["entry"]) == split


def test_names_are_listed_without_importing_the_package() -> None:
    code = (
        "import sys; from etude.worlds.registry import world_names; n = world_names(); "
        "assert 'countdown' in n and 'chain' in n and len(n) > 106; "
        "print([m for m in ('reasoning_gym', 'torch', 'textworld', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    assert world_names() == sorted(world_names())


def test_retry_shares_its_options_with_the_world_inside() -> None:
    world = load_world("retry:countdown", notation="compact", attempts=2, min_numbers=3, max_numbers=3)
    problem = world.problem("train", 0)
    assert problem.options["attempts"] == 2
    assert world.score(problem, problem.answer or "").correct


# --- adversarial answers -------------------------------------------------------------------------

CODE = "__import__('pathlib').Path('{}').touch()"
ATTACKS = (
    "9**9**9",
    "9**9**9*x",
    "9 * * 9 * * 9",
    "2**(9**9)",
    "99999999!",
    "factorial(99999999)",
    "x**99999999",
    "((x+1)**99)**99",
    "exp(exp(exp(99.0)))",
    "1e999999999",
    "1e-999999999",
    "['a']*10**9",
    "[0 for _ in range(10**10)]",
    "(" * 4000 + ")" * 4000,
    "[" * 4000,
    "-" * 4000 + "1",
    "1+" * 4000 + "1",
    "9" * 100_000,
    "R99999999 U99999999",
    "\ud800",
)
TRUSTING = (  # tasks whose verifiers evaluate an answer or count to a number in it
    "binary_matrix",
    "coin_flip",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "rubiks_cube",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)


@pytest.mark.parametrize("task", TRUSTING)
def test_adversarial_answers_are_judged_quickly_and_never_run(task: str, tmp_path) -> None:
    world = ReasoningWorld(task, **SLOW.get(task, {}))
    problem = world.problem("train", 0)
    mark = tmp_path / "ran"
    code = CODE.format(mark)
    began = time.perf_counter()
    for attack in (*ATTACKS, code, f"[{code}]", f"f'{{{code}}}'", f"({code})or 1"):
        assert not world.score(problem, f"<answer>{attack}</answer>").correct
    assert time.perf_counter() - began < 6
    assert not mark.exists()


@settings(max_examples=150, deadline=1000)
@given(st.text(st.sampled_from("0123456789+-*/()., ^!ex[]"), max_size=40))
def test_any_arithmetic_is_judged_quickly(text: str) -> None:
    world = _countdown()
    outcome = world.score(world.problem("train", 0), f"<answer>{text}</answer>")
    assert 0 <= outcome.reward <= 1


def _countdown(cache: list[ReasoningWorld] = []) -> ReasoningWorld:  # noqa: B006
    if not cache:
        cache.append(ReasoningWorld("countdown"))
    return cache[0]


def test_scoring_works_in_a_thread() -> None:
    world = ReasoningWorld("countdown")
    problem = world.problem("train", 0)
    seen: list[bool | None] = []
    thread = threading.Thread(target=lambda: seen.append(world.score(problem, problem.answer or "").correct))
    thread.start()
    thread.join(20)
    assert seen == [True]


def test_a_verifier_that_hangs_or_raises_scores_0(monkeypatch) -> None:
    world = ReasoningWorld("chain_sum")
    problem = world.problem("train", 0)
    dataset = world._dataset(problem.category)
    monkeypatch.setattr("etude.worlds.reasoning.SECONDS", 0.1)
    for broken in (lambda a, e: time.sleep(30), lambda a, e: 1 / 0, lambda a, e: None):
        monkeypatch.setattr(dataset, "score_answer", broken)
        began = time.perf_counter()
        outcome = world.score(problem, problem.answer or "")
        assert (outcome.reward, outcome.correct, outcome.parts["error"]) == (0.0, False, 1.0)
        assert time.perf_counter() - began < 2


def test_a_vacuous_verifier_is_replaced() -> None:
    """game_of_life_halting's own verifier accepts any text that is not empty."""
    world = ReasoningWorld("game_of_life_halting")
    problem = world.problem("train", 0)
    wrong = {"True": "False", "False": "True"}[problem.answer or ""]
    assert world.score(problem, f"<answer>{problem.answer}</answer>").correct
    assert not world.score(problem, f"<answer>{wrong}</answer>").correct
