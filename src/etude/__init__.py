"""Etude: models that learn from their own experience.

    import etude
    run = etude.train("grpo", world="countdown", policy="tiny", seed=0)

Importing it is light: torch is loaded when something is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etude.experience.errors import UserError
    from etude.methods.api import resume, train
    from etude.policies.zoo import load_policy
    from etude.worlds.registry import load_world

    __version__: str

_HOMES = {
    "UserError": "etude.experience.errors",
    "load_policy": "etude.policies.zoo",
    "load_world": "etude.worlds.registry",
    "resume": "etude.methods.api",
    "train": "etude.methods.api",
}

__all__ = ["UserError", "__version__", "load_policy", "load_world", "resume", "train"]


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("etude")
    if name not in _HOMES:
        raise AttributeError(f"module 'etude' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
