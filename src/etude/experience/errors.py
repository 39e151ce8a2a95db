"""Errors a user can mend: one clear line, exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what would be right."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name nobody registered, with the nearest known ones."""
    options = sorted(known)
    near = get_close_matches(name, options, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"known: {', '.join(options[:12])}" + (", ..." if len(options) > 12 else "")
    )
    return UserError(f"unknown {kind} {name!r}: {hint}")


def missing(package: str, extra: str, purpose: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(f"{purpose} needs the package {package}: pip install 'etude[{extra}]'")
