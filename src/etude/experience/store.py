"""The run's store: a SQLite database (WAL) of steps, metrics, trajectories and evaluations, with large
arrays in shards beside it. One folder is one thing that can be copied, queried and deleted.

One process writes; any number may read meanwhile. Everything of a step is committed as one transaction,
after its shard bytes. Texts and arrays come back exactly; `options`, `meta` and `tags` come back as JSON
holds them (tuples as lists, arrays as lists).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from etude.experience.database import LOGGED, connect, lock, plainly
from etude.experience.errors import UserError, unknown
from etude.experience.records import decode, encode, number, to_json
from etude.experience.shards import Position, Shards
from etude.experience.types import NOTHING, Group, Trajectory

# What `trajectories` returns, and may be asked to be equal to something.
SUMMARY = (
    "id", "stage", "step", "grp", "member", "role", "kept", "problem_id", "category", "difficulty", "text",
    "reward", "correct", "parsed", "tokens",
)  # fmt: skip


class Measured(NamedTuple):
    """One measured number with its 95% interval, over `n` problems."""

    world: str
    split: str
    metric: str
    value: float
    low: float
    high: float
    n: int


class Measurements(Protocol):
    """What an evaluation gives the store: its numbers, and the mean score of each problem by its id."""

    world: str
    split: str
    items: Mapping[str, float]

    def rows(self) -> Iterable[Measured]: ...


class Series(NamedTuple):
    """A metric's values in the order they were logged, over `n` steps."""

    stage: NDArray[np.str_]  # [n]
    step: NDArray[np.int64]  # [n]
    value: NDArray[np.float64]  # [n]


