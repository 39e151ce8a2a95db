"""GGUF files of the Llama architecture, such as SmolLM2, as a shape and float32 tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etude.experience.errors import UserError, missing
from etude.policies.transformer import Shape

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def read(path: str | Path) -> tuple[Shape, dict[str, Tensor]]:
    """The shape and tensors, dequantised and named as in `transformers`.

    Raises UserError for a file that is damaged or of another architecture.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise missing("gguf", "hf", "reading a GGUF file") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path} is not a sound GGUF file: {error}") from None
    tensors = {t.name: t for t in reader.tensors}
    shape = _shape(reader, set(tensors), path)
    weights: dict[str, Tensor] = {}
    for name, t in tensors.items():
        values = torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32))
        if name in _OUTER:
            weights[_OUTER[name]] = values
            continue
        block, layer, part, kind = (*name.split("."), "", "", "")[:4]
        if block != "blk" or part not in _NAMES or kind != "weight":
            raise UserError(f"{path}: this model has no place for the tensor {name!r}")
        if part in ("attn_q", "attn_k"):
            values = _halves(values, shape.heads if part == "attn_q" else shape.kv_heads)
        weights[f"model.layers.{layer}.{_NAMES[part]}.weight"] = values
    return shape, weights


def _shape(reader: Any, names: set[str], path: Path) -> Shape:
    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise UserError(f"{path}: the field {name!r} is missing")
        return found.contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: GGUF of the architecture {architecture!r} is not read here, only 'llama'")
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    return Shape(
        vocab=field("llama.vocab_size"),
        width=width,
        depth=field("llama.block_count"),
        heads=heads,
        kv_heads=field("llama.attention.head_count_kv"),
        head_dim=width // heads,
        ffn=field("llama.feed_forward_length"),
        rope_theta=float(field("llama.rope.freq_base")),
        norm_eps=float(field("llama.attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in names,
        limit=field("llama.context_length"),
    )


def _halves(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp keeps rotary pairs side by side in each head's rows; we keep first halves, then second."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
