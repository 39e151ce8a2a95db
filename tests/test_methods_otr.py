"""OTR: its numeric checks, its limits (DFT, SFT), its draws, and that it stands where SFT stands."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etude.experience.batch import normalise, pack, split
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.rows import example
from etude.experience.store import Store
from etude.learning.group_rl import GroupRL, compose
from etude.learning.learner import Optim, Seat, Term, update
from etude.methods.api import method, resume, train
from etude.methods.demonstrations import otr
from etude.methods.demonstrations.otr import OneTokenRollout, draw, uniforms
from etude.methods.options import build
from etude.objectives.nll import NLL
from etude.policies.outputs import Outputs
from etude.policies.tokenizers import CharTokenizer
from runs import Cut, Cutter, same, weights
from small import small_lm

P = (0.5, 0.3, 0.2)
ALL = frozenset({"logits"})


class Given:
    """What a forward pass gave, for logits that are leaves."""

    def __init__(self, logits):
        self.leaf = logits

    def map_logits(self, f):
        return f(self.leaf, slice(0, len(self.leaf)))


def batch_of(targets, keys=None, objective=None):
    """One row whose actions have these targets, prepared."""
    batch = normalise(pack([example([1], targets)]), "sequence")
    return (objective or OneTokenRollout()).prepare(None, batch, keys or Keys(0))


def ascent(objective, logits, targets=(1,)):
    """- d loss / d logits, [N, V], of a mean over N positions, times N: the direction of each."""
    leaf = torch.as_tensor(logits).clone().requires_grad_()
    objective.loss(Given(leaf), batch_of(targets, objective=objective)).total.backward()
    return -leaf.grad * len(targets)


def log(p, n=1):
    return torch.tensor(p).log().expand(n, -1)


# --- the numeric checks --------------------------------------------------------------------------


def test_the_expected_direction_is_that_of_dft():
    exact = ascent(OneTokenRollout(kappa=1.0, exact=True), log(P))[0]
    assert exact.tolist() == pytest.approx([-0.165, 0.231, -0.066], abs=1e-6)
    reward, p = torch.tensor([-0.1, 1.0, -0.1]), torch.tensor(P)
    assert torch.allclose(exact, p * (reward - (p * reward).sum()), atol=1e-6)
    assert torch.allclose(exact, 1.1 * 0.3 * (torch.tensor([0.0, 1.0, 0.0]) - p), atol=1e-6)


def test_at_another_temperature_it_is_no_longer_in_line_with_it():
    law = (log(P) / 1.3).softmax(-1)[0]
    assert law.tolist() == pytest.approx([0.460988, 0.311198, 0.227815], abs=1e-6)
    exact = ascent(OneTokenRollout(kappa=1.3, exact=True), log(P))[0]
    assert exact.tolist() == pytest.approx([-0.167258, 0.238502, -0.071245], abs=1e-6)
    line = exact / (torch.tensor([0.0, 1.0, 0.0]) - torch.tensor(P))
    assert float(line.max() - line.min()) > 0.01


def test_the_loss_of_given_draws(monkeypatch):
    monkeypatch.setattr(otr, "draw", lambda law, streams, count: torch.tensor([[1, 0, 1, 2]]))
    objective = OneTokenRollout(samples=4, kappa=1.0)
    found = objective.loss(Given(log(P)), batch_of([1], objective=objective))
    assert float(found.total) == pytest.approx(0.544422, abs=1e-6)
    assert found.metrics["hit"] == (0.5, 1.0)
    assert found.metrics["nll"][0] == pytest.approx(-np.log(0.3))


def test_many_draws_give_the_expected_direction():
    found = ascent(OneTokenRollout(samples=100_000, kappa=1.0), log(P))[0]
    assert found.tolist() == pytest.approx([-0.165, 0.231, -0.066], abs=0.005)
    assert found.tolist() != pytest.approx([-0.165, 0.231, -0.066], abs=1e-6)


def test_its_error_falls_with_the_root_of_the_draws():
    def error(samples):
        found = ascent(OneTokenRollout(samples=samples, kappa=1.0), log(P, 400), [1] * 400)
        return float((found - torch.tensor([-0.165, 0.231, -0.066])).norm(dim=-1).mean())

    few, many = error(16), error(1600)
    assert 8 < few / many < 12.5
    mean = ascent(OneTokenRollout(samples=16, kappa=1.0), log(P, 4000), [1] * 4000).mean(0)  # no bias at few draws
    assert mean.tolist() == pytest.approx([-0.165, 0.231, -0.066], abs=0.012)


def test_a_constant_reward_teaches_nothing_at_the_policys_own_temperature():
    assert ascent(OneTokenRollout(beta=1.0, kappa=1.0, exact=True), log(P)).abs().max() < 1e-7
    assert ascent(OneTokenRollout(beta=1.0, kappa=1.3, exact=True), log(P)).abs().max() > 1e-2
    assert ascent(OneTokenRollout(samples=100_000, beta=1.0, kappa=1.0), log(P)).abs().max() < 0.005


@pytest.mark.parametrize("certain", [1, 2])
@pytest.mark.parametrize("exact", [False, True])
def test_a_certain_policy_learns_nothing(certain, exact):
    """Whether it is certain of the demonstrated token (1) or of another one (2)."""
    logits = torch.full((1, 3), -50.0).index_fill(1, torch.tensor([certain]), 50.0)
    objective = OneTokenRollout(kappa=1.0, exact=exact)
    assert float(objective.loss(Given(logits), batch_of([1])).total) == pytest.approx(0.0, abs=1e-6)
    assert ascent(objective, logits).abs().max() < 1e-6


@pytest.mark.parametrize("beta", [-0.5, -0.1, 0.0, 0.7])
def test_the_exact_loss_is_dft_times_one_minus_beta(beta):
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = [3, 0, 10, 3, 7]
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1)[torch.arange(5), targets]
    (-(logp.exp().detach() * logp)).mean().backward()
    ours = ascent(OneTokenRollout(beta=beta, kappa=1.0, exact=True), logits, targets) / 5
    assert torch.allclose(ours, -(1 - beta) * leaf.grad, atol=1e-9)


def test_next_to_sft_it_weighs_by_the_probability():
    sft = torch.tensor([0.0, 1.0, 0.0]) - torch.tensor(P)
    ratio = ascent(OneTokenRollout(kappa=1.0, exact=True), log(P))[0] / sft
    assert ratio.tolist() == pytest.approx([0.33] * 3, abs=1e-5)


# --- gradients and limits through a policy -------------------------------------------------------


def test_gradients_agree_with_finite_differences_for_fixed_draws(monkeypatch):
    drawn = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(otr, "draw", lambda law, streams, count: drawn)
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    objective, batch = OneTokenRollout(samples=6), batch_of([0, 1, 2, 6])
    batch = batch.with_actions(weight=batch.actions["weight"].double())
    assert torch.autograd.gradcheck(lambda x: objective.loss(Given(x), batch).total, (logits,))


def demonstrations(tokenizer, texts=(("1+1=", "2"), ("12+9=", "19;21"), ("5=", "five of them"), ("7=", "7"))):
    return [example(tokenizer.prompt(p), tokenizer.completion(c)) for p, c in texts]


def gradient(objective, batch, policy, tokens=10_000, keys=None):
    """All parameters' gradient after one update of learning rate 0 in micro-batches, and its metrics."""
    seat = Seat(policy, Optim(lr=1e-12, algorithm="sgd", clip=1e9, tokens=tokens), 1)
    metrics = update(seat, [Term(batch, objective)], keys or Keys(3), Meter())
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), metrics


