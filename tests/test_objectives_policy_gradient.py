import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.curation.examples import pack_groups
from etude.experience.batch import normalise
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import check, plug
from etude.experience.types import Law, given_call
from etude.feedback.advantage import Advantage
from etude.objectives.clipped_pg import ClippedPG
from etude.objectives.reference import with_reference
from fake_policy import FakeOutputs, FakePolicy, accumulated, call, group

NORMALISATIONS = [("token", None), ("sequence", None), ("group", None), ("row", None), ("constant", 37.0)]


def sampled(seed: int, shift: float = 0.3, groups: int = 3, members: int = 4):
    """Groups with ragged answers, some of several windows, sampled by a slightly different policy."""
    rng, policy = np.random.default_rng(seed), FakePolicy(seed=seed)

    def answer():
        n = rng.integers(1, 3)
        return [
            call(policy, rng.integers(0, 11, 3), rng.integers(0, 11, rng.integers(1, 6)), shift=shift) for _ in range(n)
        ]

    made = [group(rng.normal(size=members), [answer() for _ in range(members)], str(g)) for g in range(groups)]
    return policy, made, Advantage()(made, pack_groups(made))


def plain_grpo(policy, reference, groups, by, constant, low, high, kl_coef, eps=1e-6):
    """GRPO as the papers write it, action by action: no packing, no columns, no shared code."""
    terms, logps = [], []  # of each row: its token losses
    for g, one in enumerate(groups):
        rewards = torch.tensor([m.outcome.reward for m in one.members], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + eps)
        for member, a in zip(one.members, advantages, strict=True):
            for c in member.calls:
                losses = []
                for t, token in enumerate(c.out):
                    before = int((list(c.context) + list(c.out))[len(c.context) + t - 1])
                    logp = policy.head(policy.embed.weight[before]).log_softmax(-1)[int(token)]
                    ref = reference.head(reference.embed.weight[before]).log_softmax(-1)[int(token)].detach()
                    s = torch.exp(logp - float(c.logp_raw[t]))
                    kept = torch.clamp(s, 1 - low, 1 + high)
                    kl = torch.exp(ref - logp) - (ref - logp) - 1
                    losses.append(-torch.minimum(s * a, kept * a) + kl_coef * kl)
                    logps.append(logp)
                terms.append((g, torch.stack(losses)))
    if by == "token":
        return torch.cat([x for _, x in terms]).mean()
    if by == "sequence":
        return torch.stack([x.mean() for _, x in terms]).mean()
    if by == "group":
        whole = [torch.cat([x for h, x in terms if h == g]) for g in range(len(groups))]
        return torch.stack([x.mean() for x in whole]).mean()
    return torch.cat([x for _, x in terms]).sum() / (len(terms) if by == "row" else constant)


def run(objective, policy, batch, by="token", constant=None, max_tokens=10**6):
    return accumulated(objective, normalise(batch, by, constant), policy, max_tokens)


@pytest.mark.parametrize(("by", "constant"), NORMALISATIONS)
@pytest.mark.parametrize(("clip_high", "kl_coef"), [(0.2, 0.04), (0.28, 0.0)])
def test_grpo_equals_a_plain_reference(by, constant, clip_high, kl_coef):
    for seed in range(4):
        policy, groups, batch = sampled(seed)
        reference = FakePolicy(seed=seed + 100)
        batch = with_reference(batch, reference)
        got, gradient, metrics = run(ClippedPG(0.2, clip_high, kl_coef=kl_coef), policy, batch, by, constant)
        assert 0 < metrics["clip_fraction"][0] < metrics["clip_fraction"][1]
        policy.zero_grad()
        want = plain_grpo(policy, reference, groups, by, constant, 0.2, clip_high, kl_coef)
        want.backward()
        assert got == pytest.approx(float(want.detach()), rel=1e-5, abs=1e-7)
        difference = (gradient - policy.gradient()).norm() / policy.gradient().norm()
        assert difference <= 1e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.integers(1, 60), st.sampled_from(NORMALISATIONS), st.sampled_from(["token", "sequence"]))
