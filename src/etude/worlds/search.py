"""Searches over graphs that a neighbour function gives: distances by breadth, and A* with its trace.

Every step costs 1. A* (Hart, Nilsson and Raphael 1968) is a state machine here: it says what may come next, so that
a search can be drawn at random, replayed, and checked clause by clause. A trace is made of two kinds of clauses, as in
arXiv 2402.14083 (section 3.1): `create` when a node enters the frontier or is found at a lower cost, `close` when it
is expanded; each with the cost so far and the estimate of what is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Literal, TypeVar

import numpy as np

N = TypeVar("N", bound=Hashable)
Neighbours = Callable[[N], Iterable[N]]


@dataclass(frozen=True)
class Clause(Generic[N]):
    """One line of a search: `node` was created or closed at `cost` steps from the start, `estimate` from the goal."""

    kind: Literal["create", "close"]
    node: N
    cost: int
    estimate: int


class AStar(Generic[N]):
    """A search for a shortest way, clause by clause.

    `options` are the clauses that may come next: after a `close` the node's children, in any order; then the closing
    of any frontier node with the least cost + estimate. `take` goes on with one of them. The search is over once the
    goal is closed (`plan` is the way there) or nothing is left to close. `estimate` must never say too much, nor fall
    by more than 1 a step: then no closed node is ever found at a lower cost.
    """

    def __init__(self, start: N, goal: N, neighbours: Neighbours[N], estimate: Callable[[N], int]) -> None:
        self.start, self.goal, self.neighbours, self.estimate = start, goal, neighbours, estimate
        self.cost: dict[N, int] = {}
        self.parent: dict[N, N] = {}
        self.frontier: dict[N, int] = {}  # cost + estimate
        self.closed: set[N] = set()
        self._children: dict[N, Clause[N]] = {start: Clause("create", start, 0, estimate(start))}
        self._closing = start

    @property
    def over(self) -> bool:
        """Whether the goal is closed, or nothing is left to close."""
        return self.goal in self.closed or not (self._children or self.frontier)

    def options(self) -> list[Clause[N]]:
        """What may come next; nothing once the search is over."""
        if self.over:
            return []
        if self._children:
            return list(self._children.values())
        least = min(self.frontier.values())
        return [self._clause("close", node) for node, total in self.frontier.items() if total == least]

    def take(self, clause: Clause[N]) -> bool:
        """Goes on with a clause; False, and nothing is changed, if it may not come next."""
        if clause not in self.options():
            return False
        node = clause.node
        if clause.kind == "create":
            del self._children[node]
            if node != self.start:
                self.parent[node] = self._closing
            self.cost[node] = clause.cost
            self.frontier[node] = clause.cost + clause.estimate
            return True
        del self.frontier[node]
        self.closed.add(node)
        self._closing = node
        if node != self.goal:
            cost = clause.cost + 1
            for child in self.neighbours(node):
                if child not in self.closed and cost < self.cost.get(child, cost + 1):
                    self._children[child] = Clause("create", child, cost, self.estimate(child))
        return True

    def plan(self) -> tuple[N, ...] | None:
        """The way from start to goal; None before the goal is closed."""
        if self.goal not in self.closed:
            return None
        way = [self.goal]
        while way[-1] != self.start:
            way.append(self.parent[way[-1]])
        return tuple(reversed(way))

    def _clause(self, kind: Literal["create", "close"], node: N) -> Clause[N]:
        return Clause(kind, node, self.cost[node], self.estimate(node))


def astar(
    start: N, goal: N, neighbours: Neighbours[N], estimate: Callable[[N], int], draw: np.random.Generator | None = None
) -> tuple[tuple[Clause[N], ...], tuple[N, ...] | None]:
    """(clauses, plan) of one search; the plan is None where there is no way. With `draw`, ties are broken and children
    put in order at random; without, as `neighbours` and the frontier have them."""
    search = AStar(start, goal, neighbours, estimate)
    clauses: list[Clause[N]] = []
    while options := search.options():
        clause = options[int(draw.integers(len(options))) if draw is not None else 0]
        search.take(clause)
        clauses.append(clause)
    return tuple(clauses), search.plan()


def distances(start: N, neighbours: Neighbours[N]) -> dict[N, int]:
    """Steps from `start` to every node that can be reached, `start` itself (0) among them."""
    found = {start: 0}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for other in neighbours(node):
            if other not in found:
                found[other] = found[node] + 1
                queue.append(other)
    return found


def is_way(way: Sequence[N], start: N, goal: N, neighbours: Neighbours[N]) -> bool:
    """Whether `way` goes from start to goal, a step to a neighbour at a time. A start that is the goal is a way."""
    if not way or way[0] != start or way[-1] != goal:
        return False
    return all(b in set(neighbours(a)) for a, b in pairwise(way))
