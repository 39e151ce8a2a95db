"""The baselines end to end: what they train on, what they leave behind, and that a cut changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etude.experience.errors import UserError
from etude.experience.store import Store
from etude.methods.api import resume, train
from etude.policies.adapters import adapted
from etude.policies.lm import LM
from etude.policies.zoo import load_policy
from runs import Cut, Cutter, logged, same, weights

STEPS = {"steps": 3}
SMALL = {**STEPS, "problems": 4, "members": 8}
CONFIGS = {
    "sft": {**STEPS, "batch": 4, "demonstrations": 10},
    "rft": {"rounds": 2, "problems": 24, "members": 8, "steps": 3, "batch": 4},
    "grpo": {**SMALL, "kl_coef": 0.04},
    "dr-grpo": SMALL,
    "dapo": {**SMALL, "overlong_cache": 1, "max_draws": 4},
    "rloo": {**SMALL, "epochs": 2},
    "group-rl": {**SMALL, "curriculum": "easy-to-hard", "credit": "batch-token", "objective": "gspo", "minibatches": 2},
    "dpo": {**STEPS, "problems": 24, "members": 8, "batch": 4},
}
CHAIN = {
    "world": "chain_sum",
    "world_options": ("min_terms=2", "max_terms=2", "min_digits=1", "max_digits=1"),
}


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A data file: say the digit you are shown."""
    file = tmp_path_factory.mktemp("data") / "echo.jsonl"
    lines = [{"prompt": f"{'x' * i}{d}=", "answer": str(d), "category": f"x{i}"} for i in range(10) for d in range(10)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture
def common(start, echo):
    return {"world": echo, "policy": start, "max_tokens": 1, "eval_problems": 8, "checkpoint_every": 2}


def source(slug, common):
    """SFT needs a world with an oracle."""
    return {**common, **CHAIN} if slug == "sft" else common


@pytest.mark.parametrize("slug", CONFIGS)
def test_a_method_trains_and_a_cut_run_ends_as_if_it_had_not_been(slug, common, start, tmp_path):
    options = {**source(slug, common), **CONFIGS[slug]}
    run = train(slug, out=tmp_path / "whole", **options)
    assert run.meter["updates"] >= 2
    assert run.meter["trained"] > 0
    assert not same(weights(run), load_file(Path(start) / "model.safetensors"))
    with Store(run.folder, read_only=True) as store:
        found = store.evaluations("accuracy")
        assert len(found) >= 2  # before and after
        assert store.count() == 0 if slug == "sft" else store.count(kept=True) > 0
        assert np.isfinite(store.metrics("loss")["loss"].value).all()
    load_policy(str(run.folder / "policy"))

    folder = tmp_path / "cut"
    with pytest.raises(Cut):
        train(slug, out=folder, reporter=Cutter(3), **options)
    resumed = resume(folder)
    assert same(weights(resumed), weights(run))
    assert logged(resumed) == logged(run)
    before = resumed.meter.read()
    assert resume(folder).meter.read() == before  # what is finished stays as it is


@pytest.mark.parametrize("slug", ["grpo", "sft"])
def test_a_method_runs_on_random_weights_in_a_world_of_sums(slug, tmp_path):
    options = {"steps": 2, "members": 4, "problems": 2} if slug == "grpo" else CONFIGS["sft"]
    run = train(slug, out=tmp_path / "r", **CHAIN, base=False, max_tokens=6, eval_problems=4, **options)
    assert run.meter["updates"] == options["steps"]
    assert json.loads((run.folder / "config.json").read_text())["method"] == slug


# --- what they train on --------------------------------------------------------------------------


def test_sft_learns_a_file_of_prompts_or_of_chats(common, tmp_path):
    plain, chats = tmp_path / "plain.jsonl", tmp_path / "chats.jsonl"
    pairs = [(f"{d}=", str(9 - d)) for d in range(10)]
    plain.write_text("".join(json.dumps({"question": p, "completion": c}) + "\n" for p, c in pairs))
    chats.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]}) + "\n"
            for p, c in pairs
        )
    )
    learn = {"steps": 40, "batch": 10, "optim": {"lr": 2e-2}}
    a = train("sft", out=tmp_path / "a", data=str(plain), columns=("prompt=question",), **learn, **common)
    b = train("sft", out=tmp_path / "b", data=str(chats), **learn, **common)
    assert same(weights(a), weights(b))  # a lone user message is its text
    with Store(a.folder, read_only=True) as store:
        nll = store.metrics("nll")["nll"].value
    assert nll[-1] < 0.3 * nll[0]


def test_dpo_learns_a_file_of_pairs(common, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{d}=", "chosen": str(d), "rejected": str(9 - d)}) + "\n" for d in range(10))
    )
    run = train("dpo", out=tmp_path / "r", data=str(file), steps=30, batch=10, optim={"lr": 3e-3}, **common)
    with Store(run.folder, read_only=True) as store:
        margin = store.metrics("margin")["margin"].value
        loss = store.metrics("loss")["loss"].value
        assert store.metrics("accuracy")["accuracy"].value[-1] == 1.0
    assert margin[0] == pytest.approx(0.0, abs=1e-6)  # the policy is its own reference at first
    assert loss[0] == pytest.approx(np.log(2), abs=1e-6)
    assert margin[-1] > 0.1
    assert run.meter["scored"] == 20 * 5  # each of 20 rows once, however often it was drawn


