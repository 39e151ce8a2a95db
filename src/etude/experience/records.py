"""Trajectories to rows of the store's tables, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etude.experience.shards import Shards, read_calls, write_calls
from etude.experience.types import Group, Outcome, Problem, StepInfo, Trajectory

Rows = list[tuple[Any, ...]]


def to_json(value: Any) -> str:
    """JSON of nearly anything: mappings become objects, arrays and sets lists, keys strings, what
    is left its text."""
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError):  # keys that are not strings or numbers, deep inside
        return json.dumps(_string_keys(value), default=_plain)


def encode(
    groups: Sequence[tuple[Group, bool]], shards: Shards, stage: str, step: int, first: tuple[int, int]
) -> tuple[Rows, Rows]:
    """Rows for the tables `problems` and `trajectories`; the arrays go to `shards`.

    `first` are the first free ids of the two. A fork's parent that is in none of the groups is
    written too, so that the fork can be read whole.
    """
    todo: list[tuple[Trajectory, int, str, bool]] = []
    for g, (group, kept) in enumerate(groups):
        todo += [(t, g, "member", kept) for t in group.members]
        todo += [(t, g, "discarded", False) for t in group.discarded]
    ids = {id(entry[0]): first[1] + i for i, entry in enumerate(todo)}
    for trajectory, g, _, _ in todo:  # grows while it is walked
        if trajectory.parent is not None and id(trajectory.parent[0]) not in ids:
            ids[id(trajectory.parent[0])] = first[1] + len(todo)
            todo.append((trajectory.parent[0], g, "parent", False))
    problems: Rows = []
    problem_ids: dict[int, int] = {}
    rows: Rows = []
    for i, (t, g, role, kept) in enumerate(todo):
        p = t.problem
        difficulty = None if p.difficulty is None else float(p.difficulty)
        if id(p) not in problem_ids:
            problem_ids[id(p)] = first[0] + len(problems)
            problems.append(
                (problem_ids[id(p)], to_json(p.prompt), _text(p.answer), to_json(p.options), to_json(p.meta))
            )
        rows.append(
            (
                first[1] + i, stage, step, g, int(t.member), role, kept,
                problem_ids[id(p)], _text(p.id), _text(p.category), difficulty, _text(t.text),
                *_encode_outcome(t.outcome),
                t.tokens(), to_json([_encode_step(s) for s in t.steps]), to_json(t.tags),
                *_encode_parent(t, ids),
                shards.shard, to_json(write_calls(shards, t.calls)),
            )
        )  # fmt: skip
    return problems, rows


def decode(row: Mapping[str, Any], shards: Shards, parent: tuple[Trajectory, int, int] | None) -> Trajectory:
    """The trajectory of a row of `trajectories` joined with its problem."""
    prompt = json.loads(row["prompt"])
    problem = Problem(
        row["problem_id"],
        prompt if isinstance(prompt, str) else tuple(prompt),
        row["answer"],
        row["category"],
        row["difficulty"],
        json.loads(row["options"]),
        json.loads(row["meta"]),
    )
    return Trajectory(
        problem,
        read_calls(shards, row["shard"], json.loads(row["calls"])),
        tuple(_decode_step(s) for s in json.loads(row["world"])),
        _decode_outcome(row),
        parent,
        row["member"],
        row["text"],
        json.loads(row["tags"]),
    )


def number(value: float | None) -> float:
    """A REAL column's number: SQLite keeps nan as null."""
    return float("nan") if value is None else value


def _encode_outcome(outcome: Outcome | None) -> tuple[Any, ...]:
    """The columns reward, correct, parsed, parts, per_call."""
    if outcome is None:
        return (None,) * 5
    correct = None if outcome.correct is None else bool(outcome.correct)
    return (float(outcome.reward), correct, _text(outcome.parsed), to_json(outcome.parts), to_json(outcome.per_call))


def _decode_outcome(row: Mapping[str, Any]) -> Outcome | None:
    if row["parts"] is None:
        return None
    correct = None if row["correct"] is None else bool(row["correct"])
    per_call = json.loads(row["per_call"])
    return Outcome(
        number(row["reward"]),
        correct,
        row["parsed"],
        json.loads(row["parts"]),
        None if per_call is None else tuple(per_call),
    )


def _encode_parent(t: Trajectory, ids: Mapping[int, int]) -> tuple[int | None, int | None, int | None]:
    if t.parent is None:
        return None, None, None
    trajectory, call, token = t.parent
    return ids[id(trajectory)], int(call), int(token)


def _encode_step(s: StepInfo) -> list[Any]:
    return [s.reward, s.valid, s.events, s.correct, s.terminated, s.truncated, s.call]


def _decode_step(values: list[Any]) -> StepInfo:
    reward, valid, events, *rest = values
    return StepInfo(reward, valid, tuple(events), *rest)


def _text(text: str | None) -> str | None:
    """Text that SQLite takes: half a surrogate pair becomes a question mark."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # arrays and their scalars
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return str(value)


def _string_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(k): _string_keys(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_string_keys(v) for v in value]
    return value
