"""`etude compare`: methods side by side, as curves, tables and a report."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from etude.app.flags import lines, parse
from etude.app.verify import parse_seeds, shown
from etude.experience.errors import UserError

Slugs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="METHOD")]
Folder = Annotated[str | None, tyro.conf.DisallowNone, tyro.conf.arg(metavar="DIR")]
Count = Annotated[int | None, tyro.conf.DisallowNone]


@dataclass(frozen=True)
class CompareFlags:
    """Methods from the same base models, on the same problems and paired seeds. Finished runs are not run again."""

    methods: Slugs  # two or more, by their names in `etude list`
    world: str = "chain_sum"  # a world's name, or a data file; see `etude list --worlds`
    world_options: tuple[str, ...] = ()  # name=value, e.g. min_terms=2
    policy: str = "tiny"  # table, tiny, small, smollm2, or the path of a checkpoint
    base: bool = True  # whether a policy with random weights is first taught until mediocre
    seeds: str = "3"  # how many, or which ones, as in 0,1,2
    budget: tuple[str, ...] = ()  # kind=amount, e.g. tokens=2e6; a run ends once one is spent
    steps: Count = None  # of every method that has the option; by default its own, or as the budget allows
    max_tokens: int = 64  # longest answer
    eval_every: int = 25  # steps between evaluations
    eval_problems: int = 256  # held-out problems in an evaluation
    jobs: Count = None  # runs at once, each on one core; by default one a core
    out: Folder = None  # where the report goes; by default a folder under runs/
    json: bool = False  # print the report for a program


def compare(argv: Sequence[str]) -> None:
    """Runs them, prints the tables, writes the report."""
    flags = parse(CompareFlags, argv, "compare")
    seeds = tuple(range(int(flags.seeds))) if flags.seeds.isdecimal() else parse_seeds(flags.seeds)
    workers = flags.jobs if flags.jobs is not None else len(os.sched_getaffinity(0))
    if not seeds or workers < 1:
        raise UserError("seeds and jobs must be at least 1")
    from etude.lab.compare import compare as run
    from etude.lab.compare import plan
    from etude.lab.report import category_rows, plain_report, summary_rows, write_report
    from etude.learning.setting import Common

    shared = ("world", "world_options", "policy", "base", "budget", "max_tokens", "eval_every", "eval_problems")
    common = Common(**{name: getattr(flags, name) for name in shared})
    planned = plan(flags.methods, common, seeds, flags.steps)
    folder = Path(flags.out) if flags.out else Path("runs") / _name(flags)
    _make(folder)
    with shown() as told:
        found = run(planned, workers, told=told)
    write_report(found, folder)
    if flags.json:
        print(json.dumps(plain_report(found)))
        return
    print(f"final accuracy (95% over seeds) and mean cost\n{lines(summary_rows(found))}\n")
    if found.categories:
        print(f"final accuracy by category\n{lines(category_rows(found))}\n")
    print(f"wrote {folder}/report.html, report.json, curves.csv, finals.csv")


def _name(flags: CompareFlags) -> str:
    """What the folder is called: a world may be the path of a file, or another inside it."""
    world = re.sub(r"[^\w.-]+", "-", flags.world).strip("-.")
    return f"compare-{'-'.join(flags.methods)}-{world}"


def _make(folder: Path) -> None:
    """Before the runs, which may take hours, rather than after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir()) and not (folder / "report.json").exists()
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    if taken:
        raise UserError(f"{folder} holds something else than a comparison: name another folder")