def test_with_beta_0_the_exact_loss_is_nll_weighted_by_p():
    policy = small_lm()
    batch = normalise(pack(demonstrations(policy.tokenizer)), "sequence")
    ours, _ = gradient(OneTokenRollout(beta=0.0, kappa=1.0, exact=True), batch, policy)
    dft, _ = gradient(NLL(weight=lambda logp, batch: logp.exp()), batch, policy)
    assert float(dft.abs().max()) > 1e-4
    assert torch.allclose(ours, dft, atol=1e-7)


def test_flat_weights_leave_sft_with_a_smaller_step():
    policy = small_lm()
    batch = normalise(pack(demonstrations(policy.tokenizer)), "sequence")
    ours, _ = gradient(OneTokenRollout(flat=True), batch, policy)
    sft, _ = gradient(NLL(), batch, policy)
    p = policy.logp(batch).exp()
    assert torch.allclose(ours, 1.1 * float((batch.actions["weight"] * p).sum()) * sft, atol=1e-7)


# --- draws ---------------------------------------------------------------------------------------


def test_streams_are_splitmix64():
    """The first outputs from seeds 0 and 1234567, as its authors' program prints them; the top 24 bits are used."""
    known = {0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F), 1234567: (6457827717110365317,)}
    for seed, outputs in known.items():
        found = uniforms(torch.tensor([seed]), len(outputs))[0]
        assert found.tolist() == [(x >> 40) / 2**24 for x in outputs]


