"""Any causal language model of `transformers` behind the Policy and Decoder protocols.

For the families that `LM` does not read. Packed rows become a right-padded batch; logits are made
chunk by chunk where the model is a base model under a linear head, and for the actions only where not.
Shapes: `B` rows of at most `L` tokens, `N` packed actions, `D` width, `V` vocabulary, `R` engine rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etude.experience.batch import Batch
from etude.experience.errors import UserError, missing, unknown
from etude.experience.protocols import Tokenizer
from etude.experience.types import Ids
from etude.policies import taps
from etude.policies.fingerprint import Fingerprint
from etude.policies.heads import HEADS, Heads
from etude.policies.outputs import Outputs

HEADS_FILE = "heads.safetensors"
LONGEST = 4096  # tokens, for a model whose configuration names no limit
NEEDS = frozenset({"logp", "entropy", "logits", "hidden"}) | HEADS


class ForeignLM(nn.Module):
    """A `transformers` causal LM as a policy. Its dropout is for whoever made it to turn off.

    Raises UserError for a model without a key-value cache.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        config: Any = self.model.config
        self.causal = True
        self.limit = int(getattr(config, "max_position_embeddings", None) or LONGEST)
        # A layer with an MLP four times its width keeps some thirty vectors of a token.
        self.token_bytes = 4 * 30 * int(config.num_hidden_layers) * int(config.hidden_size)
        self.heads = Heads()
        self.accepts = frozenset(inspect.signature(model.forward).parameters)
        if "past_key_values" not in self.accepts:
            raise UserError(f"{type(model).__name__} has no key-value cache to decode with")
        self._split = self._is_base_and_head()
        self._taps: list[int] = []
        self._fingerprint = Fingerprint()

    @classmethod
    def load(cls, path: str | Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> Self:
        """From a Hugging Face folder or GGUF file, without dropout. Weights are never unpickled.

        Raises UserError, in one line, where `transformers` cannot read it.
        """
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError:
            raise missing("transformers", "hf", f"the model {path}") from None
        path = Path(path)
        file = path.is_file()
        where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        if file:
            where["gguf_file"] = path.name
        folder = path.parent if file else path
        try:
            config = AutoConfig.from_pretrained(folder, **where)
            for name, value in config.to_dict().items():
                if "drop" in name and isinstance(value, float):
                    setattr(config, name, 0.0)
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=None if file else True,
                output_loading_info=True,
                **where,
            )
            heads = load_file(folder / HEADS_FILE) if (folder / HEADS_FILE).is_file() else {}
        except Exception as error:  # whatever the library's parsers raise about a bad file
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"transformers cannot read a causal language model from {path}: {reason}") from error
        for name in sorted(info["missing_keys"]):  # which transformers would fill with random numbers
            raise UserError(f"{path}: the tensor {name!r} is missing")
        policy = cls(model.eval(), tokenizer)
        for name in sorted(n.split(".")[0] for n in heads if n.endswith("bias")):
            policy.add_head(name, size=len(heads[f"{name}.bias"]))
        policy.heads.load_state_dict(heads)
        return policy

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load` and `transformers` read, with the heads in a file beside the model."""
        self.model.save_pretrained(folder)
        (Path(folder) / HEADS_FILE).unlink(missing_ok=True)
        if self.heads.names:
            save_file({n: t.cpu() for n, t in self.heads.state_dict().items()}, Path(folder) / HEADS_FILE)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def add_head(self, name: str, generator: torch.Generator | None = None, size: int = 1) -> Self:
        """Adds (or replaces) the head `values`, `reward` or `classes` (of `size` classes)."""
        width = self.model.config.get_text_config().hidden_size
        self.heads.add(name, width, size, generator).to(self.device, self.model.dtype)
        return self

    def forward(self, batch: Batch, needs: frozenset[str]) -> Outputs:
        """One pass over the padded batch.

        Raises UserError for unknown needs, branches, positions that the model does not take, rows
        longer than `limit`, and hidden states or heads of a model that is not a base and a linear head.
        """
        for need in sorted(needs - NEEDS):
            raise unknown("need", need, NEEDS)
        batch = batch.to(self.device)
        inputs, slot = self._pad(batch)
        target, vocab = batch.actions["target"], self.model.config.get_text_config().vocab_size
        if not self._split:
            if needs & {"hidden", *HEADS}:
                raise UserError(f"{type(self.model).__name__} does not show the hidden states that its logits are of")
            logits = self.model(**inputs).logits.flatten(0, 1)[slot[batch.at]]
            return Outputs(needs, logits, target, nn.Identity(), vocab)
        states = self.model.base_model(**inputs)[0].flatten(0, 1)[slot]
        aux = self.heads(needs & HEADS, states, batch)
        values = aux.pop("values", None)
        head = self.model.get_output_embeddings()
        return Outputs(needs, states[batch.at], target, head, vocab, values, aux)

    @torch.no_grad()
    def logp(self, batch: Batch) -> Tensor:
        """f32[N] at temperature 1, without gradient."""
        return self(batch, frozenset({"logp"})).logp

    def decoder(self) -> ForeignDecoder:
        """A decoder over the model's own cache."""
        return ForeignDecoder(self)

    @contextmanager
    def tapped(self, sites: Mapping[str, taps.Tap]) -> Iterator[Self]:
        """This policy with activations read or changed at canonical sites; see `taps`."""
        with taps.tapped(self.model, sites, self._taps):
            yield self

    def fingerprint(self) -> str:
        """Differs wherever weights, heads, adapters or taps do."""
        return self._fingerprint(self, self._taps)

    def _pad(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        """The model's inputs [B, L, ...], and int64[T]: where each packed token stands in B * L."""
        name = type(self.model).__name__
        if batch.branch is not None:
            raise UserError(f"{name} cannot keep the branches of a row apart: use a llama, qwen2 or qwen3 model")
        if batch.positions is not None and "position_ids" not in self.accepts:
            raise UserError(f"{name} takes no positions of one's own")
        longest = int(batch.lengths.max())
        if longest > self.limit:
            raise UserError(f"a row of {longest} tokens does not fit this policy's limit of {self.limit}")
        real = torch.arange(longest, device=self.device) < batch.lengths[:, None]  # [B, L]
        slot = real.flatten().nonzero().squeeze(1)

        def padded(x: Tensor) -> Tensor:
            return x.new_zeros(real.numel(), *x.shape[1:]).index_copy(0, slot, x).unflatten(0, real.shape)

        kind = "inputs_embeds" if batch.inputs.is_floating_point() else "input_ids"
        inputs: dict[str, Any] = {kind: padded(batch.inputs), "attention_mask": real.long(), "use_cache": False}
        if batch.positions is not None:
            inputs["position_ids"] = padded(batch.positions)
        return inputs, slot

    def _is_base_and_head(self) -> bool:
        """Whether logits are the output embedding of the base model's last hidden states. Some models
        scale or cap them, so this is tried, not looked up."""
        head, base = self.model.get_output_embeddings(), self.model.base_model
        if head is None or base is self.model:
            return False
        ids = torch.arange(4, device=self.device)[None]
        with torch.no_grad():
            return torch.allclose(head(base(ids)[0]), self.model(ids).logits, rtol=1e-3, atol=1e-5)


class ForeignDecoder:
    """The model's own cache for `R` rows, padded on the left. Text that is cut away is prefilled anew,
    because the caches of `transformers` cut all rows alike or not at all."""

    def __init__(self, policy: ForeignLM) -> None:
        self.policy = policy
        self.rows: list[list[int]] = []
        self.mask = torch.zeros(0, 0)  # int64[R, L]: 1 for tokens, 0 for the padding before them
        self.cache: Any = None

    def prefill(self, contexts: Sequence[Ids], room: int) -> Tensor:
        """f32[R, V]: logits after each context. Raises UserError for an empty context or one beyond the limit."""
        for r, context in enumerate(contexts):
            if not 0 < len(context) <= (limit := self.policy.limit):
                raise UserError(f"context {r} has {len(context)} tokens: a context has 1 to {limit} for this policy")
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
        extra: dict[str, Any] = {}
        if "position_ids" in self.policy.accepts:
            extra["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.policy.accepts:
            extra["logits_to_keep"] = 1
        out = self.policy.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **extra
        )
        self.cache = out.past_key_values
        return out.logits[:, -1].float()
