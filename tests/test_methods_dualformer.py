"""Dualformer: what a visit teaches, its limits (Searchformer, solutions only), modes, data of all kinds, resume."""

import json

import numpy as np
import pytest
import torch

from etude.acting.agent import PolicyAgent
from etude.acting.modes import Moded
from etude.curation.traces import FINAL, joined, parse
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Limits
from etude.experience.store import Store
from etude.methods.api import resume, train
from etude.methods.demonstrations.dualformer import Dualformer, Randomised, Traced, exchanged
from etude.policies.lm import LM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape
from etude.policies.zoo import load_policy, save_policy
from etude.worlds.maze import MazeWorld
from etude.worlds.oracles import step_oracle
from runs import Cut, Cutter, same, weights
from test_policies_tokenizers import words_tokenizer

PAPER = (0.45, 1 / 6, 1 / 6, 1 / 6, 0.05)
WORLD, TOKENS = MazeWorld(), CharTokenizer()
TINY = "tiny:width=16,depth=1,heads=2,ffn=32"
QUICK = {"steps": 3, "batch": 4, "demonstrations": 6, "eval_problems": 4, "max_tokens": 8, "checkpoint_every": 2}
MAZE = {"world": "grid_maze", "policy": TINY, **QUICK}


def shown(i, world=WORLD, tokenizer=TOKENS):
    problem = world.problem("train", i)
    text = step_oracle(world).demonstrate(problem, "plain", Keys(i))
    return Traced(tokenizer.prompt(problem.prompt), parse(text, world.grammar))


def at_level(level, clause_drop=0.3, **more):
    return Randomised(TOKENS, [float(k == level) for k in range(5)], clause_drop, **more)


def split(trace):
    parts = [joined([c for c in trace if (c.tag in FINAL) == final]) for final in (False, True)]
    return parts[0], parts[1]


# --- what a visit teaches --------------------------------------------------------------------------


@pytest.mark.parametrize("level", range(5))
def test_the_plan_is_taught_alike_at_every_level_and_the_loss_covers_the_target_alone(level):
    for i in range(20):
        one = shown(i)
        _, plan = split(one.trace)
        row = at_level(level)(one, Keys(i))
        end = TOKENS.completion(plan)
        assert row.ids[-len(end) :].tolist() == end.tolist()
        assert row.ids[: len(one.prompt)].tolist() == one.prompt.tolist()
        kept = int(row.info["kept"])
        assert len(row.at) == kept + len(plan) + 1  # r', s and eos
        assert row.columns["target"].tolist() == row.ids[len(one.prompt) :].tolist()
        assert (row.columns["weight"] == 1).all()
        assert row.info["level"] == level


def test_the_law_is_drawn_from_and_levels_are_drawn_anew_at_every_visit():
    row = Randomised(TOKENS, PAPER, 0.3)
    one = shown(0)
    drawn = [row(one, Keys(0).at("visit", i, 0)) for i in range(3000)]
    shares = np.bincount([int(r.info["level"]) for r in drawn], minlength=5) / 3000
    assert shares == pytest.approx(PAPER, abs=0.03)
    c = sum(k.tag == "create" for k in one.trace)
    closes = sum(k.tag == "close" for k in one.trace)
    whole = 4 * (c + closes)  # a compact clause has 4 tokens, 2 without its costs
    exact = np.dot(PAPER, [whole, 4 * c, 2 * c, 1.4 * c, 0])
    assert np.mean([r.info["kept"] for r in drawn]) == pytest.approx(exact, rel=0.04)
    assert row(one, Keys(5)).ids.tolist() == row(one, Keys(5)).ids.tolist()


def test_a_trace_that_level_3_leaves_bare_is_counted():
    assert at_level(3, 1.0)(shown(0), Keys(0)).info["bare"] == 1
    assert at_level(3, 0.0)(shown(0), Keys(0)).info["bare"] == 0
    assert at_level(4)(shown(0), Keys(0)).info["bare"] == 0  # as it should be


