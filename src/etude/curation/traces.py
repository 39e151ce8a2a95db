r"""Traces: demonstrations taken apart into clauses, parts of which can be left out without breaking their form.

A grammar maps the tags of clauses to regular expressions whose named groups are the clause's fields: a search is made
of "create", "close" and "plan" clauses with a field "cost", a chain of thought of "step" clauses and an "answer". What
is dropped is said in these terms (arXiv 2410.09918, section 4.1), so that what is left follows the grammar too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from etude.experience.errors import UserError
from etude.experience.keys import Keys

Grammar = Mapping[str, str]
Span = tuple[int, int]  # characters [start, end)

FINAL = ("plan", "answer")  # the clauses that are never dropped


def segments(separators: str = "\n") -> Grammar:
    r"""The grammar of a chain of thought: steps that each end in one of `separators`, and then the answer: from
    the step that holds <answer> on, or else the last one.

    >>> [(c.tag, c.text) for c in parse("3+4=7\n7+5=12\n12", segments()) or ()]
    [('step', '3+4=7\n'), ('step', '7+5=12\n'), ('answer', '12')]
    """
    other = f"[^{re.escape(separators)}]"
    return {"answer": rf"{other}*<answer>(?s:.*)\Z|{other}+\s*\Z", "step": rf"{other}*[{re.escape(separators)}]\s*"}


@dataclass(frozen=True)
class Clause:
    """A part of a demonstration: its tag, its text, and where its fields stand in that text."""

    tag: str
    text: str
    fields: Mapping[str, Span]

    def without(self, names: frozenset[str]) -> Clause:
        """The clause less the fields called so."""
        gone = sorted(span for name, span in self.fields.items() if name in names)
        if not gone:
            return self
        ends = [0, *(end for _, end in gone)]
        starts = [*(start for start, _ in gone), len(self.text)]
        text = "".join(self.text[a:b] for a, b in zip(ends, starts, strict=True))
        return Clause(self.tag, text, {})


Trace = tuple[Clause, ...]


def parse(text: str, grammar: Grammar, final: Sequence[str] = FINAL) -> Trace | None:
    """The clauses of a demonstration, which joined are its text: those of the trace, then at least one `final` one and
    no other. None where the text has not that form."""
    patterns = {tag: re.compile(pattern) for tag, pattern in grammar.items()}
    found: list[Clause] = []
    at = 0
    while at < len(text):
        tag, match = next(((t, m) for t, p in patterns.items() if (m := p.match(text, at))), ("", None))
        if match is None or match.end() == at or (found and found[-1].tag in final and tag not in final):
            return None
        fields = {
            name: (match.start(name) - at, match.end(name) - at)
            for name in match.groupdict()
            if match[name] is not None
        }
        found.append(Clause(tag, match.group(), fields))
        at = match.end()
    return tuple(found) if found and found[-1].tag in final else None


def joined(trace: Sequence[Clause]) -> str:
    """The text of clauses."""
    return "".join(clause.text for clause in trace)


@dataclass(frozen=True)
class Drop:
    """What is left out of a trace: whole clauses by tag, fields of the clauses that stay, and each other clause with
    probability `rate`. Clauses with a final tag stay as they are."""

    clauses: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    rate: float = 0.0
    final: tuple[str, ...] = FINAL

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise UserError(f"a rate of dropping lies between 0 and 1, not at {self.rate}")

    def __call__(self, trace: Trace, keys: Keys) -> Trace:
        """What is left. A draw a clause, so that which others are dropped does not depend on the trace's tags."""
        chance = keys.numpy().random(len(trace))
        kept = []
        for clause, u in zip(trace, chance, strict=True):
            if clause.tag in self.final:
                kept.append(clause)
            elif clause.tag not in self.clauses and u >= self.rate:
                kept.append(clause.without(self.fields))
        return tuple(kept)


def levels(rate: float = 0.3) -> tuple[Drop, ...]:
    """The five levels of arXiv 2410.09918: nothing; the closings of nodes; also all costs; also each clause that is
    left with probability `rate`; everything but the plan.

    A chain of thought has neither closings nor costs: levels 0 to 2 leave it as it is, level 3 drops each of its steps
    with probability `rate`, and level 4 leaves the answer.
    """
    closed, costs = frozenset({"close"}), frozenset({"cost"})
    return Drop(), Drop(closed), Drop(closed, costs), Drop(closed, costs, rate), Drop(rate=1.0)
