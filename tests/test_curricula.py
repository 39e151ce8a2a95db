import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from etude.curricula.curriculum import EasyToHard, Mixture, ThresholdAdvance, Uniform
from etude.curricula.schedules import Constant, Cosine, Linear, Threshold, Window, lr_schedule
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import check, plug
from etude.experience.protocols import Clock, Report
from etude.experience.types import Problem
from fake_policy import group

CATEGORIES = ("a", "b", "c")


class FakeWorld:
    """Problems named by what they were asked for; a finite one goes a, b, c, a, ..."""

    name = "fake"
    categories = CATEGORIES

    def __init__(self, size=None):
        self.total = size

    def size(self, split):
        return self.total

    def problem(self, split, index, category=None):
        if self.total is not None:
            assert category is None
            assert 0 <= index < self.total
            category = CATEGORIES[index % 3]
        return Problem(f"{split}/{category}/{index}", "?", category=category or "a", difficulty=float(-index))


def draws(curriculum, *sizes, seed=0, total=None):
    """What steps of these sizes draw, as ids."""
    total = total or len(sizes)
    return [[p.id for p in curriculum.draw(n, Clock(i, total), Keys(seed).at("step", i))] for i, n in enumerate(sizes)]


def flat(steps):
    return [p for step in steps for p in step]


def make(name, size=None):
    world = FakeWorld(size)
    return {
        "uniform": lambda: Uniform(world),
        "mixture": lambda: Mixture(world, {"a": 0.5, "b": 0.3, "c": 0.2}),
        "easy-to-hard": lambda: EasyToHard(world),
        "threshold": lambda: ThresholdAdvance(world, threshold=0.5, window=2),
    }[name]()


ALL = ["uniform", "mixture", "easy-to-hard", "threshold"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [None, 12])
@pytest.mark.parametrize("cut", [1, 4])
def test_resume_is_exact_mid_epoch(name, size, cut):
    def steps(curriculum, start, stop):
        out = []
        for i in range(start, stop):
            problems = curriculum.draw(5, Clock(i, 9), Keys(3).at("step", i))
            groups = [group([1, 0], category=p.category) for p in problems]
            curriculum.observe(Report(Clock(i, 9), groups, [True] * 5, [0.0] * 5))
            out.append([p.id for p in problems])
        return out

    whole = steps(make(name, size), 0, 9)
    first = make(name, size)
    head = steps(first, 0, cut)
    second = make(name, size)
    second.draw(3, Clock(0, 9), Keys(77))  # whatever it was before is forgotten
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + steps(second, cut, 9) == whole


@pytest.mark.parametrize("name", ALL)
def test_endless_worlds_never_repeat_and_seeds_differ(name):
    problems = flat(draws(make(name), 7, 1, 40))
    assert len(set(problems)) == 48
    assert set(problems).isdisjoint(flat(draws(make(name), 7, 1, 40, seed=1)))
    assert flat(draws(make(name), 7, 1, 40)) == problems


