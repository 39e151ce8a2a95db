"""The chain world: sums with a running total after every number, short and long.

The configurable world behind many experiments: each category has its own lengths, marker and hints,
the rule of a step and the notation are options, and everything is drawn from keyed streams.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.types import Outcome, Problem

SPLITS = ("train", "test")
HINT = "H"  # what opens a hint inside a compact prompt
DRAWS = 1000  # how often a chain is redrawn until it falls into the split


@dataclass(frozen=True)
class Kind:
    """One category of chains.

    `terms`: fewest and most numbers. `share`: how often it is drawn, next to the others' shares.
    `marker`: what its prompts begin with. `keep`: its prompts already hold the first j totals, j
    uniform from 0 up to all but `keep` of them; None: never a hint. `show`: the chance that a
    demonstration in the style "bridged" shows its work; None: the world's `habit` decides.
    """

    terms: tuple[int, int] = (3, 4)
    share: float = 1.0
    marker: str = ""
    keep: int | None = None
    show: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        if len(self.terms) != 2 or not 2 <= self.terms[0] <= self.terms[1]:
            raise UserError(f"chain: terms {self.terms} must be (fewest, most) with at least 2 numbers")
        if self.share < 0 or (self.keep is not None and self.keep < 1):
            raise UserError(f"chain: share {self.share} must be at least 0 and keep {self.keep} at least 1")


@dataclass(frozen=True)
class Rule:
    """A step: total c and number z give c + scale z + shift, reduced by `modulus` where there is one.

    >>> Rule().totals((3, 4, 5))
    (7, 12)
    >>> Rule(modulus=10).totals((3, 4, 5))
    (7, 2)
    """

    scale: int = 1
    shift: int = 0
    modulus: int | None = None

    def start(self, z: int) -> int:
        """The total before the first step."""
        return z % self.modulus if self.modulus else z

    def next(self, c: int, z: int) -> int:
        """The total after a step."""
        return self.start(c + self.scale * z + self.shift)

    def totals(self, terms: Sequence[int]) -> tuple[int, ...]:
        """The n-1 running totals of n numbers; the last is the answer."""
        out, c = [], self.start(terms[0])
        for z in terms[1:]:
            c = self.next(c, z)
            out.append(c)
        return tuple(out)


@dataclass(frozen=True)
class ChainWorld:
    """Chains of numbers to be added up; the last number of a completion is the answer.

    `kinds` are the categories (a mapping of `Kind`, of its fields, or of its terms alone).
    `numbers` are the smallest and largest term; `width` pads every number with zeros (0: no padding).
    Compact prompts read marker, numbers joined by `plus`, perhaps a hint, "="; steps are parted by
    `sep`. `habit[r]` is the chance that a demonstration in the style "bridged" shows its work with r
    totals to go (its last entry holds for more). Raises UserError on options that cannot be.
    """

    kinds: Mapping[str, Any] = field(default_factory=lambda: {"short": Kind((3, 4)), "long": Kind((7, 7))})
    numbers: tuple[int, int] = (1, 9)
    modulus: int | None = None
    scale: int = 1
    shift: int = 0
    notation: str = "compact"
    width: int = 0
    plus: str = "+"
    sep: str = ";"
    habit: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 0.5, 0.15, 0.002)
    seed: int = 0
    name: str = field(default="chain", init=False)

    def __post_init__(self) -> None:
        if self.notation not in ("compact", "natural"):
            raise unknown("notation", self.notation, ("compact", "natural"))
        low, high = self.numbers
        if not 0 <= low <= high:
            raise UserError(f"chain: numbers {low} to {high} must be (smallest, largest) and not negative")
        if self.modulus is not None and self.modulus < 2:
            raise UserError(f"chain: modulus {self.modulus} must be at least 2")
        if not self.plus and len(str(high)) > max(self.width, 1):
            raise UserError(f"chain: numbers up to {high} written without a plus need width={len(str(high))}")
        if self.sep not in (";", "\n"):
            raise UserError(f"chain: sep {self.sep!r} must be ';' or a newline")
        kinds = {name: _kind(value) for name, value in self.kinds.items()}
        if not kinds or not sum(k.share for k in kinds.values()):
            raise UserError("chain: at least one category needs a share above 0")
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "habit", tuple(self.habit))

    @property
    def categories(self) -> tuple[str, ...]:
        """The names of `kinds`."""
        return tuple(self.kinds)

    @property
    def rule(self) -> Rule:
        """What a step does."""
        return Rule(self.scale, self.shift, self.modulus)

    def size(self, split: str) -> int | None:
        """None: chains are drawn afresh for ever."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """The problem `index` of a split. A fifth of all chains, chosen by the hash of their numbers,
        are test chains, whatever their marker or hint."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if category is not None and category not in self.kinds:
            raise unknown("chain category", category, self.kinds)
        draw = Keys(self.seed).at("chain", split, category or "", index).numpy()
        if category is None:
            shares = np.array([k.share for k in self.kinds.values()])
            category = self.categories[int(draw.choice(len(shares), p=shares / shares.sum()))]
        kind: Kind = self.kinds[category]
        for _ in range(DRAWS):
            n = int(draw.integers(kind.terms[0], kind.terms[1] + 1))
            terms = tuple(int(z) for z in draw.integers(self.numbers[0], self.numbers[1] + 1, n))
            if _split_of(terms) == split:
                break
        else:
            raise UserError(f"chain: no {split} chains of category {category!r} turned up: allow more numbers or terms")
        problem = self._write(f"{split}/{category}/{index}", category, kind, terms)
        if kind.keep is not None:
            given = int(draw.integers(0, max(n - 1 - kind.keep, 0) + 1))
            problem = self.hinted(problem, given)
        return problem

    def hinted(self, problem: Problem, given: int) -> Problem:
        """The same problem with its first `given` totals in the prompt, never the last: a hint that
        the answer then goes on from. `given` 0 gives the problem back."""
        totals = problem.meta["totals"]
        if not 0 <= given < len(totals):
            raise UserError(f"problem {problem.id} has {len(totals)} totals: a hint may give 0 to {len(totals) - 1}")
        if given == 0:
            return problem
        return hint(problem, self.sep.join(self.number(t) for t in totals[:given]))

    def marked(self, problem: Problem, marker: str) -> Problem:
        """The same problem under another marker."""
        prompt = str(problem.prompt).removeprefix(problem.meta["marker"])
        return replace(problem, prompt=marker + prompt, meta={**problem.meta, "marker": marker})

    def score(self, problem: Problem, text: str) -> Outcome:
        """Reward 1 if the last number in `text` (after <answer>, where that is written) is the last
        total, else 0."""
        parsed = last_number(text.rpartition("<answer>")[2])
        correct = parsed is not None and parsed == last_number(problem.answer or "")
        return Outcome(float(correct), correct, parsed)

    def number(self, value: int) -> str:
        """A number as this world writes it."""
        return f"{value:0{self.width}d}"

    def _write(self, name: str, category: str, kind: Kind, terms: tuple[int, ...]) -> Problem:
        numbers = [self.number(z) for z in terms]
        totals = self.rule.totals(terms)
        if self.notation == "compact":
            prompt = f"{kind.marker}{self.plus.join(numbers)}="
        else:
            prompt = f"{kind.marker}{self._sentence(numbers)}"
        meta = {"terms": terms, "totals": totals, "marker": kind.marker, "show": kind.show}
        return Problem(name, prompt, self.number(totals[-1]), category, float(len(terms)), meta=meta)

    def _sentence(self, numbers: Sequence[str]) -> str:
        add = "z" if self.scale == 1 else f"{self.scale} * z"
        rule = f"replace the total c by c + {add}{f' + {self.shift}' if self.shift else ''}"
        if self.modulus:
            rule += f", then keep only the remainder on division by {self.modulus}"
        return (
            f"Start with the total {numbers[0]}. For each next number z in {', '.join(numbers[1:])}: {rule}. "
            "What is the last total? Give it in <answer></answer> tags."
        )


