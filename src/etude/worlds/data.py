"""Text data as typed examples, and as a world with a verifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, overload

from etude.experience.errors import UserError, unknown
from etude.experience.types import NOTHING, Message, Outcome, Problem, Prompt
from etude.worlds.datafiles import Source, read_rows
from etude.worlds.verifiers import load_verifier

Columns = Mapping[str, str]  # our name -> the data's column
Kind = Literal["completion", "chat", "preference", "problem"]


@dataclass(frozen=True)
class Example:
    """A completion to learn after a prompt."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, the first preferred."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Row:
    """A row and where it stands, for messages."""

    where: str
    values: Mapping[str, Any]
    columns: Columns

    def get(self, name: str) -> Any:
        """The value of our column `name`. Raises UserError if the row lacks it or it is null."""
        column = self.columns.get(name, name)
        if column not in self.values:
            has = ", ".join(map(str, self.values)) or "none"
            raise UserError(f"{self.where}: no column {column!r}; it has: {has} (map them with columns)")
        value = self.values[column]
        if value is None:
            raise UserError(f"{self.where}: column {column!r} is empty")
        return value

    def has(self, name: str) -> bool:
        """Whether the row has our column `name`."""
        return self.columns.get(name, name) in self.values

    def error(self, name: str, wanted: str) -> UserError:
        """The error for a value of the wrong type."""
        value = self.get(name)
        return UserError(
            f"{self.where}: column {self.columns.get(name, name)!r} should be {wanted}, not {type(value).__name__}"
        )


# --- examples ------------------------------------------------------------------------------------


@overload
def load_examples(
    source: Source, kind: Literal["completion", "chat"] = ..., columns: Columns = ...
) -> list[Example]: ...
@overload
def load_examples(source: Source, kind: Literal["preference"], columns: Columns = ...) -> list[Pair]: ...
@overload
def load_examples(source: Source, kind: Literal["problem"], columns: Columns = ...) -> list[Problem]: ...
def load_examples(source: Source, kind: Kind = "completion", columns: Columns = NOTHING) -> Sequence[Any]:
    """The examples of a .jsonl or .parquet file, a folder of them or one that `datasets` saved, a
    `datasets.Dataset`, or any rows in memory.

    `completion` reads `prompt` and `completion`, or, without a `prompt`, what `chat` does; `chat` reads
    `messages`, of which the last, the assistant's, is the completion; `preference` reads `prompt`,
    `chosen` and `rejected` (chats without a `prompt` share their beginning); `problem` reads `prompt`
    and `answer`, perhaps `category` and `difficulty`. Prompts are text or messages. `columns` maps these
    names to the data's own. Raises UserError, with the file and line or row, on anything that is not such data.
    """
    readers: dict[str, Callable[[Row, int], Any]] = {
        "completion": _completion,
        "chat": _chat,
        "preference": _preference,
        "problem": _as_problem,
    }
    if kind not in readers:
        raise unknown("kind of examples", kind, readers)
    read = readers[kind]
    return [read(Row(where, values, columns), i) for i, (where, values) in enumerate(read_rows(source))]


def _completion(row: Row, number: int) -> Example:
    if row.has("messages") and not row.has("prompt"):
        return _chat(row, number)
    return Example(_prompt(row), _reply(row, "completion"))


def _chat(row: Row, number: int) -> Example:
    messages = _messages(row, "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{row.where}: messages should end with a reply of the assistant")
    return Example(messages[:-1], messages[-1]["content"])


