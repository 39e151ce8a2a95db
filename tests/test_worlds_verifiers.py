"""Verifiers, reward functions with TRL's signature, and the time limit around them."""

import contextlib
import logging
import math
import signal
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.experience.types import Message, Outcome, Problem
from etude.worlds import text as texts
from etude.worlds import verifiers
from etude.worlds.limits import TimeLimit, within
from etude.worlds.rewards import Rewards
from etude.worlds.verifiers import from_import, load_verifier

# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so <answer> 42 </answer>. Done", "42"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>cut off", "cut off"),
        (r"thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} <answer>4</answer>", "4"),
        ("The answer is: **7**\nBye", "7"),
        ("Answer: 3\nFinal answer: 5", "5"),
        ("first\nlast line \n", "last line"),
        ("", ""),
    ],
)
def test_the_final_answer(text: str, answer: str) -> None:
    assert texts.extract_answer(text) == answer


def test_an_answer_of_several_lines() -> None:
    assert texts.extract_answer("Well:\n1 2\n3 4", lines=2) == "1 2\n3 4"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", Fraction("1234.5")),
        ("-3/4", Fraction(-3, 4)),
        ("about 2e-3 of 7 apples", Fraction(7)),
        ("2.5e3", Fraction(2500)),
        ("\u22127", Fraction(-7)),
        (".5", Fraction(1, 2)),
        ("7.", Fraction(7)),
        ("1/0", None),
        ("none", None),
        ("1e999999999", Fraction(999999999)),
        ("9" * 5000, None),
    ],
)
def test_numbers(text: str, value: Fraction | None) -> None:
    assert texts.number(text) == value


@given(st.integers(-(10**9), 10**9), st.integers(0, 999))
def test_a_number_is_read_however_it_is_written(whole: int, milli: int) -> None:
    value = Fraction(whole) + Fraction(milli, 1000) * (1 if whole >= 0 else -1)
    assert texts.number(f"it is {whole:,}.{milli:03d} m") == value


# --- verifiers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "answer", "correct"),
    [
        ("exact", "<answer> a  b\n</answer>", "a b", True),
        ("exact", "a c", "a b", False),
        ("exact", "so:\n1 2\n3 4", "1 2\n3 4", True),
        ("numeric", "Answer: 1,000.0", "1000", True),
        ("numeric", "0.3333333", "1/3", True),
        ("numeric", "0.333", "1/3", False),
        ("numeric", "nothing", "3", False),
        ("numeric", "$12.50", "12.5", True),
        ("regex", "the cat sat", r"\bcats?\b", True),
        ("regex", "dog", r"cat", False),
        ("math", r"\boxed{\frac{1}{2}}", "0.5", True),
        ("math", r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        ("math", r"\boxed{x+2}", "x+1", False),
        ("math", "words", "3", False),
    ],
)
def test_verifiers(name: str, text: str, answer: str, correct: bool) -> None:
    outcome = load_verifier(name)(text, answer)
    assert (outcome.correct, outcome.reward) == (correct, float(correct))


def test_tolerance() -> None:
    assert verifiers.numeric("3.1", "3.14", tolerance=0.05).correct
    assert not verifiers.numeric("3.1", "3.14").correct


def test_math_works_in_a_thread_and_is_not_hung() -> None:
    seen: list[bool | None] = []
    thread = threading.Thread(target=lambda: seen.append(load_verifier("math")(r"\boxed{0.5}", "1/2").correct))
    thread.start()
    thread.join(30)
    assert seen == [True]
    for bomb in ("9^{9^{9^{9}}}", "(9^9)^(9^9)", "9^{99999999}", "99999999!", "9**9**9", "{" * 400):
        began = time.perf_counter()
        assert not load_verifier("math")(rf"\boxed{{{bomb}}}", "3").correct
        assert time.perf_counter() - began < 6