def test_any_split_gives_the_same_loss_and_gradient(seed, max_tokens, normalisation, ratio):
    policy, _, batch = sampled(seed)
    objective = ClippedPG(ratio=ratio, dual_clip=3.0, entropy_coef=0.01)
    whole, split_up = (run(objective, policy, batch, *normalisation, m) for m in (10**6, max_tokens))
    assert split_up[0] == pytest.approx(whole[0], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(split_up[1], whole[1], rtol=1e-9, atol=1e-12)
    for name in ("ratio", "clip_fraction", "kl_old", "entropy"):
        assert split_up[2][name] == pytest.approx(whole[2][name])


def test_the_gradient_by_finite_differences():
    _, _, batch = sampled(1)
    batch = with_reference(normalise(batch, "token"), FakePolicy(seed=9))
    logp = batch.actions["logp_raw"].double()
    safe = (logp.detach() * 1.01).requires_grad_()

    class Out:
        pass

    for objective in (ClippedPG(0.9, 9, kl_coef=0.1, kl=kl) for kl in ("k1", "k2", "k3")):

        def loss(x, objective=objective):
            out = Out()
            out.logp = x
            return objective.loss(out, batch).total

        assert torch.autograd.gradcheck(loss, safe)


def test_without_clip_on_its_own_samples_it_is_reinforce():
    policy, _, batch = sampled(3, shift=0.0)
    _, gradient, metrics = run(ClippedPG(math.inf, math.inf), policy, batch)
    policy.zero_grad()
    norm = normalise(batch, "token")
    out = policy(norm, frozenset({"logp"}))
    (-(norm.actions["weight"] * norm.actions["advantage"] * out.logp).sum()).backward()
    torch.testing.assert_close(gradient, policy.gradient(), rtol=1e-5, atol=1e-8)
    assert metrics["ratio"][0] / metrics["ratio"][1] == pytest.approx(1, abs=1e-5)
    assert metrics["kl_old"][0] == pytest.approx(0, abs=1e-5)
    _, clipped, _ = run(ClippedPG(), policy, batch)
    torch.testing.assert_close(gradient, clipped, rtol=1e-5, atol=1e-8)


def one_action(ratio: float, advantage: float, objective: ClippedPG, n: int = 1):
    """(loss, d loss / d logp) of one row of n equal actions."""
    policy = FakePolicy()
    g = group([1.0], [[call(policy, [1], [2] * n)]])
    batch = pack_groups([g])
    batch = batch.with_actions(
        logp_old=torch.zeros(n), advantage=torch.full((n,), advantage), weight=torch.full((n,), 1 / n)
    )
    out = FakeOutputs(policy, policy.embed(batch.inputs)[batch.at], batch.actions["target"])
    out.logp = torch.full((n,), math.log(ratio), dtype=torch.float64, requires_grad=True)
    loss = objective.loss(out, batch)
    loss.total.backward()
    return float(loss.total.detach()), float(out.logp.grad.sum())


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "loss", "gradient"),
    [
        (1.3, 1.0, ClippedPG(0.2, 0.28), -1.28, 0.0),  # DLER's check
        (1.25, 1.0, ClippedPG(0.2, 0.28), -1.25, -1.25),
        (1.25, 1.0, ClippedPG(), -1.2, 0.0),
        (0.7, -1.0, ClippedPG(), 0.8, 0.0),
        (0.7, 1.0, ClippedPG(), -0.7, -0.7),
        (1.5, -1.0, ClippedPG(), 1.5, 1.5),
        (5.0, -1.0, ClippedPG(dual_clip=3.0), 3.0, 0.0),
        (2.9, -1.0, ClippedPG(dual_clip=3.0), 2.9, 2.9),
        (5.0, 1.0, ClippedPG(dual_clip=3.0), -1.2, 0.0),
    ],
)
def test_where_the_clips_act(ratio, advantage, objective, loss, gradient):
    assert one_action(ratio, advantage, objective) == pytest.approx((loss, gradient), abs=1e-6)


def test_sequence_ratio():
    policy = FakePolicy(seed=4)
    short = group([1.0, 0.0, 2.0], [[call(policy, [i], [i + 2], shift=0.4)] for i in range(3)])
    batch = Advantage()([short], pack_groups([short]))
    token, sequence = (run(ClippedPG(ratio=r), policy, batch, "sequence") for r in ("token", "sequence"))
    assert token[0] == sequence[0]  # one token a row: the same
    torch.testing.assert_close(token[1], sequence[1], rtol=0, atol=0)
    # GSPO by hand: (1/B) sum_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean_t log ratio)
    policy, _groups, batch = sampled(7)
    got, gradient, _ = run(ClippedPG(0.1, 0.1, ratio="sequence"), policy, batch, "sequence")
    policy.zero_grad()
    out, want = policy(batch, frozenset({"logp"})), []
    for b in range(batch.size):
        here = batch.row_of == b
        s = (out.logp[here] - batch.actions["logp_raw"][here]).mean().exp()
        a = batch.actions["advantage"][here][0]
        want.append(-torch.minimum(s * a, s.clamp(0.9, 1.1) * a))
    torch.stack(want).mean().backward()
    assert got == pytest.approx(float(torch.stack(want).mean().detach()), rel=1e-6)
    torch.testing.assert_close(gradient, policy.gradient(), rtol=1e-6, atol=1e-9)


