"""Delta learning: the numeric checks of its method, pairs by source and their curation, what is kept and refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etude.curation.examples import Examples, completion, pairs
from etude.experience.batch import Link, normalise, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.rows import example
from etude.experience.store import Store
from etude.learning.learner import Optim, Seat, Term, update
from etude.learning.run import Run
from etude.learning.setting import Common, Setting, setting
from etude.learning.sources import answers
from etude.methods.api import resume, train
from etude.methods.preferences.delta_learning import METHOD, DeltaLearning, collect, problems
from etude.objectives.nll import NLL
from etude.objectives.pairs import dpo_norm, normalise_pairs
from etude.objectives.reference import with_reference
from etude.policies.classifier import Classifier
from etude.policies.lm import LM
from etude.policies.zoo import load_policy, save_policy
from runs import Cut, Cutter, logged, same, weights
from small import small_lm

BETA = 5.0
LOSS = dpo_norm()


# --- the loss ------------------------------------------------------------------------------------


def at_ratios(chosen, rejected):
    """(loss, h's gradient per token) of one pair whose tokens have these log-ratios."""
    rows = [example([1], [2] * len(chosen)), example([1], [3] * len(rejected))]
    batch = pack(rows, [Link("pair", (0, 1), ("chosen", "rejected"))])
    batch = normalise_pairs(batch.with_actions(logp_ref=torch.zeros(len(batch.at)).double()))
    x = torch.tensor([*chosen, *rejected], dtype=torch.float64, requires_grad=True)

    class Out:
        logp = x

    loss = LOSS.loss(Out(), batch).total
    loss.backward()
    return float(loss.detach()), x.grad.numpy()


def test_the_loss_of_mean_ratios():
    loss, _ = at_ratios([0.1] * 3, [-0.1] * 5)
    assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-1.0))))
    assert loss == pytest.approx(0.3133, abs=1e-4)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 2), (3, 30)])
def test_at_the_start_it_is_log_2_whatever_the_lengths(n, m):
    loss, gradient = at_ratios([0.0] * n, [0.0] * m)
    assert loss == pytest.approx(math.log(2))
    assert gradient == pytest.approx([-BETA / 2 / n] * n + [BETA / 2 / m] * m)


def test_an_answer_with_every_token_twice_is_the_same_answer():
    once, _ = at_ratios([0.2, -0.1, 0.5], [-0.3, 0.1])
    twice, _ = at_ratios([0.2, 0.2, -0.1, -0.1, 0.5, 0.5], [-0.3, 0.1])
    assert once == pytest.approx(twice)


def gradient(policy, data, reference):
    """d loss / d weights of the mean over all pairs."""
    batch = normalise_pairs(with_reference(data.draw(0, len(data.links), Keys(0)), reference))
    policy.zero_grad()
    LOSS.loss(policy.forward(batch, LOSS.needs), batch).total.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def test_exchanging_the_two_sides_turns_the_gradient_round_at_the_start():
    policy = small_lm(1)
    good, bad = (
        [completion(policy.tokenizer, f"{i}=", text, 32) for i, text in enumerate(of)]
        for of in (("12", "3", "555"), ("4", "77", "6"))
    )
    forth, back = (gradient(policy, pairs(a, b), small_lm(1)) for a, b in ((good, bad), (bad, good)))
    assert forth.norm() > 0.1
    assert torch.allclose(forth, -back, rtol=1e-3, atol=1e-5)


# --- logistic regression -------------------------------------------------------------------------


def linear(w, seed=None):
    """A classifier of two classes whose class 1 has the log-odds w.x; with a `seed`, added to both classes alike."""
    policy = Classifier(len(w), 2, dtype=torch.float64)
    common = np.zeros(len(w)) if seed is None else np.random.default_rng(seed).normal(size=len(w))
    with torch.no_grad():
        policy.head.weight.copy_(torch.tensor(np.stack([common - w / 2, common + w / 2])))
    return policy


