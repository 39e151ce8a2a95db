import math

import pytest
import torch

from etude.curation.examples import completion
from etude.experience.batch import normalise, pack, split
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Loss
from etude.learning.learner import PATIENCE, Optim, Seat, Term, update
from etude.learning.weights import Weights
from etude.objectives.nll import NLL
from etude.objectives.terms import Pure, weighted
from small import small_lm, weights_of

KEYS = Keys(0)


def batch(policy, words=("12=3", "4=56789", "7=1", "0123=4567", "8=8", "55=0"), by="token"):
    rows = [completion(policy.tokenizer, *word.split("="), policy.limit) for word in words]
    return normalise(pack(rows), by)


def gradients(policy):
    return {n: None if p.grad is None else p.grad.clone() for n, p in policy.named_parameters()}


class Nan(Pure):
    """A loss that is not a number in some steps."""

    needs = frozenset({"logp"})

    def __init__(self, bad=True):
        self.bad = bad

    def loss(self, out, batch):
        total = weighted(batch, -out.logp)
        return Loss(total * math.nan if self.bad else total)


def close(a, b, tolerance=1e-6):
    """Whether gradients agree to `tolerance`, of 1 or of their largest entry."""
    size = max(1.0, *(float(g.abs().max()) for g in b.values()))
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=tolerance * size, rtol=0) for k in a)


@pytest.mark.parametrize("by", ["token", "sequence", "row"])
@pytest.mark.parametrize("tokens", [1, 9, 17])
def test_micro_batches_add_up_to_the_whole_batch(by, tokens):
    whole, parts = small_lm(), small_lm()
    data = batch(whole, by=by)
    assert len(list(split(data, tokens))) > 1
    a = update(Seat(whole, Optim(clip=math.inf), 5), [Term(data, NLL())], KEYS, Meter())
    b = update(Seat(parts, Optim(clip=math.inf, tokens=tokens), 5), [Term(data, NLL())], KEYS, Meter())
    assert close(gradients(whole), gradients(parts))
    assert a["nll"] == pytest.approx(b["nll"], abs=1e-6)  # a mean over all actions, not over micro-batches
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-5)


def test_the_gradient_is_that_of_the_objective():
    policy = small_lm()
    data = batch(policy)
    update(Seat(policy, Optim(clip=math.inf), 5), [Term(data, NLL())], KEYS, Meter())
    again = small_lm()
    out = again.forward(data, frozenset({"logp"}))
    (-(data.actions["weight"] * out.logp).sum()).backward()
    assert close(gradients(policy), gradients(again))


def test_terms_add_up_by_their_weights():
    together, one, other = small_lm(), small_lm(), small_lm()
    a, b = batch(together, ("1=2", "3=4")), batch(together, ("5=678",))
    free = Optim(clip=math.inf)
    said = update(Seat(together, free, 5), [Term(a, NLL(), 2.0, "a"), Term(b, NLL(), -0.5, "b")], KEYS, Meter())
    first = update(Seat(one, free, 5), [Term(a, NLL())], KEYS, Meter())
    second = update(Seat(other, free, 5), [Term(b, NLL())], KEYS, Meter())
    one, other = gradients(one), gradients(other)
    assert close(gradients(together), {n: 2.0 * one[n] - 0.5 * other[n] for n in one}, 1e-5)
    assert said["loss"] == pytest.approx(2.0 * first["loss"] - 0.5 * second["loss"], abs=1e-5)
    assert said["a/nll"] == pytest.approx(first["nll"], abs=1e-6)
    assert said["b/nll"] == pytest.approx(second["nll"], abs=1e-6)


def test_penalties_join_the_loss():
    policy, plain = small_lm(), small_lm()

    def squared(policy):
        return 0.1 * sum(p.square().sum() for p in policy.parameters())

    data, free = batch(policy), Optim(clip=math.inf)
    size = float(squared(policy).detach())
    said = update(Seat(policy, free, 5), [Term(data, NLL())], KEYS, Meter(), penalties=[squared])
    without = update(Seat(plain, free, 5), [Term(data, NLL())], KEYS, Meter())
    assert said["loss"] == pytest.approx(without["loss"] + size, rel=1e-5)
    start = dict(small_lm().named_parameters())
    own = gradients(plain)
    assert close(gradients(policy), {n: own[n] + 0.2 * start[n].detach() for n in own}, 1e-5)


def test_a_mask_edits_gradients_before_they_are_clipped():
    policy = small_lm()
    seat = Seat(policy, Optim(clip=1e-3), 5)
    kept = seat.params[0]

    def only_the_first(params):
        for p in params:
            if p is not kept:
                p.grad = None

    before = weights_of(policy)
    said = update(seat, [Term(batch(policy), NLL())], KEYS, Meter(), mask=only_the_first)
    after = weights_of(policy)
    changed = [n for n in before if (before[n] != after[n]).any()]
    assert changed == [next(n for n, p in policy.named_parameters() if p is kept)]
    assert float(kept.grad.norm()) == pytest.approx(1e-3, rel=1e-3)  # all of the norm allowed went to it
    assert said["grad_norm"] > 1e-3


