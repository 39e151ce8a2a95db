"""Flags from dataclasses, by tyro. Misuse is a `UserError` of one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from io import StringIO
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from etude.experience.errors import UserError, unknown

T = TypeVar("T")

# What tyro says of a wrong value, and how it is put here.
_SAID = (
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 takes a whole number, not \2"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 takes a number, not \2"),
    (r"Error parsing (\S+): (.*)", r"\1: \2"),
    (r"Missing value for argument '\('(\S+?)'.*", r"\1 needs a value"),
    (r"[Ii]nvalid choice ('.*') for argument '(.*?)'\. Expected one of \((.*?),?\)\.", r"\2 takes one of \3, not \1"),
    (r"Missing from etude (\w+).*?: *([A-Z]+) .*", r"\1 needs \2"),
)


def parse(cls: type[T], argv: Sequence[str], command: str, description: str | None = None) -> T:
    """An instance of the dataclass `cls` from flags. Raises UserError for misuse, naming the nearest
    flags; `--help` prints the flags and exits."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            parsed, left = tyro.cli(
                cls,
                args=list(argv),
                prog=f"etude {command}",
                description=description,
                return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_one_line(said.getvalue())}; see `etude {command} --help`") from None
    if left:
        wrong = next((word for word in left if word.startswith("--")), None)
        if wrong is None:
            raise UserError(f"unexpected {left[0]!r}; see `etude {command} --help`")
        raise unknown("flag", wrong.partition("=")[0], _flags(cls))
    return parsed


def _flags(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """Every flag of a dataclass, the nested ones as `--outer.inner`."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        annotation = hints[field.name]
        hint, *marks = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
        if is_dataclass(hint) and isinstance(hint, type):
            named = next((m.name for m in marks if getattr(m, "name", None) is not None), field.name)
            yield from _flags(hint, f"{prefix}{named}." if named else prefix)
        elif not any(mark is tyro.conf.Positional for mark in marks):
            name = f"{prefix}{field.name}".replace("_", "-")
            yield f"--{name}" if field.default is not True else f"--no-{name}"


def _one_line(box: str) -> str:
    """The first paragraph of the box that tyro draws around an error."""
    words: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        text = line.strip("│╰╯ ")
        if not text or set(text) == {"─"}:
            break
        words.append(text)
    message = " ".join(words)
    for pattern, put in _SAID:
        if re.fullmatch(pattern, message):
            return re.sub(pattern, put, message)
    return message


def lines(rows: Sequence[Sequence[Any]], indent: int = 2) -> str:
    """Rows as aligned columns."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)] if cells else []
    out = []
    for row in cells:
        padded = [c.ljust(w) for c, w in zip(row, widths, strict=False)]
        out.append(" " * indent + "  ".join([*padded, row[-1]]).rstrip())
    return "\n".join(out)
