"""`etude list` and `etude show`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from etude.app.flags import lines, parse
from etude.methods.catalog import CATALOG, FAMILIES, Entry


@dataclass(frozen=True)
class ListFlags:
    """Methods by family; with a flag, what they run on."""

    worlds: bool = False  # worlds by name
    policies: bool = False  # policies by name
    parts: bool = False  # registered plugs by kind
    json: bool = False  # for a program


def list_(argv: Sequence[str]) -> None:
    """Prints the catalogue, or the names of worlds, policies or parts."""
    flags = parse(ListFlags, argv, "list")
    if flags.worlds:
        from etude.worlds.registry import world_names

        _print_names({"worlds": world_names()}, flags.json)
    elif flags.policies:
        from etude.policies.zoo import ZOO

        print(json.dumps(ZOO) if flags.json else lines(list(ZOO.items())))
    elif flags.parts:
        _print_names(_parts(), flags.json)
    elif flags.json:
        print(json.dumps([{**asdict(e), "status": _status(e)} for e in CATALOG.values()], indent=1))
    else:
        print(_table())


@dataclass(frozen=True)
class ShowFlags:
    """One method."""

    method: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="METHOD")]  # its name in `etude list`
    json: bool = False  # for a program


def show(argv: Sequence[str]) -> None:
    """Prints a method's source, text and options."""
    from etude.methods.api import describe

    flags = parse(ShowFlags, argv, "show")
    found = describe(flags.method)
    if flags.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['name']}: {found['title']}")
    source = f"https://arxiv.org/abs/{found['arxiv']} ({found['year']})" if found["arxiv"] else "no single source"
    print(f"{source}; learns from: {FAMILIES[found['family']]}")
    if not found["works"]:
        print("planned, not written yet")
        return
    for name, claim in found["claims"].items():
        print(f"claim (`etude verify {name}` runs it): {claim['says']}")
    print(f"\n{found['doc']}\n\nOptions and their defaults (`etude train {flags.method} --help` says more):")
    print(lines(list(_flat(found["options"]))))


def _flat(options: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    out: list[tuple[str, object]] = []
    for name, value in options.items():
        out += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return out


def _status(entry: Entry) -> str:
    return "works" if entry.works else "planned"


def _table() -> str:
    out = []
    for family, what in FAMILIES.items():
        out.append(f"{family}: {what}")
        rows = [
            (
                "" if e.number is None else f"{e.number:02}",
                e.slug,
                _status(e),
                textwrap.shorten(e.title, 90, placeholder=" ..."),
            )
            for e in CATALOG.values()
            if e.family == family
        ]
        out += [lines(rows), ""]
    works = sum(e.works for e in CATALOG.values())
    return "\n".join([*out, f"{len(CATALOG)} methods, {works} work now"])


def _parts() -> dict[str, list[str]]:
    from typing import get_args

    from etude.experience.plugs import Kind, names
    from etude.methods.catalog import load_parts

    load_parts()

    return {kind: names(kind) for kind in get_args(Kind) if names(kind)}


def _print_names(names: dict[str, list[str]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(names))
        return
    for kind, found in names.items():
        words = textwrap.wrap("  ".join(found), 100, break_on_hyphens=False)
        print("\n".join([f"{kind}:", *(f"  {line}" for line in words)]))
