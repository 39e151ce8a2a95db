"""Plugs: named parts with what they need, give and own, and the check that they fit together.

A plug is registered where it is defined. Nothing is run to find out whether a composition fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from etude.experience.errors import UserError, unknown

Kind = Literal["curriculum", "acting", "selector", "reward", "credit", "objective", "schedule", "intervention"]
T = TypeVar("T", bound=Callable[..., Any])

OWNED = {
    "learning-rate": "the learning rate",
    "next-item": "the choice of the next item",
    "advantage": "the advantage column",
    "reference": "the reference policy",
    "boundary": "the task boundary",
    "whitening": "whitening over the batch",
    "hints": "the hints of groups that failed",
}


@dataclass(frozen=True)
class Plug:
    """`needs` and `gives` name what flows between plugs (advantage, correct, logp_old, pairs, ...).

    `law`: of an acting plug, the law its samples follow ("raw", "any": whatever the run asks for,
    "tilted": selected or bent); of any other plug, "raw" if it takes ratios of stored
    log-probabilities, else "any". `why` completes the line said when a need is not met.
    """

    kind: Kind
    name: str
    build: Callable[..., Any]
    needs: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()
    owns: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()  # what must not be present
    law: str = "any"
    why: str = ""


_PLUGS: dict[tuple[str, str], Plug] = {}


def register(
    kind: Kind,
    name: str,
    *,
    needs: Iterable[str] = (),
    gives: Iterable[str] = (),
    owns: Iterable[str] = (),
    refuses: Iterable[str] = (),
    law: str = "any",
    why: str = "",
) -> Callable[[T], T]:
    """Registers a class or function as a plug. Raises ValueError if the name is taken."""

    def decorate(build: T) -> T:
        if (kind, name) in _PLUGS and _PLUGS[kind, name].build.__qualname__ != build.__qualname__:
            raise ValueError(f"two {kind} plugs are called {name!r}")
        _PLUGS[kind, name] = Plug(
            kind, name, build, frozenset(needs), frozenset(gives), frozenset(owns), frozenset(refuses), law, why
        )
        return build

    return decorate


def plug(kind: Kind, name: str) -> Plug:
    """The plug of this kind and name. Raises UserError with the nearest names if there is none."""
    try:
        return _PLUGS[kind, name]
    except KeyError:
        raise unknown(kind, name, names(kind)) from None


def names(kind: Kind) -> list[str]:
    """All registered names of a kind."""
    return sorted(n for k, n in _PLUGS if k == kind)


def check(plugs: Sequence[Plug], law_raw: bool = True, present: Iterable[str] = ()) -> None:
    """Refuses, in one line, a composition that cannot be right; returns if it fits.

    `law_raw` says whether the run samples at temperature 1 without truncation; `present` names what
    the loop itself gives (group, correct, ...). Raises UserError.
    """
    owner: dict[str, Plug] = {}
    for p in plugs:
        for thing in sorted(p.owns):
            if thing in owner:
                other = owner[thing]
                raise UserError(
                    f"{other.kind} {other.name!r} and {p.kind} {p.name!r} both own {OWNED.get(thing, thing)}: keep one"
                )
            owner[thing] = p
    given = set(present).union(*(p.gives for p in plugs)) if plugs else set(present)
    for p in plugs:
        why = f": {p.why}" if p.why else ""
        for need in sorted(p.needs - given):
            raise UserError(f"{p.kind} {p.name!r} needs {need}, which nothing here gives{why}")
        for bad in sorted(p.refuses & given):
            # Of two that contradict each other, whoever gives it is not at fault: leaving it out would help neither.
            needing = next((q for q in plugs if bad in q.needs), None)
            culprit = needing or next((q for q in plugs if bad in q.gives), None)
            source = f"{culprit.kind} {culprit.name!r}" if culprit else "this loop"
            verb = "needs" if needing else "gives"
            raise UserError(f"{p.kind} {p.name!r} cannot be used with {bad}, which {source} {verb}{why}")
    tilted = next((p for p in plugs if p.kind == "acting" and p.law == "tilted"), None)
    for p in plugs:
        if p.kind == "acting" or p.law != "raw":
            continue
        if tilted is not None:
            raise UserError(
                f"{p.kind} {p.name!r} takes ratios of log-probabilities, but acting {tilted.name!r} selects or bends "
                "its samples: their law is no longer the one they were scored under"
            )
        if not law_raw:
            raise UserError(
                f"{p.kind} {p.name!r} takes ratios of log-probabilities at temperature 1: "
                "sample with temperature 1 and without top-k, top-p or min-p"
            )
