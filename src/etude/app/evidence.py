"""`etude evidence`: what every method's claim gave, as a table or as pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from etude.app.flags import lines, parse
from etude.experience.errors import UserError
from etude.methods.catalog import CATALOG, FAMILIES

Folder = Annotated[str | None, tyro.conf.DisallowNone, tyro.conf.arg(metavar="DIR")]
DOCS = Path("docs")


@dataclass(frozen=True)
class EvidenceFlags:
    """What every method's claim gave: planned, works, or the verdict."""

    folder: Folder = None  # where the evidence files are; by default evidence/
    write: bool = False  # render docs/EVIDENCE.md and its plots
    json: bool = False  # for a program


def evidence(argv: Sequence[str]) -> None:
    """Prints the table of all methods, or writes the pages."""
    flags = parse(EvidenceFlags, argv, "evidence")
    from etude.lab.evidence import VERDICTS

    if flags.folder is not None and not Path(flags.folder).is_dir():
        raise UserError(f"{flags.folder} is not a folder of evidence files")
    records = read_all(flags.folder)
    if flags.write:
        if not DOCS.is_dir():
            raise UserError("there is no docs/ here to write EVIDENCE.md to: go to the checkout's top folder")
        made = pages(records)
        for path in set((DOCS / "evidence").glob("*.svg")) - set(made):  # of evidence that is gone or has changed
            path.unlink()
            print(f"removed {path}")
        for path, text in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
        return
    from etude.lab.pages import overview_rows

    found = {e.slug: overview_rows(e, records) for e in CATALOG.values()}
    if flags.json:
        keys = ("number", "claim", "status", "endpoint", "estimate")
        print(json.dumps([dict(zip(keys, row, strict=True)) for rows in found.values() for row in rows], indent=1))
        return
    for family, what in FAMILIES.items():
        print(f"{family}: {what}")
        print(lines([row for e in CATALOG.values() if e.family == family for row in found[e.slug]]), end="\n\n")
    told = [rows[0][2] for rows in found.values()]
    verdicts = ", ".join(f"{told.count(v)} {v}" for v in VERDICTS if v in told)
    print(f"{len(told)} methods, {len(told) - told.count('planned')} work now" + (f"; {verdicts}" if verdicts else ""))


def read_all(folder: str | None) -> dict[str, Any]:
    """Every evidence file by the name of its claim, in the catalogue's order."""
    from etude.lab.evidence import evidence_names, read_evidence

    names = evidence_names(folder)
    ordered = [name for slug in CATALOG for name in names if name.partition(".")[0] == slug]
    return {name: record for name in ordered if (record := read_evidence(name, folder)) is not None}


def pages(records: dict[str, Any]) -> dict[Path, str]:
    """docs/EVIDENCE.md and its plots, by path."""
    from etude.lab.pages import evidence_page, plots

    out = {DOCS / "EVIDENCE.md": evidence_page(records)}
    for slug, record in records.items():
        out |= {DOCS / "evidence" / f"{slug}{end}": text for end, text in plots(record).items()}
    return out
