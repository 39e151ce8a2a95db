"""NLL, value loss, distillation and cached references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.batch import Link, normalise, pack
from etude.experience.errors import UserError
from etude.experience.meter import Meter
from etude.experience.rows import Row, example
from etude.objectives.distil import Distil
from etude.objectives.kl import kl_divergence
from etude.objectives.nll import NLL
from etude.objectives.reference import ReferenceCache, with_reference
from etude.objectives.value import ValueLoss
from fake_policy import FakePolicy, accumulated


def demonstrations(seed=0, count=5, by="token"):
    rng = np.random.default_rng(seed)
    rows = [example(rng.integers(0, 11, 2), rng.integers(0, 11, rng.integers(1, 6))) for _ in range(count)]
    return normalise(pack(rows), by)


run = accumulated


def test_nll_is_cross_entropy():
    policy, batch = FakePolicy(), demonstrations()
    loss, gradient, metrics = run(NLL(), batch, policy)
    policy.zero_grad()
    out = policy(batch, frozenset({"logits"}))
    want = torch.nn.functional.cross_entropy(out.logits(slice(None)), batch.actions["target"])
    want.backward()
    assert loss == pytest.approx(float(want.detach()), rel=1e-6)
    torch.testing.assert_close(gradient, policy.gradient(), rtol=1e-5, atol=1e-8)
    assert metrics["nll"][0] / metrics["nll"][1] == pytest.approx(loss, rel=1e-6)


def test_a_weight_of_the_models_own_probability_carries_no_gradient():
    """w = p gives the gradient of -p, which is expected reward: the limit of one-token rollouts."""
    policy, batch = FakePolicy(), demonstrations()
    _, gradient, metrics = run(NLL(lambda logp, batch: logp.exp()), batch, policy)
    policy.zero_grad()
    (-(batch.actions["weight"] * policy(batch, frozenset()).logp.exp()).sum()).backward()
    torch.testing.assert_close(gradient, policy.gradient(), rtol=1e-5, atol=1e-8)
    assert metrics["nll"] == pytest.approx(run(NLL(lambda logp, batch: None), batch, policy)[2]["nll"])


def test_value_loss_and_its_clip():
    batch = demonstrations()
    returns, old = torch.zeros(len(batch.at)), torch.full((len(batch.at),), 0.5)
    batch = batch.with_actions(returns=returns, values_old=old)

    class Out:
        pass

    def loss(objective, v):
        out = Out()
        out.values = torch.full((len(batch.at),), v, dtype=torch.float64, requires_grad=True)
        got = objective.loss(out, batch)
        got.total.backward()
        return float(got.total.detach()), float(out.values.grad.sum()), got.metrics

    assert loss(ValueLoss(), 2.0)[:2] == pytest.approx((2.0, 2.0), rel=1e-6)
    assert loss(ValueLoss(0.2), 0.6)[:2] == pytest.approx((0.18, 0.6), rel=1e-6)  # inside the clip
    assert loss(ValueLoss(0.2), 0.1)[:2] == pytest.approx((0.045, 0.0), rel=1e-6)  # clipped at 0.3: flat
    assert loss(ValueLoss(0.2), 2.0)[:2] == pytest.approx((2.0, 2.0), rel=1e-6)  # the larger error counts
    error, count = loss(ValueLoss(), 2.0)[2]["value_error"]
    assert error / count == pytest.approx(4.0)
    with pytest.raises(UserError, match="returns"):
        ValueLoss().loss(FakePolicy()(demonstrations(), frozenset()), demonstrations())


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_distillation_equals_the_whole_sum_chunk_by_chunk(kind):
    student, teacher, batch = FakePolicy(), FakePolicy(seed=5), demonstrations(count=9)
    assert len(batch.at) > 3 * 7
    meter = Meter()
    loss, gradient, metrics = run(Distil(teacher, kind, 0.3, meter), batch, student)
    assert (student.largest, teacher.largest) == (7, 7)  # one chunk of logits, forward and backward
    assert all(p.grad is None for p in teacher.parameters())
    assert meter["scored"] == len(batch.inputs)
    student.zero_grad()
    p = teacher(batch, frozenset()).logits(slice(None)).detach().softmax(-1)
    q = student(batch, frozenset()).logits(slice(None)).softmax(-1)
    m = 0.3 * p + 0.7 * q
    term = {
        "forward": (p * (p / q).log()).sum(-1),
        "reverse": (q * (q / p).log()).sum(-1),
        "jsd": 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1),
    }[kind]
    term.mean().backward()
    assert loss == pytest.approx(float(term.mean().detach()), rel=1e-6)
    torch.testing.assert_close(gradient, student.gradient(), rtol=1e-5, atol=1e-8)
    total, count = metrics[f"{kind}_divergence"]
    assert total / count == pytest.approx(loss, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40), st.sampled_from(["token", "sequence", "row"]))
def test_any_split_gives_the_same_gradient(seed, max_tokens, by):
    batch, student = demonstrations(seed, by=by), FakePolicy()
    for objective in (NLL(), Distil(FakePolicy(seed=5), "jsd")):
        whole, parts = run(objective, batch, student), run(objective, batch, student, max_tokens)
        assert parts[0] == pytest.approx(whole[0], rel=1e-9)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-8, atol=1e-12)


def test_distillation_limits_and_refusals():
    student, batch = FakePolicy(), demonstrations()
    for kind in ("forward", "reverse", "jsd"):  # a student is at the bottom next to itself
        loss, gradient, _ = run(Distil(student, kind), batch, student)
        assert loss == pytest.approx(0, abs=1e-12)
        assert float(gradient.norm()) < 1e-8
    teacher = FakePolicy(seed=5)
    forward, reverse = (run(Distil(teacher, k), batch, student)[1] for k in ("forward", "reverse"))
    near_forward, near_reverse = (run(Distil(teacher, "jsd", b), batch, student)[1] for b in (1e-6, 1 - 1e-6))
    torch.testing.assert_close(near_forward / 1e-6, forward, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(near_reverse / 1e-6, reverse, rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match="the teacher has 13 tokens and the student 11"):
        run(Distil(FakePolicy(vocab=13)), batch, student)
    with pytest.raises(UserError, match="between 0 and 1"):
        Distil(teacher, "jsd", 1.0)


def test_the_reference_is_cached_by_row_and_dropped_when_it_moves():
    reference, cache, meter = FakePolicy(seed=8), ReferenceCache(), Meter()
    batch = demonstrations(count=4)
    want = reference.logp(batch).float()
    reference.scored = 0
    first = with_reference(batch, reference, cache, meter=meter)
    torch.testing.assert_close(first.actions["logp_ref"], want)
    assert meter["scored"] == len(batch.inputs)
    again = with_reference(batch.select([3, 1]), reference, cache, meter=meter)  # repacked, other order
    torch.testing.assert_close(again.actions["logp_ref"], first.select([3, 1]).actions["logp_ref"])
    assert reference.scored == len(batch.at)
    assert meter["scored"] == len(batch.inputs)
    demonstrated = example([1], [2, 2])
    fresh = pack([example([1, 2], [3, 4, 5]), example([1], [2, 3, 4, 5])])  # same ids, other actions
    got = with_reference(fresh, reference, cache)
    torch.testing.assert_close(got.actions["logp_ref"], reference.logp(fresh).float())
    ids, one = np.array([1, 2, 2], np.int32), demonstrated.columns
    twins = pack([Row(ids, np.array([i], np.int32), {n: v[:1] for n, v in one.items()}) for i in (0, 1)])
    assert twins.actions["target"].tolist() == [2, 2]  # same ids, same targets, another position
    got = with_reference(twins, reference, cache)
    torch.testing.assert_close(got.actions["logp_ref"], reference.logp(twins).float())
    with torch.no_grad():
        reference.head.bias += torch.randn(11)
    moved = with_reference(batch, reference, cache)
    torch.testing.assert_close(moved.actions["logp_ref"], reference.logp(batch).float())
    assert not torch.allclose(moved.actions["logp_ref"], want)


def test_the_reference_keeps_the_order_of_actions_whatever_the_links():
    rows = [example([1], [i, i + 1]) for i in range(2, 6)]
    batch = pack(rows, [Link("pair", (0, 2), ("chosen", "rejected")), Link("pair", (1, 3), ("chosen", "rejected"))])
    reference = FakePolicy(seed=8)
    for cache in (None, ReferenceCache()):
        got = with_reference(batch, reference, cache, max_tokens=3).actions["logp_ref"]
        torch.testing.assert_close(got, reference.logp(batch).float())


def test_full_kl_of_logits():
    a, b = torch.tensor([[0.4, 0.6]]).log(), torch.tensor([[0.7, 0.3]]).log()
    assert float(kl_divergence(a, b)) == pytest.approx(0.192042, abs=1e-5)