def test_clipping_bounds_the_gradient_and_reports_its_norm_before():
    free, clipped = small_lm(), small_lm()
    a = update(Seat(free, Optim(clip=math.inf), 5), [Term(batch(free), NLL())], KEYS, Meter())
    b = update(Seat(clipped, Optim(clip=0.01), 5), [Term(batch(clipped), NLL())], KEYS, Meter())
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in clipped.parameters()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert a["grad_norm"] == b["grad_norm"] > 0.01
    scale = 0.01 / a["grad_norm"]
    assert close(gradients(clipped), {n: g * scale for n, g in gradients(free).items()})


def test_frozen_parameters_stay_and_are_not_written_into_checkpoints():
    policy = small_lm()
    policy.model.embed_tokens.weight.requires_grad_(False)
    before = weights_of(policy)
    seat = Seat(policy, Optim(lr=0.1, weight_decay=0.5), 5)
    for _ in range(3):
        update(seat, [Term(batch(policy), NLL())], KEYS, Meter())
    after = weights_of(policy)
    frozen = "model.embed_tokens.weight"
    assert (before[frozen] == after[frozen]).all()
    assert all((before[n] != after[n]).any() for n in before if n != frozen)
    assert Weights(policy).state_dict().keys() == before.keys() - {frozen}
    with pytest.raises(UserError, match="weights are of another policy"):
        Weights(small_lm()).load_state_dict(Weights(policy).state_dict())
    for p in policy.parameters():
        p.requires_grad_(False)
    with pytest.raises(UserError, match="no parameters to train"):
        Seat(policy, Optim(), 5)


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    policy, meter = small_lm(), Meter()
    seat = Seat(policy, Optim(), 50)
    objective = Nan()
    update(seat, [Term(batch(policy), NLL())], KEYS, meter)
    before = weights_of(policy)
    for i in range(1, PATIENCE):
        said = update(seat, [Term(batch(policy), objective)], KEYS, meter)
        assert said["skipped_update"] == 1.0
        assert seat.skipped == i
    assert all((before[n] == w).all() for n, w in weights_of(policy).items())
    assert meter["updates"] == 1
    assert meter["trained"] == PATIENCE * len(batch(policy).inputs)  # its cost was paid all the same
    objective.bad = False
    assert update(seat, [Term(batch(policy), objective)], KEYS, meter)["skipped_update"] == 0.0
    assert seat.skipped == 0
    assert any((before[n] != w).any() for n, w in weights_of(policy).items())
    objective.bad = True
    for _ in range(PATIENCE - 1):
        update(seat, [Term(batch(policy), objective)], KEYS, meter)
    with pytest.raises(UserError, match=r"10 updates in a row .* not finite: lower lr"):
        update(seat, [Term(batch(policy), objective)], KEYS, meter)


def test_the_schedule_counts_updates_and_its_rate_is_reported():
    policy = small_lm()
    seat = Seat(policy, Optim(lr=1.0, schedule="linear", warmup=0.5), 4)
    rates = [update(seat, [Term(batch(policy), NLL())], KEYS, Meter())["lr"] for _ in range(5)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_decay_is_on_matrices_only():
    policy = small_lm()
    seat = Seat(policy, Optim(weight_decay=0.1), 5)
    for group in seat.optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])
    assert sum(len(g["params"]) for g in seat.optimizer.param_groups) == len(seat.params)


def test_a_seat_goes_on_from_its_state_which_it_does_not_write_to():
    def trained(steps):
        policy = small_lm()
        seat = Seat(policy, Optim(schedule="cosine"), 6)
        for _ in range(steps):
            update(seat, [Term(batch(policy), NLL())], KEYS, Meter())
        return policy, seat

    whole, _ = trained(6)
    half, seat = trained(3)
    state, weights = seat.state_dict(), {n: w.clone() for n, w in Weights(half).state_dict().items()}
    for _ in range(2):  # the second time, the state must still be what it was
        policy = small_lm(9)
        Weights(policy).load_state_dict(weights)
        seat = Seat(policy, Optim(schedule="cosine"), 6)
        seat.load_state_dict(state)
        for _ in range(3):
            update(seat, [Term(batch(policy), NLL())], KEYS, Meter())
        assert all((w == weights_of(whole)[n]).all() for n, w in weights_of(policy).items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1e-3}, {"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"clip": 0.0}, {"clip": math.nan},
        {"tokens": 0}, {"warmup": -0.1}, {"warmup": 1.5}, {"weight_decay": -0.1}, {"beta1": 1.0}, {"beta2": -0.1},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Optim(**wrong)


def test_a_schedule_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="did you mean cosine"):
        Seat(small_lm(), Optim(schedule="cosin"), 5)
