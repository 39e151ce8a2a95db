import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from etude.acting.law import check, choose, draw, log_law
from etude.experience.errors import UserError
from etude.experience.types import GREEDY, RAW, Law

LAWS = [RAW, Law(0.7), Law(1.3, top_k=5), Law(top_p=0.8), Law(min_p=0.1), Law(0.7, top_k=9, top_p=0.9, min_p=0.05)]


def warped(logits, law):
    """transformers' own warpers, in transformers' order."""
    tf = pytest.importorskip("transformers")
    maps = [tf.TemperatureLogitsWarper(law.temperature)] if law.temperature != 1 else []
    maps += [tf.TopKLogitsWarper(law.top_k)] if law.top_k else []
    maps += [tf.TopPLogitsWarper(law.top_p)] if law.top_p < 1 else []
    maps += [tf.MinPLogitsWarper(law.min_p)] if law.min_p else []
    for m in maps:
        logits = m(torch.zeros(len(logits), 1, dtype=torch.long), logits)
    return logits


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 40),
    st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_a_law_is_what_transformers_samples_from(seed, temperature, top_k, top_p, min_p):
    law = Law(temperature, top_k, top_p, min_p)
    logits = 3 * torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(log_law(logits, law), warped(logits, law).log_softmax(-1))


@pytest.mark.parametrize("law", LAWS)
def test_log_probabilities_are_those_of_the_renormalised_support(law):
    logits = 2 * torch.randn(3, 25, generator=torch.Generator().manual_seed(1))
    logp = log_law(logits, law)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(3))
    p = (logits / law.temperature).softmax(-1) * logp.isfinite()
    torch.testing.assert_close(logp.exp(), p / p.sum(-1, keepdim=True))


@pytest.mark.parametrize("law", LAWS)
def test_sampled_frequencies_match_the_law(law):
    logits = 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(5))
    n = 40_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(n))
    token, logp = choose(logits.expand(n, -1), law, uniform)
    p = warped(logits, law).double().softmax(-1)[0].numpy()
    counts = np.bincount(token.numpy(), minlength=12)
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], n * p[p > 0] / p.sum()).pvalue > 1e-3
    torch.testing.assert_close(logp.exp().double(), torch.from_numpy(p)[token])


def test_a_test_of_frequencies_notices_a_wrong_law():
    logits = 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(5))
    uniform = torch.from_numpy(np.random.default_rng(0).random(40_000))
    token, _ = choose(logits.expand(40_000, -1), Law(0.95), uniform)
    p = logits.double().softmax(-1)[0].numpy()
    assert chisquare(np.bincount(token.numpy(), minlength=12), 40_000 * p / p.sum()).pvalue < 1e-3


def test_greedy_is_the_first_maximum_with_probability_one():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]])
    token, logp = choose(logits, GREEDY, torch.tensor([0.9, 0.9], dtype=torch.float64))
    assert token.tolist() == [1, 0]
    assert logp.tolist() == [0.0, 0.0]
    assert log_law(logits, GREEDY).exp().tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    never = float("-inf")
    logits = torch.tensor([[never, 0.3, 0.1, never], [never, never, 2.0, never], [0.0, never, never, never]])
    token = draw(logits.log_softmax(-1), torch.full((3,), uniform, dtype=torch.float64))
    assert logits.gather(1, token[:, None]).isfinite().all()


def test_draws_resolve_finer_than_float32():
    logp = torch.tensor([[0.5, 1e-9, 0.5]]).log()
    p = logp.exp().double()[0]
    for token, point in enumerate((p[0] / 2, p[0] + p[1] / 2, p[0] + p[1] + p[2] / 2)):
        assert draw(logp, (point / p.sum())[None]).tolist() == [token]


def test_top_p_of_almost_nothing_leaves_the_likeliest():
    assert log_law(torch.tensor([[0.0, 2.0, 1.0]]), Law(top_p=1e-9)).exp().tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    "law", [Law(-1.0), Law(float("nan")), Law(top_k=-1), Law(top_p=0.0), Law(top_p=1.1), Law(min_p=-0.1)]
)
def test_a_law_that_is_none_is_refused(law):
    with pytest.raises(UserError):
        check(law)