def test_an_epoch_holds_every_problem_once_in_another_order():
    problems = flat(draws(Uniform(FakeWorld(12)), *[5] * 12))
    epochs = [problems[i : i + 12] for i in range(0, 60, 12)]
    assert all(len(set(e)) == 12 for e in epochs)
    assert len({tuple(e) for e in epochs}) == 5
    assert {p.split("/")[2] for p in epochs[0]} == {str(i) for i in range(12)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=3), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_mixture_shares_are_exact(weights, sizes):
    weights = dict(zip(CATEGORIES, weights, strict=False))
    total = sum(weights.values())
    curriculum, seen = Mixture(FakeWorld(), weights), Counter()
    for problem in flat(draws(curriculum, *sizes, total)):
        seen[problem.split("/")[1]] += 1
        m = sum(seen.values())
        assert all(abs(seen[c] - m * w / total) < 1 for c, w in weights.items())
    rest = -m % total
    for problem in curriculum.draw(rest, Clock(0, 1), Keys(0)):
        seen[problem.category] += 1
    assert dict(seen) == {c: w * sum(seen.values()) // total for c, w in weights.items()}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12))
@example([0.62, 0.33, 0.05])
def test_mixture_shares_stay_within_tijdemans_bound(weights):
    world = FakeWorld()
    world.categories = tuple(str(i) for i in range(len(weights)))
    curriculum = Mixture(world, dict(zip(world.categories, weights, strict=True)))
    bound = 1 - 1 / (2 * len(weights) - 2)
    for m in range(1, 200):
        curriculum.shelf(Clock(0, 1), Keys(0))
        assert all(abs(n - m * curriculum.weights[c]) <= bound + 1e-9 for c, n in curriculum.counts.items())


def test_mixture_over_a_finite_world_goes_through_each_category():
    curriculum = Mixture(FakeWorld(12), {"a": 3, "c": 1})
    problems = list(curriculum.draw(16, Clock(0, 1), Keys(0)))
    assert Counter(p.category for p in problems) == {"a": 12, "c": 4}
    assert Counter(p.id for p in problems if p.category == "a") == {f"train/None/{i}": 3 for i in ()} | Counter(
        {f"train/a/{i}": 3 for i in (0, 3, 6, 9)}
    )


def test_easy_to_hard_by_category_and_by_difficulty():
    by_category = draws(EasyToHard(FakeWorld()), *[2] * 6)
    assert [s[0].split("/")[1] for s in by_category] == ["a", "a", "b", "b", "c", "c"]
    reverse = draws(EasyToHard(FakeWorld(), order=("c", "a")), *[1] * 4)
    assert [s[0].split("/")[1] for s in reverse] == ["c", "c", "a", "a"]
    by_difficulty = draws(EasyToHard(FakeWorld(12), levels=4), *[3] * 4)  # difficulty is minus the index
    assert [sorted(int(p.split("/")[2]) for p in s) for s in by_difficulty] == [
        [9, 10, 11],
        [6, 7, 8],
        [3, 4, 5],
        [0, 1, 2],
    ]
    with pytest.raises(UserError, match="endless"):
        EasyToHard(FakeWorld(), levels=4)


def test_threshold_advance():
    curriculum = ThresholdAdvance(FakeWorld(), threshold=0.75, window=4)

    def hear(*solved, category=None):
        groups = [group(r, category=category or curriculum.order[curriculum.level]) for r in solved]
        curriculum.observe(Report(Clock(0, 1), groups, [False] * len(groups), [0.0] * len(groups)))
        return curriculum.shelf(Clock(0, 1), Keys(0))

    assert hear([1, 1], [1, 1], [1, 1]) == "a"  # the window is not full
    assert hear([0, 0], [0, 0]) == "a"  # the last four: 1 1 0 0
    assert hear([1, 1], [1, 0], category="b") == "a"  # others' problems do not count
    assert hear([1, 1], [1, 1], [1, 1]) == "b"  # 0 1 1 1
    assert hear([1, 1], [1, 1], [1, 1]) == "b"  # starts afresh
    assert hear([1, 1]) == "c"
    assert hear(*[[1, 1]] * 8) == "c"
    assert draws(curriculum, 1)[0][0].startswith("train/c/")


@pytest.mark.parametrize("name", ["uniform", "mixture", "easy-to-hard"])
def test_as_sampler(name):
    dataset = list(range(12))
    sampler = make(name, 12).as_sampler(dataset, Keys(1), epochs=2)
    loaded = list(torch.utils.data.DataLoader(dataset, batch_size=4, sampler=sampler))
    assert [len(b) for b in loaded] == [4, 4, 4]
    assert len(sampler) == 12
    first = torch.cat(loaded).tolist()
    assert (sorted(first) == dataset) == (name == "uniform")
    second = list(sampler)
    other = make(name, 12)  # cut after 5 draws, a second process goes on
    cut = iter(other.as_sampler(dataset, Keys(1), epochs=2))
    head = [next(cut) for _ in range(5)]
    resumed = make(name, 12)
    resumed.load_state_dict(other.state_dict())
    again = resumed.as_sampler(dataset, Keys(9), epochs=2)
    assert head + list(again) + list(again) == first + second
    if name == "easy-to-hard":
        assert {i % 3 for i in first[:8]} == {0}
        assert {i % 3 for i in second[4:]} == {2}


def test_samplers_that_cannot_be():
    with pytest.raises(UserError, match="must hear"):
        make("threshold", 12).as_sampler(range(12))
    with pytest.raises(UserError, match="11 items cannot stand for the 12 problems"):
        make("uniform", 12).as_sampler(range(11))
    with pytest.raises(UserError, match="endless"):
        make("uniform").as_sampler(range(11))


def test_bad_curricula():
    with pytest.raises(UserError, match="unknown category 'bb'"):
        Mixture(FakeWorld(), {"a": 1, "bb": 1})
    with pytest.raises(UserError, match="at least 0"):
        Mixture(FakeWorld(), {"a": 1, "b": -1})
    with pytest.raises(UserError, match="no categories"):
        Mixture(FakeWorld(), {"a": 0})
    with pytest.raises(UserError, match="no problems in its split"):
        Uniform(FakeWorld(0))
    with pytest.raises(UserError, match="category 'c' has no problems"):
        EasyToHard(FakeWorld(2))
    with pytest.raises(UserError, match="window"):
        ThresholdAdvance(FakeWorld(), window=0)
    with pytest.raises(UserError, match="the choice of the next item"):
        check([plug("curriculum", "uniform"), plug("curriculum", "mixture")])


# --- schedules -----------------------------------------------------------------------------------


def rates(name, total, warmup, steps=None):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    return follow(optimizer, lr_schedule(name, optimizer, total, warmup), steps or total)


def follow(optimizer, scheduler, steps):
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (1, 0), (7, 7)])
def test_learning_rates_equal_those_of_transformers(total, warmup):
    from transformers import optimization as hf

    def theirs(make, *args, **kwargs):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        return follow(optimizer, make(optimizer, warmup, *args, **kwargs), total + 3)

    assert rates("constant", total, warmup, total + 3) == pytest.approx(theirs(hf.get_constant_schedule_with_warmup))
    assert rates("linear", total, warmup, total + 3) == pytest.approx(theirs(hf.get_linear_schedule_with_warmup, total))
    if warmup < total:
        cosine = theirs(hf.get_cosine_schedule_with_warmup, total)[: total + 1]  # theirs rises again after the end
        assert rates("cosine", total, warmup, total + 1) == pytest.approx(cosine, abs=1e-12)
        decay = max(1, round(0.2 * total))
        wsd = theirs(hf.get_wsd_schedule, num_decay_steps=decay, num_training_steps=total, decay_type="linear")
        assert rates("wsd", total, warmup, total + 3) == pytest.approx(wsd)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine", "wsd"]), st.integers(1, 60), st.data())