def test_actions_without_weight_are_not_in_the_sequence():
    policy, _, batch = sampled(7)
    weight = (torch.arange(len(batch.at)) % 3 > 0).float()
    spoilt = batch.with_actions(weight=weight, logp_old=torch.where(weight > 0, batch.actions["logp_raw"], torch.nan))
    alone = batch.with_actions(weight=weight)
    moved = alone.with_actions(logp_old=torch.where(weight > 0, batch.actions["logp_raw"], -5.0))
    results = [run(ClippedPG(ratio="sequence"), policy, b, "sequence") for b in (spoilt, alone, moved)]
    assert results[0][0] == results[1][0] == results[2][0]
    out = policy(alone, frozenset())
    keep = (weight > 0) & (batch.row_of == 0)
    want = (out.logp - batch.actions["logp_raw"])[keep].mean().exp()
    norm = normalise(alone, "sequence")
    ratio = ClippedPG(ratio="sequence")._log_ratio(out.logp, batch.actions["logp_raw"], norm)[keep].exp()
    torch.testing.assert_close(ratio, want.expand(len(ratio)))


def test_the_entropy_bonus_raises_entropy():
    policy, _, batch = sampled(5)
    plain, bonus = (run(ClippedPG(entropy_coef=c), policy, batch) for c in (0.0, 0.5))
    policy.zero_grad()
    entropy = policy(batch, frozenset({"entropy"})).entropy.mean()
    (-0.5 * entropy).backward()
    assert bonus[0] - plain[0] == pytest.approx(-0.5 * float(entropy.detach()), rel=1e-6)
    torch.testing.assert_close(bonus[1] - plain[1], policy.gradient(), rtol=1e-5, atol=1e-8)
    assert bonus[2]["entropy"][0] / bonus[2]["entropy"][1] == pytest.approx(float(entropy.detach()), rel=1e-6)


def test_what_may_not_enter_a_ratio():
    policy, _, batch = sampled(0)
    objective = ClippedPG()
    cold = group([1, 0], [[call(policy, [1], [2], law=Law(temperature=0.7))]] * 2)
    cold_batch = Advantage()([cold], pack_groups([cold]))
    with pytest.raises(UserError, match="at temperature 1"):
        run(objective, policy, cold_batch)
    shown = group([1, 0], [[given_call("actor", [1], [2, 3])], [call(policy, [1], [2])]])
    mixed = Advantage()([shown], pack_groups([shown]))
    with pytest.raises(UserError, match="2 of 3 weighted actions have no finite logp_raw"):
        run(objective, policy, mixed)
    quiet = mixed.with_actions(weight=mixed.actions["logp_raw"].isfinite().float())
    total, gradient, metrics = run(objective, policy, quiet)  # left out, they leave no nan behind
    assert math.isfinite(total)
    assert bool(gradient.isfinite().all())
    assert metrics["ratio"][1] == 1
    with pytest.raises(UserError, match="needs the column 'logp_ref'"):
        run(ClippedPG(kl_coef=0.1), policy, batch)
    with pytest.raises(UserError, match="needs the column 'advantage'"):
        run(objective, policy, pack_groups([shown]))
    with pytest.raises(UserError, match="dual_clip must be above 1"):
        ClippedPG(dual_clip=0.5)
    with pytest.raises(UserError, match="ratio must be token or sequence"):
        ClippedPG(ratio="row")


def test_nothing_to_learn_is_zero():
    policy, _, batch = sampled(0)
    total, gradient, metrics = run(ClippedPG(), policy, batch.with_actions(weight=torch.zeros(len(batch.at))))
    assert total == 0
    assert not gradient.any()
    assert metrics["ratio"] == (0.0, 0.0)
    tied = group([1, 1], [[call(policy, [1], [2, 3])]] * 2)
    assert not run(ClippedPG(), policy, Advantage()([tied], pack_groups([tied])))[1].any()


def test_presets_and_their_law():
    built = {name: plug("objective", name).build() for name in ("grpo", "dr-grpo", "dapo", "rloo", "gspo")}
    assert (built["dapo"].clip_low, built["dapo"].clip_high) == (0.2, 0.28)
    assert built["rloo"].clip_high == math.inf
    assert built["gspo"].ratio == "sequence"
    parts = [plug("credit", "grpo"), plug("objective", "grpo")]
    check(parts, present={"group", "logp_old"})
    with pytest.raises(UserError, match="sample with temperature 1"):
        check(parts, law_raw=False, present={"group", "logp_old"})
    assert built["grpo"].prepare(None, "batch", Keys(0)) == "batch"