def labelled_pairs(policy, points, chosen, rejected):
    text = [" ".join(map(str, x)) for x in points]
    tokens, limit = policy.tokenizer, policy.limit
    return pairs(
        *([completion(tokens, t, str(y), limit) for t, y in zip(text, of, strict=True)] for of in (chosen, rejected))
    )


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_its_gradient_in_logistic_regression_is_half_the_difference_of_labels_wherever_the_student_stands(seed):
    draw = np.random.default_rng(5)
    x = draw.normal(size=4).astype(np.float32)
    w = draw.normal(size=4) * (0 if seed is None else 3)
    for chosen, rejected in ((1, 0), (0, 1), (1, 1), (0, 0)):
        policy = linear(w, seed)
        data = labelled_pairs(policy, x[None], [chosen], [rejected])
        found = gradient(policy, data, linear(w, seed))[: 2 * len(x)].reshape(2, -1).numpy()
        # Along w, where class 1 has +w/2 and class 0 has -w/2; labels of +-1 differ by twice what classes do.
        along = (found[1] - found[0]) / 2
        assert along == pytest.approx(-BETA / 2 * (chosen - rejected) * x.astype(float), abs=1e-6)
        assert found[0] + found[1] == pytest.approx(np.zeros(4), abs=1e-6)


def test_teachers_that_share_their_error_move_the_student_along_the_truth():
    """theta* = e1, teachers 0.35 e1 + b and 0.05 e1 + b: the difference is 0.30 e1."""
    draw = np.random.default_rng(0)
    b = np.array([0.0, 0.6, -0.5, 0.4])
    chosen, rejected = 0.35 * np.eye(4)[0] + b, 0.05 * np.eye(4)[0] + b
    assert chosen - rejected == pytest.approx([0.30, 0, 0, 0])
    x = draw.normal(size=(500, 4)).astype(np.float32)
    x = np.concatenate([x, *(x * flip for flip in ((1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)))])
    labels = [(x @ t > 0).astype(int) for t in (chosen, rejected)]
    student = np.array([0.6, 0.5, 0.5, -0.2])
    policy, reference = linear(student), linear(student)
    data = labelled_pairs(policy, x, *labels)
    batch = normalise_pairs(with_reference(data.draw(0, len(data.links), Keys(0)), reference, max_tokens=10**9))
    seat = Seat(policy, Optim(lr=0.5, algorithm="sgd", clip=1e9, tokens=10**9), 10)
    cosines = []
    for _ in range(10):
        w = (policy.head.weight[1] - policy.head.weight[0]).detach().numpy()
        cosines.append(w[0] / np.linalg.norm(w))
        update(seat, [Term(batch, dpo_norm(0.2))], Keys(0), Meter())
    assert cosines[0] == pytest.approx(0.6 / np.linalg.norm(student))
    assert min(np.diff(cosines)) > 0
    assert cosines[-1] > cosines[0] + 0.05


POINTS = {"features": 20, "classes": 2, "condition": 1, "sharpness": 1000.0, "points": 2000, "test": 1000}


def test_imitation_of_a_teacher_ends_at_the_teachers_accuracy(tmp_path):
    """1 - arccos(a) / pi: 0.614 of a teacher of 0.35, below a student of 0.6 (0.705)."""
    learn = {"objective": "nll", "problems": 2000, "batch": 50, "epochs": 4, "validation": 0,
             "optim": {"algorithm": "sgd", "lr": 1.0, "schedule": "cosine", "clip": 1e9}}  # fmt: skip
    options = {"world": "points", "world_options": POINTS, "max_tokens": 1, "eval_temperature": 0.0, "eval_every": 0,
               "eval_problems": 1000, "base": False, **learn}  # fmt: skip
    student = train("delta-learning", out=tmp_path / "s", policy="classifier:features=20,classes=2",
                    chosen="oracle:0.60-apart", **options)  # fmt: skip
    down = train("delta-learning", out=tmp_path / "d", policy=str(student.folder / "policy"), chosen="oracle:0.35",
                 **options)  # fmt: skip
    with Store(down.folder, read_only=True) as store:
        before, after = (e["value"] for e in store.evaluations("accuracy"))
    assert before == pytest.approx(0.705, abs=0.03)
    assert after == pytest.approx(0.614, abs=0.03)


# --- pairs by source -----------------------------------------------------------------------------


