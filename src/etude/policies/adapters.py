"""Low-rank adapters (LoRA) on any language model policy, through PEFT and in PEFT's format.

W' = W + (alpha / rank) B A with A [rank, in] random and B [out, rank] zero at first (Hu et al. 2021,
arXiv:2106.09685, section 4.1): only A and B learn. PEFT's layers replace linear layers in place;
taking them out for a while gives the base model back, which serves as the reference policy for free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etude.experience.errors import UserError, missing, unknown
from etude.experience.keys import Keys
from etude.policies.foreign import ForeignLM
from etude.policies.lm import LM

P = TypeVar("P", LM, ForeignLM)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_lora(
    policy: P, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None, keys: Keys | None = None
) -> P:
    """Puts an adapter on `policy`, in place, and returns it. At first it changes nothing.

    `alpha` is twice the rank unless given; `targets` are names of linear layers (q_proj, ...), all but
    the unembedding unless given; `keys` draw A. Of the policy's parameters only A, B and heads learn on.
    Raises UserError for a rank below 1, an unknown target, and a policy that has an adapter already.
    """
    if rank < 1:
        raise UserError(f"a LoRA adapter needs a rank of at least 1, not {rank}")
    known = _linear(policy)
    for target in targets or ():
        if target not in known:
            raise unknown("LoRA target", target, known)
    peft = _peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=sorted(targets or known),
        fan_in_fan_out="Conv1D" in known.values(),
        task_type="CAUSAL_LM",
    )
    return _inject(policy, config, keys or Keys(0))


@contextmanager
def adapter_off(policy: P) -> Iterator[P]:
    """The policy without its adapter while open: exactly the base. Raises UserError if there is none."""
    places = _places(policy)
    if not places:
        raise UserError("this policy has no adapter to turn off")
    for parent, name, layer in places:
        setattr(parent, name, layer.get_base_layer())
    try:
        yield policy
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def adapted(policy: nn.Module) -> bool:
    """Whether an adapter is on the policy."""
    return bool(_places(policy))


def adapter_tensors(policy: LM | ForeignLM) -> dict[str, Tensor]:
    """The adapter's parameters, by their names in PEFT's files; empty where there is none."""
    return _tensors(_root(policy))


def merged(policy: P) -> P:
    """A copy with the adapter added into the weights, all of which learn again."""
    copy = deepcopy(policy)
    for parent, name, layer in _places(copy):
        layer.merge()
        setattr(parent, name, layer.get_base_layer())
    return copy.requires_grad_(True)


def save_adapter(policy: LM | ForeignLM, folder: str | Path) -> None:
    """Writes the adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    root = _root(policy)
    if not adapted(policy):
        raise UserError("this policy has no adapter to save")
    root.peft_config["default"].save_pretrained(folder)
    save_file({n: p.detach().cpu().contiguous() for n, p in _tensors(root).items()}, folder / WEIGHTS)


def load_adapter(policy: P, folder: str | Path) -> P:
    """Puts the LoRA adapter of a PEFT folder on `policy`, in place.

    Raises UserError for a folder that is damaged, holds another kind of adapter, or does not fit.
    """
    folder = Path(folder)
    peft = _peft()
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if not isinstance(config, peft.LoraConfig):
            raise UserError(f"{folder} holds an adapter of the kind {config.peft_type}, only LoRA is read")
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"no adapter can be read from {folder}: {str(error).splitlines()[0]}") from None
    config.inference_mode = False
    own = _tensors(_root(_inject(policy, config, Keys(0))))
    for name in sorted(own.keys() ^ weights.keys()):
        raise UserError(f"the adapter in {folder} does not fit this policy: {name} is only in one of them")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise UserError(f"the adapter in {folder} does not fit this policy: {name} differs in shape")
            parameter.copy_(weights[name])
    return policy


def _inject(policy: P, config: Any, keys: Keys) -> P:
    if adapted(policy):
        raise UserError("this policy has an adapter already: merge it first")
    learning = {n for n, p in policy.heads.named_parameters() if p.requires_grad}
    policy.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # PEFT draws A from torch's global stream
        torch.manual_seed(keys.digest() & (2**63 - 1))
        try:
            _peft().inject_adapter_in_model(config, _root(policy))
        except ValueError as error:
            raise UserError(f"this adapter does not fit the policy: {str(error).splitlines()[0]}") from None
    for parameter in _tensors(_root(policy)).values():
        if parameter.dtype in (torch.float16, torch.bfloat16):  # too coarse for an optimiser's steps
            parameter.data = parameter.data.float()
    for name, parameter in policy.heads.named_parameters():
        parameter.requires_grad_(name in learning)
    return policy


def _root(policy: nn.Module) -> Any:
    """The module whose parameter names are those of `transformers`."""
    if isinstance(policy, LM):
        return policy
    if isinstance(policy, ForeignLM):
        return policy.model
    raise UserError(f"adapters are for language models, not for a {type(policy).__name__}")


def _linear(policy: nn.Module) -> dict[str, str]:
    """The linear layers by the last part of their names, with their types, but for heads and unembedding."""
    root = _root(policy)
    model = root.model if isinstance(policy, LM) else root
    unembed = None if isinstance(policy, LM) else root.get_output_embeddings()
    return {
        name.rpartition(".")[2]: type(m).__name__
        for name, m in model.named_modules()
        if m is not unembed and type(m).__name__ in ("Linear", "Conv1D")
    }


def _places(policy: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of each linear layer that carries an adapter."""
    return [
        (parent, name, layer)
        for parent in policy.modules()
        for name, layer in parent.named_children()
        if hasattr(layer, "lora_A")
    ]


def _tensors(root: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by their names in PEFT's files."""
    return {
        f"base_model.model.{name.replace('.default', '')}": p for name, p in root.named_parameters() if ".lora_" in name
    }


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise missing("peft", "hf", "a LoRA adapter") from None
    return peft
