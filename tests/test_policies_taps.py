"""Taps read and change activations, on our models and on those of `transformers`, and come off."""

from __future__ import annotations

import pytest
import torch

from etude.experience.batch import pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.rows import example
from etude.policies.lm import LM
from etude.policies.taps import tapped
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape

SHAPE = Shape(vocab=31, width=16, depth=3, heads=4, kv_heads=2, head_dim=4, ffn=24, limit=32)
SITES = ["embed", *(f"layers.{i}.{s}" for i in range(3) for s in ("attn", "mlp", "resid")), "final"]
BATCH = pack([example([1, 2], [3, 4, 5, 6])])


def tiny() -> LM:
    return LM(SHAPE, CharTokenizer(), Keys(0).torch())


def recording(into: dict[str, torch.Tensor], sites=SITES):
    return {site: (lambda x, s=site: into.__setitem__(s, x.detach().reshape(-1, x.shape[-1]))) for site in sites}


def test_sites_compose_the_residual_stream():
    lm, seen = tiny(), {}
    with lm.tapped(recording(seen)) as policy:
        states = policy.states(BATCH)
    stream = seen["embed"]
    for i in range(3):
        stream = stream + seen[f"layers.{i}.attn"] + seen[f"layers.{i}.mlp"]
        torch.testing.assert_close(seen[f"layers.{i}.resid"], stream)
    torch.testing.assert_close(seen["final"], states)


@pytest.mark.parametrize("site", SITES)
def test_what_a_tap_returns_takes_the_place_and_comes_off(site):
    lm = tiny()
    before, mark = lm.logp(BATCH), lm.fingerprint()
    with lm.tapped({site: lambda x: x + torch.linspace(-1, 1, x.shape[-1])}):
        assert (lm.logp(BATCH) - before).abs().max() > 1e-4
        assert lm.fingerprint() != mark
        decoder = lm.decoder()
        stepped = decoder.prefill([BATCH.inputs[:5].numpy()], 1).log_softmax(-1)[0, 6]
        torch.testing.assert_close(stepped, lm.logp(BATCH)[-1])
    assert torch.equal(lm.logp(BATCH), before)
    assert lm.fingerprint() == mark


def test_taps_nest_and_gradients_reach_them():
    lm = tiny()
    delta = torch.zeros(SHAPE.width, requires_grad=True)
    with lm.tapped({"layers.1.resid": lambda x: x + delta}):
        one = lm.fingerprint()
        with lm.tapped({"final": lambda x: 2 * x}):
            assert lm.fingerprint() != one
            lm(BATCH, frozenset({"logp"})).logp.sum().backward()
        assert lm.fingerprint() == one
    assert delta.grad.abs().sum() > 0


def test_taps_come_off_after_an_exception():
    lm = tiny()
    mark = lm.fingerprint()
    with pytest.raises(RuntimeError, match="stop"), lm.tapped({"embed": lambda x: 0 * x}):
        raise RuntimeError("stop")
    assert lm.fingerprint() == mark


@pytest.mark.parametrize("site", ["layers.3.mlp", "layers.1.mlps", "embedding", "layers.x.attn"])
def test_unknown_sites_are_refused(site):
    with pytest.raises(UserError, match=r"no site .* with i from 0 to 2"), tiny().tapped({site: lambda x: x}):
        pass


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX"])
def test_the_same_sites_exist_on_transformers_models(family):
    import transformers

    small = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    if family == "GPT2":
        small = {"vocab_size": 31, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32}
    else:
        small["intermediate_size"] = 24
    config = getattr(transformers, f"{family}Config")(**small)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = BATCH.inputs[None]
    seen: dict[str, torch.Tensor] = {}
    active: list[int] = []
    with torch.no_grad():
        before = model(ids).logits
        with tapped(model, recording(seen), active):
            assert torch.equal(model(ids).logits, before)
            assert active
        assert set(seen) == set(SITES)
        torch.testing.assert_close(
            seen["layers.1.resid"], seen["layers.0.resid"] + seen["layers.1.attn"] + seen["layers.1.mlp"]
        )
        for site in SITES:
            with tapped(model, {site: lambda x: x + torch.linspace(-1, 1, 16)}, active):
                assert not torch.allclose(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    assert not active


def test_ours_and_theirs_see_the_same_activations(tmp_path):
    import transformers

    lm = tiny()
    lm.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    a: dict[str, torch.Tensor] = {}
    b: dict[str, torch.Tensor] = {}
    with torch.no_grad(), lm.tapped(recording(a)), tapped(theirs, recording(b), []):
        lm.states(BATCH)
        theirs(BATCH.inputs[None])
    for site in SITES:
        torch.testing.assert_close(a[site], b[site], atol=1e-5, rtol=0)
