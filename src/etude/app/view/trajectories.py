"""Asking for trajectories: filters from a query string, pages by id, and the tree of forks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlencode

from etude.app.view.runs import Refused
from etude.experience.store import Store

PAGE = 50  # trajectories


@dataclass(frozen=True)
class Filter:
    """What is asked for, as the words of the query string; empty ones ask for nothing."""

    category: str = ""
    low: str = ""  # reward
    high: str = ""
    correct: str = ""  # yes or no
    kept: str = ""
    step: str = ""
    contains: str = ""
    after: str = ""  # the id behind which the page begins

    @classmethod
    def read(cls, query: Mapping[str, str]) -> Filter:
        """Words that mean nothing here are left alone."""
        return cls(**{f.name: query[f.name] for f in fields(cls) if f.name in query})

    def link(self, **change: object) -> str:
        """The query string of this filter, changed."""
        words = {f.name: str(change.get(f.name, getattr(self, f.name))) for f in fields(self)}
        return urlencode({name: word for name, word in words.items() if word})

    @property
    def asked(self) -> dict[str, Any]:
        """As the store's `trajectories` and `count` take it. Raises Refused for a word that is no value."""
        low, high = _number("low", self.low), _number("high", self.high)
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        return {
            "category": self.category or None,
            "reward": None if low is None and high is None else ends,
            "correct": _yes_or_no("correct", self.correct),
            "kept": _yes_or_no("kept", self.kept),
            "step": _whole("step", self.step),
            "contains": self.contains or None,
        }

    @property
    def begin(self) -> int:
        """The id behind which the page begins."""
        return _whole("after", self.after) or 0


@dataclass(frozen=True)
class Page:
    """A page of trajectories: `total` is how many the filter finds in all."""

    rows: list[dict[str, Any]]
    total: int
    more: int | None  # the last id here, where there is a page after this one


def page(store: Store, filter: Filter) -> Page:
    """Reads it. Raises Refused for a filter that makes no sense."""
    asked = filter.asked
    rows = store.trajectories(**asked, after=filter.begin, limit=PAGE + 1)
    more = rows[PAGE - 1]["id"] if len(rows) > PAGE else None
    return Page(rows[:PAGE], store.count(**asked), more)


@dataclass(frozen=True)
class Node:
    """A line of a tree: it opens a list where it is its parent's first child, and closes `closes` after it."""

    row: dict[str, Any]
    at: tuple[int, int] | None  # the call and token of the parent where it forks
    opens: bool
    closes: int


def tree(rows: Mapping[int, dict[str, Any]], forks: Mapping[int, tuple[int, int, int]], id: int) -> list[Node]:
    """The tree that a trajectory belongs to, in the order it is read; empty where nothing forks."""
    children: dict[int, list[int]] = {}
    for child, (parent, _, _) in forks.items():
        children.setdefault(parent, []).append(child)
    root = id
    while root in forks and forks[root][0] in rows:
        root = forks[root][0]
    if root not in children:
        return []
    order: list[tuple[int, int, bool]] = []  # id, depth, whether it is a first child
    todo = [(root, 0, True)]
    while todo:
        at, depth, first = todo.pop()
        order.append((at, depth, first))
        below = [c for c in children.get(at, []) if c in rows]
        todo += [(child, depth + 1, child == below[0]) for child in reversed(below)]
    depths = [depth for _, depth, _ in order] + [-1]
    return [
        Node(rows[n], forks[n][1:] if n in forks else None, first, max(0, depth - depths[i + 1]))
        for i, (n, depth, first) in enumerate(order)
    ]


def _number(name: str, word: str) -> float | None:
    try:
        value = float(word) if word.strip() else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise Refused(400, f"{name} takes a number, not {word!r}")
    return value


def _whole(name: str, word: str) -> int | None:
    if not word.strip():
        return None
    if not word.strip().isdecimal() or len(word) > 18:
        raise Refused(400, f"{name} takes a whole number, not {word!r}")
    return int(word)


def _yes_or_no(name: str, word: str) -> bool | None:
    if word not in ("", "yes", "no"):
        raise Refused(400, f"{name} takes yes or no, not {word!r}")
    return {"yes": True, "no": False}.get(word)
