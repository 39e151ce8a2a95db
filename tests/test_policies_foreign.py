"""Other architectures through `transformers`: the model's own logits, packed, cached, saved and adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from etude.acting.engine import generate
from etude.experience.batch import Batch, normalise, pack, split
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Limits
from etude.experience.rows import example, rows
from etude.experience.types import GREEDY, Problem, Trajectory
from etude.policies.foreign import ForeignLM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.zoo import load_policy, save_policy

transformers = pytest.importorskip("transformers")
TOKENS = CharTokenizer()
V = TOKENS.size
ALL = frozenset({"logp", "entropy", "hidden", "logits"})
TEXTS = [("1+1=", "2"), ("a longer question", "yes"), ("?", "no answer at all")]

CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoX": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "Phi": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    # Caps its logits, so that they are not the output embedding of anything.
    "Gemma2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "final_logit_softcapping": 0.5,
        "sliding_window": 16,
    },
}


def foreign(family: str) -> ForeignLM:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=V, max_position_embeddings=64, initializer_range=0.2, **CONFIGS[family]
    )
    return ForeignLM(transformers.AutoModelForCausalLM.from_config(config).eval(), TOKENS)


def text_batch() -> Batch:
    return normalise(pack([example(TOKENS.prompt(a), TOKENS.completion(b)) for a, b in TEXTS]), "token")


def alone(policy: ForeignLM, ids: torch.Tensor) -> torch.Tensor:
    """f32[T, V]: the model's own logits for one row, without padding or cache."""
    with torch.no_grad():
        return policy.model(input_ids=ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_logits_are_the_models_own(family: str) -> None:
    policy, batch = foreign(family), text_batch()
    needs = ALL - {"hidden"} if family == "Gemma2" else ALL
    out = policy(batch, needs)
    seen = out.map_logits(lambda logits, part: logits)
    expected = torch.cat([alone(policy, r) for r in batch.inputs.split(batch.lengths.tolist())])[batch.at]
    torch.testing.assert_close(seen, expected, rtol=0, atol=2e-5)
    logq = expected.log_softmax(-1)
    target = batch.actions["target"][:, None]
    torch.testing.assert_close(policy.logp(batch), logq.gather(1, target).squeeze(1), rtol=0, atol=2e-5)
    torch.testing.assert_close(out.entropy, -(logq.exp() * logq).sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["GPT2", "Gemma2"])
def test_accumulated_gradients_are_those_of_the_whole(family: str) -> None:
    policy, batch = foreign(family), text_batch()

    def gradient(parts: list[Batch]) -> torch.Tensor:
        policy.zero_grad()
        for part in parts:
            (policy(part, frozenset({"logp"})).logp * -part.actions["weight"]).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    whole = gradient([batch])
    parts = list(split(batch, 20))
    assert len(parts) > 1
    torch.testing.assert_close(gradient(parts), whole, rtol=1e-4, atol=1e-6)
    assert whole.abs().max() > 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_the_decoder_gives_the_logits_of_the_whole_text(family: str) -> None:
    policy = foreign(family)
    decoder = policy.decoder()
    texts = [TOKENS.prompt(a).tolist() for a, _ in TEXTS]

    def check(seen: torch.Tensor) -> None:
        expected = torch.stack([alone(policy, torch.tensor(t))[-1] for t in texts])
        torch.testing.assert_close(seen, expected, rtol=0, atol=5e-5)

    def step(*tokens: int) -> None:
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        check(decoder.step(torch.tensor(tokens)))

    check(decoder.prefill([TOKENS.prompt(a) for a, _ in TEXTS], room=20))
    step(20, 30, 40)
    texts = [list(texts[i]) for i in (2, 0, 0)]  # drop, reorder, repeat
    decoder.select(torch.tensor([2, 0, 0]))
    step(21, 22, 23)
    step(24, 25, 26)
    decoder.rewind(torch.tensor([3, 7, 6]))
    texts = [t[:n] for t, n in zip(texts, (3, 7, 6), strict=True)]
    step(27, 28, 29)


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX"])
def test_what_the_engine_samples_the_forward_pass_scores_alike(family: str) -> None:
    policy = foreign(family)
    prompts = [TOKENS.prompt(a) for a, _ in TEXTS]
    calls = generate(policy, prompts, [Keys(0).at(i) for i in range(3)], Limits(max_tokens=12))
    batch = pack([r for c in calls for r in rows(Trajectory(Problem("p", ""), (c,)))])
    torch.testing.assert_close(policy.logp(batch), batch.actions["logp_raw"], rtol=0, atol=5e-5)
    greedy = generate(policy, prompts[:1], [Keys(0)], Limits(max_tokens=8), GREEDY)[0]
    theirs = policy.model.generate(
        torch.tensor(prompts[0][None]), do_sample=False, max_new_tokens=8, eos_token_id=TOKENS.eos, pad_token_id=0
    )
    assert theirs[0, len(prompts[0]) :].tolist()[: len(greedy.out)] == greedy.out.tolist()


def test_heads_taps_and_fingerprints() -> None:
    policy, batch = foreign("GPT2"), text_batch()
    before = policy.fingerprint()
    policy.add_head("values", Keys(1).torch())
    policy.add_head("classes", Keys(2).torch(), size=3)
    out = policy(batch, frozenset({"values", "classes", "hidden"}))
    torch.testing.assert_close(out.values, policy.heads.get_submodule("values")(out.hidden).squeeze(1))
    assert out.aux["classes"].shape == (3, 3)
    assert policy.fingerprint() != before
    with_heads, plain = policy.fingerprint(), policy.logp(batch)
    with policy.tapped({"layers.0.mlp": torch.zeros_like}):
        assert policy.fingerprint() != with_heads
        assert not torch.allclose(policy.logp(batch), plain)
    assert policy.fingerprint() == with_heads


@pytest.mark.parametrize("family", ["GPT2", "Gemma2"])
def test_folders_come_back_identical_and_without_dropout(family: str, tmp_path: Path) -> None:
    policy, batch = foreign(family), text_batch()
    if family == "GPT2":
        policy.add_head("reward", Keys(1).torch())
        assert policy.model.config.resid_pdrop > 0
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path))
    assert isinstance(again, ForeignLM)
    assert torch.equal(again.logp(batch), policy.logp(batch))
    again.train()
    assert torch.equal(again.logp(batch), policy.logp(batch))
    assert again.heads.names == policy.heads.names
    assert again.fingerprint() == policy.fingerprint()
    assert load_policy(str(tmp_path), dtype="bfloat16").model.dtype == torch.bfloat16
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({n: t for n, t in tensors.items() if "layers.1" not in n and "h.1" not in n}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="is missing"):
        load_policy(str(tmp_path))
    weights.write_bytes(b"damaged")
    with pytest.raises(UserError, match="transformers cannot read") as error:
        load_policy(str(tmp_path))
    assert "\n" not in str(error.value)


