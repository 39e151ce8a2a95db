"""A bigram policy behind the Policy protocol: small, exact, in float64, and counting its live logits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etude.experience.batch import split
from etude.experience.keys import Keys
from etude.experience.types import Author, Call, Group, Outcome, Problem, Trajectory


class FakeOutputs:
    def __init__(self, policy: FakePolicy, hidden: Tensor, target: Tensor, chunk: int = 7) -> None:
        self.policy, self.hidden, self.chunk = policy, hidden, chunk
        logq = policy.head(hidden).log_softmax(-1)
        self.logp = logq.gather(1, target[:, None])[:, 0]
        self.entropy = -(logq.exp() * logq).sum(-1)
        self.values = policy.value(hidden)[:, 0]

    def logits(self, part: slice) -> Tensor:
        out = self.policy.head(self.hidden[part])
        self.policy.largest = max(self.policy.largest, len(out))
        return out

    def map_logits(self, f):
        parts = [slice(i, min(i + self.chunk, len(self.hidden))) for i in range(0, len(self.hidden), self.chunk)]
        return torch.cat([checkpoint(lambda p: f(self.logits(p), p), p, use_reentrant=False) for p in parts])


class FakePolicy(nn.Module):
    tokenizer = SimpleNamespace(size=11)
    limit = 1000
    causal = True
    device = torch.device("cpu")

    def __init__(self, vocab: int = 11, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab, width, dtype=torch.float64)
        self.head = nn.Linear(width, vocab, dtype=torch.float64)
        self.value = nn.Linear(width, 1, dtype=torch.float64)
        self.largest = 0  # logits rows alive at once
        self.scored = 0  # actions scored by logp

    def forward(self, batch, needs) -> FakeOutputs:
        return FakeOutputs(self, self.embed(batch.inputs)[batch.at], batch.actions["target"])

    @torch.no_grad()
    def logp(self, batch) -> Tensor:
        self.scored += len(batch.at)
        return self(batch, frozenset({"logp"})).logp

    def fingerprint(self) -> str:
        return str(sum(float(p.detach().sum()) for p in self.parameters()))

    def gradient(self) -> Tensor:
        return torch.cat(
            [torch.zeros(p.numel()).double() if p.grad is None else p.grad.flatten() for p in self.parameters()]
        )


def call(policy: FakePolicy, context, out, agent: str = "actor", shift: float = 0.0, **kwargs) -> Call:
    """A sampled call whose stored log-probabilities are the policy's own, plus `shift` x noise."""
    context, out = np.asarray(context, np.int32), np.asarray(out, np.int32)
    ids = torch.from_numpy(np.concatenate([context, out]).astype(np.int64))
    with torch.no_grad():
        logq = policy.head(policy.embed(ids)).log_softmax(-1)
    at = torch.arange(len(context) - 1, len(ids) - 1)
    logp = logq[at, ids[len(context) :]].numpy()
    noise = np.random.default_rng(int(ids.sum()) + len(ids)).normal(size=len(out))
    logp = (logp + shift * noise).astype(np.float32)
    return Call(agent, context, out, np.full(len(out), Author.SELF, np.int8), logp, logp, **kwargs)


def group(rewards, calls=None, name: str = "p", category: str = "") -> Group:
    """One member a reward; `calls[i]` are its calls (default: one call of two tokens)."""
    problem = Problem(name, "?", category=category)
    plain = Call(
        "actor",
        np.array([1, 2], np.int32),
        np.array([3, 4], np.int32),
        np.zeros(2, np.int8),
        *[np.zeros(2, np.float32)] * 2,
    )
    members = tuple(
        Trajectory(problem, tuple(calls[i]) if calls else (plain,), outcome=Outcome(float(r), bool(r > 0)), member=i)
        for i, r in enumerate(rewards)
    )
    return Group(problem, members)


def accumulated(objective, batch, policy, max_tokens=10**6):
    """(loss, gradient, metrics as sums and counts) of an objective, accumulated over micro-batches."""
    policy.zero_grad()
    batch, total, metrics = objective.prepare(policy, batch, Keys(0)), 0.0, {}
    for micro in split(batch, max_tokens):
        loss = objective.loss(policy(micro, objective.needs), micro)
        loss.total.backward()
        total += float(loss.total.detach())
        for name, (value, n) in loss.metrics.items():
            s, c = metrics.get(name, (0.0, 0.0))
            metrics[name] = (s + value, c + n)
    return total, policy.gradient().clone(), metrics
