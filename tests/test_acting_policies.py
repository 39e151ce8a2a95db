"""The engine on real policies: against transformers.generate and against the learner's own forward pass."""

from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from acting_fakes import same, streams
from etude.acting.agent import PolicyAgent
from etude.acting.engine import generate
from etude.acting.hooks import Force, Rewind, When
from etude.experience.batch import pack
from etude.experience.protocols import Limits
from etude.experience.rows import rows
from etude.experience.types import GREEDY, Law, Problem, Trajectory
from etude.policies.lm import LM
from etude.policies.table import TablePolicy
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape
from etude.policies.zoo import load_policy, save_policy

PROMPTS = ["1+2=", "a longer prompt with words", "?", "1+2=", "12345678"]
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(seed=0, **sizes):
    shape = Shape(
        CharTokenizer().size, **{"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64, **sizes}
    )
    policy = LM(shape, CharTokenizer(), torch.Generator().manual_seed(seed))
    with torch.no_grad():  # far from uniform, so that a wrong context shows
        for p in policy.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return policy


def theirs(model, tokenizer, contexts, new):
    """transformers.generate, greedy, padded on the left; each row up to its stop token."""
    longest = max(map(len, contexts))
    pad = [longest - len(c) for c in contexts]
    ids = torch.tensor([[tokenizer.pad] * p + c.tolist() for p, c in zip(pad, contexts, strict=True)])
    mask = torch.tensor([[0] * p + [1] * len(c) for p, c in zip(pad, contexts, strict=True)])
    stops = sorted(tokenizer.stops)
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=stops,
        pad_token_id=tokenizer.pad,
    )[:, longest:].tolist()  # fmt: skip
    ends = [next((i + 1 for i, t in enumerate(row) if t in stops), new) for row in out]
    return [row[:end] for row, end in zip(out, ends, strict=True)]


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_greedy_is_transformers_generate_token_for_token(family, tmp_path):
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = CharTokenizer()
    extra = {"head_dim": 12} if family == "Qwen3" else {}
    config = getattr(tf, f"{family}Config")(
        vocab_size=tokenizer.size, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
        **SIZES, **extra,
    )  # fmt: skip
    model = getattr(tf, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    policy = load_policy(str(tmp_path))
    contexts = [tokenizer.prompt(p) for p in PROMPTS]
    calls = generate(policy, contexts, streams(5), Limits(40), GREEDY)
    assert [c.out.tolist() for c in calls] == theirs(model, tokenizer, contexts, 40)


@pytest.mark.smollm2
def test_greedy_on_smollm2_is_transformers_generate_token_for_token():
    tf = pytest.importorskip("transformers")
    policy = load_policy("smollm2")
    with TemporaryDirectory() as folder:
        save_policy(policy, folder)
        model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    contexts = [policy.tokenizer.prompt(p) for p in ("What is 2+3?", "Name three colours, and say why you like each.")]
    calls = generate(policy, contexts, streams(2), Limits(12), GREEDY)
    assert [c.out.tolist() for c in calls] == theirs(model, policy.tokenizer, contexts, 12)


class Meddler:
    """Forces text at 4 tokens, takes some back at 10."""

    when = When(counts=frozenset({4, 10}))

    def __call__(self, row):
        return Force((20, 21)) if len(row.out) == 4 else Rewind(7) if not row.rewinds else Force(())


@pytest.mark.parametrize("hooks", [(), (Meddler(),)])
@pytest.mark.parametrize("law", [Law(), Law(0.7, top_k=20)])
def test_log_probabilities_are_those_of_the_packed_rows(law, hooks):
    policy = tiny()
    contexts = [policy.tokenizer.prompt(p) for p in PROMPTS for _ in range(3)]
    calls = generate(policy, contexts, streams(15), Limits(24), law, hooks)
    batch = pack([r for c in calls for r in rows(Trajectory(Problem("p", ""), (c,)))])
    torch.testing.assert_close(policy.logp(batch), batch.actions["logp_raw"], atol=1e-4, rtol=0)
    assert bool((batch.actions["logp_sampled"] >= batch.actions["logp_raw"] - 1e-6).all()) or law.temperature != 1
    assert len(batch.at) == sum((c.author == 0).sum() for c in calls)


@pytest.mark.parametrize("policy", [tiny(), TablePolicy(CharTokenizer())], ids=["lm", "table"])
def test_rows_do_not_depend_on_the_batch_around_them(policy):
    contexts = [policy.tokenizer.prompt(p) for p in PROMPTS for _ in range(4)]
    keys = streams(20)
    whole = generate(policy, contexts, keys, Limits(20))
    waves = generate(policy, contexts, keys, Limits(20), max_rows=3)
    back = generate(policy, contexts[::-1], keys[::-1], Limits(20))[::-1]
    alone = [generate(policy, [c], [k], Limits(20))[0] for c, k in zip(contexts, keys, strict=True)]
    for row in zip(whole, waves, back, alone, strict=True):
        assert all(same(row[0], other) for other in row[1:])


def test_a_conversation_merges_into_one_row_with_the_log_probabilities_it_was_drawn_with():
    policy = tiny()
    agent, context, calls = PolicyAgent(policy, limits=Limits(8)), policy.tokenizer.prompt("hi"), []
    for turn in range(3):
        calls += agent.generate([context], [streams(1)[0].at(turn)])
        context = np.concatenate([context, calls[-1].out, policy.tokenizer.observation("more")])
    (row,) = rows(Trajectory(Problem("p", ""), tuple(calls)))
    torch.testing.assert_close(policy.logp(pack([row])), torch.from_numpy(row.columns["logp_raw"]), atol=1e-4, rtol=0)


def test_running_into_the_limit_of_a_real_policy():
    policy = tiny(limit=12)
    contexts = [policy.tokenizer.prompt(p) for p in ("1", "123456789", "12345678901")]
    calls = generate(policy, contexts, streams(3), Limits(6))
    assert [len(c.context) + len(c.out) <= 12 for c in calls] == [True] * 3
    assert [c.stop for c in calls][1:] == ["context", "context"]
    assert len(calls[2].out) == 0
