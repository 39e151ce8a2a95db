"""Chunked logits: right in value and gradient, and never more than one chunk of them."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from etude.experience.batch import pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.rows import example
from etude.policies.lm import LM
from etude.policies.outputs import CHUNK, Outputs
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape

V, D, N = 11, 6, 23


def fields(chunk: int, needs: str = "logp entropy logits hidden"):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, V, (N,), generator=g)
    out = Outputs(frozenset(needs.split()), hidden, target, lambda h: h @ weight.T, V, chunk=chunk)
    return out, hidden, weight, target


@pytest.mark.parametrize("needs", ["logp", "logp entropy"])
@pytest.mark.parametrize("chunk", [1, 4 * V + 3, 10**6])
def test_chunks_change_neither_values_nor_gradients(chunk, needs):
    out, hidden, weight, target = fields(chunk, needs)
    logq = (hidden @ weight.T).log_softmax(-1)
    plain = logq[torch.arange(N), target]
    torch.testing.assert_close(out.logp, plain)
    mine, expected = out.logp.square().sum(), plain.square().sum()
    if "entropy" in needs:
        entropy = torch.distributions.Categorical(logits=logq).entropy()
        torch.testing.assert_close(out.entropy, entropy)
        mine, expected = mine + (out.entropy**3).sum(), expected + (entropy**3).sum()
    for a, b in zip(
        torch.autograd.grad(mine, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_map_logits_gives_what_one_pass_gives():
    out, hidden, weight, _ = fields(5 * V)
    scale = torch.linspace(0, 1, N)

    def f(logits, at):
        return logits.logsumexp(-1) * scale[at], logits.softmax(-1)[:, :3]

    a, b = out.map_logits(f)
    x, y = f((hidden @ weight.T), slice(0, N))
    torch.testing.assert_close(a, x)
    torch.testing.assert_close(b, y)
    mine = torch.autograd.grad((a**2).sum() + b.prod(1).sum(), (hidden, weight))
    theirs = torch.autograd.grad((x**2).sum() + y.prod(1).sum(), (hidden, weight))
    for g, h in zip(mine, theirs, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-12)


def test_only_what_was_asked_for_exists():
    out, *_ = fields(CHUNK, "logp")
    for name in ("entropy", "hidden", "values"):
        with pytest.raises(AttributeError, match=f"'{name}' was not asked"):
            getattr(out, name)
    with pytest.raises(AttributeError, match="add 'logits' to needs"):
        out.map_logits(lambda logits, at: logits)
    calls = []
    Outputs(frozenset({"hidden"}), torch.ones(2, D), torch.zeros(2).long(), lambda h: calls.append(h), V)
    assert not calls


def test_no_actions_give_empty_outputs():
    out = Outputs(
        frozenset({"logp", "entropy"}), torch.ones(0, D), torch.zeros(0).long(), lambda h: h @ torch.ones(D, V), V
    )
    assert out.logp.shape == out.entropy.shape == (0,)


class LogitsWatch(TorchDispatchMode):
    """Records every tensor that ends in the vocabulary and is not the head's weight: the largest one,
    and the most that were alive at a time, in elements."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.vocab, self.width = vocab, width
        self.alive: dict[int, int] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and self.vocab in t.shape and self.width not in t.shape:
                storage = t.untyped_storage()
                if (key := storage.data_ptr()) not in self.alive:
                    self.alive[key] = storage.nbytes() // t.element_size()
                    weakref.finalize(storage, self.alive.pop, key, None)
                self.largest = max(self.largest, t.numel())
                self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(("needs", "tokens"), [({"logp"}, 8_192), ({"logp", "entropy"}, 512), ({"logits"}, 512)])
