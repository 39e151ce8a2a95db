"""Keyed random streams: the same key gives the same draws, whatever else was drawn before.

A key is a seed and a path of names, such as (step, problem, member, call, purpose). It is hashed to
the key of a counter-based generator (Philox), so an arm that draws more does not shift another's
draws, and neither refill order, batch size nor worker count matters.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Part = int | str


@dataclass(frozen=True)
class Keys:
    """A node in the tree of streams. `at` goes down; `numpy` and `torch` give generators.

    >>> keys = Keys(0).at("step", 3)
    >>> keys.numpy().integers(100, size=3).tolist() == Keys(0).at("step", 3).numpy().integers(100, size=3).tolist()
    True
    >>> keys.at("draw", 1) == keys.at("draw", 2)
    False
    """

    seed: int
    path: tuple[Part, ...] = ()

    def at(self, *parts: Part) -> Keys:
        """The node below this one named by `parts`."""
        return Keys(self.seed, self.path + parts)

    def of(self, step: int, problem: str, member: int, call: int, purpose: str) -> np.random.Generator:
        """The generator for one purpose in one call of one member."""
        return self.at(step, problem, member, call, purpose).numpy()

    def digest(self) -> int:
        """128 bits that depend on every part and on whether it is a number or a name.

        Raises TypeError for a part that is neither.
        """
        path = "".join(_written(part) for part in (self.seed, *self.path))
        return int.from_bytes(hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")

    def numpy(self) -> np.random.Generator:
        """A fresh NumPy generator at the start of this key's stream."""
        return np.random.Generator(np.random.Philox(key=self.digest()))

    def torch(self, device: str | torch.device = "cpu") -> torch.Generator:
        """A fresh torch generator at the start of this key's stream. On the CPU torch reads only 32
        bits of a seed: where many streams are drawn and compared, use `numpy`."""
        import torch

        return torch.Generator(device).manual_seed(self.digest() & (2**63 - 1))


def _written(part: Part) -> str:
    """The part with its kind and length before it, so that no two paths are written alike."""
    text = part if isinstance(part, str) else str(index(part))
    return f"{'s' if isinstance(part, str) else 'i'}{len(text)}:{text}"
