"""Flags from dataclasses, by tyro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str], command: str, description: str | None = None) -> T:
    """An instance of the dataclass `cls` from flags. Misuse exits with code 2 and a message that
    names the nearest flags."""
    return tyro.cli(cls, args=list(argv), prog=f"etude {command}", description=description)


def lines(rows: Sequence[Sequence[Any]], indent: int = 2) -> str:
    """Rows as aligned columns."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)] if cells else []
    out = []
    for row in cells:
        padded = [c.ljust(w) for c, w in zip(row, widths, strict=False)]
        out.append(" " * indent + "  ".join([*padded, row[-1]]).rstrip())
    return "\n".join(out)
