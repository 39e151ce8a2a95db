"""DLER: the numeric checks of its method, its reductions to GRPO, merging as a stage, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from etude.curation.examples import pack_groups
from etude.experience.batch import normalise
from etude.experience.errors import UserError
from etude.experience.store import Store
from etude.experience.types import Author, Call, Group, Outcome, Problem, Trajectory
from etude.feedback.advantage import Advantage
from etude.learning.group_rl import GroupRL, compose
from etude.learning.select import Mixed, Varied
from etude.methods import api
from etude.methods.api import resume, train
from etude.methods.catalog import load_parts
from etude.methods.reward import dler
from etude.methods.reward.dler import DLER, DLERCredit, dler_loss
from etude.objectives.clipped_pg import ClippedPG
from etude.policies.zoo import load_policy, save_policy


class Given:
    """What a forward pass gave, for log-probabilities that are leaves."""

    def __init__(self, logp):
        self.logp = logp


def groups_of(rewards, lengths=None, correct=None):
    """Groups with these rewards, their answers of these lengths (one token each unless given)."""
    groups = []
    for g, row in enumerate(rewards):
        problem, members = Problem(f"p{g}", "?"), []
        for m, r in enumerate(row):
            n = lengths[g][m] if lengths else 1
            old = np.full(n, -1.0, np.float32)
            out = np.arange(10, 10 + n, dtype=np.int32)
            call = Call("actor", np.array([1, 9], np.int32), out, np.full(n, Author.SELF, np.int8), old, old)
            right = bool(correct[g][m]) if correct else r > 0
            members.append(Trajectory(problem, (call,), outcome=Outcome(float(r), right), member=m))
        groups.append(Group(problem, tuple(members)))
    return groups


def credit(rule, rewards, lengths=None, correct=None):
    """The advantage of every action."""
    groups = groups_of(rewards, lengths, correct)
    return rule(groups, pack_groups(groups)).actions["advantage"].numpy()


def right(n, of):
    return [1] * n + [0] * (of - n)


POPULATION = Advantage("mean", "batch-row", ddof=0, eps=0.0)
TWO = [[1, 0, 0, 0], [1, 1, 1, 0]]


# --- the credit rule --------------------------------------------------------------------------------


def test_two_groups_of_equal_variance_have_grpos_advantages():
    wanted = [1.732051, *[-0.577350] * 3, *[0.577350] * 3, -1.732051]
    assert credit(POPULATION, TWO) == pytest.approx(wanted, abs=1e-6)
    assert credit(Advantage("mean", "std", ddof=0, eps=0.0), TWO) == pytest.approx(wanted, abs=1e-6)
    centred = np.array([0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75])
    assert centred.std() == pytest.approx(0.433013, abs=1e-6)
    for whiten in ("batch-row", "batch-token"):
        assert credit(DLERCredit(whiten), TWO) == pytest.approx(centred / 0.462910, abs=1e-5)


def test_a_rare_success_weighs_less_than_under_grpo():
    rewards = [right(1, 16), right(8, 16)]
    grpo = credit(Advantage("mean", "std", ddof=0, eps=0.0), rewards)
    batch = credit(POPULATION, rewards)
    assert (grpo[0], grpo[16]) == pytest.approx((3.872983, 1.0), abs=1e-6)
    assert (batch[0], batch[16]) == pytest.approx((2.386672, 1.272892), abs=1e-6)
    assert grpo[0] / grpo[16] == pytest.approx(3.87, abs=0.01)
    assert batch[0] / batch[16] == pytest.approx(1.87, abs=0.01)
    ours = credit(DLERCredit("batch-row"), rewards)
    assert ours == pytest.approx(batch * math.sqrt(31 / 32), abs=1e-6)  # the sample's std


@pytest.mark.parametrize("whiten", ["batch-row", "batch-token"])
def test_a_group_that_is_all_right_is_no_part_of_the_statistics(whiten):
    alone = credit(DLERCredit(whiten), [[1, 0, 0, 0]])
    both = credit(DLERCredit(whiten, boost=0.1), [[1, 1, 1, 1], [1, 0, 0, 0]])
    assert both[:4].tolist() == [0, 0, 0, 0]
    assert both[4:] - alone == pytest.approx([0.1, 0, 0, 0])


@pytest.mark.parametrize("whiten", ["batch-row", "batch-token"])
def test_neither_the_scale_of_rewards_nor_what_a_group_has_in_common_counts(whiten):
    rewards, lengths = np.array([right(1, 4), right(2, 4), right(3, 4)]), [[1, 5, 2, 2], [3, 1, 4, 1], [2, 2, 1, 6]]
    plain = credit(DLERCredit(whiten), rewards, lengths)
    assert credit(DLERCredit(whiten), 5 * rewards, lengths) == pytest.approx(plain, abs=1e-6)
    shifted = rewards + np.array([[1], [20], [-3]])
    assert credit(DLERCredit(whiten), shifted, lengths) == pytest.approx(plain, abs=1e-5)


def test_over_tokens_and_over_answers_are_the_same_where_lengths_are_equal():
    rewards, length = [right(1, 4), right(2, 4)], 5
    tokens = credit(DLERCredit("batch-token"), rewards, [[length] * 4] * 2)[::length]
    answers = credit(DLERCredit("batch-row"), rewards)
    n = 8
    bessel = math.sqrt((n * length - 1) / (n * length) * n / (n - 1))
    assert tokens == pytest.approx(answers * bessel, abs=1e-6)


def test_over_tokens_long_answers_weigh_more():
    lengths = [[1, 7, 7, 7]]
    tokens = credit(DLERCredit("batch-token"), [right(1, 4)], lengths)
    answers = credit(DLERCredit("batch-row"), [right(1, 4)], lengths)
    value = np.repeat([0.75, -0.25], [1, 21])
    assert tokens == pytest.approx((value - value.mean()) / value.std(ddof=1), abs=1e-6)
    assert answers == pytest.approx(value / np.std([0.75, -0.25, -0.25, -0.25], ddof=1), abs=1e-6)
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-6)


def test_the_boost_is_for_right_answers_that_kept_a_reward():
    plain = credit(DLERCredit(), [[1, 0, 0, 0]])
    boosted = credit(DLERCredit(boost=0.1), [[1, 0, 0, 0]], correct=[[1, 1, 0, 0]])  # the second was too long
    assert boosted - plain == pytest.approx([0.1, 0, 0, 0])


@pytest.mark.parametrize("option", [{"whiten": "group"}, {"boost": -0.1}])
def test_bad_options_of_the_credit_rule(option):
    with pytest.raises(UserError):
        DLERCredit(**option)


# --- the selector -----------------------------------------------------------------------------------


def test_groups_are_chosen_by_the_reward_that_is_left():
    all_right_one_late, all_cut, mixed = groups_of(
        [[1, 1, 0], [0, 0, 0], [1, 0, 0]], correct=[[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    )
    assert [Varied()(g) for g in (all_right_one_late, all_cut, mixed)] == [True, False, True]
    assert [Mixed()(g) for g in (all_right_one_late, all_cut, mixed)] == [False, False, True]


# --- the objective ----------------------------------------------------------------------------------


def term(ratio, advantage, **options):
    """The surrogate of one action, and its derivative by the ratio's logarithm."""
    groups = groups_of([[1.0]])
    batch = normalise(pack_groups(groups), "token").with_actions(advantage=torch.tensor([advantage]))
    logp = (batch.actions["logp_raw"] + math.log(ratio)).requires_grad_()
    loss = dler_loss(kl_coef=0.0, **options).loss(Given(logp), batch).total
    loss.backward()
    return -float(loss.detach()), -float(logp.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "high", "value", "slope"),
    [
        (1.3, 1.0, 0.28, 1.28, 0.0),
        (1.3, 1.0, 0.2, 1.2, 0.0),
        (1.25, 1.0, 0.28, 1.25, 1.25),
        (1.25, 1.0, 0.2, 1.2, 0.0),
        (0.7, -1.0, 0.28, -0.8, 0.0),
        (0.9, -1.0, 0.28, -0.9, -0.9),
    ],
)
def test_the_clip_is_higher_above(ratio, advantage, high, value, slope):
    assert term(ratio, advantage, clip_high=high) == pytest.approx((value, slope), abs=1e-5)


