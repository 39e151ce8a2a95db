"""A small policy whose next-token logits depend on the whole history, for tests of the engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from etude.experience.keys import Keys


class Letters:
    """Ids 0 pad, 1 start, 2 stop, then one piece of text each."""

    notation = "compact"

    def __init__(self, pieces=("a", "b", "c", "ab", "bc", "x\n", ".", " ")):
        self.pieces = ("", "", "", *pieces)
        self.size, self.pad, self.stops = len(self.pieces), 0, frozenset({2})

    def encode(self, text):
        return np.array([self.pieces.index(c) for c in text], np.int32)

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def prompt(self, prompt):
        return np.concatenate([[1], self.encode(prompt)]).astype(np.int32)

    def completion(self, text):
        return np.concatenate([self.encode(text), [2]]).astype(np.int32)

    def observation(self, text):
        return self.encode(f" {text} ")


class Fake:
    """Logits are a row of a random table, picked by a polynomial hash of all tokens so far."""

    device = torch.device("cpu")
    causal = True

    def __init__(self, tokenizer=None, limit=64, seed=0, stop_bias=0.0, scale=1.5):
        self.tokenizer = tokenizer or Letters()
        self.limit = limit
        self.table = scale * torch.randn(97, self.tokenizer.size, generator=torch.Generator().manual_seed(seed))
        self.table[:, 0:2] = float("-inf")
        self.table[:, 2] += stop_bias
        self.prefilled: list[int] = []  # rows of each prefill
        self.fed = 0  # tokens that went through any decoder

    def logits(self, ids) -> Tensor:
        state = 7
        for i in ids:
            state = (state * 31 + int(i) + 1) % 97
        return self.table[state]

    def decoder(self):
        return FakeDecoder(self)


class FakeDecoder:
    def __init__(self, policy):
        self.policy, self.rows = policy, []

    def prefill(self, contexts, room):
        self.rows = [list(map(int, c)) for c in contexts]
        self.policy.prefilled.append(len(self.rows))
        self.policy.fed += sum(map(len, self.rows))
        return self._logits()

    def step(self, tokens):
        self.policy.fed += len(self.rows)
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
            assert len(row) <= self.policy.limit
        return self._logits()

    def select(self, rows):
        self.rows = [list(self.rows[i]) for i in rows.tolist()]

    def rewind(self, lengths):
        for row, n in zip(self.rows, lengths.tolist(), strict=True):
            assert 0 < n <= len(row)
            del row[n:]

    def _logits(self):
        return torch.stack([self.policy.logits(r) for r in self.rows])


def streams(n, seed=0):
    return [Keys(seed).at("row", i) for i in range(n)]


def same(a, b, logp=True):
    """Whether two calls hold the same tokens, authors and reasons (and log-probabilities)."""
    equal = a.out.tolist() == b.out.tolist() and a.author.tolist() == b.author.tolist() and a.stop == b.stop
    return equal and (
        not logp
        or (
            np.allclose(a.logp_raw, b.logp_raw, atol=1e-5, equal_nan=True)
            and np.allclose(a.logp_sampled, b.logp_sampled, atol=1e-5, equal_nan=True)
        )
    )
