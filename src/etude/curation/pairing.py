"""Preference pairs from valued answers: wide margins, a floor, two sides that differ, and replay of older pairs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from operator import eq
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from etude.curation.examples import Examples
from etude.curation.examples import pairs as paired
from etude.experience.batch import Link
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.rows import Row

T = TypeVar("T")
SLACK = 1e-9  # of a margin, for values that were averaged
Margin = Callable[[int, int], float]  # of (chosen, rejected): the least gap of their values; inf: never a pair


def pairs(
    items: Sequence[T],
    value: Sequence[float],
    margin: float | Margin,
    floor: float = -np.inf,
    same: Callable[[T, T], bool] = eq,
    most: int | None = None,
) -> tuple[list[tuple[int, int]], int]:
    """The pairs (chosen, rejected) among one problem's answers, as indices, and how many had identical sides.

    A pair is admitted where value[chosen] is at least `floor`, and above value[rejected] by at least `margin`. Those
    of equal sides (`same`) are dropped and counted. The widest come first, at most `most` of them; there may be none.
    Raises ValueError for values that are nan or not one an item.
    """
    if len(items) != len(value) or np.isnan(value).any():
        raise ValueError(f"{len(items)} items need as many values, none of them nan")
    least = margin if callable(margin) else lambda i, j: margin
    gaps = [
        (i, j)
        for i in range(len(items))
        for j in range(len(items))
        if value[i] >= floor - SLACK and value[i] > value[j] and value[i] - value[j] >= least(i, j) - SLACK
    ]
    gaps.sort(key=lambda p: value[p[1]] - value[p[0]])
    return differing(gaps, lambda i, j: same(items[i], items[j]), most)


def differing(
    found: Iterable[tuple[T, T]], same: Callable[[T, T], bool], most: int | None = None
) -> tuple[list[tuple[T, T]], int]:
    """The pairs whose sides are not the same (at most the first `most` of them), and how many were: both sides of
    those would be pushed apart by the same gradient, which is none."""
    kept: list[tuple[T, T]] = []
    identical = 0
    for pair in found:
        if same(*pair):
            identical += 1
        else:
            kept.append(pair)
    return kept[:most], identical


def unlike(items: Sequence[Hashable], most: int, keys: Keys) -> tuple[list[tuple[int, int]], int]:
    """Pairs of different items, at most `most` of them, drawn from all that there are; as indices, each item by its
    last copy. And how many items were copies."""
    different = list({item: i for i, item in enumerate(items)}.values())
    every = list(combinations(different, 2))
    return [every[i] for i in keys.numpy().permutation(len(every))[:most]], len(items) - len(different)


def linked(
    rows: Sequence[Sequence[Row]],
    values: Sequence[NDArray[np.float64]],
    picked: Sequence[tuple[Sequence[tuple[int, int]], int]],
) -> tuple[Examples | None, dict[str, float]]:
    """The pairs (chosen, rejected) that were picked among each problem's rows, every row with its `value` for its only
    column; None where there are none. And how many: pairs, identical (dropped for equal sides, as `picked` counts
    them), and skipped, problems that have no pair."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for of, value, (found, _) in zip(rows, values, picked, strict=True):
        for pair in found:
            for side, i in zip(sides, pair, strict=True):
                side.append(replace(of[i], info={"value": float(value[i])}))
    identical, skipped = sum(same for _, same in picked), sum(not found for found, _ in picked)
    counts = {"pairs": float(len(sides[0])), "identical": float(identical), "skipped": float(skipped)}
    return paired(*sides) if sides[0] else None, counts


def repetitive(row: Row, gram: int = 4) -> bool:
    """Whether over half of the n-grams (of `gram` tokens) of an answer came before in it; a shorter one than 4 of them
    never is."""
    out = row.columns["target"].tolist()
    grams = [tuple(out[i : i + gram]) for i in range(len(out) - gram + 1)]
    return len(out) >= 4 * gram and len(set(grams)) < len(grams) / 2


def same_tokens(a: Row, b: Row) -> bool:
    """Whether two rows hold the same tokens and learn the same of them."""
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.at, b.at)


def joined(parts: Sequence[Examples]) -> Examples:
    """All examples one after another, with their links."""
    rows: list[Row] = []
    links: list[Link] = []
    for part in parts:
        links += [replace(link, rows=tuple(r + len(rows) for r in link.rows)) for link in part.links]
        rows += part.rows
    return Examples(rows, links)


def with_older(new: Examples, older: Sequence[Examples], share: float, keys: Keys) -> Examples:
    """`new` with linked rows of earlier rounds, `older` from the last round back.

    Of all that comes out at most `share` is of the last round, half that of the one before, and so on (DNO-Prct, arXiv
    2404.03715, algorithm 2), drawn without replacement. Raises UserError for a share outside 0 to 0.5, which would
    leave nothing for the new.
    """
    if not 0 <= share < 0.5:
        raise UserError(f"the share of the last round's pairs must lie in [0, 0.5), not at {share}")
    shares = [share / 2**k for k in range(len(older))]
    total = len(new.links) / (1 - sum(shares))
    parts = [new]
    for k, (part, of) in enumerate(zip(older, shares, strict=True)):
        count = min(len(part.links), int(of * total + SLACK))
        if count:
            picked = sorted(keys.at("older", k).numpy().permutation(len(part.links))[:count].tolist())
            parts.append(of_links(part, [part.links[i] for i in picked]))
    return joined(parts)


class PairStore:
    """The pairs that each round made, for the later ones. State for a run to track."""

    def __init__(self) -> None:
        self.rounds: list[Examples] = []

    def mixed(self, new: Examples, share: float, keys: Keys) -> Examples:
        """The pairs of a new round with older ones (see `with_older`); the new are remembered."""
        found = with_older(new, self.rounds[::-1], share, keys)
        self.rounds.append(new)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": [r.state_dict() for r in self.rounds]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = [Examples.from_state(r) for r in state["rounds"]]


def of_links(data: Examples, links: Sequence[Link]) -> Examples:
    """The examples of these links alone."""
    rows: list[Row] = []
    kept: list[Link] = []
    for link in links:
        kept.append(replace(link, rows=tuple(range(len(rows), len(rows) + len(link.rows)))))
        rows += [data.rows[r] for r in link.rows]
    return Examples(rows, kept)


def with_info(data: Examples, columns: Mapping[str, Sequence[float | str]]) -> Examples:
    """The examples with more row columns, a value a row."""
    rows = [
        replace(row, info={**row.info, **{name: values[i] for name, values in columns.items()}})
        for i, row in enumerate(data.rows)
    ]
    return Examples(rows, data.links)
