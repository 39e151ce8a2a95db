"""SEC: the numeric checks of its method, the bandit's limits, and what the loop tells the curriculum."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.curricula.bandit import Bandit
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Report
from etude.experience.store import Store
from etude.experience.types import Group, Outcome, Problem, Trajectory
from etude.feedback.advantage import Advantage
from etude.methods.api import train
from etude.methods.scheduling.sec import SEC, SelfEvolving, arm_rewards
from etude.worlds.lock import LockWorld


def group(rewards, category="1"):
    problem = Problem("p", "", category=category)
    return Group(problem, tuple(Trajectory(problem, (), outcome=Outcome(float(r), r > 0)) for r in rewards))


def gain(rewards, ddof=1, eps=1e-6):
    """The mean |advantage| of a group under GRPO, as the loop reports it."""
    return float(np.abs(Advantage("mean", "std", ddof, eps)._in_group(group(rewards))).mean())


def report(*groups, gains=None):
    gains = [gain(g.rewards) for g in groups] if gains is None else gains
    return Report(Clock(0, 1), groups, [True] * len(groups), gains)


@pytest.mark.parametrize(
    ("right", "population", "sample"),
    [(1, 0.6614, 0.6187), (2, 0.8660, 0.8101), (4, 1.0, 0.9354), (0, 0, 0), (8, 0, 0)],
)
def test_the_mean_advantage_of_a_binary_group(right, population, sample):
    rewards = [1] * right + [0] * (8 - right)
    assert gain(rewards, ddof=0) == pytest.approx(population, abs=1e-4)
    assert gain(rewards, ddof=1) == pytest.approx(sample, abs=1e-4)
    assert gain(rewards, ddof=0) == pytest.approx(2 * math.sqrt(right / 8 * (1 - right / 8)), abs=1e-4)


def test_values_follow_what_was_paid():
    bandit = Bandit(["a"], alpha=0.5, tau=1.0)
    values = []
    for paid in (0.8, 0.6):
        bandit.pay({"a": paid})
        values.append(bandit.values["a"])
    assert values == pytest.approx([0.4, 0.5])


@pytest.mark.parametrize(
    ("values", "tau", "wanted"),
    [
        ((1, 0), 1.0, (0.7311, 0.2689)),
        ((1, 0), 0.4, (0.9241, 0.0759)),
        ((0.8, 0.4, 0), 1.0, (0.4718, 0.3162, 0.2120)),
        ((0.8, 0.4, 0), 0.2, (0.8668, 0.1173, 0.0159)),
        ((1e6, 0, 0), 0.2, (1, 0, 0)),
    ],
)
def test_arms_are_drawn_by_a_softmax(values, tau, wanted):
    bandit = Bandit([str(i) for i in range(len(values))], 1.0, tau)
    bandit.pay({str(i): float(v) for i, v in enumerate(values)})
    assert bandit.probabilities() == pytest.approx(wanted, abs=1e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 1))
def test_limits_of_the_bandit(paid, alpha):
    arms = [str(i) for i in range(len(paid))]
    rewards = dict(zip(arms, paid, strict=True))
    flat = Bandit(arms, alpha, tau=1e9)
    flat.pay(rewards)
    assert flat.probabilities() == pytest.approx([1 / len(paid)] * len(paid), abs=1e-6)  # tau without end: uniform
    last = Bandit(arms, 1.0, tau=1.0)
    last.pay(dict.fromkeys(arms, 7.0))
    last.pay(rewards)
    assert last.values == pytest.approx(rewards)  # alpha 1: only the last payment
    fading = Bandit(arms, 0.5, tau=0.2)
    fading.pay(rewards)
    for _ in range(60):
        fading.pay(dict.fromkeys(arms, 0.0))
    assert fading.probabilities() == pytest.approx([1 / len(paid)] * len(paid), abs=1e-6)  # nothing to learn: uniform


@pytest.mark.parametrize(("unsampled", "wanted"), [("untouched", 0.6), ("decay", 0.3)])
def test_an_arm_that_was_not_drawn(unsampled, wanted):
    bandit = Bandit(["0", "1"], 0.5, 1.0, unsampled)
    bandit.load_state_dict({"values": {"0": 0.6, "1": 0.6}})
    bandit.pay({"0": 0.6})
    assert bandit.values == pytest.approx({"0": 0.6, "1": wanted})


def test_the_scale_of_rewards_is_forgotten_or_kept():
    one, ten = group([1, 0, 0, 0]), group([10, 0, 0, 0])
    assert arm_rewards(report(one))["1"] == pytest.approx(arm_rewards(report(ten))["1"], abs=1e-5)
    assert arm_rewards(report(ten), "reward")["1"] == pytest.approx(10 * arm_rewards(report(one), "reward")["1"])
    assert arm_rewards(report(one), "reward")["1"] == pytest.approx(0.375)  # mean |r - 1/4|


def test_an_arm_is_paid_the_mean_of_all_its_groups_also_the_tied_ones():
    paid = arm_rewards(report(group([1, 0]), group([1, 1]), group([0, 0], "2")))
    assert paid == pytest.approx({"1": gain([1, 0]) / 2, "2": 0.0})


def test_the_arm_on_the_edge_is_drawn_more_than_one_out_of_reach():
    """Success 0.5 against 0.02 at 8 answers: preferred in over 95% of runs after 10 updates at tau 0.2."""
    dice, preferred = np.random.default_rng(0), 0
    for _ in range(400):
        bandit = Bandit(["edge", "far"], 0.5, 0.2)
        for _ in range(10):
            drawn = {"edge": dice.random(8) < 0.5, "far": dice.random(8) < 0.02}
            bandit.pay({arm: gain(r.astype(float)) for arm, r in drawn.items()})
        preferred += bandit.probabilities()[0] > 0.5
    assert preferred > 0.95 * 400


def test_draws_are_uniform_over_arms_at_first_and_depend_on_the_keys_alone():
    def drawn(seed):
        return [p.category for p in SelfEvolving(LockWorld()).draw(800, Clock(0, 1), Keys(seed))]

    counts = np.bincount([int(c) for c in drawn(0)], minlength=9)[1:]
    assert counts.min() > 60
    assert counts.max() < 140
    assert drawn(0) == drawn(0) != drawn(1)


def test_dealing_payments_at_random_keeps_the_payments():
    curriculum = SelfEvolving(LockWorld(), alpha=1.0, permute=True)
    curriculum.draw(1, Clock(0, 1), Keys(0))
    groups = [group([1] * i + [0] * (8 - i), str(i)) for i in range(1, 5)]
    orders = set()
    for step in range(30):
        told = report(*groups)
        curriculum.observe(Report(Clock(step, 30), told.groups, told.kept, told.gain))
        paid = [curriculum.bandit.values[str(i)] for i in range(1, 5)]
        assert sorted(paid) == pytest.approx(sorted(told.gain))
        orders.add(tuple(paid))
    assert len(orders) > 10


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Bandit(["a"], 0.0, 1.0), "alpha lies above 0"),
        (lambda: Bandit(["a"], 1.5, 1.0), "alpha lies above 0"),
        (lambda: Bandit(["a"], 0.5, 0.0), "tau must be above 0"),
        (lambda: Bandit(["a"], 0.5, 1.0, "forget"), "unsampled must be untouched or decay"),
        (lambda: arm_rewards(report(group([1]))), "needs at least 2 answers to each problem"),
        (lambda: SelfEvolving(LockWorld()).as_sampler([0]), "must hear what came of its draws"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def run(out, **options):
    shared = {"steps": 12, "problems": 16, "members": 8, "max_tokens": 1, "eval_every": 0, "eval_problems": 8,
              "normalise": "sequence", "optim": {"algorithm": "sgd", "lr": 4.0, "clip": 1e9}}  # fmt: skip
    options = {"method": "sec", **shared, **options}
    return train(
        options.pop("method"), world="lock", policy="table:order=2,rows=16,actions=6", base=False, out=out, **options
    )


def test_draws_follow_the_edge_of_competence(tmp_path):
    """At first only the lowest rungs are ever opened, so that they are drawn most."""
    with Store(run(tmp_path / "run", tau=0.2).folder, read_only=True) as store:
        low = sum(store.count(category=c) for c in "123")
        assert low > 1.3 * sum(store.count(category=c) for c in "678")
        assert store.metrics("live")["live"].value[6:].mean() > 0.4


def test_one_arm_and_a_temperature_without_end_draw_as_told(tmp_path):
    only = run(tmp_path / "one", world_options={"rungs": 1}, steps=3)
    with Store(only.folder, read_only=True) as store:
        assert store.count(category="1") == store.count()


def test_its_command_line_reaches_the_bandit():
    made = SEC(alpha=0.1, tau=0.4, unsampled="decay", gain="reward", permute=True).options()
    assert made == {("curriculum", "sec"): {"alpha": 0.1, "tau": 0.4, "gain": "reward", "unsampled": "decay",
                                            "permute": True}}  # fmt: skip


def test_a_resumed_bandit_goes_on_where_it_was():
    a = SelfEvolving(LockWorld(), tau=0.2)
    a.draw(8, Clock(0, 2), Keys(0))
    a.observe(report(group([1, 0]), group([1, 0, 0, 0], "2")))
    b = SelfEvolving(LockWorld(), tau=0.2)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    ahead = [[p.id for p in c.draw(50, Clock(1, 2), Keys(3))] for c in (a, b)]
    assert ahead[0] == ahead[1]
