import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.batch import Link, normalise, pack
from etude.experience.errors import UserError
from etude.experience.plugs import check, plug
from etude.experience.rows import example
from etude.objectives.pairs import PairLoss, normalise_pairs
from etude.objectives.reference import reference_of, with_reference
from fake_policy import FakePolicy, accumulated

REFERENCE = FakePolicy(seed=50)


def pairs(seed: int = 0, count: int = 4, rejected: int = 1, equal: bool = False):
    rng = np.random.default_rng(seed)
    rows, links = [], []
    for _ in range(count):
        start = len(rows)
        for _ in range(1 + rejected):
            n = 3 if equal else rng.integers(1, 6)
            rows.append(example(rng.integers(0, 11, 2), rng.integers(0, 11, n)))
        links.append(Link("pair", tuple(range(start, len(rows))), ("chosen", *["rejected"] * rejected)))
    return with_reference(pack(rows, links), REFERENCE)


def run(objective, batch, policy=None, max_tokens=10**6):
    return accumulated(objective, batch, policy or FakePolicy(), max_tokens)


def at_ratios(objective, chosen, rejected, n=2):
    """The loss of one pair whose tokens have these log-ratios each, and d loss / d chosen."""
    rows = [example([1], [2] * n), example([1], [3] * n)]
    batch = pack(rows, [Link("pair", (0, 1), ("chosen", "rejected"))])
    batch = normalise_pairs(batch.with_actions(logp_ref=torch.zeros(2 * n).double()))
    x = torch.tensor([chosen] * n + [rejected] * n, dtype=torch.float64, requires_grad=True)

    class Out:
        logp = x

    loss = objective.loss(Out(), batch)
    loss.total.backward()
    return float(loss.total.detach()), x.grad.tolist(), loss.metrics


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_published_numbers():
    loss, gradient, metrics = at_ratios(PairLoss(beta=0.4), 0.25, -0.5)  # sums 0.5 and -1
    assert loss == pytest.approx(0.4375, abs=1e-4)
    assert gradient[0] == pytest.approx(-0.4 * 0.3543, abs=1e-4)
    assert metrics["margin"] == pytest.approx((0.6, 1))
    assert metrics["accuracy"] == (1.0, 1.0)
    assert metrics["reward_chosen"][0] == pytest.approx(0.2)
    assert metrics["reward_rejected"][0] == pytest.approx(-0.4)
    assert at_ratios(PairLoss(beta=0.1), 0.15, -0.15)[0] == pytest.approx(0.66360, abs=1e-4)
    dpo_norm = plug("objective", "dpo-norm").build()
    for n in (1, 2, 7):  # the length does not matter
        assert at_ratios(dpo_norm, 0.1, -0.1, n)[0] == pytest.approx(0.3133, abs=1e-4)
    assert at_ratios(PairLoss(), 0, 0)[0] == pytest.approx(math.log(2))


def test_links_against_their_formulas():
    h, beta = 0.6, 0.4
    expected = {
        PairLoss(beta=beta, label_smoothing=0.1): -0.9 * log_sigmoid(0.24) - 0.1 * log_sigmoid(-0.24),
        PairLoss("squared", beta): (h - 1 / (2 * beta)) ** 2,
        PairLoss("hinge", beta): 1 - beta * h,
        PairLoss("infonce", beta): -log_sigmoid(beta * h),
        PairLoss(beta=beta, reference=False, per_token=True, gamma=0.5): -log_sigmoid(beta * h / 2 - 0.5),
        PairLoss(beta=beta, nll_coef=0.3): -log_sigmoid(beta * h) - 0.3 * 0.2,
    }
    for objective, want in expected.items():
        assert at_ratios(objective, 0.2, -0.1)[0] == pytest.approx(want, abs=1e-9)
    assert at_ratios(PairLoss("hinge", 10.0), 0.2, -0.1)[:2] == (0.0, [0.0] * 4)


