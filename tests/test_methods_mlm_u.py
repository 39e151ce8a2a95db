"""MLM-U end to end: what it makes of a policy, that a cut changes nothing, other architectures, refusals."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etude.experience.errors import UserError
from etude.experience.store import Store
from etude.methods.api import resume, train
from etude.policies.zoo import load_policy, save_policy
from runs import Cut, Cutter, same, weights
from small import small_lm
from test_policies_tokenizers import words_tokenizer

TINY = "tiny:width=16,depth=1,heads=2,ffn=16,limit=32,nodes=10"
STAR = {
    "world": "star", "policy": TINY, "steps": 3, "batch": 8, "demonstrations": 30, "max_tokens": 4, "eval_problems": 8,
    "eval_every": 0, "eval_temperature": 0.0, "checkpoint_every": 2,
}  # fmt: skip


def short(out, **options):
    return train("mlm-u", out=out, **{**STAR, **options})


def logged(run, name):
    with Store(run.folder, read_only=True) as store:
        return store.metrics(name)[name].value.tolist()


def test_it_leaves_a_policy_that_looks_both_ways_and_fills(tmp_path):
    run = short(tmp_path / "run")
    policy = load_policy(str(run.folder / "policy"))
    assert not policy.causal
    assert run.meter["updates"] == 3
    assert run.meter["trained"] == 3 * 8 * (10 + 4)
    with Store(run.folder, read_only=True) as store:
        measured = {e["metric"] for e in store.evaluations()}
        assert {"accuracy", "part/first", "part/valid"} <= measured
        assert [e["value"] for e in store.evaluations("length")] == [4.0, 4.0]
    nll = logged(run, "nll")
    assert len(nll) == 3
    assert nll == pytest.approx(logged(run, "loss"), abs=1e-5)  # the mean over hidden tokens
    again = short(tmp_path / "more", policy=str(run.folder / "policy"))  # it may go on from there
    assert not load_policy(str(again.folder / "policy")).causal


@pytest.mark.parametrize("options", [{}, {"visible": "prefix"}, {"rates": (1.0, 1.0)}, {"normalise": "sequence"}])
def test_every_setting_trains_otherwise_and_alike_again(options, tmp_path):
    run = short(tmp_path / "one", **options)
    assert same(weights(run), weights(short(tmp_path / "two", **options)))
    if options:
        assert not same(weights(run), weights(short(tmp_path / "plain")))


def test_a_cut_run_ends_as_if_it_had_not_been(tmp_path):
    whole = short(tmp_path / "whole", steps=5)
    with pytest.raises(Cut):
        short(tmp_path / "cut", steps=5, reporter=Cutter(4))
    assert same(weights(resume(tmp_path / "cut")), weights(whole))
    assert logged(resume(tmp_path / "cut"), "nll") == logged(whole, "nll")


def test_all_answers_are_filled_as_it_is_told(tmp_path):
    left, whole = (short(tmp_path / str(b), fill={"block": b, "at_once": 4, "rule": "margin"}) for b in (1, 0))
    assert same(weights(left), weights(whole))  # only looked at otherwise
    with pytest.raises(UserError, match=r"fill\.rule takes one of confidence, margin, random"):
        short(tmp_path / "bad", fill={"rule": "best"})


def test_it_starts_from_the_same_weights_as_next_token_training(tmp_path):
    """At a vanishing learning rate both end where they began."""
    still = {"optim": {"lr": 1e-30}}
    next_token = train("sft", out=tmp_path / "sft", **STAR, **still)
    assert load_policy(str(next_token.folder / "policy")).causal
    assert same(weights(short(tmp_path / "mlm", **still)), weights(next_token))


def test_it_learns_what_is_plain_to_see(tmp_path):
    """Arms of one node: the answer is the goal, which stands in the question."""
    run = short(
        tmp_path / "run", world_options={"length": 2, "labels": 4}, policy=TINY.replace("nodes=10", "nodes=4"),
        max_tokens=2, steps=150, batch=32, eval_problems=50, optim={"lr": 1e-2}, world="star",
    )  # fmt: skip
    with Store(run.folder, read_only=True) as store:
        before, after = (e["value"] for e in store.evaluations("accuracy"))
    assert before < 0.5
    assert after > 0.9


# --- checkpoints of transformers ----------------------------------------------------------------


def checkpoint(folder, family, mask="<mask>"):
    """A random checkpoint as `transformers` writes it, with a tokenizer that has a mask token or none."""
    tf = pytest.importorskip("transformers")
    tokenizer = words_tokenizer()
    if mask:
        tokenizer.hf.add_special_tokens({"mask_token": mask})
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(vocab_size=len(tokenizer.hf), max_position_embeddings=512, **sizes)
    getattr(tf, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_checkpoint_of_transformers_is_made_to_look_both_ways(family, tmp_path):
    run = short(tmp_path / "run", policy=checkpoint(tmp_path / "hf", family), max_tokens=12)
    policy = load_policy(str(run.folder / "policy"))
    assert not policy.causal
    assert policy.tokenizer.hf.convert_ids_to_tokens(policy.tokenizer.mask) == "<mask>"
    assert np.isfinite(logged(run, "loss")).all()
    assert not same(weights(run), load_file(tmp_path / "hf" / "model.safetensors"))


def test_a_checkpoint_without_a_mask_token_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"needs a mask token, which this policy's tokenizer does not have \(mask_token\)"
    ):
        short(tmp_path / "run", policy=checkpoint(tmp_path / "hf", "Llama", None), max_tokens=12)


def test_policies_that_see_one_side_alone_are_refused(tmp_path):
    said = "mlm-u needs a transformer that can be made to look both ways"
    with pytest.raises(UserError, match=said):
        short(tmp_path / "table", policy="table")
    tf = pytest.importorskip("transformers")
    tokenizer = small_lm().tokenizer
    config = tf.GPT2Config(vocab_size=tokenizer.size, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2")
    with pytest.raises(UserError, match=said):
        short(tmp_path / "run", policy=str(tmp_path / "gpt2"))


def test_what_teaches_from_left_to_right_refuses_a_policy_that_looks_both_ways(tmp_path):
    save_policy(small_lm().look_both_ways(), tmp_path / "both")
    for slug, more in (("sft", {}), ("grpo", {"steps": 1})):
        options = {k: v for k, v in STAR.items() if slug == "sft" or k not in ("demonstrations", "batch")}
        with pytest.raises(UserError, match="looks both ways and predicts hidden tokens alone"):
            train(slug, out=tmp_path / slug, **{**options, **more, "policy": str(tmp_path / "both"), "max_tokens": 2})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 3}, "an answer of 4 tokens does not fit a canvas of 3: raise max_tokens"),
        ({"max_tokens": 30}, "a prompt of 10 tokens and 30 to fill are longer than the policy's context of 32"),
        (
            {
                "world": "grid_maze",
                "world_options": {"kind": "dfs", "n": 4},
                "style": "direct",
                "max_tokens": 17,
            },
            "a prompt of 19 tokens and 17 to fill are longer than the policy's context of 32",
        ),
        ({"rates": (0.9, 0.1)}, "rates must be the smallest and largest share"),
        ({"visible": "suffix"}, "visible"),
        ({"normalise": "word"}, "normalise"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"style": "loud"}, "style must be one of plain, not 'loud'"),
        ({"world": "lock"}, "world 'lock' has no oracle"),
    ],
)
def test_bad_options_are_one_line(options, said, tmp_path):
    if options.get("world") == "grid_maze":
        options = {**options, "policy": TINY.replace("nodes=10", "nodes=16")}
    with pytest.raises(UserError, match=said) as error:
        short(tmp_path / "run", **options)
    assert "\n" not in str(error.value)
