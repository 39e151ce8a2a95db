"""Refinement in two passes: what each does, its reduction to SFT, its noise window, and its schedule elsewhere."""

import json
import math

import numpy as np
import pytest
import torch

from etude.curation.examples import completion
from etude.curricula.refine import refine, smooth
from etude.experience.batch import normalise, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Clock
from etude.experience.store import Store
from etude.learning.learner import Optim, Seat, Term, update
from etude.methods.api import resume, train
from etude.methods.scheduling.lr_refinement import METHOD, LRRefinement, NoiseWindow
from etude.objectives.nll import NLL
from runs import same, weights
from small import small_lm

SGD = {"algorithm": "sgd", "schedule": "linear", "warmup": 0.0, "clip": 1e9, "lr": 1.0}
WORLD = {"points": 200, "features": 5, "flips": 0.1, "condition": 10.0}


def run(out, slug="lr-refinement", **options):
    shared = {"world": "points", "world_options": WORLD, "policy": "classifier:features=5", "base": False, "steps": 40,
              "batch": 8, "eval_every": 0, "eval_problems": 8, "optim": SGD}  # fmt: skip
    return train(slug, out=out, **{**shared, **options})


def series(run, name, stage):
    with Store(run.folder, read_only=True) as store:
        return store.metrics(name, stage)[name].value


def losses(run, metric="loss"):
    with Store(run.folder, read_only=True) as store:
        return {(e["stage"], e["step"]): e["value"] for e in store.evaluations(metric)}


# --- the two passes --------------------------------------------------------------------------------


def test_one_pass_is_sft(tmp_path):
    one, sft = run(tmp_path / "one", passes=1), run(tmp_path / "sft", "sft")
    assert same(weights(one), weights(sft))
    assert series(one, "loss", "train").tolist() == series(sft, "loss", "train").tolist()


def test_the_second_pass_has_the_schedule_of_the_norms_of_the_first(tmp_path):
    made = run(tmp_path / "run", smoothing=0.2)
    norms = series(made, "grad_norm", "train/first")
    shape = refine(norms, "l2", 0.2).shape
    assert series(made, "lr", "train/first") == pytest.approx([1 - t / 40 for t in range(40)])
    assert series(made, "lr", "train") == pytest.approx(shape)
    assert series(made, "refined/peak", "train/refine") == pytest.approx([(shape.argmax() + 1) / 40])
    assert series(made, "refined/fallback", "train/refine") == pytest.approx([0.0])
    smoothed = smooth(norms, 0.2)
    promised = (smoothed**-2).sum() ** -0.5 / (np.sqrt((smoothed**2).sum()) / 40)
    assert series(made, "refined/bound", "train/refine") == pytest.approx([promised])
    assert promised < 1


def test_adam_reads_l1_norms_after_clipping(tmp_path):
    made = run(tmp_path / "run", optim={"schedule": "cosine", "clip": 0.5, "lr": 0.05})
    l2, l1 = (series(made, name, "train/first") for name in ("grad_norm", "grad_norm_l1"))
    assert (l2 > 0.5).any()
    assert series(made, "lr", "train") == pytest.approx(0.05 * refine(l1 * np.minimum(1, 0.5 / l2), "l1").shape)


def test_both_passes_begin_alike_and_see_other_batches(tmp_path):
    made = run(tmp_path / "run")
    found = losses(made)
    assert found["train/first", 0] == found["train", 0] == pytest.approx(math.log(4))
    assert found["train", 40] < found["train", 0]
    assert series(made, "loss", "train/first")[1:].tolist() != series(made, "loss", "train")[1:].tolist()


def test_a_warm_up_is_for_the_first_pass_only(tmp_path):
    made = run(tmp_path / "run", optim={**SGD, "warmup": 0.25})
    assert series(made, "lr", "train/first")[0] == 0.0
    assert series(made, "lr", "train")[0] > 0.0


def test_shuffled_norms_are_the_same_norms(tmp_path):
    plain, shuffled = run(tmp_path / "a", smoothing=0.0), run(tmp_path / "b", smoothing=0.0, shuffle=True)
    norms = series(plain, "grad_norm", "train/first")
    assert norms.tolist() == series(shuffled, "grad_norm", "train/first").tolist()
    told = Keys(0).at("shuffle").numpy().permutation(norms)
    assert series(shuffled, "lr", "train") == pytest.approx(refine(told, "l2", 0.0).shape)
    assert not np.allclose(series(shuffled, "lr", "train"), series(plain, "lr", "train"))


