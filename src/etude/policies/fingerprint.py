"""A digest of everything that decides how a policy acts."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import torch
from torch import Tensor, nn


class Fingerprint:
    """Digests a module's weights and switches; hashes content again only if a weight has changed.

    A change shows as another storage, a higher version counter, or another sum: the counter misses
    writes through `.data`, the sum does not.
    """

    def __init__(self) -> None:
        self._seen: object = None
        self._content = ""

    def __call__(self, module: nn.Module, also: Iterable[object] = ()) -> str:
        """Hex digest of `module`'s parameters, buffers and adapter switches, and of `also`."""
        tensors = dict(module.state_dict(keep_vars=True))
        sums = torch.stack([t.detach().sum(dtype=torch.float32) for t in tensors.values()]).tolist()
        state = [(name, t.data_ptr(), t._version) for name, t in tensors.items()], sums
        if state != self._seen:
            self._content = _content(tensors)
            self._seen = state
        return sha256(repr((self._content, _switches(module), *also)).encode()).hexdigest()[:32]


def _content(tensors: dict[str, Tensor]) -> str:
    digest = sha256()
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _switches(module: nn.Module) -> list[tuple[str, str]]:
    """Which of PEFT's adapters are active, merged and how strong, in each layer that has them."""
    return [
        (name, repr((m.active_adapters, m.disable_adapters, m.merged_adapters, getattr(m, "scaling", None))))
        for name, m in module.named_modules()
        if hasattr(m, "disable_adapters") and hasattr(m, "merged_adapters")
    ]