def test_scattered_dropping_leaves_as_many_tokens_in_their_order_and_breaks_the_grammar():
    broken = 0
    for i in range(20):
        one = shown(i)
        trace, plan = split(one.trace)
        kept, scattered = at_level(2)(one, Keys(i)), at_level(2, scattered=True)(one, Keys(i))
        assert len(scattered) == len(kept)
        out = TOKENS.decode(scattered.ids[len(one.prompt) : -1])
        left = out[: -len(plan)]
        assert out.endswith(plan)
        rest = iter(trace)
        assert all(character in rest for character in left)  # a subsequence
        broken += not WORLD.text.follows_grammar(left)
        for level in (0, 4):  # nothing to scatter where all or nothing is kept
            assert (
                at_level(level, scattered=True)(one, Keys(i)).ids.tolist() == at_level(level)(one, Keys(i)).ids.tolist()
            )
    assert broken == 20


def test_traces_of_other_problems_keep_prompt_and_plan():
    data = [shown(i) for i in range(5)]
    for i, (own, other) in enumerate(zip(data, exchanged(data), strict=True)):
        assert other.prompt is own.prompt
        assert split(other.trace) == (split(data[(i + 1) % 5].trace)[0], split(own.trace)[1])
    with pytest.raises(UserError, match="at least 2 demonstrations"):
        exchanged(data[:1])


# --- limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["grid_maze", "chain_sum"])
@pytest.mark.parametrize(("law", "style"), [((1, 0, 0, 0, 0), "plain"), ((0, 0, 0, 0, 1), "direct")])
def test_its_limits_are_sft_on_whole_traces_and_on_answers_alone(world, law, style, tmp_path):
    mine = train("dualformer", out=tmp_path / "a", law=law, **{**MAZE, "world": world}, optim={"lr": 1e-2})
    optim = {"lr": 1e-2, "schedule": "cosine", "warmup": 0.05}
    sft = train("sft", out=tmp_path / "b", style=style, **{**MAZE, "world": world}, base=False, optim=optim)
    assert same(weights(mine), weights(sft))


def test_levels_1_and_2_leave_a_chain_of_thought_whole(tmp_path):
    sums = {**MAZE, "world": "chain_sum"}
    runs = [train("dualformer", out=tmp_path / str(i), law=law, **sums)
            for i, law in enumerate([(1, 0, 0, 0, 0), (0, 0.5, 0.5, 0, 0), (0, 0, 0, 1, 0)])]  # fmt: skip
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


# --- runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["none", "other", "scattered"])
def test_a_run_is_seen_in_every_mode_and_a_cut_one_ends_as_if_it_had_not_been(control, tmp_path):
    run = train("dualformer", out=tmp_path / "whole", control=control, **MAZE)
    with Store(run.folder, read_only=True) as store:
        names = {e["metric"] for e in store.evaluations()}
        logged = store.metrics()
    assert {f"{m}{k}" for m in ("", "fast/", "slow/") for k in ("accuracy", "part/optimal", "part/trace")} <= names
    assert len(logged["kept"].value) == len(logged["level"].value) == 3
    assert logged["skipped"].value.tolist() == [0.0]
    with pytest.raises(Cut):
        train("dualformer", out=tmp_path / "cut", control=control, reporter=Cutter(3), **MAZE)
    assert same(weights(resume(tmp_path / "cut")), weights(run))
    other = train("dualformer", out=tmp_path / "other", control=control, **MAZE, seed=1)
    assert not same(weights(other), weights(run))


def test_it_learns_to_tell_modes_apart(tmp_path):
    """Six mazes by heart: asked to be fast it gives plans, asked to be slow it searches first."""
    options = {**MAZE, "world_options": {"n": 3, "least": 2}, "steps": 120, "batch": 6, "max_tokens": 60}
    options |= {"policy": "tiny:width=32,depth=1,heads=2,ffn=64", "eval_every": 0, "optim": {"lr": 1e-2}}
    run = train("dualformer", out=tmp_path / "r", law=(0.5, 0, 0, 0, 0.5), **options)
    with Store(run.folder, read_only=True) as store:
        nll = store.metrics("nll")["nll"].value
        last = {e["metric"]: e["value"] for e in store.evaluations()}
    assert nll[-1] < 0.4 * nll[0]
    assert last["fast/length"] < 0.7 * last["slow/length"]
    assert last["fast/part/trace"] == 0 < last["slow/part/trace"]