def test_infonce_of_two_is_dpo_and_of_more_is_a_softmax():
    two = pairs(3)
    for a, b in zip(run(PairLoss(), two)[:2], run(PairLoss("infonce"), two)[:2], strict=True):
        torch.testing.assert_close(a, b)
    many, policy = normalise_pairs(pairs(4, rejected=3)), FakePolicy()
    out = policy(many, frozenset({"logp"}))
    score = many.per_row(out.logp - many.actions["logp_ref"])
    want = torch.stack([-(0.1 * score[list(link.rows)]).log_softmax(0)[0] for link in many.links]).mean()
    assert run(PairLoss("infonce"), many)[0] == pytest.approx(float(want.detach()))
    with pytest.raises(UserError, match="use infonce"):
        run(PairLoss(), many)


def test_small_beta_is_the_difference_of_log_likelihoods():
    """DPO's loss tends to log 2 - beta h / 2, IPO's optimum is h = 1 / (2 beta)."""
    batch, policy, beta = normalise_pairs(pairs(5)), FakePolicy(), 1e-5
    _, gradient, _ = run(PairLoss(beta=beta), batch, policy)
    policy.zero_grad()
    total = batch.per_row(policy(batch, frozenset({"logp"})).logp)
    (-(total[0::2] - total[1::2]).mean() / 2).backward()
    torch.testing.assert_close(gradient / beta, policy.gradient(), rtol=1e-3, atol=1e-6)
    x = 0.0
    for _ in range(200):
        loss, (slope, _), _ = at_ratios(PairLoss("squared", 0.25), x, 0.0, n=1)
        x -= 0.1 * slope
    assert x == pytest.approx(1 / (2 * 0.25), abs=1e-3)
    assert loss == pytest.approx(0, abs=1e-5)


def test_swapping_reverses_the_gradient_at_the_reference():
    policy = FakePolicy(seed=50)
    batch = pairs(6)
    swapped = replace(batch, links=tuple(replace(link, rows=link.rows[::-1]) for link in batch.links))
    loss, gradient, _ = run(PairLoss(), batch, policy)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(gradient, -run(PairLoss(), swapped, policy)[1], rtol=1e-4, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 50),
    st.integers(1, 60),
    st.sampled_from(
        [PairLoss(nll_coef=0.5), PairLoss("squared"), PairLoss("infonce"), plug("objective", "simpo").build()]
    ),
)
def test_any_split_gives_the_same_loss_and_gradient(seed, max_tokens, objective):
    batch = pairs(seed, count=5)
    whole, parts = run(objective, batch), run(objective, batch, max_tokens=max_tokens)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-6, atol=1e-9)
    assert parts[2]["margin"] == pytest.approx(whole[2]["margin"])
    scaled = run(objective, normalise(batch, "token"))  # token weights only say in or out
    torch.testing.assert_close(scaled[1], whole[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "objective",
    [PairLoss(label_smoothing=0.1, nll_coef=0.2), PairLoss("soft"), PairLoss("squared"), PairLoss("infonce")],
)
def test_the_gradient_by_finite_differences(objective):
    batch = normalise_pairs(soft(pairs(2, rejected=1)))

    class Out:
        pass

    def loss(x):
        out = Out()
        out.logp = x
        return objective.loss(out, batch).total

    assert torch.autograd.gradcheck(loss, -torch.rand(len(batch.at)).double().requires_grad_())


# --- soft targets ---------------------------------------------------------------------------------


def soft(batch, seed=0, scale=1.0):
    """The batch with a value for every row."""
    value = scale * torch.from_numpy(np.random.default_rng(seed).normal(size=batch.size))
    return replace(batch, row={**batch.row, "value": value})


def test_soft_targets_are_met_where_the_margin_is_their_difference():
    """D = 0.04: at the reference the loss is log 2, at beta h = D it is the entropy of sigmoid(D), its least."""
    rows = [example([1], [2], value=0.62), example([1], [3], value=0.58)]
    batch = pack(rows, [Link("pair", (0, 1), ("chosen", "rejected"))])
    batch = normalise_pairs(batch.with_actions(logp_ref=torch.zeros(2).double()))

    def at(margin, beta=0.5):
        class Out:
            logp = torch.tensor([margin / beta, 0.0], dtype=torch.float64)

        return float(PairLoss("soft", beta).loss(Out(), batch).total)

    assert at(0.0) == pytest.approx(0.693147, abs=1e-6)
    assert at(0.04) == pytest.approx(0.692947, abs=1e-6)
    assert at(0.04) < min(at(0.039), at(0.041))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_hard_targets_are_dpo(beta):
    batch = pairs(3)
    certain = soft(batch)
    value = torch.zeros(batch.size).double()
    value[[link.rows[0] for link in batch.links]] = 1e3
    certain = replace(certain, row={**certain.row, "value": value})
    got, wanted = run(PairLoss("soft", beta), certain), run(PairLoss("logistic", beta), batch)
    assert got[0] == pytest.approx(wanted[0], rel=1e-12)
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=0)