def test_a_pattern_that_backtracks_for_ever_is_cut_off(monkeypatch) -> None:
    monkeypatch.setattr(verifiers, "SECONDS", 0.2)
    began = time.perf_counter()
    assert not load_verifier("regex")("a" * 60 + "b", "(a+)+$").correct
    assert time.perf_counter() - began < 3
    with pytest.raises(UserError, match="not a regular expression"):
        load_verifier("regex")("a", "(")


def test_a_user_s_function(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def close(text, answer):\n    return 1.0 if text == answer else 0.25\nnumber = 3\n")
    verify = load_verifier(f"{file}:close")
    assert verify("a", "a") == Outcome(1.0, True)
    assert verify("b", "a") == Outcome(0.25, False)
    assert from_import("math:gcd") is math.gcd
    for broken in (lambda t, a: 1 / 0, lambda t, a: math.nan, lambda t, a: "x", lambda t, a: None):
        assert load_verifier(broken)("a", "a") == Outcome(0.0, False, None, {"fault": 1.0})


def test_bad_imports_are_one_clear_line(tmp_path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    empty = tmp_path / "empty.py"
    empty.write_text("def clsoe(): ...\nvalue = 3\n")
    for spec, message in (
        ("nocolon", "unknown verifier 'nocolon'"),
        (":f", "names no function"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        (f"{broken}:f", "No module named 'nothing_of_that_name'"),
        (f"{empty}:close", "did you mean clsoe"),
        (f"{empty}:value", "is a int, not a function"),
        (f"{tmp_path}/none.py:f", "no such file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_verifier(spec)
        assert "\n" not in str(error.value)


# --- reward functions ----------------------------------------------------------------------------

ASKED = [Problem(str(i), f"{i}+1=", str(i + 1), meta={"hint": "h" * i}) for i in range(3)]
SAID = ["1", "2", "x"]


def length(completions, **columns):
    return [float(len(c)) for c in completions]


def right(prompts, completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_the_weighted_sum_of_named_parts() -> None:
    rewards = Rewards([right, length], [2.0, 0.5])
    outcomes = rewards.judge(ASKED, SAID)
    assert [o.reward for o in outcomes] == [2.5, 2.5, 0.5]
    assert [dict(o.parts) for o in outcomes] == [{"right": r, "length": 1.0} for r in (1.0, 1.0, 0.0)]
    assert all(o.correct is None for o in outcomes)
    assert rewards(ASKED[2], "x") == outcomes[2]


def test_functions_are_given_trl_s_columns() -> None:
    seen = {}

    def spy(prompts, completions, completion_ids, answer, hint, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids, answer=answer, hint=hint)
        return [None] * len(prompts)

    outcomes = Rewards([spy]).judge(ASKED, SAID, completion_ids=[[1], [2], [3]])
    assert seen["prompts"] == ["0+1=", "1+1=", "2+1="]
    assert seen["completions"] == SAID
    assert seen["ids"] == [[1], [2], [3]]
    assert seen["answer"] == ["1", "2", "3"]
    assert seen["hint"] == ["", "h", "hh"]
    assert seen["category"] == ["", "", ""]
    assert [(o.reward, dict(o.parts)) for o in outcomes] == [(0.0, {})] * 3  # None: not applicable

    chat = Problem("c", (Message(role="user", content="hi"),))
    Rewards([lambda prompts, completions: seen.update(p=prompts, c=completions) or [1.0]])(chat, "ho")
    assert seen["p"] == [[{"role": "user", "content": "hi"}]]
    assert seen["c"] == [[{"role": "assistant", "content": "ho"}]]


def test_correct_is_the_verifier_s_word() -> None:
    rewards = Rewards([length], verifier=lambda p, t: Outcome(1.0, t == p.answer, t))
    assert [(o.correct, o.parsed, o.reward) for o in rewards.judge(ASKED, SAID)] == [
        (True, "1", 1.0),
        (True, "2", 1.0),
        (False, "x", 1.0),
    ]


def test_arrays_and_booleans_are_numbers() -> None:
    rewards = Rewards(
        {"a": lambda completions: np.array([1, 2, 3]), "b": lambda completions: [True, False, np.float32(1)]}
    )
    assert [o.reward for o in rewards.judge(ASKED, SAID)] == [2.0, 2.0, 4.0]


def test_only_the_samples_at_fault_are_scored_0(caplog) -> None:
    def parse(completions, **columns):
        return [float(int(c)) for c in completions]

    rewards = Rewards([parse, length])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            outcomes = rewards.judge(ASKED, SAID)
    assert [o.reward for o in outcomes] == [2.0, 3.0, 0.0]
    assert ["fault" in o.parts for o in outcomes] == [False, False, True]
    assert len(caplog.records) == 1
    assert "parse" in caplog.text
    assert "ValueError" in caplog.text


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        ([1.0, math.nan, 1.0], [0, 1, 0]),
        ([1.0, math.inf, 1.0], [0, 1, 0]),
        ([1.0, "1.0", [2]], [0, 1, 1]),
        ([1.0, None, 1.0], [0, 0, 0]),
        ([1.0, 1.0], [1, 1, 1]),
        ([], [1, 1, 1]),
        (None, [1, 1, 1]),
        (3.0, [1, 1, 1]),
    ],
)
def test_faulty_values(given, faults) -> None:
    outcomes = Rewards({"odd": lambda completions: given, "two": lambda completions: [2.0] * len(completions)}).judge(
        ASKED, SAID
    )
    assert [o.parts.get("fault", 0) for o in outcomes] == faults
    assert [o.reward == 0.0 for o in outcomes] == [bool(f) for f in faults]


def test_a_function_that_hangs_is_cut_off() -> None:
    def sleep(completions):
        time.sleep(30)

    def spin(completions):
        while True:
            with contextlib.suppress(Exception):
                sum(range(100))

    for hang in (sleep, spin):
        began = time.perf_counter()
        outcomes = Rewards([hang], seconds=0.2).judge(ASKED, SAID)
        assert [o.parts["fault"] for o in outcomes] == [1, 1, 1]
        assert time.perf_counter() - began < 3


def test_bad_sets_of_functions() -> None:
    with pytest.raises(UserError, match="at least one reward function"):
        Rewards([])
    with pytest.raises(UserError, match="a name of its own"):
        Rewards([length, length])
    with pytest.raises(UserError, match="1 weights for 2"):
        Rewards([length, right], [1.0])


# --- time limits ---------------------------------------------------------------------------------


def test_within_passes_results_and_errors_on_in_any_thread() -> None:
    found: list[object] = []

    def stubborn() -> None:
        try:
            time.sleep(0.5)
        except BaseException:
            time.sleep(1.5)

    def check() -> None:
        found.append(within(5, divmod, 7, 2))
        with pytest.raises(ZeroDivisionError):
            within(5, divmod, 1, 0)
        began = time.perf_counter()
        with pytest.raises(TimeLimit):
            within(0.1, time.sleep, 1.5)
        with pytest.raises(TimeLimit):
            within(0.1, stubborn)
        found.append(time.perf_counter() - began < 1.2)

    check()
    thread = threading.Thread(target=check)
    thread.start()
    thread.join(20)
    assert found == [(3, 1), True] * 2


def test_within_leaves_other_timers_as_they_were() -> None:
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    before = signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        within(5, time.sleep, 0.1)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.31
        time.sleep(0.5)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


@pytest.mark.parametrize(
    ("text", "reference", "answer"),
    [
        ("1 + 6 + 4 = 11", "11", "11"),
        ("so it is 1,234.", "1234", "1,234"),
        ("-3", "-3", "-3"),
        ("4 apples", "4 apples", "4 apples"),  # the reference is no number: nothing is picked out
        ("none", "7", "none"),
        ("<answer>7x</answer>", "7", "7x"),  # what is marked as the answer is taken as it stands
    ],
)
def test_where_a_number_is_wanted_the_last_one_answers(text, reference, answer):
    assert texts.extract_answer(text, numeric=texts.is_number(reference)) == answer
