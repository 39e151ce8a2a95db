"""A policy's trainable weights, as a run tracks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from etude.experience.errors import UserError
from etude.learning.sharded import Sharded

EXTRA = "_extra_state"  # how torch calls the part of a module's state that is no tensor


class Weights:
    """The parameters that learn. Frozen ones come from where the policy was loaded, and are not
    written into every checkpoint."""

    def __init__(self, policy: Any) -> None:
        self.policy: nn.Module | Sharded = policy

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def frozen(self) -> dict[str, nn.Parameter]:
        """The parameters that do not learn, by name."""
        return {name: p for name, p in self.policy.named_parameters() if not p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """The trainable parameters by name, detached, and what else decides how they are read (the
        table's contexts)."""
        extra = {name: v for name, v in self.policy.state_dict().items() if name.endswith(EXTRA)}
        return {**{name: p.detach() for name, p in self._trainable().items()}, **extra}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies values back in place. Raises UserError if they are of another policy."""
        extra = {name: v for name, v in state.items() if name.endswith(EXTRA)}
        own = self._trainable()
        if own.keys() != state.keys() - extra.keys():
            name = min(own.keys() ^ (state.keys() - extra.keys()))
            raise UserError(
                f"the saved weights are of another policy (they differ in {name}): has the one it began with changed?"
            )
        if isinstance(self.policy, Sharded):
            self.policy.load_state_dict({name: state[name] for name in own})
            return
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(state[name])
        if extra:
            self.policy.load_state_dict(extra, strict=False)
