"""Selectors: which drawn groups are trained on."""

from __future__ import annotations

from etude.experience.plugs import register
from etude.experience.types import Group


@register("selector", "all", gives={"tied"})
def everything() -> None:
    """Every drawn group is trained on, also those whose members all got the same reward."""


@register("selector", "mixed")
class Mixed:
    """Only groups in which some members are right and some wrong (dynamic sampling of DAPO, arXiv
    2503.14476, eq. 11)."""

    def __call__(self, group: Group) -> bool:
        return 0.0 < group.solved < 1.0