class Store:
    """A run's folder, open for writing (one process at a time) or reading.

    Raises UserError if the folder cannot be used: in use, not writable, full, damaged, of something
    else or of a newer version.
    """

    def __init__(self, folder: str | Path, read_only: bool = False) -> None:
        self.folder = Path(folder)
        self.read_only = read_only
        self._lock: int | None = None
        self._file = self.folder / "store.sqlite"
        with plainly(self.folder):
            if read_only and not self._file.is_file():
                raise UserError(f"{self.folder} holds no run: it has no {self._file.name}")
            if not read_only:
                (self.folder / "shards").mkdir(parents=True, exist_ok=True)
                self._lock = lock(self.folder)
            try:
                self._db = connect(self._file, read_only)
                self._shards = Shards(self.folder / "shards")
                if not read_only:
                    self._take_back()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder. What was committed stays."""
        if hasattr(self, "_db"):
            self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- writing ---------------------------------------------------------------------------------

    def commit(
        self,
        stage: str,
        step: int,
        *,
        seconds: float = 0.0,
        meter: Mapping[str, float] = NOTHING,
        metrics: Mapping[str, float] = NOTHING,
        groups: Sequence[tuple[Group, bool]] = (),
        evaluations: Sequence[Measurements] = (),
    ) -> None:
        """Writes all of a step, or nothing. `meter` is a reading, `groups` come with whether they were
        trained on. Raises ValueError if the stage already has this step, UserError if the disk will not
        take it."""
        at = (stage, step)
        with self._transaction():
            if self._db.execute("SELECT 1 FROM steps WHERE stage = ? AND step = ?", at).fetchone():
                raise ValueError(f"stage {stage!r} already has a step {step}")
            self._shards.begin(self._position())
            first = (self._last("problems") + 1, self._last("trajectories") + 1)
            problems, trajectories = encode(groups, self._shards, stage, step, first)
            after = self._shards.flush()
            self._insert("steps", [(None, *at, seconds, to_json(meter))])
            self._insert("metrics", [(None, *at, name, float(value)) for name, value in metrics.items()])
            self._insert("problems", problems)
            self._insert("trajectories", trajectories)
            self._insert("evaluations", [(None, *at, *row) for e in evaluations for row in e.rows()])
            self._insert("items", [(None, *at, e.world, e.split, *i) for e in evaluations for i in e.items.items()])
            self._put("position", after)

    def event(self, kind: str, text: str) -> None:
        """Notes that something happened now: started, resumed, a warning."""
        with self._transaction():
            self._insert("events", [(None, time.time(), kind, text)])

    def put(self, key: str, value: Any) -> None:
        """Keeps a JSON value under a name; `rewind` leaves it alone."""
        with self._transaction():
            self._put(f"user.{key}", value)

    def mark(self) -> dict[str, Any]:
        """Where the store stands, for a checkpoint. All up to it is on the disk when this returns."""
        with plainly(self.folder):
            self._shards.sync()
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            return {"position": list(self._position()), "rows": {t: self._last(t) for t in LOGGED}}

    def rewind(self, mark: Mapping[str, Any] | None) -> None:
        """Removes everything after `mark` (None: everything), as if it had not been written.

        Raises UserError if the store ends before the mark.
        """
        mark = mark or {"position": [1, 0], "rows": dict.fromkeys(LOGGED, 0)}
        position: Position = (mark["position"][0], mark["position"][1])
        with self._transaction():
            for table, last in mark["rows"].items():
                if table not in LOGGED:
                    raise UserError(f"{self.folder}: the checkpoint speaks of a table {table!r} that no store has")
                if self._last(table) < last:
                    raise UserError(f"{self.folder}: the store ends before its checkpoint ({table}): it is damaged")
                self._db.execute(f"DELETE FROM {table} WHERE id > ?", (last,))
            self._put("position", position)
        with plainly(self.folder):
            self._shards.rewind(position)

    # --- reading ---------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None) -> Any:
        """The value kept under a name."""
        found = self._rows("SELECT value FROM meta WHERE key = ?", (f"user.{key}",))
        return json.loads(found[0]["value"]) if found else default

    def steps(self) -> list[dict[str, Any]]:
        """Every step in order: stage, step, seconds, meter (a reading)."""
        rows = self._rows("SELECT stage, step, seconds, meter FROM steps ORDER BY id")
        return [{**row, "meter": json.loads(row["meter"])} for row in rows]

    def metrics(self, name: str | None = None, stage: str | None = None) -> dict[str, Series]:
        """The logged metrics by name, or one of them, of all stages or one."""
        where, values = _where({"name = ?": name, "stage = ?": stage})
        found: dict[str, list[tuple[str, int, float]]] = {}
        for row in self._rows(f"SELECT name, stage, step, value FROM metrics{where} ORDER BY id", values):
            found.setdefault(row["name"], []).append((row["stage"], row["step"], number(row["value"])))
        return {n: Series(*(np.array(column) for column in zip(*rows, strict=True))) for n, rows in found.items()}

    def evaluations(self, metric: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
        """Every measured number in order: stage, step and the fields of `Measured`."""
        where, values = _where({"metric = ?": metric, "stage = ?": stage})
        columns = ", ".join(("stage", "step", *Measured._fields))
        rows = self._rows(f"SELECT {columns} FROM evaluations{where} ORDER BY id", values)
        return [{**row, **{k: number(row[k]) for k in ("value", "low", "high")}} for row in rows]

    def items(self, stage: str, step: int, world: str, split: str) -> dict[str, float]:
        """The mean score of each problem, by its id, in an evaluation made at a step."""
        where, values = _where({"stage = ?": stage, "step = ?": step, "world = ?": world, "split = ?": split})
        found = self._rows(f"SELECT problem, score FROM items{where} ORDER BY id", values)
        return {row["problem"]: number(row["score"]) for row in found}

    def events(self) -> list[dict[str, Any]]:
        """Every event in order: time (seconds since 1970), kind, text."""
        return self._rows("SELECT time, kind, text FROM events ORDER BY id")

    def trajectories(
        self,
        *,
        reward: tuple[float, float] | None = None,
        contains: str | None = None,
        after: int = 0,
        limit: int | None = 100,
        offset: int = 0,
        **equal: Any,
    ) -> list[dict[str, Any]]:
        """Trajectories without their arrays, in order, with `prompt`, `answer` and `parts`.

        `equal` asks columns of SUMMARY for a value (`category="long", kept=True`), `reward` for a range
        (both ends included), `contains` for a text within the answer, `after` for larger ids (to page
        through many). `load(row["id"])` gives the whole trajectory.
        Raises UserError on an unknown column.
        """
        where, values = _where(_equal(equal) | _between(reward) | {"instr(t.text, ?)": contains, "t.id > ?": after})
        columns = ", ".join(f"t.{n}" for n in SUMMARY)
        rows = self._rows(
            f"SELECT {columns}, t.parts, p.prompt, p.answer FROM trajectories t JOIN problems p ON p.id = t.problem"
            f"{where} ORDER BY t.id LIMIT ? OFFSET ?",
            (*values, -1 if limit is None else limit, offset),
        )
        for row in rows:
            judged = row["parts"] is not None
            row["parts"] = json.loads(row["parts"]) if judged else {}
            row["reward"] = number(row["reward"]) if judged else None
            row["correct"] = None if row["correct"] is None else bool(row["correct"])
            row["kept"] = bool(row["kept"])
            row["prompt"] = json.loads(row["prompt"])
        return rows

    def count(self, *, reward: tuple[float, float] | None = None, contains: str | None = None, **equal: Any) -> int:
        """How many trajectories `trajectories` would find without a limit."""
        where, values = _where(_equal(equal) | _between(reward) | {"instr(t.text, ?)": contains})
        return int(self._rows(f"SELECT count(*) AS n FROM trajectories t{where}", values)[0]["n"])

    def load(self, id: int) -> Trajectory:
        """One trajectory, every array bit for bit, as read-only views of the shards.

        Raises KeyError if there is none of this id, UserError if the shards are damaged.
        """
        rows = self._rows(
            "SELECT t.*, p.prompt, p.answer, p.options, p.meta FROM trajectories t "
            "JOIN problems p ON p.id = t.problem WHERE t.id = ?",
            (id,),
        )
        if not rows:
            raise KeyError(f"{self.folder} has no trajectory {id}")
        row = rows[0]
        parent = None
        if row["parent"] is not None:
            parent = (self.load(row["parent"]), row["parent_call"], row["parent_token"])
        return decode(row, self._shards, parent)

    def forks(self, stage: str, step: int) -> dict[int, tuple[int, int, int]]:
        """Of each trajectory of a step that is a fork, by its id: the parent's id, call and token."""
        where, values = _where({"stage = ?": stage, "step = ?": step, "parent > ?": 0})
        columns = "id, parent, parent_call, parent_token"
        found = self._rows(f"SELECT {columns} FROM trajectories{where} ORDER BY id", values)
        return {row["id"]: (row["parent"], row["parent_call"], row["parent_token"]) for row in found}

    # --- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, whatever is raised inside; errors of the disk in one line."""
        with plainly(self.folder):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._take_back()
                raise

    def _take_back(self) -> None:
        """Cuts off shard bytes that the database does not count."""
        self._shards.discard(self._position())

    def _position(self) -> Position:
        found = self._db.execute("SELECT value FROM meta WHERE key = 'position'").fetchone()
        shard, size = json.loads(found["value"]) if found else (1, 0)
        return int(shard), int(size)

    def _last(self, table: str) -> int:
        return int(self._db.execute(f"SELECT coalesce(max(id), 0) AS n FROM {table}").fetchone()["n"])

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self._db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    def _put(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, to_json(value)))

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        with plainly(self.folder):
            return [dict(row) for row in self._db.execute(query, values)]


def _equal(columns: Mapping[str, Any]) -> dict[str, Any]:
    for name in columns:
        if name not in SUMMARY:
            raise unknown("column", name, SUMMARY)
    return {f"t.{name} = ?": value for name, value in columns.items()}


def _between(ends: tuple[float, float] | None) -> dict[str, Any]:
    return {} if ends is None else {"t.reward >= ?": ends[0], "t.reward <= ?": ends[1]}


def _where(conditions: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The WHERE clause of conditions whose value is not None, and their values."""
    asked = {condition: value for condition, value in conditions.items() if value is not None}
    return (" WHERE " + " AND ".join(asked) if asked else ""), list(asked.values())