def written(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def author(tmp_path_factory):
    """The folder of a policy that mostly answers one of ten digits, and ends there."""
    policy = small_lm()
    seat = Seat(policy, Optim(lr=1e-2), 60)
    rows = [completion(policy.tokenizer, f"{d}=", str(e), 32) for d in range(10) for e in range(10)]
    batch = normalise(pack(rows), "token")
    for _ in range(60):
        update(seat, [Term(batch, NLL())], Keys(0), Meter())
    folder = tmp_path_factory.mktemp("author") / "policy"
    save_policy(policy, folder)
    return str(folder)


@pytest.fixture
def echo(tmp_path):
    """A data file: say the digit you are shown."""
    rows = [{"prompt": f"{'x' * i}{d}=", "answer": str(d)} for i in range(20) for d in range(10)]
    return written(tmp_path / "echo.jsonl", rows)


@pytest.fixture
def common(start, echo):
    return {"world": echo, "policy": start, "max_tokens": 2, "eval_problems": 8, "checkpoint_every": 2}


@pytest.fixture
def made(tmp_path, common):
    """What `train` is given, in a run that is open."""
    run = Run(tmp_path / "setting", {"seed": 3})
    yield setting(run, Common(**common))
    run.close()


def collected(s: Setting, config):
    """(rows as (prompt and answer, role), updates, what was logged)."""
    found = collect(s, config, problems(s, config))
    data = Examples.from_state(found["data"])
    roles = {r: role for link in data.links for r, role in zip(link.rows, link.roles, strict=True)}
    rows = [(s.policy.tokenizer.decode(row.ids), roles.get(r, "")) for r, row in enumerate(data.rows)]
    return rows, found["steps"], s.run._pending.metrics


def test_unusable_and_identical_pairs_are_dropped_and_counted(made, tmp_path):
    rows = [
        {"prompt": "1=", "chosen": "1", "rejected": "2"},
        {"prompt": "2=", "chosen": "2", "rejected": "2"},
        {"prompt": "3=", "chosen": " ", "rejected": "2"},
        {"prompt": "4=", "chosen": "4", "rejected": ""},
        {"prompt": "5=", "chosen": "5" * 40, "rejected": ""},
        {"prompt": "6=", "chosen": "6", "rejected": "66"},
    ]
    rows, steps, logged = collected(made, DeltaLearning(data=written(tmp_path / "p.jsonl", rows), batch=1, epochs=3))
    assert rows == [("1=1", "chosen"), ("1=2", "rejected"), ("6=6", "chosen"), ("6=66", "rejected")]
    assert steps == 6
    assert {k: v for k, v in logged.items() if "/" in k and k.startswith("dropped")} == {
        "dropped/identical": 1, "dropped/empty": 2, "dropped/long": 1, "dropped/absent": 0,
    }  # fmt: skip
    assert logged["pairs"] == 2
    assert (logged["chosen/length"], logged["rejected/length"]) == (pytest.approx(45 / 6), pytest.approx(5 / 6))
    assert "chosen/reward" not in logged  # the world does not know these prompts


def test_imitation_has_every_usable_chosen_answer_and_as_many_updates_as_there_are_pairs(made, tmp_path):
    rows = [{"prompt": f"{i}=", "chosen": str(i), "rejected": str(i % 3)} for i in range(9)]
    file = written(tmp_path / "p.jsonl", rows)
    rows, steps, _ = collected(made, DeltaLearning(data=file, batch=2, objective="nll"))
    assert rows == [(f"{i}={i}", "") for i in range(9)]
    assert steps == 3  # of the 6 pairs that differ
    assert collected(made, DeltaLearning(data=file, batch=2))[1] == 3


def test_files_of_completions_are_matched_by_their_prompts(made, tmp_path):
    chosen = written(tmp_path / "w.jsonl", [{"ask": f"{i}=", "completion": str(i)} for i in range(4)])
    rejected = written(tmp_path / "v.jsonl", [{"ask": f"{i}=", "completion": "9"} for i in (3, 1)])
    config = DeltaLearning(chosen=chosen, rejected=rejected, columns=("prompt=ask",), batch=1)
    rows, steps, logged = collected(made, config)
    assert rows == [("1=1", "chosen"), ("1=9", "rejected"), ("3=3", "chosen"), ("3=9", "rejected")]
    assert (steps, logged["dropped/absent"]) == (2, 2)


def test_shuffled_pairs_are_turned_round_about_half_the_time(made, tmp_path):
    file = written(tmp_path / "p.jsonl", [{"prompt": f"{i}=", "chosen": "1", "rejected": "2"} for i in range(400)])
    straight, turned = (collected(made, DeltaLearning(data=file, shuffled=on))[0] for on in (False, True))
    assert all(text[-1] == "12"[role == "rejected"] for text, role in straight)
    share = np.mean([text.endswith("2") for text, role in turned if role == "chosen"])
    assert 0.4 < share < 0.6
    assert {text for text, _ in turned} == {text for text, _ in straight}


def test_a_policy_answers_for_itself_and_one_policy_twice_answers_twice(made, author):
    asked = [made.world.problem("train", i) for i in range(60)]
    a, b = (answers(made, author, role, asked) for role in ("chosen", "rejected"))
    assert a == answers(made, author, "chosen", asked)
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 30  # by chance one in ten
    assert made.run.meter["sampled"] > 100
    absent = sum(None in pair for pair in zip(a, b, strict=True))
    assert absent < 30
    _, _, logged = collected(made, DeltaLearning(chosen=author, rejected=author, problems=60, validation=8))
    assert logged["dropped/absent"] == absent
    assert 0 < logged["dropped/identical"] < 30
    assert 0 < logged["chosen/reward"] < 0.4


def test_an_answer_that_was_cut_is_none(made, start):
    """Within two tokens a policy that was never taught to end does not."""
    texts = answers(made, start, "chosen", [made.world.problem("train", i) for i in range(20)])
    assert texts.count(None) >= 18


def test_sources_without_two_answers_are_refused_with_the_reasons(made, tmp_path):
    file = written(tmp_path / "p.jsonl", [{"prompt": "1=", "chosen": "1", "rejected": "1"}] * 3)
    with pytest.raises(UserError, match=r"none of 3 prompts has two answers to choose between \(3 identical\)"):
        collected(made, DeltaLearning(data=file))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chosen": "tiny", "data": "x.jsonl"}, "not from both"),
        ({"data": "x.jsonl", "rejected": "tiny"}, "not from both"),
        ({"chosen": "tiny"}, "name both --chosen and --rejected"),
        ({"rejected": "tiny"}, "name both --chosen and --rejected"),
        ({"rejected": "tiny", "objective": "nll"}, "name both --chosen and --rejected"),
        ({"data": "x.jsonl", "batch": 0}, "batch must be at least 1, not 0"),
        ({"data": "x.jsonl", "epochs": 0}, "epochs must be at least 1, not 0"),
        ({"data": "x.jsonl", "problems": 0}, "problems must be at least 1, not 0"),
        ({"data": "x.jsonl", "beta": 0.0}, "beta must be above 0"),
        ({"data": "x.jsonl", "validation": -1}, "validation at least 0"),
        ({"data": "x.jsonl", "objective": "nll", "shuffled": True}, "leave out one of them"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        DeltaLearning(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "say whose answers are preferred to whose"),
        ({"chosen": "oracle:plain", "rejected": "oracle:plain", "validation": 8}, "has no oracle"),
        ({"chosen": "no/such/policy", "rejected": "oracle:plain", "validation": 8}, "no policy at no/such/policy"),
        ({"data": "no-such.jsonl"}, "no-such.jsonl"),
        ({"chosen": "oracle:4", "rejected": "oracle:99", "world": "sections"}, "unknown style of the oracle .*'99'"),
        ({"chosen": "oracle:1", "rejected": "oracle:2", "world": "lock"}, "world 'lock' has many turns"),
        ({"chosen": "oracle:1", "rejected": "oracle:2", "validation": 300}, "too few to validate on 300"),
    ],
)
def test_sources_that_are_not_there(options, said, common, tmp_path):
    with pytest.raises(UserError, match=said):
        train("delta-learning", out=tmp_path / "r", **{**common, **options})