def test_dpo_pairs_right_with_wrong_answers_of_one_problem(common, tmp_path):
    run = train("dpo", out=tmp_path / "r", **common, **CONFIGS["dpo"], pairs_each=1)
    with Store(run.folder, read_only=True) as store:
        kept = store.trajectories(kept=True, limit=None)
        pairs = store.metrics("pairs")["pairs"].value.tolist()
    groups = {}
    for t in kept:
        groups.setdefault(t["problem_id"], set()).add(t["correct"])
    assert all(found == {True, False} for found in groups.values())
    assert pairs == [len(groups)]


def test_rft_keeps_each_distinct_right_answer_once(common, tmp_path):
    run = train("rft", out=tmp_path / "r", **common, **CONFIGS["rft"])
    with Store(run.folder, read_only=True) as store:
        counted = store.metrics("examples")["examples"].value.tolist()
        for r, n in enumerate(counted):
            right = {
                (t["problem_id"], t["text"])
                for t in store.trajectories(stage=f"train/round{r}/collect", correct=True, limit=None)
            }
            assert n == len(right) > 0


def test_a_reward_function_of_ones_own_is_learnt_and_the_verifier_still_judges(common, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def seven(prompts, completions, answer, **more):\n    return [2.0 * ('7' in c) for c in completions]\n"
    )
    run = train(
        "grpo", out=tmp_path / "r", reward=(f"{tmp_path}/mine.py:seven",), steps=25, problems=8, members=8,
        optim={"lr": 1e-2}, **common,
    )  # fmt: skip
    with Store(run.folder, read_only=True) as store:
        sevens = store.metrics("part/seven")["part/seven"].value
        rows = store.trajectories(limit=None)
    assert sevens[-1] > 1.5 > 0.6 > sevens[0]
    assert all(t["reward"] == (2.0 if "7" in t["text"] else 0.0) for t in rows)
    assert all(t["correct"] == (t["text"] == t["answer"]) for t in rows)


def test_an_adapter_learns_and_the_weights_under_it_stay(common, start, tmp_path):
    run = train("grpo", out=tmp_path / "r", **common, **SMALL, lora={"rank": 2})
    under = load_file(run.folder / "policy" / "model.safetensors")
    assert same(under, load_file(Path(start) / "model.safetensors"))
    adapter = load_file(run.folder / "policy" / "adapter" / "adapter_model.safetensors")
    assert any(float(w.abs().max()) > 0 for n, w in adapter.items() if "lora_B" in n)
    assert adapted(load_policy(str(run.folder / "policy")))
    folder = tmp_path / "cut"
    with pytest.raises(Cut):
        train("grpo", out=folder, reporter=Cutter(3), **common, **SMALL, lora={"rank": 2})
    resumed = resume(folder)
    assert same(weights(resumed), weights(run))
    other = train("grpo", out=tmp_path / "s", **common, **SMALL, lora={"rank": 2}, seed=1)
    began = load_file(other.folder / "policy" / "adapter" / "adapter_model.safetensors")
    assert not any(torch.allclose(began[n], w, atol=0.02) for n, w in adapter.items() if "lora_A" in n)


# --- the API -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "options", "said"),
    [
        ("grpo", {"step": 1}, "unknown option 'step': did you mean steps"),
        ("grpo", {"optim": {"rl": 1.0}}, r"unknown option 'optim\.rl'"),
        ("grpo", {"world": "no-such-world"}, "unknown world 'no-such-world'"),
        ("grpo", {"policy": "no/such/policy"}, "no policy at no/such/policy"),
        ("grpo", {"world_options": ("verifier",)}, "a world option is given as name=value, not 'verifier'"),
        ("grpo", {"world_options": ("verifyer=exact",)}, "did you mean verifier"),
        ("grpo", {"reward": ("nothing.py:f",)}, "nothing.py"),
        ("sft", {"data": "missing.jsonl", "steps": 2}, "no such file: missing.jsonl"),
        ("sft", {"steps": 2}, "world 'echo' has no oracle"),
        ("sft", {"data": "x.jsonl", "columns": ("prompt",)}, "a column is given as name=value"),
        ("dapo", {"overlong_cache": 2}, "overlong cache must be 0 to 1 tokens"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_and_leaves_nothing(slug, options, said, common, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        train(slug, out=tmp_path / "r", **{**common, **options})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()


def test_a_kill_while_the_policy_is_written_is_mended_by_resuming(common, tmp_path, monkeypatch):
    def half(policy, folder):
        (Path(folder) / "model.safetensors").write_text("half")
        raise Cut

    with monkeypatch.context() as m:
        m.setattr(LM, "save", half)
        with pytest.raises(Cut):
            train("grpo", out=tmp_path / "r", **common, **SMALL)
    run = resume(tmp_path / "r")
    load_policy(str(run.folder / "policy"))


def test_a_run_of_something_else_is_not_resumed(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0}')
    for _ in range(2):  # and is let go of
        with pytest.raises(UserError, match="was not made by `etude train`"):
            resume(tmp_path)


def test_runs_without_a_place_get_one_each(common, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {**common, "steps": 1, "problems": 1, "members": 2}
    folders = {train("grpo", name="mine", **options).folder for _ in range(2)}
    assert len(folders) == 2
    assert all(f.parent == Path("runs") and f.name.startswith("mine-0-") for f in folders)


def test_world_options_may_be_a_mapping_and_a_refused_run_leaves_no_folder(start, tmp_path):
    options = {"min_terms": 2, "max_terms": 2}
    run = train("grpo", world="chain_sum", world_options=options, policy=start, max_tokens=1, eval_problems=2, steps=1)
    assert run.config["common"]["world_options"] == ("min_terms=2", "max_terms=2")
    assert run.folder.parent == Path("runs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        with pytest.raises(UserError, match="unknown world"):
            train("grpo", world="chain_summ", policy=start)
    assert not list(elsewhere.iterdir())
