"""How a method is looked at while it trains: views, probes, the law and length of evaluations."""

from dataclasses import replace

import numpy as np
import pytest

from etude.audits.estimators import parts
from etude.experience.errors import UserError
from etude.experience.protocols import Clock
from etude.experience.store import Store
from etude.experience.types import Group, Outcome, Problem, Trajectory
from etude.learning.run import Run
from etude.learning.setting import Common, setting

TINY = {"policy": "tiny:width=16,depth=1,heads=2,ffn=32", "base": False, "eval_problems": 8, "max_tokens": 3}


@pytest.fixture
def made(tmp_path):
    run = Run(tmp_path / "run", {"seed": 3})
    yield lambda **more: setting(run, Common("chain_sum", **{**TINY, **more}))
    run.close()


def test_views_and_probes_are_measured_with_every_evaluation_and_change_nothing_else(made, tmp_path):
    s = made()
    before = s.evaluate()

    def silent(roles, problems, n, score, clock, keys):
        return [Group(p, tuple(Trajectory(p, (), text="") for _ in range(n))) for p in problems]

    s.views["silent"] = silent
    s.probes["weights"] = lambda policy, keys: float(sum(p.numel() for p in policy.parameters()))
    s.probes["draw"] = lambda policy, keys: float(keys.numpy().random())
    after = s.evaluate()
    assert {n: e for n, e in after.metrics.items() if n in before.metrics} == before.metrics
    assert after.metrics["silent/accuracy"].value == 0.0
    assert after.metrics["silent/length"].value == 0.0
    assert after.metrics["weights"].value == sum(p.numel() for p in s.policy.parameters())
    assert s.evaluate().metrics["draw"] == after.metrics["draw"]  # the same streams every time
    s.act = silent
    assert s.evaluate().accuracy.value == 0.0
    s.run.track("seat", _Nothing())
    for clock in s.run.steps(1):
        s.watch(clock)
    s.run.close()
    with Store(tmp_path / "run", read_only=True) as store:
        assert [e["value"] for e in store.evaluations("weights")] == [after.metrics["weights"].value]


class _Nothing:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_evaluations_may_be_greedy_and_longer_than_training(made):
    s = made(eval_temperature=0.0, eval_tokens=7, eval_samples=2)
    found = s.evaluate()
    assert set(found.items.values()) <= {0.0, 1.0}  # two greedy samples are the same sample
    assert np.isnan(found.metrics["entropy"].value)  # greedy tokens say nothing of the policy's entropy
    assert found.metrics["length"].value > 3
    assert s.limits.max_tokens == 3
    with pytest.raises(UserError, match="eval_temperature must be at least 0"):
        Common(eval_temperature=-1)
    with pytest.raises(UserError, match="eval_tokens must be at least 1"):
        Common(eval_tokens=0)


def test_parts_are_means_over_the_samples_that_have_them():
    problem = Problem("p", "1=")
    members = tuple(
        Trajectory(problem, (), outcome=Outcome(0.0, parts=parts_of))
        for parts_of in ({"a": 1.0}, {"a": 3.0, "b": 5.0}, {})
    )
    found = parts([Group(problem, members), Group(replace(problem, id="q"), ())])
    assert {name: e.value for name, e in found.items()} == {"a": 2.0, "b": 5.0}
    assert parts([]) == {}


def test_the_clock_of_the_end_is_watched_too(made):
    s = made(eval_every=0)
    seen = []
    s.probes["seen"] = lambda policy, keys: seen.append(1) or 0.0
    for step in (0, 1, 5):
        s.watch(Clock(step, 5))
    assert len(seen) == 2