def test_a_degenerate_first_pass_is_said_and_followed_by_linear_decay(tmp_path):
    """Noise of a rate that makes every norm but those of the last updates huge."""
    with pytest.warns(UserWarning, match="the second pass has linear decay: the rate would peak at"):
        made = run(tmp_path / "run", noise=1e4, noise_to=0.92, smoothing=0.0, optim={**SGD, "lr": 1e-6})
    assert series(made, "lr", "train") == pytest.approx(1e-6 * np.linspace(1, 0, 40))
    assert series(made, "refined/fallback", "train/refine") == pytest.approx([1.0])


# --- noise -----------------------------------------------------------------------------------------


def test_noise_is_added_within_its_window_alone():
    window = NoiseWindow(lambda clock, keys: clock, 2.0, 0.25, 0.5, Keys(0))
    p = torch.nn.Parameter(torch.zeros(40, 50))
    made = []
    for step in range(8):
        assert window.draw(Clock(step, 8), Keys(1)) == Clock(step, 8)
        p.grad = torch.ones(40, 50)
        window([p, torch.nn.Parameter(torch.zeros(3))])
        made.append(p.grad)
    assert [float((g - 1).std()) for g in made] == pytest.approx([0, 0, 2, 2, 0, 0, 0, 0], rel=0.1)
    window.draw(Clock(2, 8), Keys(9))
    p.grad = torch.ones(40, 50)
    window([p])
    assert torch.equal(p.grad, made[2])  # of the step alone


def test_every_schedule_sees_the_same_noise(tmp_path):
    """What is added does not depend on the arm: with a rate of about 0 the gradients of two schedules are alike."""
    noisy = {"noise": 1.0, "noise_from": 0.3, "noise_to": 0.7, "steps": 10}
    tiny = {**SGD, "lr": 1e-12}
    runs = [
        run(tmp_path / "linear", passes=1, optim=tiny, **noisy),
        run(tmp_path / "cosine", passes=1, optim={**tiny, "schedule": "cosine"}, **noisy),
        run(tmp_path / "refined", optim=tiny, **noisy),
    ]
    norms = [series(r, "grad_norm", "train") for r in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[2], rel=1e-5)
    inside = np.arange(10) // 3 == 1
    assert norms[0][inside[:10]].min() > 2 * norms[0][~inside][:3].max()


def test_it_learns_around_a_window_of_noise(tmp_path):
    """Rates fall where gradients are noise, and the last iterate is better for it."""
    noisy = {"noise": 1.0, "noise_from": 1 / 3, "noise_to": 2 / 3, "steps": 150, "optim": {**SGD, "lr": 3.0}}
    linear, refined = run(tmp_path / "linear", passes=1, **noisy), run(tmp_path / "refined", **noisy)
    rates = series(refined, "lr", "train")
    assert rates[60:90].max() < 0.1 * rates.max() < rates[:40].mean()
    assert losses(linear, "excess")["train", 150] > 4 * losses(refined, "excess")["train", 150] > 0


def test_excess_is_loss_above_the_least(tmp_path):
    made = run(tmp_path / "run", passes=1)
    loss, excess = losses(made), losses(made, "excess")
    assert {at: loss[at] - excess[at] for at in loss} == pytest.approx(
        dict.fromkeys(loss, loss["train", 0] - excess["train", 0])
    )
    deep = run(tmp_path / "deep", passes=1, policy="classifier:features=5,depth=1,width=8", steps=2)
    assert losses(deep)
    assert not losses(deep, "excess")


# --- the log ---------------------------------------------------------------------------------------