# --- learning ------------------------------------------------------------------------------------


def curve(run, metric):
    with Store(run.folder, read_only=True) as store:
        return [e["value"] for e in store.evaluations(metric)]


@pytest.fixture
def wrong(tmp_path):
    """Pairs that teach the world's problems wrongly: 9 - d over d."""
    rows = [{"prompt": f"{'y' * i}{d}=", "chosen": str(9 - d), "rejected": str(d)} for i in range(8) for d in range(10)]
    return {"data": written(tmp_path / "wrong.jsonl", rows), "batch": 8, "validation": 32}


def test_the_weights_that_did_best_on_held_back_problems_are_kept(wrong, common, tmp_path):
    options = {**common, **wrong, "eval_every": 2, "eval_problems": 20, "optim": {"lr": 3e-3}}
    run = train("delta-learning", out=tmp_path / "r", **options)
    with Store(run.folder, read_only=True) as store:
        scores = store.metrics("validation")["validation"]
        kept = int(store.metrics("kept_step")["kept_step"].value[0])
    at = scores.step.tolist()
    assert at == [0, 2, 4, 6, 8, 10]
    assert kept == at[int(scores.value.argmax())]
    assert curve(run, "kept/accuracy") == [curve(run, "accuracy")[at.index(kept)]]
    assert len(curve(run, "accuracy")) == len(at)
    last = train("delta-learning", out=tmp_path / "last", **{**options, "validation": 0})
    assert curve(last, "accuracy") == curve(run, "accuracy")
    assert not curve(last, "kept/accuracy")
    assert same(weights(last), weights(run)) == (kept == 10)


