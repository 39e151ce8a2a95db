"""Fixed training data: rows with their links, drawn in epochs, or examples that are made anew at every visit.

What a step gets is a pure function of the seed and the step, so there is no position to save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from etude.experience.batch import Batch, Link, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Tokenizer
from etude.experience.rows import COLUMNS, Row, example
from etude.experience.rows import rows as rows_of
from etude.experience.types import Group, Law, Prompt, Trajectory

E = TypeVar("E")


def visits(count: int, step: int, size: int, keys: Keys) -> list[tuple[int, int]]:
    """(unit, epoch) of each of the `size` units of a step: an epoch is a keyed shuffle of all `count` units, and a
    step that reaches its end goes on in the next."""
    found: list[tuple[int, int]] = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, count)
        if not found or offset == 0:
            order = keys.at("epoch", epoch).numpy().permutation(count)
        found.append((int(order[offset]), epoch))
    return found


@dataclass(frozen=True)
class Visited(Generic[E]):
    """Examples of which `row(example, keys)` makes a row at every visit: what it draws, such as what is left out or
    hidden, is drawn anew in each epoch."""

    examples: Sequence[E]
    row: Callable[[E, Keys], Row]

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError("there is nothing to train on: 0 examples")

    def draw(self, step: int, size: int, keys: Keys) -> Batch:
        """The batch of `size` examples of a step, in epochs; see `visits`."""
        drawn = visits(len(self.examples), step, size, keys)
        return pack([self.row(self.examples[i], keys.at("visit", epoch, i)) for i, epoch in drawn])


@dataclass(frozen=True)
class Examples:
    """Rows and the links between them. Linked rows are drawn together."""

    rows: Sequence[Row]
    links: Sequence[Link] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError("there is nothing to train on: 0 examples")

    @cached_property
    def units(self) -> list[tuple[int, ...]]:
        """What is drawn as one: the rows of each link, and every row that stands alone."""
        linked = {r for link in self.links for r in link.rows}
        return [link.rows for link in self.links] + [(r,) for r in range(len(self.rows)) if r not in linked]

    def draw(self, step: int, size: int, keys: Keys) -> Batch:
        """The batch of `size` units of a step, in epochs; see `visits`."""
        rows: list[Row] = []
        drawn: list[Link] = []
        for i, _ in visits(len(self.units), step, size, keys):
            unit = self.units[i]
            at = tuple(range(len(rows), len(rows) + len(unit)))
            rows += [self.rows[r] for r in unit]
            if i < len(self.links):  # the links are the first of the units
                drawn.append(replace(self.links[i], rows=at))
        return pack(rows, drawn)

    def state_dict(self) -> dict[str, Any]:
        """A tree for a checkpoint or a stage's result, with the arrays of all rows joined."""
        laws = list(dict.fromkeys(law for r in self.rows for law in r.laws))
        return {
            "lengths": np.array([len(r) for r in self.rows]),
            "actions": np.array([len(r.at) for r in self.rows]),
            "ids": np.concatenate([r.ids for r in self.rows]),
            "at": np.concatenate([r.at for r in self.rows]),
            "columns": {name: np.concatenate([r.columns[name] for r in self.rows]) for name in COLUMNS},
            "laws": [[law.temperature, law.top_k, law.top_p, law.min_p, list(law.tilt)] for law in laws],
            "laws_of": [[laws.index(law) for law in r.laws] for r in self.rows],
            "info": [dict(r.info) for r in self.rows],
            "pos": {i: r.pos for i, r in enumerate(self.rows) if r.pos is not None},
            "branch": {i: r.branch for i, r in enumerate(self.rows) if r.branch is not None},
            "links": [[link.kind, list(link.rows), list(link.roles)] for link in self.links],
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Examples:
        """What `state_dict` gave, as examples again."""
        tokens, actions = np.cumsum(state["lengths"])[:-1], np.cumsum(state["actions"])[:-1]
        ids, at = np.split(state["ids"], tokens), np.split(state["at"], actions)
        columns = {name: np.split(joined, actions) for name, joined in state["columns"].items()}
        laws = [Law(t, k, p, m, tuple(tilt)) for t, k, p, m, tilt in state["laws"]]
        rows = [
            Row(
                ids[i],
                at[i],
                {name: parts[i] for name, parts in columns.items()},
                tuple(laws[law] for law in state["laws_of"][i]),
                state["info"][i],
                state["pos"].get(i),
                state["branch"].get(i),
            )
            for i in range(len(ids))
        ]
        return Examples(rows, [Link(kind, tuple(of), tuple(roles)) for kind, of, roles in state["links"]])


def completion(tokenizer: Tokenizer, prompt: Prompt, text: str, limit: int, **info: float | str) -> Row:
    """The row that teaches `text` as the answer to `prompt`. Raises UserError if it is longer
    than `limit` tokens."""
    row = example(tokenizer.prompt(prompt), tokenizer.completion(text), None, **info)
    if len(row) > limit:
        raise UserError(
            f"an example of {len(row)} tokens is longer than the policy's context of {limit}: {prompt!r:.60}"
        )
    return row


def pack_groups(groups: Sequence[Group], agent: str | None = None) -> Batch:
    """The batch of all members of all groups.

    Row columns: `group` and `trajectory` (both counted in this order; several rows may belong to one
    trajectory), `member`, `reward`, `correct` (nan where the verifier has no word), `solved` (the share of
    the group's members that are correct). Raises ValueError if no member has an action.
    """
    rows: list[Row] = []
    index = 0
    for g, group in enumerate(groups):
        for member in group.members:
            correct = member.outcome.correct if member.outcome else None
            rows += rows_of(
                member,
                agent,
                group=float(g),
                trajectory=float(index),
                member=float(member.member),
                reward=member.reward,
                correct=np.nan if correct is None else float(correct),
                solved=group.solved,
            )
            index += 1
    return pack(rows)


def demonstration(trajectory: Trajectory, agent: str | None = None) -> list[Row]:
    """The rows that teach what `agent` did in `trajectory`, as it did it."""
    return rows_of(trajectory, agent, reward=trajectory.reward)


def only_row(answer: Trajectory) -> Row:
    """The row of an answer that is to be a side of a pair. Raises UserError where it has none, or fills several."""
    rows = demonstration(answer)
    if len(rows) != 1:
        raise UserError(
            f"problem {answer.problem.id}: an answer whose context was cut fills {len(rows)} rows and cannot be in a "
            "pair: allow a longer context"
        )
    return rows[0]


def pairs(chosen: Sequence[Row], rejected: Sequence[Row]) -> Examples:
    """Preference pairs: row i of `chosen` is preferred to row i of `rejected`."""
    rows = [row for both in zip(chosen, rejected, strict=True) for row in both]
    links = [Link("pair", (i, i + 1), ("chosen", "rejected")) for i in range(0, len(rows), 2)]
    return Examples(rows, links)