def test_soft_targets_do_not_care_which_row_is_called_the_better():
    batch = soft(pairs(4))
    swapped = replace(batch, links=tuple(replace(link, rows=link.rows[::-1]) for link in batch.links))
    got, other = run(PairLoss("soft"), batch), run(PairLoss("soft"), swapped)
    assert got[0] == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(got[1], other[1], rtol=1e-9, atol=1e-12)


def test_equal_values_pull_back_to_the_reference():
    """D = 0: no gradient at the reference, a pull towards it elsewhere."""
    assert at_value(0.0)[1] == pytest.approx(0.0)
    assert at_value(0.3)[1] > 0 > at_value(-0.3)[1]


def at_value(h):
    rows = [example([1], [2], value=0.5), example([1], [3], value=0.5)]
    batch = pack(rows, [Link("pair", (0, 1), ("chosen", "rejected"))])
    batch = normalise_pairs(batch.with_actions(logp_ref=torch.zeros(2).double()))
    x = torch.tensor([h, 0.0], dtype=torch.float64, requires_grad=True)

    class Out:
        logp = x

    loss = PairLoss("soft").loss(Out(), batch).total
    loss.backward()
    return float(loss.detach()), float(x.grad[0])


def test_a_written_reference_is_the_same_as_one_of_every_token():
    batch = soft(pairs(5))
    rows = [example([1], [4, 5, 6]), example([2, 3], [7])]
    policy = FakePolicy(seed=9)
    whole = with_reference(pack(rows), policy)
    assert reference_of(rows, policy) == pytest.approx(whole.per_row(whole.actions["logp_ref"]).tolist())
    summed = batch.per_row(batch.actions["logp_ref"])
    written = replace(batch, row={**batch.row, "logp_ref": summed})
    del written.actions["logp_ref"]
    for objective in (PairLoss("soft"), PairLoss("logistic", 0.3)):
        a, b = run(objective, soft(pairs(5))), run(objective, written)
        assert a[0] == pytest.approx(b[0], rel=1e-6)
        torch.testing.assert_close(a[1], b[1], rtol=1e-5, atol=1e-8)


def test_bad_pairs():
    batch = pairs(0)
    loose = replace(batch, links=batch.links[1:])
    with pytest.raises(UserError, match="2 of 8 rows belong to none"):
        normalise_pairs(loose)
    with pytest.raises(UserError, match="8 of 8 rows belong to none"):
        normalise_pairs(replace(batch, links=()))
    with pytest.raises(UserError, match="one chosen"):
        normalise_pairs(replace(batch, links=(Link("pair", (0, 1), ("chosen", "chosen")), *batch.links)))
    with pytest.raises(ValueError, match="normalise_pairs"):
        PairLoss().loss(FakePolicy()(batch, frozenset()), batch)
    bare = normalise_pairs(batch)
    del bare.actions["logp_ref"]
    with pytest.raises(UserError, match="with_reference"):
        PairLoss().loss(FakePolicy()(bare, frozenset()), bare)
    with pytest.raises(UserError, match="soft targets need the row column 'value'"):
        run(PairLoss("soft"), pairs(0))
    with pytest.raises(UserError, match="belong to the logistic link"):
        PairLoss("soft", label_smoothing=0.1)
    with pytest.raises(UserError, match="belong to the logistic link"):
        PairLoss("squared", gamma=1.0)
    with pytest.raises(UserError, match="'dpo' needs pairs"):
        check([plug("objective", "dpo")], present={"reference"})
