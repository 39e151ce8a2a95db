"""Trajectories to training rows: calls merge exactly where each context extends the last.

A row is one sequence of `L` tokens with `n` actions in it. Each action keeps its identity (call,
token), its author, its law and both log-probabilities from sampling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.experience.types import RAW, Author, Call, Floats, Ids, Law, Trajectory

# Per-action columns every row has, with their types.
COLUMNS: dict[str, type] = {
    "target": np.int64,  # the token chosen (may differ from the next input)
    "weight": np.float32,  # what normalise() turns into the loss weight
    "logp_raw": np.float32,  # at temperature 1, nan if demonstrated
    "logp_sampled": np.float32,  # under the law it was drawn from
    "author": np.int8,
    "law": np.int16,  # index into the row's laws
    "call": np.int32,  # index of the call in its trajectory
    "token": np.int32,  # index in that call's out
    "turn": np.int32,  # how many calls of this agent came before
}


@dataclass(frozen=True, eq=False)
class Row:
    """One training sequence.

    `at[i]` is the input position whose output decides action `i` (for a causal LM, one before the
    token). `info` holds per-row values (reward, source, domain, item, ...), numbers or strings.
    """

    ids: Ids
    at: NDArray[np.int32]
    columns: Mapping[str, NDArray[Any]]
    laws: tuple[Law, ...] = (RAW,)
    info: Mapping[str, float | str] = field(default_factory=dict)
    pos: Ids | None = None
    branch: Ids | None = None

    def __len__(self) -> int:
        return len(self.ids)


def rows(trajectory: Trajectory, /, agent: str | None = None, **info: float | str) -> list[Row]:
    """The rows that train `agent` (None: every agent) on `trajectory`.

    Calls share a row where the context of each is the row so far and more, at the same positions and
    in the same branches: then every action has the very context it was chosen in. A token is an action
    if the agent chose it, or if its call gives it a weight above 0. Raises ValueError where an action
    has no token before it to be predicted from.
    """
    out: list[Row] = []
    building: _Builder | None = None
    turns: Counter[str] = Counter()
    for k, call in enumerate(trajectory.calls):
        if building is None or not building.extended_by(call):
            if building is not None:
                out.extend(building.finish(info))
            building = _Builder(call.context)
        building.add(call, k, turns[call.agent], mine=agent is None or call.agent == agent)
        turns[call.agent] += 1
    if building is not None:
        out.extend(building.finish(info))
    return out


def example(
    context: Sequence[int] | Ids,
    out: Sequence[int] | Ids,
    weight: Sequence[float] | Floats | None = None,
    **info: float | str,
) -> Row:
    """A demonstrated row: `out` is to be learnt after `context`.

    With an empty context the first token of `out` is only input. Raises ValueError if nothing
    is left to learn or `weight` has another length than `out`.
    """
    ids = np.concatenate([np.asarray(context, np.int32), np.asarray(out, np.int32)])
    start = max(len(context), 1)
    n = len(ids) - start
    if n <= 0:
        raise ValueError("an example needs at least one token to learn after its first")
    w = np.ones(len(out), np.float32) if weight is None else np.asarray(weight, np.float32)
    if len(w) != len(out):
        raise ValueError(f"{len(w)} weights for {len(out)} tokens")
    token = np.arange(len(out) - n, len(out), dtype=np.int32)
    nan = np.full(n, np.nan, np.float32)
    zero = np.zeros(n, np.int32)
    columns: dict[str, NDArray[Any]] = {
        "target": ids[start:].astype(np.int64),
        "weight": w[len(out) - n :],
        "logp_raw": nan,
        "logp_sampled": nan,
        "author": np.full(n, Author.SELF, np.int8),
        "law": zero.astype(np.int16),
        "call": zero,
        "token": token,
        "turn": zero,
    }
    return Row(ids, np.arange(start - 1, len(ids) - 1, dtype=np.int32), columns, info=info)


class _Builder:
    """One row while calls are still being merged into it."""

    def __init__(self, context: Ids) -> None:
        self.parts: list[Ids] = [np.asarray(context, np.int32)]
        self.length = len(context)
        self.at: list[NDArray[Any]] = []
        self.columns: dict[str, list[NDArray[Any]]] = {name: [] for name in COLUMNS}
        self.laws: dict[Law, int] = {}
        self.pos: Ids | None = None
        self.branch: Ids | None = None

    def ids(self) -> Ids:
        if len(self.parts) > 1:
            self.parts = [np.concatenate(self.parts)]
        return self.parts[0]

    def extended_by(self, call: Call) -> bool:
        own, n = self.ids(), self.length
        return (
            len(call.context) >= n
            and np.array_equal(call.context[:n], own)
            and np.array_equal(_first(n, call.pos, np.arange(n)), _first(n, self.pos, np.arange(n)))
            and np.array_equal(_first(n, call.branch, np.zeros(n)), _first(n, self.branch, np.zeros(n)))
        )

    def add(self, call: Call, index: int, turn: int, mine: bool) -> None:
        self.parts += [np.asarray(call.context[self.length :], np.int32), np.asarray(call.out, np.int32)]
        start = len(call.context)
        self.length = start + len(call.out)
        self.pos, self.branch = call.pos, call.branch
        if not mine:
            return
        weight = call.weights
        token = np.flatnonzero((call.author == Author.SELF) | (weight > 0)).astype(np.int32)
        if start == 0 and len(token) and token[0] == 0:
            raise ValueError(f"call {index} chose its first token after an empty context: begin with a start token")
        n = len(token)
        law = self.laws.setdefault(call.law, len(self.laws))
        self.at.append(start + token - 1)
        values: dict[str, NDArray[Any]] = {
            "target": call.out[token],
            "weight": weight[token],
            "logp_raw": call.logp_raw[token],
            "logp_sampled": call.logp_sampled[token],
            "author": call.author[token],
            "law": np.full(n, law),
            "call": np.full(n, index),
            "token": token,
            "turn": np.full(n, turn),
        }
        for name, value in values.items():
            self.columns[name].append(value.astype(COLUMNS[name]))

    def finish(self, info: Mapping[str, float | str]) -> list[Row]:
        if not any(len(a) for a in self.at):
            return []
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        at = np.concatenate(self.at).astype(np.int32)
        return [Row(self.ids(), at, columns, tuple(self.laws), dict(info), self.pos, self.branch)]


def _first(n: int, override: Ids | None, plain: NDArray[Any]) -> NDArray[Any]:
    """The first `n` positions or branches, `plain` where they were not overridden."""
    return plain if override is None else override[:n]
