"""Policies by name and path, what is saved comes back, and adapters on top of either kind of model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from etude.acting.engine import generate
from etude.experience.batch import Batch, normalise, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Limits
from etude.experience.rows import example
from etude.experience.types import GREEDY
from etude.policies import gguf_weights, zoo
from etude.policies.adapters import adapted, adapter_off, add_lora, load_adapter, merged, save_adapter
from etude.policies.foreign import ForeignLM
from etude.policies.lm import LM
from etude.policies.table import TablePolicy
from etude.policies.tokenizers import CharTokenizer, HFTokenizer
from etude.policies.zoo import ZOO, load_policy, save_policy

TOKENS = CharTokenizer()
LOGP = frozenset({"logp"})
BATCH = normalise(
    pack([example(TOKENS.prompt(a), TOKENS.completion(b)) for a, b in (("1+1=", "2"), ("ab", "a longer answer"))]),
    "token",
)


def small_lm(seed: int = 0) -> LM:
    return load_policy("tiny", Keys(seed), width=32, depth=2, heads=2, ffn=48, limit=64)  # type: ignore[return-value]


def small_gpt2() -> ForeignLM:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=TOKENS.size, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return ForeignLM(transformers.AutoModelForCausalLM.from_config(config).eval(), TOKENS)


BOTH = pytest.mark.parametrize("make", [small_lm, small_gpt2], ids=["ours", "foreign"])


def learn(policy: LM | ForeignLM, batch: Batch = BATCH, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (policy(batch, LOGP).logp * -batch.actions["weight"]).sum().backward()
        optimizer.step()


# --- names and paths --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least", "most"), [("tiny", 0.8e6, 1.2e6), ("small", 9e6, 12e6)])
def test_sizes_are_what_the_zoo_says(name: str, least: float, most: float) -> None:
    policy = load_policy(name)
    count = sum(p.numel() for p in policy.parameters())
    assert least < count < most
    assert f"{count / 1e6:.1f}M" in ZOO[name] or f"{count / 1e6:.0f}M" in ZOO[name]


def test_weights_are_drawn_from_the_keys_alone() -> None:
    torch.manual_seed(1)
    one = small_lm(0)
    torch.manual_seed(2)
    assert small_lm(0).fingerprint() == one.fingerprint()
    assert small_lm(1).fingerprint() != one.fingerprint()


def test_shapes_and_types() -> None:
    policy = load_policy("tiny", width=64, heads=2, depth=1, limit=32, dtype="bfloat16")
    assert isinstance(policy, LM)
    assert (policy.shape.width, policy.shape.head_dim, policy.shape.depth, policy.limit) == (64, 32, 1, 32)
    assert next(policy.parameters()).dtype == torch.bfloat16
    table = load_policy("table", rows=8, order=2)
    assert isinstance(table, TablePolicy)
    assert tuple(table.logits.shape) == (8, TOKENS.size)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("tinny", {}, "unknown policy 'tinny': did you mean tiny?"),
        ("runs/no-such/policy", {}, "no policy at runs/no-such/policy: there is no such file or folder"),
        ("model.gguf", {}, "no policy at model.gguf"),
        ("tiny", {"widht": 64}, "unknown size of 'tiny' 'widht': did you mean width?"),
        ("tiny", {"width": 0}, "width of 'tiny' must be at least 1, not 0"),
        ("tiny", {"width": 100, "heads": 3}, "width 100 of 'tiny' must be a multiple of twice its 3 heads"),
        ("smollm2", {"width": 64}, "'smollm2' is already trained: its width cannot be chosen"),
        ("tiny", {"dtype": "float61"}, "unknown dtype 'float61'"),
    ],
)
def test_bad_names_and_sizes_are_one_line(name: str, options: dict[str, int], line: str) -> None:
    with pytest.raises(UserError) as error:
        load_policy(name, **options)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_paths_that_hold_no_policy_are_one_line(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00")
    (tmp_path / "empty").mkdir()
    for path in (text, tmp_path / "short.gguf", tmp_path / "empty"):
        with pytest.raises(UserError) as error:
            load_policy(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not a GGUF file"):
        load_policy(str(text))


def test_without_cuda_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match="no CUDA device"):
        load_policy("tiny", device="cuda")


def test_smollm2_missing_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="make smollm2"):
        load_policy("smollm2")


@pytest.mark.smollm2
def test_smollm2_is_converted_once_answers_and_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path))
    load_policy("smollm2")
    monkeypatch.setattr(gguf_weights, "read", lambda path: pytest.fail("the GGUF file was read again"))
    policy = load_policy("smollm2")
    assert [p.name.startswith("SmolLM2-135M") for p in tmp_path.iterdir()] == [True]
    tok = policy.tokenizer
    assert isinstance(tok, HFTokenizer)
    call = generate(policy, [tok.prompt("What is the capital of France?")], [Keys(0)], Limits(max_tokens=12), GREEDY)[0]
    assert "Paris" in tok.decode(call.out)
    assert call.stop == "stop"
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "-1?"},
        {"role": "assistant", "content": "1"},
    ]
    pieces = [tok.prompt("1+1?"), tok.completion("It is 2."), tok.observation("-1?"), tok.completion("1")]
    whole = tok.hf.apply_chat_template(chat, tokenize=True, return_dict=False)
    laid = [int(i) for piece in pieces for i in piece]
    assert whole == [*laid, *tok.encode("\n")]


def test_the_list_of_names_needs_no_torch() -> None:
    code = "import sys; from etude.policies.zoo import ZOO; assert 'torch' not in sys.modules; print(*ZOO)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["table", "classifier", "tiny", "small", "smollm2"]


def test_folders_come_back_identical(tmp_path: Path) -> None:
    policy = small_lm().add_head("values", Keys(1).torch())
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path))
    assert isinstance(again, LM)
    assert again.fingerprint() == policy.fingerprint()
    assert again.tokenizer.prompt("x?").tolist() == TOKENS.prompt("x?").tolist()
    assert torch.equal(again.logp(BATCH), policy.logp(BATCH))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the policy"):
        save_policy(small_lm(), tmp_path / "file")


# --- adapters ---------------------------------------------------------------------------------------


@BOTH
def test_an_adapter_starts_as_nothing_and_learns_alone(make) -> None:
    policy = make()
    policy.add_head("values", Keys(1).torch())
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    plain, print_before = policy.logp(BATCH), policy.fingerprint()
    assert add_lora(policy, rank=4) is policy
    torch.testing.assert_close(policy.logp(BATCH), plain, rtol=0, atol=0)
    learning = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert all(".lora_" in n or n.startswith("heads.") for n in learning)
    assert "heads.values.weight" in learning
    learn(policy)
    assert (policy.logp(BATCH) - plain).abs().max() > 1e-2
    assert policy.fingerprint() != print_before
    after = {n.replace(".base_layer", ""): p for n, p in policy.named_parameters()}
    assert all(torch.equal(after[n], value) for n, value in before.items())


@BOTH
def test_adapter_off_is_exactly_the_base(make) -> None:
    base = make()
    policy = add_lora(make(), rank=2)
    learn(policy)
    adapted_logp = policy.logp(BATCH)
    with adapter_off(policy) as reference:
        assert torch.equal(reference.logp(BATCH), base.logp(BATCH))
        assert reference.fingerprint() == base.fingerprint()
    assert torch.equal(policy.logp(BATCH), adapted_logp)
    grown = policy(BATCH, LOGP).logp
    with adapter_off(policy), torch.no_grad():  # between forward and backward, as a loss does it
        policy(BATCH, LOGP)
    grown.sum().backward()
    assert all(p.grad is not None for n, p in policy.named_parameters() if ".lora_" in n)


@BOTH
def test_merged_says_the_same_and_is_a_plain_policy(make, tmp_path: Path) -> None:
    policy = add_lora(make(), rank=4, alpha=3)
    learn(policy)
    one = merged(policy)
    torch.testing.assert_close(one.logp(BATCH), policy.logp(BATCH), rtol=0, atol=1e-5)
    assert adapted(policy)
    assert not adapted(one)
    assert all(p.requires_grad for p in one.parameters())
    save_policy(one, tmp_path)
    assert torch.equal(load_policy(str(tmp_path)).logp(BATCH), one.logp(BATCH))


@BOTH
def test_adapted_policies_are_saved_with_base_and_adapter(make, tmp_path: Path) -> None:
    policy = add_lora(make(), rank=4)
    learn(policy)
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path))
    assert torch.equal(again.logp(BATCH), policy.logp(BATCH))
    with adapter_off(again):
        assert torch.equal(again.logp(BATCH), make().logp(BATCH))
    learn(again)
    assert not torch.equal(again.logp(BATCH), policy.logp(BATCH))
    save_policy(make(), tmp_path)  # over the old one, whose adapter must not survive
    assert torch.equal(load_policy(str(tmp_path)).logp(BATCH), make().logp(BATCH))


def test_peft_reads_the_adapter_on_a_transformers_twin(tmp_path: Path) -> None:
    import peft
    import transformers

    policy = add_lora(small_lm(), rank=4, targets=["q_proj", "down_proj"])
    learn(policy)
    save_policy(policy, tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    row = BATCH.select([1])
    plain = twin(row.inputs[None]).logits[0]
    twin = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    with torch.no_grad():
        seen = twin(row.inputs[None]).logits[0]
        ours = policy(row, frozenset({"logits"})).map_logits(lambda logits, part: logits)
    torch.testing.assert_close(seen[row.at], ours, rtol=0, atol=1e-4)
    assert (seen - plain).abs().max() > 1e-2


def test_an_adapter_on_a_bfloat16_policy_learns_in_float32(tmp_path: Path) -> None:
    policy = add_lora(load_policy("tiny", width=32, depth=2, heads=2, ffn=48, limit=64, dtype="bfloat16"), rank=2)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    plain = policy.logp(BATCH)
    learn(policy)
    assert (policy.logp(BATCH) - plain).abs().max() > 1e-2
    save_policy(policy, tmp_path)
    assert torch.equal(load_policy(str(tmp_path), dtype="bfloat16").logp(BATCH), policy.logp(BATCH))


def test_the_keys_draw_the_adapter_and_nothing_else_is_drawn() -> None:
    def drawn(policy: LM) -> torch.Tensor:
        return torch.cat([p.flatten() for n, p in policy.named_parameters() if "lora_A" in n])

    policy = small_lm()
    state = torch.get_rng_state()
    one = drawn(add_lora(policy, 2, keys=Keys(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, drawn(add_lora(small_lm(), 2, keys=Keys(1))))
    assert not torch.equal(one, drawn(add_lora(small_lm(), 2, keys=Keys(2))))


def test_adapters_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank of at least 1"):
        add_lora(small_lm(), 0)
    with pytest.raises(UserError, match="unknown LoRA target 'q_prj': did you mean q_proj"):
        add_lora(small_lm(), 2, targets=["q_prj"])
    with pytest.raises(UserError, match="already"):
        add_lora(add_lora(small_lm(), 2), 2)
    with pytest.raises(UserError, match="not for a TablePolicy"):
        add_lora(TablePolicy(TOKENS), 2)  # type: ignore[type-var]
    with pytest.raises(UserError, match="no adapter to turn off"), adapter_off(small_lm()):
        pass
    with pytest.raises(UserError, match="no adapter to save"):
        save_adapter(small_lm(), tmp_path)
    with pytest.raises(UserError, match="no adapter can be read"):
        load_adapter(small_lm(), tmp_path)
    save_adapter(add_lora(small_lm(), 2), tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(small_gpt2(), tmp_path)
    wider = load_policy("tiny", width=64, depth=2, heads=2, ffn=48, limit=64)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(wider, tmp_path)  # type: ignore[type-var]