def test_the_learner_logs_both_norms_before_clipping():
    policy = small_lm()
    batch = normalise(pack([completion(policy.tokenizer, "1+1=", "2", 32)]), "token")
    said = update(Seat(policy, Optim(clip=0.01), 5), [Term(batch, NLL())], Keys(0), Meter())
    policy = small_lm()
    NLL().loss(policy.forward(batch, NLL().needs), batch).total.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert said["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert said["grad_norm_l1"] == pytest.approx(float(gradient.abs().sum()), rel=1e-5)


def test_another_method_takes_the_schedule_of_a_run(tmp_path):
    def grpo(out, **optim):
        return train(
            "grpo", world="lock", world_options={"rungs": 2}, policy="table:order=2,rows=16,actions=3", base=False,
            steps=6, problems=8, members=8, max_tokens=1, eval_problems=8, eval_every=0, out=out,
            optim={"lr": 0.1, **optim},
        )  # fmt: skip

    first = grpo(tmp_path / "first")
    second = grpo(tmp_path / "second", schedule=f"refined:{first.folder}")
    l2, l1 = (series(first, name, "train") for name in ("grad_norm", "grad_norm_l1"))
    assert series(second, "lr", "train") == pytest.approx(0.1 * refine(l1 * np.minimum(1, 1 / l2), "l1").shape)
    with pytest.raises(UserError, match="made 6 updates and this run makes 40"):
        run(tmp_path / "sft", "sft", optim={"schedule": f"refined:{first.folder}"})
    assert not (tmp_path / "sft").exists()


# --- where it runs ---------------------------------------------------------------------------------


class Cut:
    """Stops a run after a step of a stage, as a kill would."""

    def __init__(self, stage, step):
        self.at = (stage, step)

    def step(self, clock, metrics, run):
        if (clock.stage, clock.step) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [("train/first", 25), ("train", 25)])
def test_a_run_that_was_cut_ends_as_if_it_had_not_been(at, tmp_path):
    options = {"noise": 0.5, "noise_to": 0.5, "checkpoint_every": 10, "policy": "classifier:features=5,depth=1,width=8"}
    whole = run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", reporter=Cut(*at), **options)
    resumed = resume(tmp_path / "cut")
    assert same(weights(resumed), weights(whole))
    for stage in ("train/first", "train"):
        assert series(resumed, "loss", stage).tolist() == series(whole, "loss", stage).tolist()


def text(out, policy, **options):
    return train(
        "lr-refinement", world="chain_sum", policy=policy, base=False, steps=4, batch=4, demonstrations=16,
        max_tokens=8, eval_every=0, eval_problems=4, out=out, optim={"lr": 1e-3, "schedule": "linear"}, **options,
    )  # fmt: skip


def test_it_refines_a_language_model(tmp_path):
    made = text(tmp_path / "run", "tiny:depth=1,width=32")
    assert series(made, "lr", "train")[-1] == 0.0
    found = losses(made)
    assert found["train", 4] < found["train", 0] == found["train/first", 0]


def test_it_refines_a_checkpoint_of_transformers_on_a_data_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    from etude.policies.foreign import ForeignLM
    from etude.policies.tokenizers import CharTokenizer
    from etude.policies.zoo import save_policy

    tokenizer = CharTokenizer()
    config = transformers.GPT2Config(vocab_size=tokenizer.size, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    save_policy(ForeignLM(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer), tmp_path / "gpt2")
    rows = [{"prompt": f"{i}=", "completion": str(i)} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = text(tmp_path / "run", str(tmp_path / "gpt2"), data=str(tmp_path / "data.jsonl"))
    assert losses(made)["train", 4] < losses(made)["train", 0]


def test_points_can_be_read_as_text(tmp_path):
    made = run(tmp_path / "run", policy="tiny:depth=1,width=32", steps=2, max_tokens=2, passes=1, optim={})
    assert losses(made)["train", 2] < losses(made)["train", 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"passes": 3}, "passes must be 1 or 2"),
        ({"smoothing": -0.1}, "smoothing is a share"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"noise_from": 0.6, "noise_to": 0.4}, "its window go from"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        LRRefinement(**options)


def test_a_budget_that_ends_in_the_first_pass_ends_the_run_there(tmp_path):
    made = run(tmp_path / "run", budget=["updates=10"])
    assert made.meter["updates"] == 10
    assert set(losses(made)) == {("train/first", 0), ("train/first", 10)}
    assert len(series(made, "lr", "train/first")) == 10


def test_a_world_without_demonstrations_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no oracle"):
        run(tmp_path / "run", world="lock", world_options={}, policy="table")


def test_its_claims_change_nothing_but_the_schedule_and_the_noise():
    for claim in METHOD.claims.values():
        usual = claim.options.get("optim") or claim.arms[0].options["optim"]
        for arm in claim.arms:
            assert arm.method == "lr-refinement"
            assert set(arm.options) <= {"passes", "shuffle", "noise", "noise_from", "noise_to", "optim"}
            assert {**arm.options.get("optim", usual), "schedule": ""} == {**usual, "schedule": ""}
