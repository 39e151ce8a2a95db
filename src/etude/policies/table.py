"""The `table` policy: a row of logits for every context, exact and fast enough for pilots and checks.

A context is the last `order` tokens before an action (fewer at the start of a sequence). A context
that was never learnt from has zero logits, that is a uniform law; it gets a row of the table when a
forward pass with gradients first meets it, in the order of the batch. Nothing is hashed or shared.
Shapes: `N` packed actions, `S` rows of the table, `V` vocabulary, `R` engine rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etude.experience.batch import Batch
from etude.experience.errors import UserError, unknown
from etude.experience.protocols import Tokenizer
from etude.experience.types import Ids
from etude.policies.fingerprint import Fingerprint
from etude.policies.outputs import Outputs

NEEDS = frozenset({"logp", "entropy", "logits", "hidden", "values"})
FILE, WEIGHTS = "table.json", "table.safetensors"
NEVER = -1e4  # logit of a token that may not be chosen: its probability is exactly 0
UNKNOWN = -1  # the place of a context without a row


class TablePolicy(nn.Module):
    """`logits` [S, V] and `values` [S], both zero at first, for up to S contexts of `order` tokens.

    `actions` above 0 leaves the policy the digits below it to choose from, and no other token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        order: int = 32,
        rows: int = 4096,
        limit: int = 512,
        actions: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if order < 1 or rows < 1:
            raise UserError(f"a table needs an order and rows of at least 1, not order={order} and rows={rows}")
        if not 0 <= actions <= 10:
            raise UserError(f"a table's actions are the first 0 to 10 digits, not {actions}")
        self.tokenizer = tokenizer
        self.order = order
        self.causal = True
        self.limit = limit
        self.token_bytes = 8 * tokenizer.size
        self.logits = nn.Parameter(torch.zeros(rows, tokenizer.size, dtype=dtype))
        self.values = nn.Parameter(torch.zeros(rows, dtype=dtype))
        self.actions = actions
        digits = tokenizer.encode("0123456789"[:actions]).tolist()
        self.barred: Tensor
        barred = torch.full((tokenizer.size,), NEVER if actions else 0.0, dtype=dtype)
        barred[digits] = 0.0
        self.register_buffer("barred", barred, persistent=False)
        self._place: dict[tuple[int, ...], int] = {}
        self._fingerprint = Fingerprint()

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def contexts(self) -> list[tuple[int, ...]]:
        """The contexts that have rows, in the order of the rows."""
        return list(self._place)

    def place(self, context: Sequence[int]) -> int:
        """The row of a context, taken now if it has none. Raises UserError once all rows are taken."""
        key = self._key(context)
        if key not in self._place:
            if len(self._place) == len(self.logits):
                raise UserError(
                    f"the table's {len(self.logits)} rows are all taken: give it more rows, "
                    f"or shorter contexts than order={self.order}"
                )
            self._place[key] = len(self._place)
        return self._place[key]

    def at(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """f[R, V]: the logits after each context."""
        return self.barred + self._look_up(self.logits, [self._place.get(self._key(c), UNKNOWN) for c in contexts])

    def forward(self, batch: Batch, needs: frozenset[str]) -> Outputs:
        """Raises UserError for unknown needs, and for branches, positions and embeddings."""
        for need in sorted(needs - NEEDS):
            raise unknown("need", need, NEEDS)
        if batch.branch is not None or batch.positions is not None or batch.inputs.is_floating_point():
            raise UserError("a table policy reads plain rows of token ids: no branches, positions or embeddings")
        contexts = self._contexts(batch)
        if torch.is_grad_enabled():
            places = [self.place(c) for c in contexts]
        else:
            places = [self._place.get(c, UNKNOWN) for c in contexts]
        logits, target = self.barred + self._look_up(self.logits, places), batch.actions["target"].to(self.device)
        values = self._look_up(self.values, places) if "values" in needs else None
        return Outputs(needs, logits, target, nn.Identity(), self.tokenizer.size, values)

    @torch.no_grad()
    def logp(self, batch: Batch) -> Tensor:
        """f32[N] at temperature 1, without gradient."""
        return self(batch, frozenset({"logp"})).logp

    def decoder(self) -> TableDecoder:
        """A decoder that remembers each row's tokens."""
        return TableDecoder(self)

    def fingerprint(self) -> str:
        """Differs wherever the table or its contexts do."""
        return self._fingerprint(self)

    def _contexts(self, batch: Batch) -> list[tuple[int, ...]]:
        """The context of each action."""
        ids = batch.inputs.tolist()
        first = batch.starts[batch.row_of].tolist()
        return [tuple(ids[max(s, p + 1 - self.order) : p + 1]) for s, p in zip(first, batch.at.tolist(), strict=True)]

    def _key(self, context: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(i) for i in context[-self.order :])

    def _look_up(self, table: Tensor, places: Sequence[int]) -> Tensor:
        index = torch.tensor(places, dtype=torch.int64, device=self.device)
        known = (index != UNKNOWN).reshape(-1, *[1] * (table.ndim - 1))
        return torch.where(known, table[index], 0.0)

    def save(self, folder: str | Path) -> None:
        """Writes table.json and table.safetensors."""
        sizes = {"order": self.order, "limit": self.limit, "actions": self.actions}
        state = {n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}
        save_file(state, Path(folder) / WEIGHTS)
        (Path(folder) / FILE).write_text(json.dumps(sizes) + "\n")

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> TablePolicy:
        """Reads what `save` wrote. Raises UserError for files that are missing or damaged."""
        folder = Path(folder)
        try:
            sizes = json.loads((folder / FILE).read_text())
            state = load_file(folder / WEIGHTS)
            policy = cls(tokenizer, sizes["order"], len(state["logits"]), sizes["limit"], sizes["actions"], dtype)
            policy.load_state_dict(state)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"no table can be read from {folder}: {str(error).splitlines()[0]}") from None
        return policy

    def get_extra_state(self) -> Tensor:
        """int32[S', order]: the contexts that have rows, -1 before the shorter ones."""
        padded = [[-1] * (self.order - len(c)) + list(c) for c in self._place]
        return torch.tensor(padded, dtype=torch.int32).reshape(len(padded), self.order)

    def set_extra_state(self, state: Tensor) -> None:
        self._place = {tuple(t for t in row if t >= 0): i for i, row in enumerate(state.tolist())}


class TableDecoder:
    """The tokens of `R` rows; their last ones are looked up."""

    def __init__(self, policy: TablePolicy) -> None:
        self.policy = policy
        self.rows: list[list[int]] = []

    def prefill(self, contexts: Sequence[Ids], room: int) -> Tensor:
        """f32[R, V]: logits after each context."""
        self.rows = [np.asarray(c).tolist() for c in contexts]
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        """int64[R] -> f32[R, V]."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._logits()

    def select(self, rows: Tensor) -> None:
        """int64[R']."""
        self.rows = [list(self.rows[i]) for i in rows.tolist()]

    def rewind(self, lengths: Tensor) -> None:
        """int64[R]."""
        self.rows = [row[:n] for row, n in zip(self.rows, lengths.tolist(), strict=True)]

    def _logits(self) -> Tensor:
        return self.policy.at(self.rows).detach().float()
