"""Selectors: which drawn groups are trained on."""

from __future__ import annotations

from etude.experience.plugs import register
from etude.experience.types import Group
from etude.feedback.advantage import degenerate


@register("selector", "all", gives={"tied"})
def everything() -> None:
    """Every drawn group is trained on, also those whose members all got the same reward."""


@register("selector", "mixed")
class Mixed:
    """Only groups in which some members are right and some wrong (dynamic sampling of DAPO, arXiv
    2503.14476, eq. 11)."""

    def __call__(self, group: Group) -> bool:
        return 0.0 < group.solved < 1.0


@register("selector", "varied", gives={"tied"})  # verdicts may be, where rewards are not
class Varied:
    """Only groups whose rewards differ, as a reward plug has left them: unlike `mixed`, also one whose members are all
    right and some too long, and none whose right members all are (dynamic sampling of DLER, arXiv 2510.15110)."""

    def __call__(self, group: Group) -> bool:
        return not degenerate(group)