def test_positions_and_embeddings_pass_through() -> None:
    policy, batch = foreign("GPT2"), text_batch()
    plain = policy.logp(batch)
    batch.positions = torch.cat([torch.arange(n) for n in batch.lengths.tolist()])
    torch.testing.assert_close(policy.logp(batch), plain)
    batch.positions = batch.positions + 1
    assert not torch.allclose(policy.logp(batch), plain, atol=1e-3)
    batch.positions = None
    batch.inputs = policy.model.get_input_embeddings()(batch.inputs).detach()
    torch.testing.assert_close(policy.logp(batch), plain)


def test_what_it_cannot_do_is_refused() -> None:
    policy, batch = foreign("GPT2"), text_batch()
    long = pack([example([1], [2] * 80)])
    with pytest.raises(UserError, match="a row of 81 tokens"):
        policy.logp(long)
    with pytest.raises(UserError, match="a context has 1 to 64"):
        policy.decoder().prefill([long.inputs.numpy()], room=1)
    with pytest.raises(UserError, match="does not show the hidden states"):
        foreign("Gemma2")(batch, frozenset({"hidden"}))
    batch.branch = torch.zeros_like(batch.inputs)
    with pytest.raises(UserError, match="branches"):
        policy.logp(batch)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(UserError, match="no key-value cache"):
        ForeignLM(mamba, TOKENS)
