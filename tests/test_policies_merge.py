"""Merging: the arithmetic, policies of every kind, and what cannot be merged."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app_cli import refused, runner
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.policies.adapters import add_lora, merged
from etude.policies.merge import merge, merge_weights, top
from etude.policies.table import TablePolicy
from etude.policies.tokenizers import CharTokenizer
from etude.policies.zoo import load_policy, save_policy
from small import small_lm


def moved(policy, seed=0):
    """A copy of a policy that has learnt something."""
    tuned = deepcopy(policy)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.1 * torch.randn(p.shape, generator=dice)
    return tuned


def same(a, b, **how):
    theirs = dict(b.named_parameters())
    return all(torch.allclose(p, theirs[n], **how) for n, p in a.named_parameters())


def test_the_largest_quarter_of_the_change_at_seven_tenths():
    base, delta = torch.zeros(4), torch.tensor([4.0, -3.0, 1.0, 0.5])
    assert top(delta, 0.25).tolist() == [4, 0, 0, 0]
    assert merge_weights({"w": base}, {"w": delta})["w"].tolist() == pytest.approx([2.8, 0, 0, 0])
    assert merge_weights({"w": base}, {"w": delta}, keep=0.5)["w"].tolist() == pytest.approx([2.8, -2.1, 0, 0])


@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.01, 1.0))
def test_what_is_kept_is_the_largest_and_as_much_as_was_asked(seed, size, keep):
    delta = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    kept = top(delta, keep)
    chosen = kept != 0
    assert int(chosen.sum()) == max(1, round(keep * size))
    assert torch.equal(kept[chosen], delta[chosen])
    if not chosen.all():
        assert float(delta[chosen].abs().min()) >= float(delta[~chosen].abs().max())


@given(st.floats(0, 1))
def test_with_all_of_the_change_it_is_the_line_between_the_two(scale):
    a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 5.0]])
    got = merge_weights({"w": a}, {"w": b}, keep=1.0, scale=scale)["w"]
    assert got == pytest.approx((1 - scale) * a + scale * b, abs=1e-6)
    if scale == 0.5:
        assert got == pytest.approx((a + b) / 2)


def test_each_tensor_keeps_its_own_share():
    base = {"small": torch.zeros(4), "large": torch.zeros(4)}
    tuned = {"small": torch.tensor([1e-3, 0, 0, 1e-4]), "large": torch.tensor([9.0, 8.0, 7.0, 6.0])}
    got = merge_weights(base, tuned, scale=1.0)
    assert got["small"].tolist() == pytest.approx([1e-3, 0, 0, 0])
    assert got["large"].tolist() == [9, 0, 0, 0]


def test_half_precision_is_reckoned_in_full():
    base, tuned = torch.full((4,), 256.0, dtype=torch.bfloat16), torch.tensor([258.0, 256, 256, 256]).bfloat16()
    got = merge_weights({"w": base}, {"w": tuned}, scale=1.0)["w"]
    assert got.dtype == torch.bfloat16
    assert got.tolist() == [258, 256, 256, 256]


def test_the_ends_of_a_merge():
    base = small_lm()
    tuned = moved(base)
    assert same(merge(base, deepcopy(tuned), keep=1.0, scale=1.0), tuned, atol=1e-6)
    assert same(merge(base, deepcopy(tuned), scale=0.0), base, atol=0)
    assert same(merge(base, deepcopy(base)), base, atol=0)
    part = merge(base, deepcopy(tuned))
    assert not same(part, base, atol=1e-3)
    changed = [
        (p != b).float().mean() for (_, p), (_, b) in zip(part.named_parameters(), base.named_parameters(), strict=True)
    ]
    assert max(map(float, changed)) <= 0.26
    assert part.lm_head.weight is part.model.embed_tokens.weight  # still tied


def test_a_table_goes_on_where_its_start_ended():
    start = TablePolicy(CharTokenizer(), order=2, rows=4)
    start.place([1, 2])
    tuned = deepcopy(start)
    tuned.place([1, 3])
    with torch.no_grad():
        tuned.logits[1, 7] = 2.0
    assert float(merge(start, tuned).at([[1, 3]])[0, 7].detach()) == pytest.approx(1.4)
    other = TablePolicy(CharTokenizer(), order=2, rows=4)
    other.place([5, 5])
    with pytest.raises(UserError, match="the rows of their tables are for other contexts"):
        merge(start, other)


def test_an_adapter_is_part_of_the_change():
    pytest.importorskip("peft")
    base = small_lm()
    tuned = add_lora(deepcopy(base), rank=2, keys=Keys(0))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p += 0.3
    got = merge(base, tuned, keep=1.0, scale=1.0)
    assert not same(got, base, atol=1e-3)
    assert same(got, merged(tuned), atol=1e-6)


def gpt2(**sizes):
    transformers = pytest.importorskip("transformers")
    from etude.policies.foreign import ForeignLM

    tokenizer = CharTokenizer()
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, **sizes}
    made = transformers.GPT2Config(vocab_size=tokenizer.size, **config)
    torch.manual_seed(0)
    return ForeignLM(transformers.AutoModelForCausalLM.from_config(made).eval(), tokenizer)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (lambda: small_lm(width=16), lambda: small_lm(width=24), "width is 16 in the first and 24 in the second"),
        (lambda: small_lm(depth=1), lambda: small_lm(depth=2), "depth is 1 in the first and 2 in the second"),
        (small_lm, lambda: TablePolicy(CharTokenizer()), "they are a LM and a TablePolicy"),
        (small_lm, gpt2, "they are a LM and a ForeignLM"),
        (gpt2, lambda: gpt2(n_embd=32), r"the tensor 'model.\S+' has shape \(\S+, 16\) in the first and \(\S+, 32\)"),
        (gpt2, lambda: gpt2(n_layer=2), r"the tensor 'model.\S+' is only in the second"),
        (small_lm, lambda: small_lm().add_head("values", Keys(0).torch()), "'heads.values.bias' is only in the second"),
    ],
)
def test_policies_that_are_not_alike_are_refused(first, second, said):
    with pytest.raises(UserError, match=f"these policies cannot be merged: .*{said}") as refusal:
        merge(first(), second())
    assert "\n" not in str(refusal.value)


def test_shares_that_cannot_be():
    for options in ({"keep": 0.0}, {"keep": 1.5}, {"scale": -0.1}, {"scale": 2.0}):
        with pytest.raises(UserError, match=r"keep is the share|scale lies between"):
            merge(small_lm(), small_lm(), **options)


@pytest.mark.parametrize("make", [small_lm, gpt2], ids=["ours", "foreign"])
def test_from_the_command_line(make, tmp_path, capfd):
    etude = runner(capfd)
    base = make()
    tuned = moved(base)
    save_policy(base, tmp_path / "base")
    save_policy(tuned, tmp_path / "tuned")
    said = etude("merge", tmp_path / "base", tmp_path / "tuned", "--keep", 0.5, "--scale", 0.6, "--out", tmp_path / "m")
    assert said.code == 0, said
    assert same(load_policy(str(tmp_path / "m")), merge(base, tuned, 0.5, 0.6), atol=1e-6)
    assert "exists: name a new folder" in refused(
        etude("merge", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "m")
    )


def test_misuse_on_the_command_line_is_a_line_and_leaves_nothing(tmp_path, capfd):
    etude = runner(capfd)
    save_policy(small_lm(width=16), tmp_path / "a")
    save_policy(small_lm(width=24), tmp_path / "b")
    assert "width is 16" in refused(etude("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "m"))
    assert "keep is the share" in refused(
        etude("merge", tmp_path / "a", tmp_path / "a", "--keep", 2, "--out", tmp_path / "m")
    )
    assert "no policy at" in refused(etude("merge", tmp_path / "a", tmp_path / "none", "--out", tmp_path / "m"))
    assert "out" in refused(etude("merge", tmp_path / "a", tmp_path / "b"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
