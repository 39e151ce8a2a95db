"""The mixture: shares, order and sizes; problems go back to the world, the verifier and the oracle they came from."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.curricula.curriculum import Uniform
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock
from etude.experience.types import Outcome, Problem
from etude.methods.api import train
from etude.worlds.mixture import MixWorld
from etude.worlds.oracles import faulty, find_oracle, load_oracle, step_oracle
from etude.worlds.registry import load_world, world_names

SORTING = {"world": "number_sorting", "min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "max_value": 9.0}
PARTS = {"sums": {"world": "chain"}, "sorting": SORTING}


def mix(**options: Any) -> Any:
    return load_world("mix", notation="compact", parts=PARTS, **options)


@dataclass(frozen=True)
class Counted:
    """A world of `n` problems (None: endless); each says its number."""

    name: str
    n: int | None = None
    categories: tuple[str, ...] = ("a", "b")

    def size(self, split: str) -> int | None:
        return self.n

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        assert self.n is None or index < self.n
        return Problem(f"{split}/{index}", str(index), str(index), category or self.categories[index % 2])

    def score(self, problem: Problem, text: str) -> Outcome:
        assert problem.id == f"{problem.id.split('/')[0]}/{problem.answer}"  # as it was given
        return Outcome(float(text == self.name + (problem.answer or "")), text == self.name + (problem.answer or ""))


shares = st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any)


@settings(deadline=None)
@given(shares, st.integers(1, 60))
def test_shares_are_kept_and_no_problem_of_a_part_is_skipped_or_repeated(counts: list[int], cycles: int) -> None:
    names = [f"w{i}" for i in range(len(counts))]
    world = MixWorld({n: Counted(n) for n in names}, dict(zip(names, counts, strict=True)))
    drawn = [world.problem("train", i) for i in range(cycles * sum(counts))]
    assert Counter(p.category for p in drawn) == {n: c * cycles for n, c in zip(names, counts, strict=True) if c}
    for name in names:
        assert [p.prompt for p in drawn if p.category == name] == list(
            map(str, range(sum(p.category == name for p in drawn)))
        )
    held = [world.problem("test", i).category for i in range(2 * len(names))]
    assert held == names * 2  # each in turn, whatever its share
    assert world.problem("train", 3) == world.problem("train", 3)


@settings(deadline=None)
@given(shares, st.data())
def test_it_ends_where_the_first_part_ends(counts: list[int], data: st.DataObject) -> None:
    names = [f"w{i}" for i in range(len(counts))]
    sizes = data.draw(st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=len(counts), max_size=len(counts)))
    parts = {n: Counted(n, size) for n, size in zip(names, sizes, strict=True)}
    world = MixWorld(parts, dict(zip(names, counts, strict=True)))
    size = world.size("train")
    if size is None:
        assert all(s is None for s, c in zip(sizes, counts, strict=True) if c)
        return
    for i in range(size):
        world.problem("train", i)
    with pytest.raises(AssertionError):
        world.problem("train", size)


def test_shares_are_spread_over_a_cycle() -> None:
    world = mix(shares={"sums": 1, "sorting": 3})
    assert [world.problem("train", i).category for i in range(8)] == ["sorting", "sums", "sorting", "sorting"] * 2


def test_every_problem_is_judged_by_its_own_world() -> None:
    world = MixWorld({n: Counted(n) for n in ("x", "y")})
    for i in range(6):
        problem = world.problem("test", i)
        assert world.score(problem, problem.category + str(problem.answer)).correct
        other = {"x": "y", "y": "x"}[problem.category]
        assert not world.score(problem, other + str(problem.answer)).correct
    ids = [world.problem(split, i).id for split in ("train", "test") for i in range(20)]
    assert len(set(ids)) == 40


def test_categories_are_parts_or_their_categories() -> None:
    plain, fine = mix(), mix(levels=True)
    assert plain.categories == ("sums", "sorting")
    assert fine.categories == ("sums/short", "sums/long", "sorting/default")
    assert {len(fine.problem("train", i, "sums/long").meta["terms"]) for i in range(9)} == {7}
    assert {len(plain.problem("train", i, "sums").meta["terms"]) for i in range(40)} == {3, 4, 7}
    for category in fine.categories:
        problem = fine.problem("test", 3, category)
        assert problem.category == category
        assert fine.score(problem, str(problem.answer)).correct
    for world in (plain, fine):
        drawn = Uniform(world).draw(12, Clock(0, 1), Keys(0))
        assert {p.category for p in drawn} <= set(world.categories)
        with pytest.raises(UserError, match="unknown category of the mixture, 'summs': did you mean sums"):
            world.problem("train", 0, "summs")


@pytest.mark.parametrize("notation", ["compact", "natural"])
@pytest.mark.parametrize("levels", [False, True])
def test_demonstrations_steps_and_explanations_are_the_parts(notation: str, levels: bool) -> None:
    world: Any = load_world("mix", notation=notation, parts=PARTS, levels=levels)
    oracle = step_oracle(world)
    assert oracle.styles == ("plain", "direct", "verbose")
    for i in range(12):
        problem = world.problem("train", i)
        text = oracle.demonstrate(problem, "plain", Keys(i))
        assert world.score(problem, text).correct
        steps, answer = oracle.solve(problem)
        assert oracle.plan(problem, ()) == steps[0]
        assert oracle.check_step(problem, (), steps[0])
        assert not oracle.check_step(problem, (), "nonsense")
        assert all(answer not in hint for tier in oracle.hints(problem) for hint in tier if "," in answer)
        assert oracle.parse(text)[1] == answer
        part = find_oracle(world.parts[problem.meta["part"]])
        assert part is not None
        inner = world.inner_problem(problem)
        assert part.demonstrate(inner, "plain", Keys(i)) == text
        assert oracle.explain(problem, "9;9") == part.explain(inner, "9;9")


def test_a_fault_of_one_part_strikes_there_alone() -> None:
    world = mix()
    oracle = faulty(step_oracle(world), 1.0, ("order",))
    found = {
        problem.category: world.score(problem, oracle.demonstrate(problem, "plain", Keys(i))).correct
        for i in range(20)
        if len(set((problem := world.problem("train", i)).prompt)) > 5
    }
    assert found == {"sums": True, "sorting": False}
    assert {"order", "carry"} <= set(oracle.oracle.kinds)
    with pytest.raises(UserError, match="unknown fault 'ordre'"):
        load_oracle(world, 0.5, ("ordre",))


def test_worlds_by_name() -> None:
    assert "mix" in world_names()
    named = load_world("mix:chain_sum,countdown", notation="compact")
    assert named.categories == ("chain_sum", "countdown")
    changed: Any = load_world("mix:chain_sum,countdown", parts={"countdown": {"max_value": 5, "partial": True}})
    assert changed.categories == ("chain_sum", "countdown")
    assert changed.parts["countdown"].partial
    assert find_oracle(load_world("mix:chain_sum,maze", notation="compact")) is None


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mix", {}, "mix: there must be at least one part"),
        ("mix:chain_sum,cuontdown", {}, "unknown world 'cuontdown': did you mean countdown"),
        ("mix", {"parts": ["chain_sum"]}, "mix: parts are options by name"),
        ("mix", {"parts": {"chain_sum": {"min_term": 2}}}, "unknown option of chain_sum 'min_term'"),
        ("mix:chain_sum,gcd", {"shares": {"gdc": 1}}, "unknown part of the mixture, 'gdc': did you mean gcd"),
        ("mix:chain_sum,gcd", {"shares": {"gcd": 0.5}}, "mix: shares are whole numbers, at least 0, not gcd=0.5"),
        ("mix:chain_sum,gcd", {"shares": {"gcd": -1}}, "mix: shares are whole numbers, at least 0, not gcd=-1"),
        ("mix:gcd", {"shares": {"gcd": 0}}, "mix: at least one part needs a share above 0"),
        ("mix:gcd", {"share": {"gcd": 0}}, "unknown option of world mix, 'share': did you mean shares"),
        ("mix:chain_sum,retry:gcd", {}, "mix: 'retry:gcd' is a world of many turns"),
        ("mix:chain_sum", {"parts": {"gcd": {"notation": "compact"}}}, "in one notation, not in compact and natural"),
    ],
)
def test_what_cannot_be_mixed_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_world(name, **options)


def test_a_run_on_one_part_is_looked_at_on_both(tmp_path: Any) -> None:
    from etude.experience.store import Store

    run = train(
        "sft", out=tmp_path / "r", world="mix", world_options={"parts": PARTS, "shares": {"sums": 0, "sorting": 1}},
        policy="table", steps=2, batch=4, demonstrations=8, eval_problems=8, max_tokens=4,
    )  # fmt: skip
    with Store(run.folder, read_only=True) as store:
        seen = {e["metric"] for e in store.evaluations()}
    assert {"accuracy/sums", "accuracy/sorting"} <= seen
    assert json.loads((run.folder / "config.json").read_text())["common"]["world"] == "mix"