def _preference(row: Row, number: int) -> Pair:
    if row.has("prompt"):
        return Pair(_prompt(row), _reply(row, "chosen"), _reply(row, "rejected"))
    if isinstance(row.get("chosen"), str):
        row.get("prompt")  # text without a prompt: says what is missing
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if not (len(chosen) == len(rejected) >= 2 and chosen[:-1] == rejected[:-1]):
        raise UserError(f"{row.where}: chosen and rejected should be chats that differ in their last message only")
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _as_problem(row: Row, number: int) -> Problem:
    prompt, answer = _prompt(row), row.get("answer")
    if not isinstance(answer, str | int | float):
        raise row.error("answer", "text or a number")
    category = str(row.get("category")) if row.has("category") else ""
    difficulty = row.get("difficulty") if row.has("difficulty") else None
    if not isinstance(difficulty, int | float | None):
        raise row.error("difficulty", "a number")
    used = {row.columns.get(n, n) for n in ("prompt", "answer", "category", "difficulty")}
    rest = {k: v for k, v in row.values.items() if k not in used}
    return Problem(f"row/{number}", prompt, str(answer), category, difficulty, meta=rest)


def _prompt(row: Row) -> Prompt:
    return row.get("prompt") if isinstance(row.get("prompt"), str) else _messages(row, "prompt")


def _reply(row: Row, name: str) -> str:
    """Text, or a chat of one message."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    messages = _messages(row, name)
    if len(messages) != 1:
        raise UserError(f"{row.where}: column {name!r} should be text or one message, not {len(messages)} messages")
    return messages[0]["content"]


def _messages(row: Row, name: str) -> tuple[Message, ...]:
    value = row.get(name)
    if not isinstance(value, list | tuple) or not value:
        raise row.error(name, "text or a list of messages" if name != "messages" else "a list of messages")
    for m in value:
        if not (isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise UserError(f"{row.where}: every message in {name!r} needs a role and a content, both text")
    return tuple(Message(role=m["role"], content=m["content"]) for m in value)


# --- a world -------------------------------------------------------------------------------------


class DataWorld:
    """Problems from rows with `prompt` and `answer` (and `category`, `difficulty`), judged by a verifier.

    `path` and `columns` are as for `load_examples`; `verifier` as for `load_verifier`. A row is a test
    row if a hash of its prompt falls into the share `test`, so rows with one prompt share a split. The
    other columns are in `meta`, for reward functions. Raises UserError on data that cannot be read.
    """

    def __init__(
        self,
        path: Source,
        *,
        verifier: str | Callable[[str, str], Any] = "exact",
        columns: Columns = NOTHING,
        test: float = 0.1,
    ) -> None:
        if not 0 <= test <= 1:
            raise UserError(f"test={test} should be a share from 0 to 1")
        self.name = Path(path).stem if isinstance(path, str | Path) else "data"
        self.notation = "natural"
        self._verify = load_verifier(verifier)
        problems = load_examples(path, "problem", columns)
        self.categories: tuple[str, ...] = tuple(sorted({p.category for p in problems}))
        self._rows: dict[tuple[str, str | None], list[Problem]] = {}
        for problem in problems:
            split = "test" if _share(problem.prompt) < test else "train"
            for category in (None, problem.category):
                self._rows.setdefault((split, category), []).append(problem)

    def size(self, split: str) -> int | None:
        """How many rows a split has."""
        return len(self._rows.get((split, None), ()))

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """Row `index` of a split (of a category); after the last it starts over.
        Raises UserError if there is no such row."""
        if split not in ("train", "test"):
            raise unknown("split", split, ("train", "test"))
        if category is not None and category not in self.categories:
            raise unknown(f"category of {self.name}", category, self.categories)
        rows = self._rows.get((split, category))
        if not rows:
            where = f" of category {category!r}" if category else ""
            raise UserError(f"{self.name} has no {split} rows{where}: change test=..., the share of test rows")
        return rows[index % len(rows)]

    def score(self, problem: Problem, text: str) -> Outcome:
        """The verifier's outcome."""
        return self._verify(text, problem.answer or "")


def _share(prompt: Prompt) -> float:
    """A number from 0 to 1 that depends on the prompt alone."""
    return int.from_bytes(blake2b(as_text(prompt).encode(), digest_size=8).digest(), "little") / 2**64


def as_text(prompt: Prompt) -> str:
    """A prompt as text, to compare it by and look it up."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