def test_logits_of_a_large_vocabulary_never_exceed_one_chunk(needs, tokens):
    vocab, width = 49_152, 8
    shape = Shape(vocab, width=width, depth=1, heads=2, kv_heads=1, head_dim=4, ffn=16)
    lm = LM(shape, CharTokenizer(), Keys(0).torch())
    ids = Keys(1).numpy().integers(0, vocab, (8, tokens // 8))
    batch = pack([example(row[:1], row[1:]) for row in ids])
    with LogitsWatch(vocab, width) as watch:
        out = lm(batch, frozenset(needs))
        if "logits" in needs:
            loss = out.map_logits(lambda logits, at: logits.log_softmax(-1)[:, :5].sum(-1)).mean()
        else:
            loss = sum(getattr(out, name).mean() for name in needs)
        forward = watch.peak
        loss.backward()
    print(f"needs {sorted(needs)}: largest {watch.largest}, alive {forward} forward, {watch.peak} with backward")
    assert 0 < watch.largest <= CHUNK
    assert forward <= 4 * CHUNK  # logits, log-probabilities and their temporaries, of one chunk
    assert watch.peak <= 5 * CHUNK  # and their gradients
    assert lm.lm_head.weight.grad.abs().sum() > 0


def test_gradient_of_the_whole_model_by_finite_differences():
    shape = Shape(vocab=13, width=8, depth=2, heads=2, kv_heads=1, head_dim=4, ffn=12, qkv_bias=True, qk_norm=True)
    lm = LM(shape, CharTokenizer(), Keys(0).torch()).add_head("values", Keys(1).torch()).double()
    rows = Keys(2).numpy().integers(0, 13, (2, 7))
    batch = pack([example(rows[0][:2], rows[0][2:]), example(rows[1][:1], rows[1][1:4])])

    def loss() -> torch.Tensor:
        # In double throughout: Outputs gives float32, too coarse for differences.
        states = lm.states(batch)[batch.at]
        logq = lm.lm_head(states).log_softmax(-1)
        picked = logq.gather(-1, batch.actions["target"][:, None]).squeeze(-1)
        return (picked * torch.linspace(-1, 1, len(picked))).sum() + lm.heads.values(states).square().sum()

    loss().backward()
    rng = Keys(3).numpy()
    for name, p in lm.named_parameters():
        direction = torch.from_numpy(rng.standard_normal(tuple(p.shape)))
        with torch.no_grad():
            h = 3e-7
            p.add_(direction, alpha=h)
            up = loss()
            p.sub_(direction, alpha=2 * h)
            down = loss()
            p.add_(direction, alpha=h)
        slope = float((p.grad * direction).sum())
        assert float(up - down) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def test_logp_has_no_gradient_and_equals_forward():
    shape = Shape(vocab=13, width=8, depth=1, heads=2, kv_heads=1, head_dim=4, ffn=12)
    lm = LM(shape, CharTokenizer(), Keys(0).torch())
    batch = pack([example([1, 2], [3, 4, 5])])
    out = lm(batch, frozenset({"logp", "entropy", "hidden"}))
    assert out.hidden.shape == (3, 8)
    assert not lm.logp(batch).requires_grad
    torch.testing.assert_close(lm.logp(batch), out.logp.detach())


def test_heads_read_actions_and_last_tokens():
    shape = Shape(vocab=13, width=8, depth=1, heads=2, kv_heads=1, head_dim=4, ffn=12)
    lm = LM(shape, CharTokenizer(), Keys(0).torch())
    for i, (name, size) in enumerate({"values": 1, "reward": 1, "classes": 3}.items()):
        lm.add_head(name, Keys(i).torch(), size)
    batch = pack([example([1, 2], [3, 4, 5]), example([6], [7])])
    out = lm(batch, frozenset({"values", "reward", "classes"}))
    states = lm.states(batch)
    head = lm.heads
    torch.testing.assert_close(out.values, head.values(states[batch.at])[:, 0])
    torch.testing.assert_close(out.aux["reward"], head.reward(states[[4, 6]])[:, 0])
    torch.testing.assert_close(out.aux["classes"], head.classes(states[[4, 6]]))
    assert np.isfinite(out.values.detach()).all()
    with pytest.raises(UserError, match="unknown head 'value'"):
        lm.add_head("value", Keys(0).torch())
