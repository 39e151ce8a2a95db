"""Oracles: their answers verify, their checks tell right steps from wrong ones, their faults are faults."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import World
from etude.worlds.chain import ChainWorld
from etude.worlds.countdown import evaluate, express, search
from etude.worlds.maze import MazeWorld
from etude.worlds.oracles import faulty, inject, load_oracle, step_oracle
from etude.worlds.reasoning import ReasoningWorld

NAMES = [
    f"{task}/{notation}"
    for task in ("chain", "chain-mod", "chain_sum", "countdown", "mini_sudoku", "grid_maze", "number_sorting")
    for notation in ("compact", "natural")
]
PROBLEMS = 200


@cache
def world(name: str) -> Any:
    task, notation = name.split("/")
    if task == "chain":
        return ChainWorld(notation=notation)
    if task == "chain-mod":
        return ChainWorld(notation=notation, modulus=50, scale=7, shift=3, numbers=(0, 4))
    if task == "grid_maze":
        return MazeWorld(notation=notation)
    return ReasoningWorld(task, notation=notation)


def problems(w: World, n: int) -> list[Any]:
    return [w.problem(("train", "test")[i % 2], i) for i in range(n)]


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_verify_in_every_style(name: str) -> None:
    w = world(name)
    oracle = step_oracle(w)
    styles = [s for s in oracle.styles if s != "bridged"]
    for i, p in enumerate(problems(w, PROBLEMS)):
        style = styles[i % len(styles)]
        text = oracle.demonstrate(p, style, Keys(i))
        assert w.score(p, text).correct, (p.prompt, style, text)
        assert text == oracle.demonstrate(p, style, Keys(i))


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_solution_checks_and_is_planned(name: str) -> None:
    w = world(name)
    oracle = step_oracle(w)
    for p in problems(w, 40):
        steps, answer = oracle.solve(p)
        for i, step in enumerate(steps):
            assert oracle.check_step(p, steps[:i], step)
            planned = oracle.plan(p, steps[:i])
            assert planned is not None
            assert oracle.check_step(p, steps[:i], planned)
        assert oracle.plan(p, steps) is None
        assert not oracle.check_step(p, (), "nonsense")
        plain = oracle.demonstrate(p, "plain", Keys(0))
        assert oracle.parse(plain) == (steps, answer)


@pytest.mark.parametrize("name", NAMES)
def test_injected_faults_are_seen(name: str) -> None:
    w = world(name)
    oracle = step_oracle(w)
    struck = set()
    for p in problems(w, 30):
        right, _ = oracle.solve(p)
        for kind in oracle.kinds:
            for at in oracle.places(p, kind):
                shown = inject(oracle, p, kind, at, "plain", Keys(at))
                assert not w.score(p, shown.text).correct, (kind, at, shown.text)
                (fault,) = shown.faults
                assert fault.kind == kind
                written = [shown.text[a:b] for a, b in fault.spans]
                assert len(written) == 1
                steps, answer = oracle.parse(shown.text)
                assert fault.step == min(at, len(shown.steps) - 1)
                if at < len(right):
                    assert written[0] == steps[at]
                    assert all(oracle.check_step(p, steps[:i], steps[i]) for i in range(at))
                    assert not oracle.check_step(p, steps[:at], steps[at])
                else:
                    assert written[0] == answer
                assert oracle.explain(p, shown.text) != "right"
                struck.add(kind)
    assert struck == set(oracle.kinds)


@pytest.mark.parametrize("name", ["chain_sum/compact", "chain-mod/natural"])
def test_only_the_faulty_step_of_a_sum_is_wrong(name: str) -> None:
    w = world(name)
    oracle = step_oracle(w)
    for p in problems(w, 40):
        for at in oracle.places(p, "arithmetic"):
            steps, _ = oracle.work(p, {at: "arithmetic"}, Keys(at))
            wrong = [i for i in range(len(steps)) if not oracle.check_step(p, steps[:i], steps[i])]
            assert wrong == [at]
            if at == 0 or steps[at] != steps[at - 1]:  # a slip to the total before reads as stating it again
                assert oracle.explain(p, "\n".join(steps)) == f"step {at + 1} is wrong"


@pytest.mark.parametrize("name", NAMES)
def test_hints_go_from_abstract_to_concrete_without_the_answer(name: str) -> None:
    w = world(name)
    oracle = step_oracle(w)
    tiers = 0
    for p in problems(w, PROBLEMS):
        found = oracle.hints(p)
        tiers += len(found)
        _, answer = oracle.solve(p)
        for tier in found:
            for hint in tier:
                numbers = hint.replace(";", " ").replace("=", " ").split()
                assert answer not in numbers
                if "/" in answer or "*" in answer or " " in answer:
                    assert answer not in hint
        shown = [h for tier in found for h in tier if "=" in h or ";" in h]
        assert all(b.startswith(a) for a, b in pairwise(shown))
    assert tiers > PROBLEMS / 2


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["chain/compact", "countdown/compact", "mini_sudoku/compact", "grid_maze/compact"])
def test_fault_rate(name: str, rate: float) -> None:
    w = world(name)
    oracle = faulty(step_oracle(w), rate)
    n = 300
    demos = [oracle.trace(p, "plain", Keys(7).at(i)) for i, p in enumerate(problems(w, n))]
    wrong = sum(not w.score(p, d.text).correct for p, d in zip(problems(w, n), demos, strict=True))
    assert wrong == sum(bool(d.faults) for d in demos)
    low, high = binom.ppf([1e-5, 1 - 1e-5], n, rate)
    assert low <= wrong <= high
    assert demos == [oracle.trace(p, "plain", Keys(7).at(i)) for i, p in enumerate(problems(w, n))]


def test_fault_rate_by_step_and_repairs() -> None:
    w = ChainWorld(kinds={"long": (12, 12)}, modulus=100, numbers=(10, 99))
    oracle = faulty(step_oracle(w), 0.25, ("arithmetic",), per="step")
    n, slips, repaired = 200, 0, 0
    for i, p in enumerate(problems(w, n)):
        demo = oracle.trace(p, "check", Keys(i))
        slips += len(demo.faults)
        assert w.score(p, demo.text).correct  # every slip is repaired at the next check
        segments = demo.text.split(";")
        repairs = [s for s in segments if s.startswith("wait") and not s.endswith("yes")]
        assert len(repairs) <= len(demo.faults)
        repaired += len(repairs)
        marked = {demo.text[a:b] for f in demo.faults for a, b in f.spans}
        assert marked <= set(segments)
        assert step_oracle(w).explain(p, step_oracle(w).demonstrate(p, "check", Keys(i))) == "wrong answer"
    low, high = binom.ppf([1e-5, 1 - 1e-5], 11 * n, 0.25)
    assert low <= slips <= high
    # Two slips between the same two checks make one repair, or none if they cancel.
    assert 0.6 * slips < repaired < slips


def test_direct_faults_stand_in_the_answer() -> None:
    w = world("chain/compact")
    p = w.problem("train", 0)
    demo = inject(step_oracle(w), p, "arithmetic", 0, "direct", Keys(0))
    assert [demo.text[a:b] for a, b in demo.faults[0].spans] == [demo.text]
    verbose = inject(step_oracle(w), p, "arithmetic", 0, "verbose", Keys(0))
    assert len({verbose.text[a:b] for a, b in verbose.faults[0].spans}) == 1
    assert 2 <= len(verbose.faults[0].spans) <= 4


def test_compact_completions_are_short() -> None:
    chain_sum = ReasoningWorld("chain_sum", notation="compact", min_terms=3, max_terms=3, max_digits=2)
    countdown = ReasoningWorld(
        "countdown",
        notation="compact",
        min_numbers=3,
        max_numbers=3,
        max_value=9,
        min_target=2,
        max_target=30,
    )
    for w, longest in ((chain_sum, 10), (countdown, 30)):
        texts = [step_oracle(w).demonstrate(p, "plain", Keys(0)) for p in problems(w, 100)]
        assert max(map(len, texts)) <= longest


def test_countdown_search_styles() -> None:
    w = world("countdown/compact")
    oracle = step_oracle(w)
    for p in problems(w, 30):
        for k in (0, 1, 3, 6):
            text = oracle.demonstrate(p, f"search-{k}", Keys(k))
            assert text.split(";").count("x") == k
            assert oracle.parse(text) == oracle.solve(p)
            assert w.score(p, text).correct
    with pytest.raises(UserError, match="unknown style 'serch'"):
        oracle.demonstrate(w.problem("train", 0), "serch", Keys(0))


numbers = st.lists(st.integers(1, 25), min_size=2, max_size=6)


@settings(deadline=None, max_examples=60)
@given(numbers, st.data())
def test_search_finds_what_exists(values: list[int], data: st.DataObject) -> None:
    target, rest = values[0], values[1:]
    for n in rest:  # some target that can be made from left to right
        op = data.draw(st.sampled_from("+-*"))
        target = target + n if op == "+" else target - n if op == "-" else target * n
    ops = search(tuple(values), target)
    assert ops is not None
    pool: list[int] = list(values)
    for a, op, b, c in ops:
        pool.remove(a)
        pool.remove(b)
        assert evaluate(f"({a}){op}({b})")[0] == c
        pool.append(c)
    assert pool == [target]


def test_search_says_when_there_is_no_way() -> None:
    assert search((1, 1), 3) is None
    assert search((1, 1, 1, 1), 1000) is None
    assert search((2, 3), -1) == ((2, "-", 3, -1),)


trees = st.recursive(st.integers(1, 20), lambda t: st.tuples(st.sampled_from("+-*/"), t, t), max_leaves=6)


@given(trees)
def test_expressions_keep_their_value(tree: Any) -> None:
    def value(t: Any) -> Fraction:
        if isinstance(t, int):
            return Fraction(t)
        a, b = value(t[1]), value(t[2])
        return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[t[0]]()

    try:
        expected = value(tree)
    except ZeroDivisionError:
        return
    assert evaluate(express(tree))[0] == expected


@pytest.mark.parametrize("text", ["", "3+", "__import__('os')", "2**9", "(" * 300, "1/0", "x", "3.5", "\0", "9" * 300])
def test_what_is_no_arithmetic_has_no_value(text: str) -> None:
    assert evaluate(text) == (None, [])


def test_explanations() -> None:
    w = ReasoningWorld("countdown", notation="compact")
    oracle, p = step_oracle(w), w.problem("train", 0)
    numbers, target = p.meta["entry"]["metadata"]["numbers"], p.meta["entry"]["metadata"]["target"]
    total = "+".join(map(str, numbers))
    assert oracle.explain(p, total) == f"gives {sum(numbers)}, not {target}"
    assert oracle.explain(p, str(numbers[0])) == "must use each number once"
    assert oracle.explain(p, "hm") == "not an expression"


def test_a_world_without_an_oracle() -> None:
    with pytest.raises(UserError, match=r"world 'maze' has no oracle; worlds with one: chain, .*textworld, .*sum"):
        load_oracle(ReasoningWorld("maze"))


def test_bad_faults() -> None:
    w = world("chain/compact")
    with pytest.raises(UserError, match="unknown fault 'arithmetics': did you mean arithmetic"):
        load_oracle(w, 0.5, ("arithmetics",))
    with pytest.raises(UserError, match="between 0 and 1"):
        load_oracle(w, 1.5)
    with pytest.raises(UserError, match="can strike at steps"):
        inject(step_oracle(w), w.problem("train", 0), "arithmetic", 99, "plain", Keys(0))
