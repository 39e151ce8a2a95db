"""`etude matrix`: which parts fit together."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from etude.app.flags import lines, parse
from etude.experience.errors import UserError

if TYPE_CHECKING:
    from etude.lab.matrix import Cell

Text = Annotated[str | None, tyro.conf.DisallowNone]
SIGNS = {"runs": "yes", "refused": "-", "refused while running": "LATE", "crashed": "CRASH"}


@dataclass(frozen=True)
class MatrixFlags:
    """Compose and run every pair of parts of `etude train group-rl`; say which are refused, and why."""

    steps: int = 2  # of each run
    json: Text = None  # a file for every pair with its status and reason


def matrix(argv: Sequence[str]) -> None:
    """Prints a grid for every two kinds of parts, every reason once, and the counts."""
    flags = parse(MatrixFlags, argv, "matrix")
    if flags.steps < 1:
        raise UserError(f"steps must be at least 1, not {flags.steps}")
    from etude.lab.evidence import write_json
    from etude.lab.matrix import matrix as run

    cells = run(flags.steps, _told)
    print(grids(cells))
    if flags.json:
        rows = [{"parts": [list(p) for p in c.pair], "status": c.status, "why": c.why} for c in cells]
        write_json(Path(flags.json), rows)
    print(counts(cells))


def counts(cells: Sequence[Cell]) -> str:
    """The last line: how many pairs run, are refused, were refused too late (where any was), and crashed."""
    n = Counter(c.status for c in cells)
    late = f"{n['refused while running']} refused while running, " if n["refused while running"] else ""
    return f"{len(cells)} pairs: {n['runs']} run, {n['refused']} refused, {late}{n['crashed']} crashed"


def grids(cells: Sequence[Cell]) -> str:
    """A grid for every two kinds that hold a pair which does not run, then every reason once."""
    kinds = dict.fromkeys((c.pair[0][0], c.pair[1][0]) for c in cells)
    out: list[str] = []
    whys: dict[str, None] = {}
    for first, second in kinds:
        grid = {(c.pair[0][1], c.pair[1][1]): c for c in cells if (c.pair[0][0], c.pair[1][0]) == (first, second)}
        if all(c.status == "runs" for c in grid.values()):
            out += [f"{first} x {second}: every pair runs", ""]
            continue
        columns = sorted({a for a, _ in grid})
        rows = [["", *columns]]
        for b in sorted({b for _, b in grid}):
            rows.append([b, *(SIGNS[grid[a, b].status] for a in columns)])
        out += [f"{second} (down) x {first} (across)", lines(rows), ""]
        whys |= dict.fromkeys(c.why for c in grid.values() if c.why)
    return "\n".join([*out, "why not:", *(f"  {why}" for why in whys), ""])


def _told(over: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{over} of {of} compositions run", end="\n" if over == of else "", file=sys.stderr, flush=True)
