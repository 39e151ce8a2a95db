"""The language model policy: transformer, tokenizer, heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from etude.experience.batch import Batch
from etude.experience.errors import UserError, unknown
from etude.experience.protocols import Decoder, Tokenizer
from etude.policies import checkpoint, gguf_weights, taps
from etude.policies.cache import CacheDecoder
from etude.policies.fingerprint import Fingerprint
from etude.policies.heads import HEADS, Heads
from etude.policies.layout import Layout
from etude.policies.outputs import Outputs
from etude.policies.prefixes import shared
from etude.policies.transformer import Linear, Shape, Transformer

NEEDS = frozenset({"logp", "entropy", "logits", "hidden"}) | HEADS


class LM(nn.Module):
    """A `Policy` over tokens. `generator` draws the weights; without one they are left unset.

    Needs: `logp`, `entropy`, `logits` (for `map_logits`), `hidden`, and the names of its heads.
    """

    def __init__(self, shape: Shape, tokenizer: Tokenizer, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.tokenizer = tokenizer
        self.limit = shape.limit
        # What a layer keeps of a token: some nine vectors of the model's width, the queries and keys before and
        # after their rotation, the values, and four of the gated MLP's.
        kept = 9 * shape.width + (2 * shape.heads + 3 * shape.kv_heads) * shape.head_dim + 4 * shape.ffn
        self.token_bytes = 4 * shape.depth * kept
        self.model = Transformer(shape)
        self.lm_head = Linear(shape.width, shape.vocab, bias=False)
        self.heads = Heads()
        self._taps: list[int] = []
        self._fingerprint = Fingerprint()
        self.tie()
        if generator is not None:
            self.model.initialise(generator)
            if not shape.tie_embeddings:
                with torch.no_grad():
                    self.lm_head.weight.normal_(0.0, 0.02, generator=generator)

    def tie(self) -> None:
        """Makes embedding and unembedding one parameter where the shape says so."""
        if self.shape.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def of(cls, shape: Shape, tokenizer: Tokenizer, weights: Mapping[str, Tensor], source: object = "weights") -> Self:
        """An LM of these tensors, named as in `transformers`, with heads as `heads.NAME.weight`.

        Raises UserError, naming `source`, if a tensor is missing, unknown or of the wrong shape.
        """
        weights = dict(weights)
        if shape.tie_embeddings and "model.embed_tokens.weight" in weights:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        with torch.device("meta"):
            lm = cls(shape, tokenizer)
            for name in sorted(n.split(".")[1] for n in weights if n.startswith("heads.") and n.endswith("weight")):
                lm.heads.add(name, shape.width, len(weights[f"heads.{name}.weight"]))
        wanted = lm.state_dict()
        for name, like in wanted.items():
            if name not in weights:
                raise UserError(f"{source}: the tensor {name!r} is missing")
            if (has := tuple(weights[name].shape)) != tuple(like.shape):
                raise UserError(f"{source}: the tensor {name!r} has shape {has}, not {tuple(like.shape)}")
        if extra := sorted(weights.keys() - wanted.keys()):
            raise UserError(f"{source}: this model has no place for {extra[0]!r} ({len(extra)} such)")
        lm.load_state_dict(weights, assign=True)
        lm.tie()
        return lm

    @classmethod
    def load(cls, path: str | Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> Self:
        """From a Hugging Face folder or a GGUF file. Raises UserError where either is not sound."""
        path = Path(path)
        shape, weights = gguf_weights.read(path) if path.suffix == ".gguf" else checkpoint.read(path)
        return cls.of(shape, tokenizer, {n: w.to(dtype) for n, w in weights.items()}, path)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load` and `transformers` read. Raises UserError while adapters are
        attached: merge or remove them first."""
        state = self.state_dict()
        if lora := next((n for n in state if ".base_layer." in n), None):
            raise UserError(f"adapters are attached (at {lora.split('.base_layer')[0]}): merge or remove them to save")
        checkpoint.write(folder, self.shape, state, self.tokenizer.stops, self.tokenizer.pad)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def causal(self) -> bool:
        """Whether a token sees only what is before it."""
        return self.shape.causal

    def look_both_ways(self) -> Self:
        """Lets every token see its whole row from now on, with the weights as they are; gives this LM."""
        self.shape = self.model.shape = replace(self.shape, causal=False)
        return self

    def add_head(self, name: str, generator: torch.Generator, size: int = 1) -> Self:
        """Adds or replaces the head `values`, `reward` or `classes` (of `size` classes); gives this LM."""
        self.heads.add(name, self.shape.width, size, generator).to(self.device, self.model.norm.weight.dtype)
        return self

    def states(self, batch: Batch) -> Tensor:
        """[T, D]: hidden states after the last norm. What rows begin with alike passes the layers once, and hooks of
        one's own see it once; under `tapped` all of it passes. Raises UserError for a row beyond the limit."""
        layout = Layout(batch.lengths, self.shape.causal, batch.branch)
        positions = layout.positions if batch.positions is None else batch.positions
        longest = int(batch.lengths.max()) if batch.positions is None else int(positions.max()) + 1
        if longest > self.limit:
            raise UserError(f"a row of {longest} tokens does not fit this policy's limit of {self.limit}")
        plain = self.shape.causal and batch.branch is None and batch.positions is None and not self._taps
        same = shared(batch.inputs, batch.lengths) if plain and not batch.inputs.is_floating_point() else None
        if same is None:
            return self.model(batch.inputs, positions, layout)
        states = self.model(batch.inputs[same.kept], positions[same.kept], same.mix(layout))
        return states.index_select(0, same.where)

    def forward(self, batch: Batch, needs: frozenset[str]) -> Outputs:
        """Raises UserError for unknown needs, missing heads, rows that are too long, and log-probabilities of tokens
        that a policy which looks both ways can see."""
        for need in sorted(needs - NEEDS):
            raise unknown("need", need, NEEDS)
        if batch.inputs.device != self.device:
            batch = batch.to(self.device)
        if not self.causal and needs & {"logp", "entropy"}:
            mask = -1 if self.tokenizer.mask is None else self.tokenizer.mask
            seen = int((batch.inputs[batch.at] != mask).sum())
            if seen:
                raise UserError(
                    f"this policy looks both ways and predicts hidden tokens alone, but {seen} of {len(batch.at)} are "
                    "in sight: train it with a masked objective, as mlm-u does"
                )
        states = self.states(batch)
        aux = self.heads(needs & HEADS, states, batch)
        values = aux.pop("values", None)
        hidden = states.index_select(0, batch.at)
        return Outputs(needs, hidden, batch.actions["target"], self.lm_head, self.shape.vocab, values, aux)

    @torch.no_grad()
    def logp(self, batch: Batch) -> Tensor:
        """f32[N] at temperature 1, without gradient."""
        return self(batch, frozenset({"logp"})).logp

    def decoder(self) -> Decoder:
        """A fresh key-value cache over the current weights."""
        return CacheDecoder(self.model, self.lm_head)

    @contextmanager
    def tapped(self, sites: Mapping[str, taps.Tap]) -> Iterator[Self]:
        """This policy with activations read or changed at canonical sites; see `taps`."""
        with taps.tapped(self.model, sites, self._taps):
            yield self

    def fingerprint(self) -> str:
        """Differs wherever weights, heads, adapters or taps do."""
        return self._fingerprint(self, (self.shape, *self._taps))
