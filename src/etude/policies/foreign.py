"""Any causal language model of `transformers` behind the Policy and Decoder protocols.

For the families that `LM` does not read. Packed rows become a right-padded batch; logits are made
chunk by chunk where the model is a base model under a linear head, and for the actions only where not.
Shapes: `B` rows of at most `L` tokens, `N` packed actions, `D` width, `V` vocabulary, `R` engine rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.experience.batch import Batch
from etude.experience.errors import UserError, missing
from etude.experience.protocols import Tokenizer
from etude.experience.types import Ids

LONGEST = 4096  # tokens, for a model whose configuration names no limit


class ForeignLM(nn.Module):
    """A `transformers` causal LM as a policy. Dropout is for its maker to turn off (`load_foreign` does)."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.limit = int(getattr(model.config, "max_position_embeddings", None) or LONGEST)
        self.accepts = frozenset(inspect.signature(model.forward).parameters)
        self.plain_head = self._is_base_and_head()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, batch: Batch, needs: frozenset[str]) -> Outputs:
        """One pass over the padded batch. Raises UserError for branches, for positions that the model
        does not take, and for rows longer than `limit`."""

    def decoder(self) -> ForeignDecoder:
        """A decoder that keeps the model's own cache."""
        return ForeignDecoder(self)

    def _is_base_and_head(self) -> bool:
        """Whether logits are the output embedding of the base model's last hidden state: models may
        scale or cap them, so this is tried, not looked up."""
        head = self.model.get_output_embeddings()
        base = self.model.base_model
        if head is None or base is self.model:
            return False
        ids = torch.arange(4, device=self.device)[None]
        with torch.no_grad():
            return torch.allclose(head(base(ids)[0]), self.model(ids).logits, rtol=1e-4, atol=1e-5)


class ForeignDecoder:
    """The model's own cache for `R` rows, padded on the left. Text that is cut away is prefilled anew,
    because the caches of `transformers` cut all rows alike or not at all."""

    def __init__(self, policy: ForeignLM) -> None:
        self.policy = policy
        self.rows: list[list[int]] = []

    def prefill(self, contexts: Sequence[Ids], room: int) -> Tensor:
        """f32[R, V]: logits after each context."""
        longest = max(map(len, contexts)) + room
        if longest > self.policy.limit:
            raise UserError(f"a context with room for its answer is {longest} tokens long; limit {self.policy.limit}")
        self.rows = [np.asarray(c).tolist() for c in contexts]
        return self._refill()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """int64[R] -> f32[R, V]."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self._run(tokens[:, None])

    def select(self, rows: Tensor) -> None:
        """int64[R']."""
        self.rows = [list(self.rows[i]) for i in rows.tolist()]
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)

    def rewind(self, lengths: Tensor) -> None:
        """int64[R], each at least 1."""
        self.rows = [row[:n] for row, n in zip(self.rows, lengths.tolist(), strict=True)]
        self._refill()

    @torch.no_grad()
    def _refill(self) -> Tensor:
        device = self.policy.device
        longest = max(map(len, self.rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in self.rows], device=device)
        lengths = torch.tensor([len(r) for r in self.rows], device=device)
        self.mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        self.cache = None
        return self._run(ids)

    def _run(self, ids: Tensor) -> Tensor:
        extra = {}
        if "position_ids" in self.policy.accepts:
            extra["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.policy.accepts:
            extra["logits_to_keep"] = 1
        out = self.policy.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **extra
        )
        self.cache = out.past_key_values
        return out.logits[:, -1].float()