def test_draws_follow_the_law_and_nothing_else():
    law = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    streams = torch.from_numpy(Keys(1).numpy().integers(2**63, size=3))
    drawn = draw(law, streams, 100_000)
    share = torch.stack([(drawn == token).float().mean(1) for token in range(4)], 1)
    assert torch.allclose(share, law, atol=0.006)
    assert (share[law == 0] == 0).all()
    again = draw(law[[2, 0]], streams[[2, 0]], 100_000)
    assert torch.equal(again, drawn[[2, 0]])  # a row's draws are its own
    u = uniforms(torch.from_numpy(Keys(2).numpy().integers(2**63, size=1000)), 100)
    assert 0 <= float(u.min()) < 1e-3
    assert 0.999 < float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.004)
    between = np.corrcoef(u.numpy())[np.triu_indices(1000, 1)]
    assert np.abs(between).mean() < 0.09  # of independent ones: 0.08


def test_draws_are_keyed_by_step_and_seed():
    def streams(keys):
        return batch_of([3, 4, 5], keys).actions["stream"].tolist()

    assert streams(Keys(0).at(1)) == streams(Keys(0).at(1))
    assert len({*streams(Keys(0).at(1)), *streams(Keys(0).at(2)), *streams(Keys(1).at(1))}) == 9


@pytest.mark.parametrize("objective", [OneTokenRollout(), OneTokenRollout(exact=True), OneTokenRollout(flat=True)])
def test_how_a_batch_is_split_changes_nothing(objective):
    policy = small_lm()
    batch = normalise(pack(demonstrations(policy.tokenizer)), "sequence")
    assert len(list(split(batch, 12))) >= 3
    whole, seen = gradient(objective, batch, policy)
    parts, seen_in_parts = gradient(objective, batch, policy, tokens=12)
    assert float(whole.abs().max()) > 1e-4
    assert torch.allclose(whole, parts, atol=1e-6)
    assert seen_in_parts["hit"] == pytest.approx(seen["hit"], abs=1e-6)
    other, _ = gradient(objective, batch, policy, keys=Keys(4))
    assert torch.equal(whole, other) == (objective.exact or objective.flat)


def test_chunks_of_the_vocabulary_change_nothing():
    """Logits are made and made again in pieces of two positions."""
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    head = torch.randn(16, 50, generator=torch.Generator().manual_seed(1))
    batch, grads, totals = batch_of([1, 2, 3, 4, 5, 6, 7]), [], []
    sizes = []

    def logits(h):
        sizes.append(len(h))
        return h @ head

    for chunk in (10_000, 100):
        leaf = hidden.clone().requires_grad_()
        out = Outputs(ALL, leaf, batch.actions["target"], logits, 50, chunk=chunk)
        total = OneTokenRollout().loss(out, batch).total
        total.backward()
        totals.append(float(total.detach()))
        grads.append(leaf.grad)
    assert sizes[0] == 7
    assert max(sizes[1:]) == 2
    assert totals[0] == pytest.approx(totals[1], abs=1e-6)
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


# --- where it stands -----------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["none", "grpo"])
def test_answers_of_its_own_are_refused(credit):
    with pytest.raises(UserError, match="objective 'otr' needs demonstrations, which nothing here gives"):
        compose(GroupRL(objective="otr", credit=credit), law_raw=True)


@pytest.mark.parametrize("option", [{"samples": 0}, {"kappa": 0.0}, {"kappa": float("nan")}, {"beta": 2.0}])
def test_bad_options_are_refused(option):
    with pytest.raises(UserError, match="must be"):
        OneTokenRollout(**option)
    with pytest.raises(UserError, match="must be"):
        train("otr", world="chain_sum", policy="tiny:width=16,depth=1,heads=2,ffn=16", base=False, steps=1, **option)


