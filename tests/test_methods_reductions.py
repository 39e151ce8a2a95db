"""What the baselines' docstrings say of one another, as numbers; and what may be put together."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etude.curation.examples import pack_groups
from etude.experience.batch import normalise
from etude.experience.errors import UserError
from etude.experience.plugs import check, names, plug
from etude.experience.protocols import Clock, Limits
from etude.experience.types import Author, Call, Group, Outcome, Problem, Trajectory
from etude.feedback.overlong import Overlong
from etude.learning import group_rl as preset
from etude.learning.group_rl import SLOTS, GroupRL, compose, group_rl
from etude.methods.api import train
from etude.methods.reward.dapo import DAPO
from etude.methods.reward.dr_grpo import DrGRPO
from etude.methods.reward.grpo import GRPO
from etude.methods.reward.rloo import RLOO
from etude.policies.zoo import save_policy
from runs import weights
from small import small_lm

LONGEST = 6  # tokens an answer may have


def groups_of(rewards, lengths):
    """Groups of random answers with these rewards and lengths, each [P][G]."""
    dice, groups = np.random.default_rng(0), []
    for p, (group_rewards, group_lengths) in enumerate(zip(rewards, lengths, strict=True)):
        problem, members = Problem(f"p{p}", "?"), []
        for m, (r, n) in enumerate(zip(group_rewards, group_lengths, strict=True)):
            out = dice.integers(10, 90, size=n).astype(np.int32)
            zero = np.zeros(n, np.float32)
            call = Call("actor", np.array([1, 20 + p], np.int32), out, np.full(n, Author.SELF, np.int8), zero, zero)
            members.append(Trajectory(problem, (call,), outcome=Outcome(r, r > 0), member=m))
        groups.append(Group(problem, tuple(members)))
    return groups


class Stage:
    """The part of a `Setting` that `group_rl` reads before its loop begins."""

    def __init__(self):
        self.policy = small_lm()
        self.world, self.run, self.score, self.law = EMPTY, None, None, RAW_LAW
        self.limits = Limits(max_tokens=LONGEST)
        self.watch = None

    ahead = None

    def acting(self, act, late=False):
        return act

    def roles(self):
        return {}

    def reference(self):
        return "the reference"


class _Empty:
    name, categories = "empty", ()

    def size(self, split):
        return None

    def problem(self, split, index):
        return Problem("0", "", "")


EMPTY = _Empty()
RAW_LAW = type("Law", (), {"raw": True})()


def composition(config, monkeypatch):
    """What `group_rl` hands to the loop for this config."""
    handed = {}
    with monkeypatch.context() as m:
        m.setattr(preset, "on_policy", lambda run, seat, roles, **kwargs: handed.update(kwargs))
        group_rl(Stage(), config)
    return handed


def gradient(config, groups, monkeypatch):
    """The gradient of the first update on `groups`, by name, as the method composes it."""
    parts = composition(config, monkeypatch)
    policy = small_lm()
    shaped = parts["shape"](groups, Clock(0, 1)) if parts["shape"] else groups
    batch = pack_groups([g for g in shaped if parts["select"] is None or parts["select"](g)], "actor")
    batch = batch.with_actions(logp_raw=policy.logp(batch))
    batch = normalise(parts["credit"](shaped, batch), parts["by"], parts["constant"])
    objective = parts["objective"]
    objective.loss(policy.forward(batch, objective.needs), batch).total.backward()
    return {n: p.grad for n, p in policy.named_parameters()}


def assert_multiple(a, b, factor):
    """a = factor x b, entry by entry, to float32."""
    assert any(float(g.abs().max()) > 1e-3 for g in b.values())
    for name in a:
        size = float(b[name].abs().max()) * abs(factor) + 1e-6
        assert torch.allclose(a[name], factor * b[name], atol=1e-5 * size, rtol=0), name


REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.5, 2.0, 0.0]]
LENGTHS = [[1, 5, 3, 2], [6, 2, 2, 4]]
SIZES = {"problems": 2, "members": 4}
REDUCED = {"clip_high": 0.2, "selector": "all", "normalise": "sequence", "overlong_cache": 0}  # DAPO to GRPO


def test_rloo_is_a_multiple_of_dr_grpo(monkeypatch):
    groups = groups_of(REWARDS, LENGTHS)
    rloo = gradient(RLOO(**SIZES), groups, monkeypatch)
    dr_grpo = gradient(DrGRPO(**SIZES), groups, monkeypatch)
    assert_multiple(rloo, dr_grpo, 4 / 3 * LONGEST)  # G / (G - 1) and the constant


def test_dr_grpo_is_a_multiple_of_grpo_where_lengths_and_deviations_are_tied(monkeypatch):
    root = math.sqrt(2.0)
    groups = groups_of([[0.0, root], [5.0, 5.0 - root]], [[3, 3], [3, 3]])  # sample deviation 1
    sizes = {"problems": 2, "members": 2}
    dr_grpo = gradient(DrGRPO(**sizes), groups, monkeypatch)
    grpo = gradient(GRPO(**sizes), groups, monkeypatch)
    assert_multiple(dr_grpo, grpo, 3 / LONGEST)
    uneven = groups_of([[0.0, root], [5.0, 5.0 - root]], [[3, 1], [2, 3]])
    a, b = gradient(DrGRPO(**sizes), uneven, monkeypatch), gradient(GRPO(**sizes), uneven, monkeypatch)
    with pytest.raises(AssertionError):
        assert_multiple(a, b, 3 / LONGEST)


def test_dapo_without_its_four_changes_is_grpo(monkeypatch):
    groups = groups_of([*REWARDS, [1.0] * 4], [*LENGTHS, [1, 2, 3, 4]])
    plain = {
        "clip_high": 0.2,
        "selector": "all",
        "normalise": "sequence",
        "overlong_cache": 0,
        "problems": 3,
        "members": 4,
    }
    dapo = gradient(DAPO(**plain), groups, monkeypatch)
    grpo = gradient(GRPO(problems=3, members=4), groups, monkeypatch)
    assert_multiple(dapo, grpo, 1.0)
    for change in ({"normalise": "token"}, {"overlong_cache": 4}):
        with pytest.raises(AssertionError):
            assert_multiple(gradient(DAPO(**{**REDUCED, **change}), groups, monkeypatch), grpo, 1.0)


def test_the_gradient_of_rloo_is_reinforce_with_the_others_as_baseline(monkeypatch):
    groups = groups_of(REWARDS, LENGTHS)
    policy = small_lm()
    batch = pack_groups(groups, "actor")
    answer = batch.per_row(policy.forward(batch, frozenset({"logp"})).logp)
    rewards = torch.tensor(REWARDS, dtype=torch.float32)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    (-((rewards - others).reshape(-1) * answer).mean()).backward()
    assert_multiple(
        gradient(RLOO(**SIZES), groups, monkeypatch), {n: p.grad for n, p in policy.named_parameters()}, 1.0
    )


def test_hyperparameters_reach_their_parts(monkeypatch):
    dapo = composition(DAPO(clip_low=0.1, clip_high=0.4, overlong_cache=3, max_draws=5), monkeypatch)
    assert (dapo["objective"].clip_low, dapo["objective"].clip_high) == (0.1, 0.4)
    assert dapo["shape"] == Overlong(Limits(max_tokens=LONGEST), 3)
    assert dapo["max_draws"] == 5
    assert not dapo["select"](groups_of([[1.0, 1.0]], [[1, 1]])[0])
    grpo = composition(GRPO(clip=0.3, kl_coef=0.04), monkeypatch)
    assert (grpo["objective"].clip_low, grpo["objective"].clip_high, grpo["objective"].kl_coef) == (0.3, 0.3, 0.04)
    assert grpo["reference"] == "the reference"
    assert composition(GRPO(), monkeypatch)["reference"] is None
    dr_grpo = composition(DrGRPO(problems=3, members=4, minibatches=2), monkeypatch)
    assert (dr_grpo["by"], dr_grpo["constant"]) == ("constant", 3 * 4 / 2 * LONGEST)
    assert composition(DrGRPO(constant=7.0), monkeypatch)["constant"] == 7.0
    assert composition(DrGRPO(normalise="token"), monkeypatch)["constant"] is None
    assert composition(RLOO(), monkeypatch)["objective"].clip_high == math.inf


def test_the_overlong_punishment_begins_at_the_cache_and_ends_at_one():
    shape = Overlong(Limits(max_tokens=10), 4)
    assert [shape.penalty(n) for n in (0, 5, 6, 7, 8, 9, 10, 12)] == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1]
    [group] = shape(groups_of([[1.0, 0.0]], [[8, 3]]), Clock(0, 1))
    assert group.rewards.tolist() == [0.5, 0.0]
    assert [m.correct for m in group.members] == [True, False]  # shaping is not the verifier's word
    assert group.members[0].outcome.parts["overlong"] == -0.5
    for cache in (-1, 11):
        with pytest.raises(UserError, match="must be 0 to 10 tokens"):
            Overlong(Limits(max_tokens=10), cache)


# --- the same, end to end ------------------------------------------------------------------------


@pytest.fixture
def common(tmp_path):
    save_policy(small_lm(), tmp_path / "start")
    lines = [{"prompt": f"{'x' * i}{d}=", "answer": str(d)} for i in range(10) for d in range(10)]
    (tmp_path / "echo.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "world": str(tmp_path / "echo.jsonl"), "policy": str(tmp_path / "start"), "max_tokens": 3, "eval_problems": 4,
        "steps": 2, "problems": 8, "members": 8, "epochs": 2, "out": tmp_path / "run",
    }  # fmt: skip


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def test_dapo_reduced_trains_to_the_very_weights_of_grpo(common, tmp_path):
    (tmp_path / "even.py").write_text(
        "def even(prompts, completions, **more):\n    return [sum(x in '02468' for x in c) for c in completions]\n"
    )
    common["reward"] = (f"{tmp_path}/even.py:even",)

    def trained(slug, **options):
        return weights(train(slug, **{**common, "out": tmp_path / f"r{len(list(tmp_path.iterdir()))}"}, **options))

    grpo = trained("grpo")
    assert same(trained("dapo", **REDUCED), grpo)
    assert same(trained("group-rl", normalise="sequence"), grpo)
    assert not same(grpo, load_file(tmp_path / "start" / "model.safetensors"))
    assert not same(trained("dapo", **{**REDUCED, "credit": "dr-grpo"}), grpo)
    assert not same(trained("grpo", seed=1), grpo)


@pytest.mark.parametrize(
    ("slug", "options", "said"),
    [
        (
            "group-rl",
            {"act": "best-of-n"},
            "acting 'best-of-n' selects or bends its samples",
        ),
        ("grpo", {"temperature": 0.7}, "takes ratios of log-probabilities at temperature 1"),
        ("rloo", {"temperature": 0.0}, "takes ratios of log-probabilities at temperature 1"),
        ("group-rl", {"objective": "dpo"}, "objective 'dpo' needs pairs, which nothing here gives"),
        ("group-rl", {"objective": "grop"}, "unknown objective 'grop': did you mean grpo"),
        ("group-rl", {"curriculum": "unifrom"}, "unknown curriculum 'unifrom': did you mean uniform"),
        ("group-rl", {"act": "smaple"}, "unknown acting 'smaple': did you mean sample"),
        ("dapo", {"shaping": "overlogn"}, "unknown reward 'overlogn': did you mean overlong"),
        ("grpo", {"selector": "mixd"}, "unknown selector 'mixd': did you mean mixed"),
        ("grpo", {"credit": "rlo"}, "unknown credit 'rlo': did you mean rloo"),
    ],
)
def test_what_cannot_be_right_is_refused_before_it_runs(slug, options, said, common):
    with pytest.raises(UserError, match=said) as error:
        train(slug, **{**common, **options})
    assert "\n" not in str(error.value)
    assert not common["out"].exists()


def test_best_of_n_may_teach_by_likelihood(common):
    run = train("group-rl", act="best-of-n", objective="nll", credit="none", **common)
    assert run.meter["updates"] == 4


@pytest.mark.parametrize(
    ("kind", "pair", "owned"),
    [
        ("credit", ("grpo", "rloo"), "the advantage column"),
        ("curriculum", ("uniform", "mixture"), "the choice of the next item"),
        ("schedule", ("linear", "cosine"), "the learning rate"),
    ],
)
def test_two_owners_of_one_thing_are_refused(kind, pair, owned):
    with pytest.raises(UserError, match=f"{kind} '{pair[0]}' and {kind} '{pair[1]}' both own {owned}: keep one"):
        check([plug(kind, name) for name in pair])


def test_every_credit_fits_every_ratio_objective_that_takes_advantages():
    ratios = [n for n in names("objective") if plug("objective", n).needs == {"advantage", "logp_old"}]
    assert {"grpo", "dr-grpo", "dapo", "rloo", "gspo"} <= set(ratios)
    for objective in ratios:
        for credit in ("grpo", "dr-grpo", "rloo", "batch-row", "batch-token", "reward"):
            plugs = compose(GroupRL(objective=objective, credit=credit), law_raw=True)
            assert set(plugs) == set(SLOTS)