def test_right_pairs_are_learnt_and_swapped_ones_unlearnt(common, tmp_path):
    margins = {}
    for name, (good, bad) in {"right": (0, 1), "swapped": (1, 0)}.items():
        rows = []
        for i in range(64):
            answers = (str(i % 10), str((i + 3) % 10))
            rows.append({"prompt": f"{i % 10}=", "chosen": answers[good], "rejected": answers[bad]})
        run = train("delta-learning", out=tmp_path / name, data=written(tmp_path / f"{name}.jsonl", rows), batch=16,
                    epochs=5, validation=0, **{**common, "optim": {"lr": 3e-3}})  # fmt: skip
        after = load_policy(str(run.folder / "policy"))
        batch = pack([completion(after.tokenizer, f"{i}=", str(i), 32) for i in range(10)])
        before = load_policy(common["policy"])
        margins[name] = float((after.logp(batch) - before.logp(batch)).mean())
    assert margins["right"] > 0.05
    assert margins["swapped"] < -0.05


def test_imitation_is_supervised_fine_tuning(common, tmp_path):
    """All answers in one batch, so that the order of the draws does not matter."""
    rows = [{"prompt": f"{d}=", "chosen": str(9 - d), "rejected": str(d)} for d in range(10)]
    shared = {**common, "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0.0}, "batch": 10}
    a = train("delta-learning", out=tmp_path / "a", data=written(tmp_path / "p.jsonl", rows), epochs=6, objective="nll",
              validation=0, **shared)  # fmt: skip
    file = written(tmp_path / "c.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])
    b = train("sft", out=tmp_path / "b", data=file, steps=6, **shared)
    start = load_file(Path(common["policy"]) / "model.safetensors")
    for name, found in weights(a).items():
        assert torch.allclose(found, weights(b)[name], atol=1e-4)
        assert (found - start[name]).abs().max() > 1e-2


@pytest.mark.parametrize("at", [2, 8, 12])  # in the fit, after its best step, and once it is over
def test_a_cut_run_ends_as_if_it_had_not_been(at, wrong, common, tmp_path):
    options = {**common, **wrong, "eval_every": 2, "optim": {"lr": 3e-3}}
    whole = train("delta-learning", out=tmp_path / "whole", **options)
    with pytest.raises(Cut):
        train("delta-learning", out=tmp_path / "cut", reporter=Cutter(at), **options)
    resumed = resume(tmp_path / "cut")
    assert same(weights(resumed), weights(whole))
    assert logged(resumed) == logged(whole)


def test_it_runs_on_random_weights_with_two_policies_as_sources(author, tmp_path):
    run = train("delta-learning", out=tmp_path / "r", policy="tiny:depth=1,width=32", base=False, chosen=author,
                rejected=author, world="chain", world_options={"kinds": {"sum": [4, 4]}}, problems=80, batch=16,
                validation=16, max_tokens=4, eval_problems=8)  # fmt: skip
    assert run.meter["updates"] >= 1
    assert np.isfinite(curve(run, "kept/length")).all()


def test_it_runs_on_a_checkpoint_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from etude.policies.foreign import ForeignLM
    from etude.policies.tokenizers import CharTokenizer

    tokenizer = CharTokenizer()
    config = transformers.GPT2Config(vocab_size=tokenizer.size, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    save_policy(ForeignLM(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer), tmp_path / "gpt2")
    run = train("delta-learning", out=tmp_path / "r", policy=str(tmp_path / "gpt2"), world="sections",
                chosen="oracle:3", rejected="oracle:2", problems=48, batch=16, validation=8, max_tokens=8,
                eval_problems=4, optim={"lr": 1e-2})  # fmt: skip
    assert not isinstance(load_policy(str(run.folder / "policy")), LM)
    with Store(run.folder, read_only=True) as store:
        loss = store.metrics("loss")["loss"].value
    assert loss[0] == pytest.approx(math.log(2), abs=1e-5)
    assert loss[-1] < loss[0]


def test_its_claims_name_margins_and_an_ablation_that_must_take_the_effect_away():
    assert set(METHOD.claims) == {"delta-learning", "delta-learning.sections", "delta-learning.logistic"}
    for claim in METHOD.claims.values():
        roles = {a.name: a.role for a in claim.arms}
        assert any(e.role == "vanish" and roles[e.pairs[0][1][0]] == "ablation" for e in claim.endpoints)
        assert len(claim.grid) == 2