def test_the_dual_clip_bounds_what_a_bad_token_costs():
    assert term(50.0, -1.0)[0] == pytest.approx(-50.0, rel=1e-4)
    assert term(50.0, -1.0, dual_clip=10.0) == pytest.approx((-10.0, 0.0))


def test_its_gradient_with_the_divergence_agrees_with_finite_differences():
    groups = groups_of(TWO, [[2, 1, 3, 1]] * 2)
    batch = DLERCredit()(groups, normalise(pack_groups(groups), "token"))
    n = len(batch.at)
    dice = torch.Generator().manual_seed(0)
    batch = batch.with_actions(
        **{name: batch.actions[name].double() for name in ("weight", "logp_raw", "advantage")},
        logp_ref=-1 + torch.randn(n, generator=dice).double(),
    )
    logp = (batch.actions["logp_raw"] + 0.1 * torch.randn(n, generator=dice).double()).requires_grad_()
    objective = dler_loss(kl_coef=0.5)
    assert torch.autograd.gradcheck(lambda x: objective.loss(Given(x), batch).total, (logp,), eps=1e-6, atol=1e-6)
    plain = dler_loss(kl_coef=0.0).loss(Given(logp), batch).total
    square = (batch.actions["weight"] * (logp - batch.actions["logp_ref"]).square() / 2).sum()
    assert float((objective.loss(Given(logp), batch).total - plain - 0.5 * square).detach()) == pytest.approx(0)


