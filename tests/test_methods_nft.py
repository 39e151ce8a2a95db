"""NFT: the numeric checks of its method, its reductions to RFT, Dr. GRPO and GRPO, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from etude.curation.examples import pack_groups
from etude.experience.batch import normalise
from etude.experience.errors import UserError
from etude.experience.types import Author, Call, Group, Outcome, Problem, Trajectory
from etude.feedback.advantage import dr_grpo as dr_grpo_credit
from etude.feedback.advantage import grpo as grpo_credit
from etude.learning.group_rl import GroupRL, compose
from etude.methods.api import train
from etude.methods.catalog import load_parts
from etude.methods.reward.nft import NFT, NFTLoss, implicit_negative, straight_through
from etude.objectives.clipped_pg import ClippedPG
from small import small_lm


class Given:
    """What a forward pass gave, for log-probabilities that are leaves."""

    def __init__(self, logp):
        self.logp = logp


def batch_of(right, ratios=None, tokens=1):
    """Rows of one group a list of 0/1 labels, and leaf log-probabilities whose ratio to the old ones is `ratios`."""
    groups = []
    for g, labels in enumerate(right):
        members = []
        for m, r in enumerate(labels):
            old = np.full(tokens, -1.0, np.float32)
            out = np.arange(10, 10 + tokens, dtype=np.int32)
            call = Call("actor", np.array([1, 9], np.int32), out, np.full(tokens, Author.SELF, np.int8), old, old)
            members.append(Trajectory(Problem(f"p{g}", "?"), (call,), outcome=Outcome(float(r), bool(r)), member=m))
        groups.append(Group(Problem(f"p{g}", "?"), tuple(members)))
    batch = normalise(pack_groups(groups), "constant", 1.0)
    shift = torch.zeros(len(batch.at)) if ratios is None else torch.tensor(ratios).log()
    return groups, batch, (batch.actions["logp_raw"] + shift).double().requires_grad_()


def coefficients(objective, right, ratios=None):
    """d loss / d log pi of every action."""
    _, batch, logp = batch_of(right, ratios)
    objective.loss(Given(logp), batch).total.backward()
    return logp.grad.numpy()


def group(r_q):
    """Labels of a group of 4 with this share of right ones."""
    return [1] * round(4 * r_q) + [0] * (4 - round(4 * r_q))


def test_at_a_ratio_of_one_a_wrong_token_is_pushed_as_hard_as_a_right_one_is_pulled():
    _, batch, logp = batch_of([group(0.5)])
    loss = NFTLoss(prompt_weight="one").loss(Given(logp), batch)
    assert float(loss.total.detach()) == pytest.approx(0.0, abs=1e-7)
    assert coefficients(NFTLoss(prompt_weight="one"), [group(0.5)]) == pytest.approx([-1, -1, 1, 1])


@pytest.mark.parametrize(
    ("r_q", "eps", "ratios", "wanted"),
    [
        (0.25, 1.0, (0.5, 1.0, 2.0), (0.142857, 0.333333, 0.666667)),
        (0.25, 1.0, (3.0, 3.0, 3.0), (1.0, 1.0, 1.0)),
        (0.25, 0.1, (0.5, 1.0, 2.0), (0.142857, 0.333333, 1.0)),
        (0.25, 0.1, (3.0, 3.0, 3.0), (3.0, 3.0, 3.0)),
        (0.5, 1.0, (2.0, 2.0), (2.0, 2.0)),
        (0.5, 0.1, (2.0, 2.0), (20.0, 20.0)),
    ],
)
def test_the_push_on_wrong_tokens(r_q, eps, ratios, wanted):
    right = group(r_q)
    every = (*[1.0] * sum(right), *ratios)
    _, batch, logp = batch_of([right], every)
    objective = NFTLoss(eps=eps, prompt_weight="one")
    assert math.isfinite(float(objective.loss(Given(logp), batch).total.detach()))
    assert coefficients(objective, [right], every)[sum(right) :] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("r_q", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    ("weight", "credit", "advantages"),
    [
        (
            "sqrt",
            grpo_credit(ddof=0, eps=0.0),
            {0.25: (1.732051, -0.577350), 0.5: (1, -1), 0.75: (0.577350, -1.732051)},
        ),
        ("1-r", dr_grpo_credit(), {0.25: (0.75, -0.25), 0.5: (0.5, -0.5), 0.75: (0.25, -0.75)}),
    ],
)
def test_at_a_ratio_of_one_its_gradient_is_that_of_grpo_and_dr_grpo(r_q, weight, credit, advantages):
    right = group(r_q)
    ours = -coefficients(NFTLoss(prompt_weight=weight), [right])
    assert ours == pytest.approx([advantages[r_q][1 - r] for r in right], rel=1e-5)
    groups, batch, logp = batch_of([right])
    ClippedPG().loss(Given(logp), credit(groups, batch)).total.backward()
    assert ours == pytest.approx(-logp.grad.numpy(), abs=1e-6)


def test_through_a_policy_the_gradient_is_that_of_dr_grpo():
    """One group of 4 with one right answer, on a transformer: within 1e-6."""
    policy = small_lm().double()
    groups, batch, _ = batch_of([[1, 0, 0, 0]], tokens=3)
    ids = torch.tensor([3, 4, 5, 6]).repeat_interleave(3) + 10
    batch = batch.with_actions(target=ids)
    batch = batch.with_actions(logp_raw=policy.logp(batch))
    grads = []
    for objective, given in ((NFTLoss(), batch), (ClippedPG(), dr_grpo_credit()(groups, batch))):
        policy.zero_grad()
        objective.loss(policy.forward(given, objective.needs), given).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert float(grads[0].abs().max()) > 1e-3
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


def test_without_negatives_it_is_rft():
    ratios = (0.5, 2.0, 3.0, 0.1)
    right = [1, 1, 0, 0]
    assert coefficients(NFTLoss(negative=0.0, prompt_weight="one"), [right], ratios) == pytest.approx([-1, -1, 0, 0])
    assert coefficients(NFTLoss(negative=0.0), [right], ratios) == pytest.approx([-0.5, -0.5, 0, 0])


def test_the_mixture_identity():
    """pi_old = (0.6, 0.4) on a right and a wrong answer: pi+ = (1, 0), so that pi- must be (0, 1)."""
    old, positive = torch.tensor([0.6, 0.4]), torch.tensor([1.0, 0.0])
    negative = implicit_negative(positive / old, torch.tensor(0.6)) * old
    assert torch.allclose(negative, torch.tensor([0.0, 1.0]), atol=1e-7)


def test_the_clamp_is_straight_through():
    x = torch.tensor([-1.0, 0.5, 1.0, 2.0], requires_grad=True)
    y = straight_through(x, 1.0)
    y.sum().backward()
    assert y.tolist() == [1, 1, 1, 2]
    assert x.grad.tolist() == [1, 1, 1, 1]  # a plain clamp has 0 for the first two


def test_gradients_agree_with_finite_differences_where_the_clamp_does_not_bite():
    right, ratios = [1, 0, 0, 0], [0.7, 0.5, 0.8, 0.9]
    _, batch, logp = batch_of([right], ratios)
    objective = NFTLoss(eps=0.5)
    batch = batch.with_actions(weight=batch.actions["weight"].double(), logp_raw=batch.actions["logp_raw"].double())
    assert torch.autograd.gradcheck(lambda x: objective.loss(Given(x), batch).total, (logp,), eps=1e-6, atol=1e-5)


def test_extreme_shares_and_ratios_stay_finite():
    for right in ([1] * 99 + [0], [1] + [0] * 99):
        got = coefficients(NFTLoss(), [right], [1e9] * 100)
        assert np.isfinite(got).all()
        assert (got[np.array(right) == 1] < 0).all()


def test_an_answer_without_a_verdict_is_refused():
    _, batch, logp = batch_of([[1, 0]])
    batch.row["correct"] = torch.tensor([1.0, math.nan])
    with pytest.raises(UserError, match="nft: some answers have no 'correct': its world needs a verifier"):
        NFTLoss().loss(Given(logp), batch)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"credit": "rloo"}, "objective 'nft' cannot be used with advantage, which credit 'rloo' gives: it weighs "
                             "right and wrong answers itself"),
        ({"selector": "all"}, "objective 'nft' cannot be used with tied, which selector 'all' gives"),
        ({"selector": "varied"}, "objective 'nft' cannot be used with tied, which selector 'varied' gives"),
        ({"act": "best-of-n"}, "objective 'nft' takes ratios of log-probabilities, but acting 'best-of-n'"),
        ({"curriculum": "sec"}, "curriculum 'sec' needs advantage, which nothing here gives: its arms are paid"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_combined_with_is_said_in_a_line(parts, said):
    load_parts()
    with pytest.raises(UserError, match=said):
        compose(NFT(**parts), law_raw=True)


def test_it_is_a_part_of_group_rl_too():
    plugs = compose(GroupRL(objective="nft", credit="none", selector="mixed", curriculum="easy-to-hard"), law_raw=True)
    assert plugs["objective"].name == "nft"


@pytest.mark.parametrize("option", [{"eps": 0.0}, {"negative": -1.0}, {"prompt_weight": "r"}])
def test_bad_options_are_refused(option):
    with pytest.raises(UserError):
        NFTLoss(**option)


def short(slug, out, **options):
    """A few steps on the lock world, where a table is right often enough for groups to differ."""
    return train(
        slug, world="lock", world_options={"rungs": 2}, policy="table:order=2,rows=16,actions=3", base=False, steps=3,
        problems=4, members=8, max_tokens=1, eval_problems=8, eval_every=0, out=out, **options,
    )  # fmt: skip


def weights(run):
    from safetensors.torch import load_file

    return load_file(run.folder / "policy" / "table.safetensors")["logits"]


def test_with_one_update_a_batch_it_trains_exactly_as_dr_grpo(tmp_path):
    shared = {"minibatches": 1, "max_draws": 3, "normalise": "constant"}
    ours = short("nft", tmp_path / "nft", **shared)
    theirs = short("dr-grpo", tmp_path / "dr", selector="mixed", **shared)
    assert float(weights(ours).abs().max()) > 1e-4
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-6)
    several = short("nft", tmp_path / "several", **{**shared, "minibatches": 2})
    assert not torch.allclose(weights(ours), weights(several), atol=1e-6)
