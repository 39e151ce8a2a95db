"""Early stopping by validation: the best weights are kept, on problems that nothing is trained on."""

import math

import numpy as np
import pytest
import torch

from etude.experience.errors import UserError
from etude.learning.best import VALIDATION, Best, held_back, keep_best, validation
from etude.learning.run import Run
from etude.learning.setting import Common, Setting
from small import Echo, small_lm, weights_of


class Few(Echo):
    """A finite training split, in which every prompt stands twice."""

    def size(self, split):
        return 20 if split == "train" else None

    def problem(self, split, index, category=None):
        return super().problem(split, index // 2 if split == "train" else index, category)


class Counted(Echo):
    """As many different prompts as there are indices."""

    def problem(self, split, index, category=None):
        from dataclasses import replace

        return replace(super().problem(split, index, category), prompt=f"{index % 40}=")


def moved(policy, by):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(by)


def same(a, b):
    return all(np.array_equal(a[n], b[n]) for n in a)


@pytest.fixture
def made(tmp_path):
    def make(world):
        common = Common(eval_temperature=1.0, max_tokens=2)
        run = Run(tmp_path / "run", {"seed": 3})
        return Setting(run, common, world, small_lm(1), world.score, "base")

    return make


def test_the_first_of_the_best_is_kept_and_put_back():
    policy = small_lm(0)
    best, seen = Best(policy), []
    for step, score in enumerate((0.25, 0.5, math.nan, 0.5, 0.375)):
        seen.append(weights_of(policy))
        best.hear(score, step)
        moved(policy, 0.125)
    assert (best.score, best.step) == (0.5, 1)
    best.restore()
    assert same(weights_of(policy), seen[1])
    moved(policy, 1.0)  # what is kept is a copy, on both sides
    best.restore()
    assert same(weights_of(policy), seen[1])


def test_what_is_kept_survives_in_a_state():
    policy, other = small_lm(0), small_lm(0)
    best = Best(policy)
    best.hear(0.5, 4)
    then = weights_of(policy)
    moved(policy, 1.0)
    again = Best(other)
    moved(other, 2.0)
    again.load_state_dict(best.state_dict())
    again.hear(0.5, 6)  # no better
    again.restore()
    assert same(weights_of(other), then)
    assert again.step == 4


def test_nothing_heard_is_nothing_to_put_back():
    best = Best(small_lm(0))
    best.hear(math.nan, 0)
    with pytest.raises(UserError, match="no weights were kept"):
        best.restore()


def test_held_back_problems_are_of_the_training_split_and_not_trained_on(made):
    s = made(Counted())
    seen = [s.world.problem("train", i).prompt for i in range(30)]
    held = held_back(s, 5, seen)
    prompts = [p.prompt for p in held]
    assert len(set(prompts)) == 5
    assert not set(prompts) & set(seen)
    assert all(p.id.startswith("train-") and int(p.id.rsplit("-", 1)[1]) >= VALIDATION for p in held)
    with pytest.raises(UserError, match="has 10 training problems that are not trained on, too few to validate on 11"):
        held_back(s, 11, seen)


def test_a_finite_split_is_held_back_from_its_end_each_prompt_once(made):
    s = made(Few())
    last = [s.world.problem("train", i) for i in range(19, 11, -1)]
    held = held_back(s, 3, [])
    assert [p.prompt for p in held] == list(dict.fromkeys(p.prompt for p in last))[:3]
    chats = [({"role": "user", "content": p.prompt},) for p in held]  # chats are no keys of a set
    assert held_back(s, 3, chats) == held


def test_validation_is_the_mean_reward_by_the_same_draws_every_time_and_costs_the_run_nothing(made):
    s = made(Echo(slack=9))
    held = [s.world.problem("train", i) for i in range(40)]
    measure = validation(s, held)
    first = measure()
    assert 0 < first <= 1
    assert measure() == first
    assert first * 40 == pytest.approx(round(first * 40))
    assert all(value == 0 for kind, value in s.run.meter.read().items() if kind != "seconds")
    moved(s.policy, 0.5)
    assert measure() != first
    s.score = lambda problem, text: Echo(slack=9).score(problem, "no digit")
    assert validation(s, held)() == 0.0


@pytest.mark.parametrize("count", [40, 0])
def test_looking_keeps_the_best_and_does_nothing_without_problems(count, made):
    s = made(Echo(slack=9))
    start = weights_of(s.policy)
    look, restore = keep_best(s, [s.world.problem("train", i) for i in range(count)])
    look(0)
    moved(s.policy, 0.5)
    s.score = lambda problem, text: Echo(slack=9).score(problem, "no digit")
    look(1)  # worse
    restore()
    assert same(weights_of(s.policy), start) == (count > 0)
