"""Rows of JSON Lines, Parquet, `datasets` folders, or in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etude.experience.errors import UserError, missing

Source = str | Path | Iterable[Mapping[str, Any]]
Placed = tuple[str, Mapping[str, Any]]  # where a row stands, for messages, and the row


def read_rows(source: Source) -> list[Placed]:
    """Every row with where it stands. Raises UserError if there is none or it cannot be read."""
    on_disk = isinstance(source, str | Path)
    rows = list(_read(Path(source)) if isinstance(source, str | Path) else _in_memory(source))
    if not rows:
        raise UserError(f"{source if on_disk else 'the data'} holds no rows")
    return rows


def _in_memory(rows: Iterable[Mapping[str, Any]]) -> Iterator[Placed]:
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"row {i}: should be a mapping of columns to values, not {type(row).__name__}")
        yield f"row {i}", row


def _read(path: Path) -> Iterator[Placed]:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    readers = {".jsonl": _read_lines, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: data files end in .jsonl or .parquet")
    return readers[path.suffix](path)


def _read_lines(path: Path) -> Iterator[Placed]:
    with path.open("rb") as lines:
        for n, line in enumerate(lines, 1):
            where = f"{path}, line {n}"
            try:
                text = line.decode("utf-8-sig" if n == 1 else "utf-8").strip()
                row = json.loads(text or "{}")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
            except ValueError as error:
                raise UserError(f"{where}: not JSON: {error}") from None
            except RecursionError:
                raise UserError(f"{where}: nested too deeply") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: should be a JSON object, not {type(row).__name__}")
            if text:
                yield where, row


def _read_parquet(path: Path) -> Iterator[Placed]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing("pyarrow", "data", "reading Parquet") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from None
    return ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _read_folder(path: Path) -> Iterator[Placed]:
    """What `datasets` saved there, or else every data file, in the order of their names."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path} holds several splits: give the folder of one ({splits})")
    if (path / "dataset_info.json").is_file():
        try:
            import datasets
        except ImportError:
            raise missing("datasets", "data", "reading a folder saved by datasets") from None
        try:
            rows = datasets.load_from_disk(str(path))
        except Exception as error:  # the package raises whatever its readers raise
            raise UserError(f"{path}: datasets cannot read it: {str(error).splitlines()[0]}") from None
        return ((f"{path}, row {i}", row) for i, row in enumerate(rows))
    files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".parquet"))
    if not files:
        raise UserError(f"{path}: no .jsonl or .parquet file in this folder")
    return (item for file in files for item in _read(file))