def test_learning_rates_rise_then_never_rise_again(name, total, data):
    warmup = data.draw(st.integers(0, total))
    got = rates(name, total, warmup, total + 5)
    assert all(0 <= r <= 0.5 + 1e-12 for r in got)
    assert got[:warmup] == sorted(got[:warmup])
    assert got[warmup:] == sorted(got[warmup:], reverse=True)
    if warmup < total:
        assert got[warmup] == 0.5
        assert got[-1] == (0.5 if name == "constant" else pytest.approx(0, abs=1e-12))


def test_a_resumed_schedule_goes_on():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = lr_schedule("cosine", optimizer, 10, 2)
    head = follow(optimizer, scheduler, 4)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    resumed = lr_schedule("cosine", other, 10, 2)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert head + follow(other, resumed, 6) == rates("cosine", 10, 2)


def test_bad_learning_rate_schedules():
    optimizer = SimpleNamespace()
    with pytest.raises(UserError, match="did you mean cosine"):
        lr_schedule("cosin", optimizer, 10)
    with pytest.raises(UserError, match="11 warm-up steps"):
        lr_schedule("linear", optimizer, 10, 11)
    with pytest.raises(UserError, match="both own the learning rate"):
        check([plug("schedule", "cosine"), plug("schedule", "wsd")])


def test_schedules_of_other_numbers():
    def at(schedule, *steps):
        return [schedule(Clock(s, 10)) for s in steps]

    assert at(Constant(3.0), 0, 10) == [3, 3]
    assert at(Linear(1, 0), 0, 5, 10) == [1, 0.5, 0]
    assert at(Cosine(1, 0), 0, 5, 10) == pytest.approx([1, 0.5, 0])
    assert at(Cosine(0, 2), 2) == pytest.approx([1 - math.cos(0.2 * math.pi)])
    assert at(Window(0.2, 0.5, inside=4.0), 1, 2, 4, 5) == [0, 4, 4, 0]
    assert at(Threshold(0.5), 4, 5, 10) == [0, 1, 1]
