"""Two policies into one: a start and what was tuned from it, by arithmetic on their weights.

theta = theta_base + scale top_keep(theta_tuned - theta_base), where top_keep leaves of every tensor the share `keep`
of entries that are largest in size and makes the others 0: the update-selective merging of DLER (arXiv 2510.15110). The
paper does not say whether the share is of each tensor or of all; it is of each here, as where TIES trims (arXiv
2306.01708). With keep = 1 this is linear interpolation, and with scale = 1/2 as well the plain average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from etude.experience.errors import UserError
from etude.policies.adapters import adapted, merged
from etude.policies.lm import LM
from etude.policies.table import TablePolicy


def top(delta: Tensor, keep: float) -> Tensor:
    """`delta` with all but the share `keep` of its largest entries at 0 (at least one is left)."""
    count = max(1, round(keep * delta.numel()))
    flat = delta.flatten()
    largest = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).reshape(delta.shape)


def merge_weights(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], keep: float = 0.25, scale: float = 0.7
) -> dict[str, Tensor]:
    """base + scale top_keep(tuned - base) of every tensor, reckoned in float32 and given in the type of `tuned`.

    Raises UserError for shares outside 0 to 1, and for tensors that only one side has or that differ in shape.
    """
    check_shares(keep, scale)
    for name in sorted(base.keys() ^ tuned.keys()):
        side = "the first" if name in base else "the second"
        raise UserError(f"these policies cannot be merged: the tensor {name!r} is only in {side}")
    out = {}
    for name, b in base.items():
        t = tuned[name]
        if b.shape != t.shape:
            raise UserError(
                f"these policies cannot be merged: the tensor {name!r} has shape {tuple(b.shape)} in the first and "
                f"{tuple(t.shape)} in the second"
            )
        start = b.to(t.device, torch.float32)
        out[name] = (start + scale * top(t.float() - start, keep)).to(t.dtype)
    return out


@torch.no_grad()
def merge(base: Any, tuned: Any, keep: float = 0.25, scale: float = 0.7) -> Any:
    """The merge as a policy: `tuned` itself with new weights, or where it has an adapter a copy with whole weights.

    Raises UserError for policies of different architectures.
    """
    check_shares(keep, scale)
    base, tuned = (merged(p) if _may_adapt(p) and adapted(p) else p for p in (base, tuned))
    _check_alike(base, tuned)
    weights = merge_weights(dict(base.named_parameters()), dict(tuned.named_parameters()), keep, scale)
    for name, parameter in tuned.named_parameters():
        parameter.copy_(weights[name])
    return tuned


def check_shares(keep: float, scale: float) -> None:
    """Raises UserError unless 0 < keep <= 1 and 0 <= scale <= 1."""
    if not 0 < keep <= 1:
        raise UserError(f"keep is the share of entries that are kept, above 0 and at most 1, not {keep}")
    if not 0 <= scale <= 1:
        raise UserError(f"scale lies between 0 (the first policy) and 1, not at {scale}")


def _may_adapt(policy: Any) -> bool:
    return not isinstance(policy, TablePolicy)


def _check_alike(base: Any, tuned: Any) -> None:
    """What tensors alone do not show: equal shapes may be read in different ways."""
    if type(base) is not type(tuned):
        kinds = f"a {type(base).__name__} and a {type(tuned).__name__}"
        raise UserError(f"these policies cannot be merged: they are {kinds}")
    if isinstance(base, TablePolicy):
        rows = base.contexts
        if base.order != tuned.order or tuned.contexts[: len(rows)] != rows:
            raise UserError("these policies cannot be merged: the rows of their tables are for other contexts")
        return
    a, b = (asdict(p.shape) if isinstance(p, LM) else {"model": p.model.config.model_type} for p in (base, tuned))
    if differ := next((name for name in a if a[name] != b[name]), None):
        raise UserError(
            f"these policies cannot be merged: {differ} is {a[differ]} in the first and {b[differ]} in the second"
        )