def test_a_file_of_traces_is_read_and_what_has_not_the_form_is_skipped(tmp_path):
    file = tmp_path / "traces.jsonl"
    lines = []
    for i in range(4):
        problem = WORLD.problem("train", i)
        lines.append(
            {"prompt": problem.prompt, "completion": step_oracle(WORLD).demonstrate(problem, "plain", Keys(i))}
        )
    lines += [{"prompt": "?", "completion": "+a04-"}, {"prompt": "?", "completion": "no trace"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = train("dualformer", out=tmp_path / "r", data=str(file), **MAZE)
    with Store(run.folder, read_only=True) as store:
        assert store.metrics("skipped")["skipped"].value.tolist() == [2.0]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[4:]))
    with pytest.raises(UserError, match="no demonstration is a trace that ends in a plan or an answer: 'no trace'"):
        train("dualformer", out=tmp_path / "s", data=str(file), **MAZE)


def test_it_runs_on_a_pretrained_checkpoint_in_words(tmp_path):
    """A tiny random Llama with a byte-level tokenizer and chat template, saved as Hugging Face folders are."""
    pytest.importorskip("transformers")
    tokenizer = words_tokenizer()
    shape = Shape(tokenizer.size, 16, 1, heads=2, kv_heads=1, head_dim=8, ffn=32, limit=2048)
    save_policy(LM(shape, tokenizer, Keys(0).torch()), tmp_path / "llama")
    run = train(
        "dualformer", out=tmp_path / "r", **{**MAZE, "policy": str(tmp_path / "llama")}, law=(0, 0, 0.5, 0.5, 0)
    )
    world = MazeWorld(notation="natural")
    agent = PolicyAgent(load_policy(str(run.folder / "policy")), limits=Limits(max_tokens=12))
    for mode, word in (("fast", "plan"), ("slow", "create")):
        (group,) = Moded(mode)({"actor": agent}, [world.problem("test", 0)], 2, world.score, Clock(0, 1), Keys(0))
        assert all(m.text.startswith(word) for m in group.members)


def test_it_runs_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from etude.policies.foreign import ForeignLM

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=TOKENS.size, n_embd=16, n_layer=1, n_head=2, n_positions=256)
    save_policy(ForeignLM(transformers.AutoModelForCausalLM.from_config(config).eval(), TOKENS), tmp_path / "gpt2")
    run = train("dualformer", out=tmp_path / "r", **{**MAZE, "policy": str(tmp_path / "gpt2")})
    assert isinstance(load_policy(str(run.folder / "policy")), ForeignLM)
    assert run.meter["updates"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"law": (0.5, 0.5)}, "law must be five shares"),
        ({"law": (1.0, 0.2, 0, 0, -0.2)}, "law must be five shares"),
        ({"law": (0.45, 0.1, 0.1, 0.1, 0.05)}, "law must be five shares"),
        ({"law": (float("nan"),) * 5}, "law must be five shares"),
        ({"clause_drop": 1.5}, "clause_drop is a probability"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"control": "mirror"}, "control must be none, other or scattered"),
    ],
)
def test_hyperparameters_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        Dualformer(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"style": "verse"}, "style must be one of plain, direct, not 'verse'"),
        ({"world": "gcd"}, "world 'gcd' has no oracle"),
        ({"policy": "tiny:width=16,depth=1,heads=2,ffn=32,limit=30"}, "longer than the policy's context of 30"),
    ],
)
def test_runs_that_cannot_be_are_refused(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        train("dualformer", out=tmp_path / "r", **{**MAZE, **options})
