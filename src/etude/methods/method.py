"""What a method's module offers: its hyperparameters, and a function that trains with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from etude.experience.claims import Claim
from etude.learning.setting import Setting


@dataclass(frozen=True)
class Method:
    """One technique. `config` is a frozen dataclass, the method's command line; `start` says what
    a policy with random weights is first made into (see `learning.setting`)."""

    slug: str
    config: type[Any]
    train: Callable[[Setting, Any], None]
    start: Literal["base", "random"] = "base"
    claim: Claim | None = None
