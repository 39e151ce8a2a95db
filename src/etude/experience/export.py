"""A run's tables as JSON Lines or Parquet, in the columns that people's tools read.

Trajectories come with `prompt` (text, or chat messages) and `completion`, so that an export is itself a
data set to train on. Numbers that are not finite become null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from etude.experience.errors import UserError, missing
from etude.experience.store import Store

Table = Literal["trajectories", "metrics", "evaluations", "steps"]
CHUNK = 5000  # rows held in memory at once


def export_run(store: Store, path: str | Path, table: Table = "trajectories") -> int:
    """Writes one of the run's tables to `path`, `.jsonl` or `.parquet`; returns how many rows.

    The file appears whole or not at all. Raises UserError for another suffix, an empty table, a path
    that cannot be written, and for Parquet without pyarrow.
    """
    path = Path(path)
    writers = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise UserError(f"cannot export to {path}: the name must end in {' or '.join(writers)}")
    if table not in _ROWS:
        raise UserError(f"unknown table {table!r}: one of {', '.join(_ROWS)}")
    rows = _ROWS[table](store)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{store.folder} has no {table} to export")
    chat = isinstance(first.get("prompt"), list)
    with _replacing(path) as part:
        return writers[path.suffix](_chunks(first, rows), part, table, chat)


def _trajectories(store: Store) -> Iterator[dict[str, Any]]:
    last = 0
    while page := store.trajectories(after=last, limit=CHUNK):
        last = page[-1]["id"]
        for row in page:
            row["completion"] = row.pop("text")
            yield row


def _metrics(store: Store) -> Iterator[dict[str, Any]]:
    for name, series in store.metrics().items():
        for stage, step, value in zip(*(column.tolist() for column in series), strict=True):
            yield {"stage": stage, "step": step, "name": name, "value": value}


_ROWS = {
    "trajectories": _trajectories,
    "metrics": _metrics,
    "evaluations": lambda store: iter(store.evaluations()),
    "steps": lambda store: iter(store.steps()),
}


def _write_jsonl(chunks: Iterator[list[dict[str, Any]]], path: Path, table: str, chat: bool) -> int:
    n = 0
    with open(path, "w", encoding="utf-8") as file:
        for chunk in chunks:
            file.writelines(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in chunk)
            n += len(chunk)
    return n


def _write_parquet(chunks: Iterator[list[dict[str, Any]]], path: Path, table: str, chat: bool) -> int:
    """A column has one type: `chat` says whether prompts are messages or text; the others are converted."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing("pyarrow", "data", "export to Parquet") from None
    text, whole, real, truth = pa.string(), pa.int64(), pa.float64(), pa.bool_()
    at = [("stage", text), ("step", whole)]
    named = pa.map_(text, real)
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    fields = {
        "metrics": [*at, ("name", text), ("value", real)],
        "steps": [*at, ("seconds", real), ("meter", named)],
        "evaluations": [
            *at, ("world", text), ("split", text), ("metric", text),
            ("value", real), ("low", real), ("high", real), ("n", whole),
        ],
        "trajectories": [
            ("id", whole), *at, ("grp", whole), ("member", whole), ("role", text), ("kept", truth),
            ("problem_id", text), ("category", text), ("difficulty", real),
            ("prompt", messages if chat else text), ("answer", text), ("completion", text), ("parsed", text),
            ("reward", real), ("correct", truth), ("parts", named), ("tokens", whole),
        ],
    }  # fmt: skip
    schema = pa.schema(fields[table])
    n = 0
    with pq.ParquetWriter(path, schema) as writer:
        for chunk in chunks:
            rows = [_columns(_finite(row), chat) for row in chunk]
            writer.write_table(pa.Table.from_pylist(rows, schema))
            n += len(rows)
    return n


def _columns(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    prompt = row.get("prompt")
    if chat and isinstance(prompt, str):
        row["prompt"] = [{"role": "user", "content": prompt}]
    elif not chat and isinstance(prompt, list):
        row["prompt"] = json.dumps(prompt, ensure_ascii=False)
    for name in ("parts", "meter"):
        if name in row:
            row[name] = list(row[name].items())
    return row


def _chunks(first: dict[str, Any], rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk = [first, *islice(rows, CHUNK - 1)]
    while chunk:
        yield chunk
        chunk = list(islice(rows, CHUNK))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(v) for v in value]
    return value


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if all goes well and is removed if not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
