"""Hugging Face folders of the Llama, Qwen2 and Qwen3 families: config.json and safetensors.

Read and written without `transformers`; nothing is unpickled. Heads lie beside the model in
heads.safetensors, where other libraries do not look.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etude.experience.errors import UserError
from etude.policies.transformer import RopeScaling, Shape

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
WEIGHTS, INDEX, HEADS = "model.safetensors", "model.safetensors.index.json", "heads.safetensors"


def model_type(folder: str | Path) -> str:
    """What config.json says the model is. Raises UserError if there is no readable config.json."""
    return str(_json(Path(folder) / "config.json").get("model_type", "nothing"))


def read(folder: str | Path) -> tuple[Shape, dict[str, Tensor]]:
    """The shape and tensors of a folder, heads named `heads.NAME.weight` and `heads.NAME.bias`.

    Raises UserError for a family or option that our transformer does not have, and for files that
    are missing or damaged.
    """
    folder = Path(folder)
    shape = _shape(folder / "config.json")
    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{folder / INDEX} has no weight_map")
        files = sorted({str(name) for name in shards.values()})
    elif not (folder / WEIGHTS).is_file() and (folder / "pytorch_model.bin").is_file():
        raise UserError(f"{folder} holds pickled weights, which are never read: save the model as safetensors")
    if (folder / HEADS).is_file():
        files.append(HEADS)
    weights: dict[str, Tensor] = {}
    for name in files:
        try:
            weights |= load_file(folder / name)
        except FileNotFoundError:
            raise UserError(f"{folder} has no {name}") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is damaged: {error}") from None
    return shape, {n: w for n, w in weights.items() if not n.endswith("rotary_emb.inv_freq")}


def write(
    folder: str | Path, shape: Shape, weights: Mapping[str, Tensor], stops: frozenset[int] = frozenset(), pad: int = 0
) -> None:
    """Writes what `read` and `transformers` read. Each file appears whole or not at all.

    `stops` and `pad` tell `generate` where to stop. Raises UserError for a shape no family has.
    """
    folder = Path(folder)
    config = _config(shape) | {"eos_token_id": sorted(stops) or None, "pad_token_id": pad}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    tensors = {n: t.detach().cpu().contiguous() for n, t in weights.items()}
    if shape.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    heads = {n: tensors.pop(n) for n in list(tensors) if n.startswith("heads.")}
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    _whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    if heads:
        _whole(folder / HEADS, lambda path: save_file(heads, path, metadata={"format": "pt"}))
    else:
        (folder / HEADS).unlink(missing_ok=True)
    generation = {k: config[k] for k in ("eos_token_id", "pad_token_id")}
    _whole(folder / "generation_config.json", lambda path: path.write_text(json.dumps(generation, indent=2) + "\n"))
    _whole(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def _shape(path: Path) -> Shape:
    config = _json(path)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: the family {family!r} is not read here; known: {', '.join(FAMILIES)}")
    for option, only in (
        ("hidden_act", "silu"),
        ("mlp_bias", False),
        ("attention_bias", family == "qwen2"),
        ("use_sliding_window", False),
    ):
        if config.get(option, only) != only:
            raise UserError(f"{path}: {family} with {option}={config[option]!r} is not read here, only {only!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        return Shape(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            ffn=config["intermediate_size"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            norm_eps=float(config["rms_norm_eps"]),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            limit=config["max_position_embeddings"],
            rope_scaling=_scaling(rope, path),
            causal=config.get("is_causal", True),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no {family} configuration: {type(error).__name__} {error}") from None


def _scaling(rope: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path}: rotary scaling {kind!r} is not read here, only 'llama3'")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_limit=int(rope["original_max_position_embeddings"]),
    )


def _config(shape: Shape) -> dict[str, Any]:
    if shape.qkv_bias and shape.qk_norm:
        raise UserError("no Hugging Face family has both qkv_bias and qk_norm: this shape cannot be saved")
    family = "qwen2" if shape.qkv_bias else "qwen3" if shape.qk_norm else "llama"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if (s := shape.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_limit,
        }
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "hidden_act": "silu",
        "rope_theta": shape.rope_theta,
        "rope_parameters": rope,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings,
        "max_position_embeddings": shape.limit,
        "is_causal": shape.causal,
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object")
    return data


def _whole(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Writes beside `path` and moves into place; removes what is half-written on any failure."""
    part = path.with_name(path.name + ".part")
    try:
        write_to(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        part.unlink(missing_ok=True)
