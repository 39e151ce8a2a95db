"""What a method's module offers: its hyperparameters, a function that trains with them, its claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from etude.experience.claims import Claim
from etude.experience.types import NOTHING
from etude.learning.setting import Setting


@dataclass(frozen=True)
class Method:
    """One technique. `config` is a frozen dataclass, the method's command line; `start` says what
    a policy with random weights is first made into (see `learning.setting`). `claim` is the main claim, `more`
    those in further settings, by a word each."""

    slug: str
    config: type[Any]
    train: Callable[[Setting, Any], None]
    start: Literal["base", "random"] = "base"
    claim: Claim | None = None
    more: Mapping[str, Claim] = field(default_factory=lambda: NOTHING)

    @property
    def claims(self) -> dict[str, Claim]:
        """Every claim by its name, under which its evidence is kept: SLUG, then SLUG.WORD."""
        main = {} if self.claim is None else {self.slug: self.claim}
        return main | {f"{self.slug}.{word}": claim for word, claim in self.more.items()}
