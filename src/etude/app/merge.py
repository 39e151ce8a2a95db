"""`etude merge`: a policy and what was tuned from it as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from etude.app.flags import parse
from etude.app.using import checkpoint_of
from etude.experience.errors import UserError

BaseName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
TunedName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED")]
Folder = Annotated[str, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True)
class MergeFlags:
    """BASE and a part of what TUNED has learnt since: the largest entries of the difference of their weights.

    With --keep 1 it is the line between the two, and with --scale 0.5 as well their average."""

    base: BaseName  # a name of the zoo, a checkpoint, or a run directory
    tuned: TunedName  # the same model, tuned: a checkpoint, or a run directory
    out: Folder  # a new folder for the merged policy
    keep: float = 0.25  # share of every tensor's entries whose change is kept, the largest first
    scale: float = 0.7  # factor on the changes that are kept


def merge(argv: Sequence[str]) -> None:
    """Merges and writes a folder that other commands, and other libraries, read."""
    flags = parse(MergeFlags, argv, "merge")
    target = Path(flags.out)
    if target.exists():
        raise UserError(f"{target} exists: name a new folder")
    from etude.policies.merge import check_shares
    from etude.policies.merge import merge as merge_policies
    from etude.policies.zoo import load_policy, save_policy

    check_shares(flags.keep, flags.scale)
    base, tuned = (load_policy(checkpoint_of(name)) for name in (flags.base, flags.tuned))
    save_policy(merge_policies(base, tuned, flags.keep, flags.scale), target)
    print(f"wrote {target}")
