"""Which registered parts fit together: every pair of parts of a group-RL loop, composed and run for two steps.

A pair fits if some composition that holds both passes the check that is made before anything runs; then such
a composition is run. As few compositions are run as cover all pairs that fit; one that fails is held against
every pair in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from etude.experience.errors import UserError
from etude.experience.plugs import Kind, names
from etude.learning.group_rl import SLOTS, GroupRL, compose
from etude.methods.api import train
from etude.methods.catalog import load_parts

Part = tuple[Kind, str]
Pair = tuple[Part, Part]
Composition = tuple[Part, ...]  # a part for every slot
Status = Literal["runs", "refused", "refused while running", "crashed"]  # from best to worst
OPTIONS = {"acting": "act", "reward": "shaping"}  # where a slot's option is not called as the slot

# Sums of single digits, of which only the last bit is asked: a table that knows nothing is right half the time.
WORLD: dict[str, Any] = {"kinds": {"short": [2, 2], "long": [3, 3]}, "numbers": [0, 9], "modulus": 2}
SMALL: dict[str, Any] = {
    "problems": 4, "members": 4, "minibatches": 2, "max_tokens": 1, "eval_every": 0, "eval_problems": 2,
}  # fmt: skip
POLICY = "table:order=8,rows=512,actions=2"


@dataclass(frozen=True)
class Cell:
    """What came of a pair; `why` is the line of a refusal or an error."""

    pair: Pair
    status: Status
    why: str = ""


def matrix(steps: int = 2, told: Callable[[int, int], None] = lambda over, of: None) -> list[Cell]:
    """A cell for every pair of parts of two slots. `told` hears how many compositions of how many were run."""
    load_parts()
    shelves: list[list[Part]] = [[(kind, name) for name in names(kind)] for kind in SLOTS]
    fits: list[Composition] = []
    reasons: dict[Pair, Counter[str]] = {}
    for composition in product(*shelves):
        said = refusal(composition)
        if not said:
            fits.append(composition)
        for pair in combinations(composition, 2):
            reasons.setdefault(pair, Counter())[said] += 1
    worse = get_args(Status).index
    found: dict[Pair, Cell] = {}
    chosen = list(_cover(fits))
    for i, composition in enumerate(chosen):
        status, why = attempt(composition, steps)
        for pair in combinations(composition, 2):
            if pair not in found or worse(status) > worse(found[pair].status):
                found[pair] = Cell(pair, status, why)
        told(i + 1, len(chosen))
    return [found.get(pair) or Cell(pair, "refused", _reason(pair, said_of)) for pair, said_of in reasons.items()]


def refusal(composition: Composition) -> str:
    """Why these parts do not fit, "" if they do."""
    try:
        compose(GroupRL(**options(composition)), law_raw=True, offered={"world"})
    except UserError as error:
        return str(error)
    return ""


def options(composition: Composition) -> dict[str, Any]:
    """The options of `group-rl` that name these parts."""
    return {OPTIONS.get(kind, kind): name for kind, name in composition}


def attempt(composition: Composition, steps: int) -> tuple[Status, str]:
    """Runs a composition in a folder that is thrown away."""
    named = options(composition)
    with TemporaryDirectory(prefix="etude-") as folder:
        try:
            train(
                "group-rl", world="chain", world_options=WORLD, policy=POLICY, base=False, steps=steps,
                out=Path(folder) / "run", **named, **SMALL,
            )  # fmt: skip
        except UserError as error:
            return "refused while running", str(error)
        except Exception as error:  # whatever a combination that nobody tried raises
            return "crashed", f"{type(error).__name__}: {error}".splitlines()[0]
    return "runs", ""


def _reason(pair: Pair, said: Counter[str]) -> str:
    """Of the lines with which all compositions that hold the pair were refused, one about the pair itself: it names
    both parts where any does. A third part may well be at fault in most of the others."""
    return max(said, key=lambda line: (sum(f"{kind} {name!r}" in line for kind, name in pair), said[line]))


def _cover(fits: list[Composition]) -> Iterator[Composition]:
    """Few compositions that hold every pair held by any: always the one with the most that are still missing."""
    held = {composition: set(combinations(composition, 2)) for composition in fits}
    missing = set().union(*held.values()) if held else set()
    while missing:
        best = max(held, key=lambda c: len(held[c] & missing))
        missing -= held[best]
        yield best