def hint(problem: Problem, text: str) -> Problem:
    """The problem with a hint in its prompt: before the "=" of a compact prompt, else a line of its own.
    `meta["hint"]` holds it, and the id names it, so that random streams differ."""
    if not isinstance(problem.prompt, str):
        *before, last = problem.prompt
        prompt: Any = (*before, {**last, "content": f"{last['content']}\n\nHint: {text}"})
    elif problem.prompt.endswith("="):
        prompt = f"{problem.prompt[:-1]}{HINT}{text}="
    else:
        prompt = f"{problem.prompt}\n\nHint: {text}"
    return replace(problem, id=f"{problem.id}+{text}", prompt=prompt, meta={**problem.meta, "hint": text})


def last_number(text: str) -> str | None:
    """The last whole number in `text`, without leading zeros or a plus; None if there is none."""
    found = re.findall(r"-?\d+", text)
    if not found:
        return None
    digits = found[-1].lstrip("-").lstrip("0") or "0"
    return f"-{digits}" if found[-1].startswith("-") and digits != "0" else digits


def _kind(value: Any) -> Kind:
    if isinstance(value, Kind):
        return value
    try:
        return Kind(**value) if isinstance(value, Mapping) else Kind(tuple(value))
    except TypeError:
        raise UserError(f"chain: a category is (fewest, most) terms or fields of Kind, not {value!r}") from None


def _split_of(terms: tuple[int, ...]) -> str:
    return "train" if blake2b(repr(terms).encode(), digest_size=4).digest()[0] % 5 else "test"
