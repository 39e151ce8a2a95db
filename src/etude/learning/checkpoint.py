"""Checkpoints that a kill cannot corrupt: written aside, synced, then renamed into place.

A state is a tree of dicts, lists, tuples, numbers, strings, None, tensors and arrays. Tensors go to
one safetensors file, the rest to JSON; nothing is pickled. The manifest holds the hash of both, so a
damaged checkpoint is refused instead of trained on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from etude.experience.errors import UserError

TREE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"


def save_state(folder: Path, state: Any) -> None:
    """Writes `state` as `folder`, all of it or nothing. Raises UserError if the disk refuses."""
    scratch, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_flatten(state, tensors))
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / TREE).write_text(tree)
        save_file(tensors, scratch / TENSORS)
        hashes = {name: _hash(scratch / name) for name in (TREE, TENSORS)}
        (scratch / MANIFEST).write_text(json.dumps(hashes))
        for file in (TREE, TENSORS, MANIFEST):
            _sync(scratch / file)
        _sync(scratch)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        scratch.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {error}") from error


def load_state(folder: Path, remedy: str) -> Any:
    """Reads what `save_state` wrote. Raises UserError, which ends in the `remedy`, if any of it is missing or
    damaged."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
        for name in (TREE, TENSORS):
            if _hash(folder / name) != hashes[name]:
                raise UserError(f"{folder} is damaged: {name} does not match its hash; {remedy}")
        return _restore(json.loads((folder / TREE).read_text()), load_file(folder / TENSORS))
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {error}; {remedy}") from error


def _flatten(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON form of a tree; tensors and arrays are moved to `tensors`."""
    if isinstance(node, torch.Tensor):
        # A clone: safetensors refuses tensors that share storage (tied embeddings).
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"$": "tensor", "name": name}
    if isinstance(node, np.ndarray):
        name = str(len(tensors))
        tensors[name] = torch.from_numpy(np.array(node, order="C"))
        return {"$": "array", "name": name}
    if isinstance(node, Mapping):
        return {"$": "dict", "items": [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in node.items()]}
    if isinstance(node, list | tuple):
        return {"$": "tuple" if isinstance(node, tuple) else "list", "items": [_flatten(v, tensors) for v in node]}
    if isinstance(node, np.generic):
        return node.item()
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"a checkpoint cannot hold a {type(node).__name__}: {node!r:.80}")


def _restore(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    match node["$"]:
        case "tensor":
            return tensors[node["name"]]
        case "array":
            return tensors[node["name"]].numpy()
        case "dict":
            return {_restore(k, tensors): _restore(v, tensors) for k, v in node["items"]}
        case "tuple":
            return tuple(_restore(v, tensors) for v in node["items"])
        case _:
            return [_restore(v, tensors) for v in node["items"]]


def _hash(path: Path) -> str:
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
