import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.curation.examples import pack_groups
from etude.experience.errors import UserError
from etude.objectives.kl import f_divergence, js_divergence, k1, k2, k3, kl_divergence, kl_reward
from etude.objectives.reference import with_reference
from fake_policy import FakePolicy, call, group

logits_st = st.lists(st.floats(-3, 3), min_size=5, max_size=5).map(lambda x: torch.tensor([x], dtype=torch.float64))
REF, NEW = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.4, 0.6]).double()


@settings(max_examples=40, deadline=None)
@given(logits_st, logits_st)
def test_estimators_by_exact_expectation(p_logits, q_logits):
    """Sums over the vocabulary stand for means over samples."""
    p_logits.requires_grad_()
    logp, logq = p_logits.log_softmax(-1)[0], q_logits.log_softmax(-1)[0]
    p = logp.exp().detach()
    kl, forward = kl_divergence(p_logits, q_logits)[0], kl_divergence(q_logits, p_logits)[0]
    for estimate in (k1, k3):
        torch.testing.assert_close((p * estimate(logp, logq)).sum(), kl, atol=1e-9, rtol=1e-9)
    assert bool((k3(logp, logq) >= 0).all())
    assert bool((k2(logp, logq) >= 0).all())

    def gradient(loss):
        return torch.autograd.grad(loss, p_logits, retain_graph=True)[0]

    zero = torch.zeros_like(p_logits)
    torch.testing.assert_close(gradient((p * k1(logp, logq)).sum()), zero, atol=1e-9, rtol=0)
    torch.testing.assert_close(gradient((p * k2(logp, logq)).sum()), gradient(kl), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(gradient((p * k3(logp, logq)).sum()), gradient(forward), atol=1e-9, rtol=1e-6)
    surrogate = (p * k1(logp, logq).detach() * logp).sum()  # k1 as a reward
    torch.testing.assert_close(gradient(surrogate), gradient(kl), atol=1e-9, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(logits_st, logits_st)
def test_jensen_shannon_tends_to_both_kls(p, q):
    forward, reverse = kl_divergence(p, q), kl_divergence(q, p)
    torch.testing.assert_close(js_divergence(p, q, 1e-7) / 1e-7, forward, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(js_divergence(p, q, 1 - 1e-7) / 1e-7, reverse, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p))
    assert bool((js_divergence(p, q) <= math.log(2)).all())


def test_published_f_divergences():
    u = torch.tensor([0.5, 2.0]).double().log()
    zero = torch.zeros(2).double()
    for kind, alpha, want in (
        ("forward", 0.5, [0.193147, 0.306853]),
        ("js", 0.5, [0.0849495, 0.169899]),
        ("alpha", 0.2, [0.160318, 0.368118]),
        ("alpha", 0.5, [0.171573, 0.343146]),
    ):
        np.testing.assert_allclose(f_divergence(u, zero, kind, alpha), want, atol=1e-6)

    def expected(kind, alpha=0.5):
        return float((REF * f_divergence(NEW.log(), REF.log(), kind, alpha)).sum())

    assert expected("forward") == pytest.approx(0.183787, abs=1e-6)
    assert expected("js") == pytest.approx(0.0924017, abs=1e-6)
    assert float(2 * js_divergence(NEW.log(), REF.log())) == pytest.approx(0.0924017, abs=1e-6)
    alphas = {0.001: 0.192027, 0.2: 0.189368, 0.8: 0.184446, 0.999: 0.183789}
    for alpha, want in alphas.items():
        assert expected("alpha", alpha) == pytest.approx(want, abs=1e-6)
    assert float(kl_divergence(NEW.log(), REF.log())) == pytest.approx(0.192042, abs=1e-6)


@pytest.mark.parametrize("kind", ["forward", "js", "alpha"])
def test_f_divergences_are_flat_where_the_policies_agree(kind):
    x = torch.tensor([0.3]).double().log().requires_grad_()
    value = f_divergence(x, x.detach(), kind, 0.3)
    value.sum().backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    assert float(x.grad) == pytest.approx(0, abs=1e-12)
    y = torch.tensor([0.2, 0.5]).double().log().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: f_divergence(t, torch.zeros(2).double() - 1, kind, 0.3), y)


def test_divergences_by_finite_differences():
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 4).double()
    p.requires_grad_(), q.requires_grad_()
    assert torch.autograd.gradcheck(kl_divergence, (p, q))
    assert torch.autograd.gradcheck(lambda a, b: js_divergence(a, b, 0.3), (p, q))


def test_kl_reward_adds_to_what_is_placed():
    policy = FakePolicy()
    g = group([1.0], [[call(policy, [1], [2, 3, 4])]])
    batch = with_reference(pack_groups([g]), FakePolicy(seed=1))
    ratio = batch.actions["logp_raw"] - batch.actions["logp_ref"]
    torch.testing.assert_close(kl_reward(batch, 0.1).actions["reward"], -0.1 * ratio)
    placed = batch.with_actions(reward=torch.tensor([0.0, 0.0, 5.0]))
    torch.testing.assert_close(kl_reward(placed, 0.1).actions["reward"], torch.tensor([0.0, 0, 5]) - 0.1 * ratio)
    with pytest.raises(UserError, match="logp_ref"):
        kl_reward(pack_groups([g]), 0.1)