def test_noise_and_faults_are_checked(tmp_path):
    small = {"world": "chain_sum", "policy": "table", "base": False, "steps": 1, "out": tmp_path / "r"}
    with pytest.raises(UserError, match="faults name what goes wrong"):
        train("otr", faults=("carry",), **small)
    with pytest.raises(UserError, match="unknown fault 'cary'"):
        train("otr", noise=0.5, faults=("cary",), **small)
    with pytest.raises(UserError, match="noise is a share"):
        train("otr", noise=1.5, **small)
    assert not (tmp_path / "r").exists()


TINY = {
    "world": "chain_sum", "policy": "tiny:width=32,depth=1,heads=2,ffn=32", "base": False, "max_tokens": 6,
    "steps": 3, "batch": 4, "demonstrations": 10, "eval_problems": 8, "eval_every": 0, "checkpoint_every": 2,
}  # fmt: skip


def test_it_trains_in_the_place_of_sft_and_a_cut_changes_nothing(tmp_path):
    run = train("otr", out=tmp_path / "otr", **TINY)
    other = train("otr", out=tmp_path / "kappa", kappa=1.0, **TINY)
    sft = train("sft", out=tmp_path / "sft", **TINY)
    assert not same(weights(run), weights(sft))
    assert not same(weights(run), weights(other))
    with Store(run.folder, read_only=True) as store:
        logged = store.metrics()
        assert {"nll", "hit", "loss"} <= set(logged)
        assert np.isfinite(logged["loss"].value).all()
        mine = logged["nll"].value[0]
    with Store(sft.folder, read_only=True) as store:
        assert store.metrics()["nll"].value[0] == pytest.approx(mine, rel=1e-5)  # the same demonstrations, in order
    with pytest.raises(Cut):
        train("otr", out=tmp_path / "cut", reporter=Cutter(1), **TINY)
    assert same(weights(resume(tmp_path / "cut")), weights(run))


def test_it_learns_a_file_and_is_looked_at_in_three_ways(tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{d}=", "completion": f"{9 - d}"}) + "\n" for d in range(10)))
    world = tmp_path / "world.jsonl"
    world.write_text("".join(json.dumps({"prompt": f"{d}=", "answer": f"{9 - d}"}) + "\n" for d in range(10)))
    from etude.policies.zoo import save_policy

    save_policy(small_lm(), tmp_path / "start")
    options = {
        **TINY,
        "world": str(world),
        "policy": str(tmp_path / "start"),
        "max_tokens": 2,
        "steps": 60,
        "batch": 10,
    }
    run = train("otr", out=tmp_path / "r", data=str(file), audit=True, optim={"lr": 2e-2}, **options)
    with Store(run.folder, read_only=True) as store:
        nll, hit = (store.metrics(name)[name].value for name in ("nll", "hit"))
        kl = [e["value"] for e in store.evaluations("kl")]
        seen = {e["metric"] for e in store.evaluations()}
    assert nll[-1] < 0.6 * nll[0]
    assert hit[-1] > 2 * hit[0]
    assert kl[0] == pytest.approx(0.0, abs=1e-5)
    assert kl[-1] > 0.5
    assert {"accuracy", "greedy/accuracy", "greedy/length"} <= seen


def test_a_model_of_transformers_learns_by_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = CharTokenizer()
    config = transformers.GPT2Config(vocab_size=tokenizer.size, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2")
    run = train("otr", out=tmp_path / "r", **{**TINY, "policy": str(tmp_path / "gpt2")})
    assert run.meter["updates"] == 3
    before, after = load_file(tmp_path / "gpt2" / "model.safetensors"), weights(run)
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name in after)


def test_the_arms_of_its_claims_can_be_built():
    found = method("otr")
    assert set(found.claims) == {"otr", "otr.cold"}
    for claim in found.claims.values():
        for arm in claim.arms:
            config = method(arm.method).config
            options = {**claim.options, **arm.options}
            own = {k: v for k, v in options.items() if k in config.__dataclass_fields__}
            assert build(config, own).normalise == "sequence"
