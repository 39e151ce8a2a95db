import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.meter import Meter
from etude.feedback.score import mean, perplexity, quantile, score, total
from fake_policy import FakePolicy

POLICY = FakePolicy()
ids_st = st.lists(st.integers(0, 10), max_size=6)


def logq(ids):
    return POLICY.head(POLICY.embed(torch.tensor(ids))).log_softmax(-1).detach().numpy()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(ids_st.filter(bool), ids_st), max_size=6), st.integers(1, 20))
def test_scores_are_the_policys_own_whatever_the_chunks(items, max_tokens):
    contexts, continuations = [np.array(c, np.int32) for c, _ in items], [np.array(o, np.int32) for _, o in items]
    meter = Meter()
    for want in ("logp", "entropy", "margin"):
        got = score(POLICY, contexts, continuations, want, max_tokens=max_tokens, meter=meter)
        assert len(got) == len(items)
        for (context, out), values in zip(items, got, strict=True):
            q = logq([*context, *out])[len(context) - 1 : -1] if out else np.zeros((0, 11))
            p = np.sort(np.exp(q), 1)
            wanted = {
                "logp": q[np.arange(len(out)), out] if out else [],
                "entropy": -(np.exp(q) * q).sum(1),
                "margin": p[:, -1] - p[:, -2],
            }
            np.testing.assert_allclose(values, wanted[want], rtol=1e-5, atol=1e-6)
    assert meter["scored"] == 3 * sum(len(c) + len(o) for c, o in items if o)


def test_reducers():
    logp = np.log(np.array([0.5, 0.25, 1.0, 0.5], np.float32))
    assert total(logp) == pytest.approx(np.log(1 / 16))
    assert mean(logp) == pytest.approx(np.log(1 / 16) / 4)
    assert perplexity(logp) == pytest.approx(2.0)
    assert quantile(logp, 0) == pytest.approx(np.log(0.25))
    assert quantile(logp, 0.5) == pytest.approx(np.log(0.5))
    assert total(logp[:0]) == 0.0
    with pytest.raises(ValueError, match="empty continuation"):
        mean(logp[:0])
    with pytest.raises(ValueError, match="empty context"):
        score(POLICY, [np.array([], np.int32)], [np.array([1], np.int32)])