def test_its_constants_are_the_papers():
    assert dler_loss() == ClippedPG(0.2, 0.28, kl_coef=0.0005, kl="k2")


# --- composition ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DLER(normalise="token", objective="nft"), "objective 'nft' cannot be used with advantage"),
        (DLER(act="best-of-n"), "objective 'dler' takes ratios of log-probabilities, but acting 'best-of-n'"),
        (DLER(credit="grpo", boost=0.1), "boost is an option of credit 'dler', which 'grpo' has replaced"),
        (DLER(shaping="overlong", lengths=(8,)), "lengths is an option of reward 'truncation', which 'overlong' has"),
        (DLER(objective="grpo", clip_high=0.3), "clip_high is an option of objective 'dler'"),
    ],
)
def test_what_it_cannot_be_combined_with_is_said_in_a_line(config, said):
    load_parts()
    with pytest.raises(UserError, match=said):
        compose(config, law_raw=True)


def test_its_parts_go_with_those_of_others():
    load_parts()
    compose(GroupRL(curriculum="sec", credit="dler", shaping="truncation", selector="varied"), law_raw=True)
    compose(GroupRL(credit="dler", objective="gspo", selector="mixed", shaping="overlong"), law_raw=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"members": 1}, "members must be at least 2"),
        ({"thresholds": (0.5,)}, "which need as many lengths, not 0"),
        ({"keep": 0.0}, "keep is the share"),
        ({"scale": 1.5}, "scale lies between"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        DLER(**options)


# --- runs -------------------------------------------------------------------------------------------

WORLD = {"kinds": {"pair": [2, 2], "more": [3, 3]}, "numbers": [1, 4], "modulus": 5}
SMALL = {
    "world": "chain", "world_options": WORLD, "problems": 4, "members": 4, "minibatches": 2, "max_tokens": 6,
    "eval_every": 0, "eval_problems": 8, "eval_tokens": 12, "steps": 3, "optim": {"lr": 1e-3},
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A transformer that was shown how to answer at length, and errs."""
    folder = tmp_path_factory.mktemp("start")
    run = train(
        "sft", world="chain", world_options=WORLD, policy="tiny:width=32,depth=1,ffn=64", base=False, steps=60,
        batch=16, demonstrations=200, style="verbose", eval_every=0, eval_problems=2, optim={"lr": 5e-3},
        out=folder / "sft",
    )  # fmt: skip
    return str(run.folder / "policy")


def weights(run_or_path):
    return dict(load_policy(str(getattr(run_or_path, "folder", run_or_path))).named_parameters())


def same(a, b, **how):
    return all(torch.allclose(a[n], b[n], **how) for n in a)


def policy_of(run):
    return weights(run.folder / "policy")


def logged(run):
    with Store(run.folder, read_only=True) as store:
        return {name: m.value for name, m in store.metrics().items()}


def test_a_few_steps(start, tmp_path):
    run = train("dler", policy=start, out=tmp_path / "run", **SMALL)
    seen = logged(run)
    assert 0 < seen["truncated"].mean() < 1
    assert seen["part/in_time"] == pytest.approx(1 - seen["truncated"])
    assert (seen["groups_drawn"] >= seen["groups_kept"]).all()
    assert "kl_ref" in seen
    assert not same(policy_of(run), weights(start))
    assert run.meter["scored"] > 0


def test_without_its_parts_it_is_grpo(start, tmp_path):
    off = {"shaping": "none", "selector": "all", "credit": "grpo", "objective": "grpo", "max_draws": 1}
    ours = train("dler", policy=start, out=tmp_path / "ours", **SMALL, **off)
    theirs = train("grpo", policy=start, out=tmp_path / "theirs", **SMALL, normalise="token")
    assert same(policy_of(ours), policy_of(theirs), atol=0)
    clip = {**off, "objective": "dler", "clip_high": 0.2, "kl_coef": 0.0}
    assert same(policy_of(train("dler", policy=start, out=tmp_path / "clip", **SMALL, **clip)), policy_of(ours), atol=0)


def test_with_group_rl_it_is_the_same_composition(start, tmp_path):
    parts = {"shaping": "truncation", "selector": "varied", "credit": "dler", "objective": "dler", "max_draws": 4}
    ours = train("dler", policy=start, out=tmp_path / "ours", **SMALL)
    theirs = train("group-rl", policy=start, out=tmp_path / "theirs", **SMALL, **parts)
    assert same(policy_of(ours), policy_of(theirs), atol=0)
    train("group-rl", policy=start, out=tmp_path / "sec", **SMALL, **parts, curriculum="sec")


def test_where_every_group_is_cut_nothing_is_learnt(start, tmp_path):
    run = train("dler", policy=start, out=tmp_path / "run", **{**SMALL, "max_tokens": 1})
    seen = logged(run)
    assert seen["empty_step"].tolist() == [1.0] * 3
    assert (seen["groups_drawn"] == 16).all()  # four times the problems
    assert (seen["reward"] == 0).all()
    assert (seen["accuracy"] == 0).all()  # though some tokens alone would have matched
    assert run.meter["updates"] == 0
    assert same(policy_of(run), weights(start), atol=0)


def test_limits_by_difficulty_cost_answers_that_are_right_but_long(start, tmp_path):
    easy = {"thresholds": (0.0,), "lengths": (6, 2)}  # where anything is right at all, two tokens
    run = train("dler", policy=start, out=tmp_path / "run", **SMALL, **easy)
    seen = logged(run)
    assert (seen["reward"] < seen["accuracy"]).any()
    with pytest.raises(UserError, match="truncation at 7 tokens is beyond the longest answer"):
        train("dler", policy=start, out=tmp_path / "long", **SMALL, lengths=(7,))
    assert not (tmp_path / "long").exists()


def test_a_tenth_of_the_reward_of_cut_answers(start, tmp_path):
    seen = logged(train("dler", policy=start, out=tmp_path / "run", **SMALL, stop_properly=0.1))
    assert (seen["reward"] <= seen["accuracy"]).all()
    assert (seen["reward"] < seen["accuracy"]).any()


@pytest.mark.parametrize(("keep", "scale", "like"), [(0.25, 0.0, "start"), (1.0, 1.0, "tuned"), (0.25, 0.7, None)])
def test_at_the_end_it_may_be_merged_with_the_start(start, tmp_path, keep, scale, like):
    run = train("dler", policy=start, out=tmp_path / "run", **SMALL, merge=True, keep=keep, scale=scale)
    ended = policy_of(run)
    if like == "start":
        assert same(ended, weights(start), atol=0)
    else:
        changed = [float((ended[n] - p).abs().gt(1e-9).float().mean()) for n, p in weights(start).items()]
        assert max(changed) > 0
        assert max(changed) <= 0.26 or keep == 1.0
    with Store(run.folder, read_only=True) as store:
        seen = store.evaluations("accuracy")
        assert [e["stage"] for e in seen] == ["train/rl", "train/rl", "train/merge"]
        if like == "tuned":
            assert seen[1]["value"] == seen[2]["value"]
            assert store.evaluations("entropy")[1]["value"] == pytest.approx(store.evaluations("entropy")[2]["value"])


def test_a_run_cut_between_training_and_merging_ends_as_if_it_had_not_been(start, tmp_path, monkeypatch):
    whole = train("dler", policy=start, out=tmp_path / "whole", **SMALL, merge=True)

    def killed(s, config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dler, "merge_with_start", killed)
        with pytest.raises(KeyboardInterrupt):
            train("dler", policy=start, out=tmp_path / "cut", **SMALL, merge=True)
    ended = resume(tmp_path / "cut")
    assert same(policy_of(ended), policy_of(whole), atol=0)


def test_merging_needs_whole_weights(start, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="merge needs whole weights in one process: train without it, then use `etude"):
        train("dler", policy=start, out=tmp_path / "run", **SMALL, merge=True, lora={"rank": 2})
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_library(tmp_path):
    """A model that speaks at random is cut most of the time, and rewarded for short texts where it is not."""
    transformers = pytest.importorskip("transformers")
    from etude.policies.foreign import ForeignLM
    from etude.policies.tokenizers import CharTokenizer

    tokens = CharTokenizer()
    config = transformers.GPT2Config(vocab_size=tokens.size, n_embd=16, n_layer=1, n_head=2, n_positions=96)
    torch.manual_seed(0)
    save_policy(ForeignLM(transformers.AutoModelForCausalLM.from_config(config).eval(), tokens), tmp_path / "gpt2")
    (tmp_path / "odd.py").write_text("def odd(completions, **columns):\n    return [len(c) % 2 for c in completions]\n")
    options = {**SMALL, "max_tokens": 64, "members": 8, "reward": [f"{tmp_path / 'odd.py'}:odd"]}
    run = train("dler", policy=str(tmp_path / "gpt2"), out=tmp_path / "run", **options)
    assert run.meter["updates"] > 0
    assert not same(policy_of(run), weights(tmp_path / "gpt2"))


def test_its_claims_name_arms_that_fit():
    load_parts()
    for claim in api.method("dler").claims.values():
        for arm in claim.arms:
            if arm.method == "dler":
                options = {k: v for k, v in {**claim.options, **arm.options}.items() if k in DLER.__dataclass_fields__}
                compose(DLER(**{k: v for k, v in options.items() if k != "optim"}), law_raw=True)
