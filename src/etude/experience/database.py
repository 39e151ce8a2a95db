"""The store's SQLite file: its tables, opening it safely, its lock, and its errors in one line."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etude.experience.errors import UserError

VERSION = 2  # of the tables
APPLICATION = 0x45545544  # SQLite's application_id of our files
WAIT = 30.0  # seconds to wait for a reader that closes

LOGGED = ("steps", "metrics", "problems", "trajectories", "evaluations", "items", "events")  # what a rewind cuts back
TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE steps(
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, step INTEGER NOT NULL, seconds REAL, meter TEXT NOT NULL,
    UNIQUE(stage, step));
CREATE TABLE metrics(
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, step INTEGER NOT NULL, name TEXT NOT NULL, value REAL);
CREATE INDEX metrics_by_name ON metrics(name, stage, step);
CREATE TABLE problems(
    id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, answer TEXT, options TEXT NOT NULL, meta TEXT NOT NULL);
CREATE TABLE trajectories(
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, step INTEGER NOT NULL, grp INTEGER NOT NULL,
    member INTEGER NOT NULL,
    role TEXT NOT NULL,     -- member, discarded, or parent: of a fork, and in no group of this step
    kept INTEGER NOT NULL,  -- whether it was trained on
    problem INTEGER NOT NULL REFERENCES problems(id),
    problem_id TEXT NOT NULL, category TEXT NOT NULL, difficulty REAL, text TEXT NOT NULL,
    reward REAL, correct INTEGER, parsed TEXT, parts TEXT, per_call TEXT,  -- parts is null: no outcome
    tokens INTEGER NOT NULL,
    world TEXT NOT NULL,    -- what the world said of each step
    tags TEXT NOT NULL, parent INTEGER, parent_call INTEGER, parent_token INTEGER,
    shard INTEGER NOT NULL, calls TEXT NOT NULL);
CREATE INDEX trajectories_by_step ON trajectories(stage, step);
CREATE INDEX trajectories_by_category ON trajectories(category);
CREATE INDEX trajectories_by_reward ON trajectories(reward);
CREATE TABLE evaluations(
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, step INTEGER NOT NULL, world TEXT NOT NULL,
    split TEXT NOT NULL, metric TEXT NOT NULL, value REAL, low REAL, high REAL, n INTEGER NOT NULL);
CREATE TABLE items(
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, step INTEGER NOT NULL, world TEXT NOT NULL,
    split TEXT NOT NULL, problem TEXT NOT NULL, score REAL);  -- of each problem of an evaluation
CREATE INDEX items_by_step ON items(stage, step);
CREATE TABLE events(id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL);
"""


def connect(file: Path, read_only: bool) -> sqlite3.Connection:
    """Opens the database, making it if it is to be written and not there.

    Transactions are begun and ended by the caller. Raises UserError for a file of something else or of
    a newer version, sqlite3.Error where it cannot be opened.
    """
    db = _open(file, "ro" if read_only else "rwc")
    try:
        _look_at(db, file, read_only)
    except BaseException:
        db.close()
        raise
    return db


def _look_at(db: sqlite3.Connection, file: Path, read_only: bool) -> None:
    application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
        if read_only:
            raise UserError(f"{file.parent} holds no run: {file.name} is empty")
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(
            f"BEGIN; {TABLES} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;"
        )
    elif application != APPLICATION:
        raise UserError(f"{file} is not a run's store but another program's database: choose another folder")
    elif version > VERSION:
        raise UserError(f"{file} was written by a newer etude (its tables are version {version}): upgrade etude")
    elif version < VERSION:
        raise UserError(f"{file} was written by an older etude (its tables are version {version}): run it anew")
    # A commit survives the death of the process; `Store.mark` makes it survive the machine's.
    db.execute("PRAGMA synchronous = NORMAL")


def _open(file: Path, mode: str) -> sqlite3.Connection:
    options = f"mode={mode}"
    if mode == "ro" and not os.access(file.parent, os.W_OK) and not file.with_name(f"{file.name}-wal").exists():
        options = "immutable=1"  # a WAL database that nobody writes, where SQLite cannot make its index file
    db = sqlite3.connect(f"{file.absolute().as_uri()}?{options}", uri=True, timeout=WAIT, isolation_level=None)
    db.row_factory = sqlite3.Row
    return db


def lock(folder: Path) -> int:
    """Takes the folder's lock until the returned descriptor is closed or the process dies.

    Raises UserError if another process has it.
    """
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace") or "unknown"
        os.close(fd)
        raise UserError(
            f"{folder} is in use by process {holder}: wait until it ends or choose another folder"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def plainly(folder: Path) -> Iterator[None]:
    """Errors of the disk and the database as a UserError of one line."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorname", "")
        for start, said in _SAID.items():
            if code.startswith(start):
                raise UserError(f"{folder}: {said}") from error
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(f"{folder}: {_SAID['SQLITE_FULL'] if full else error.strerror or error}") from error


_SAID = {
    "SQLITE_FULL": "the disk is full: free some space, then resume",
    "SQLITE_READONLY": "the folder cannot be written: choose another, or mend its permissions",
    "SQLITE_CANTOPEN": "its store cannot be opened: check that the folder may be read and written",
    "SQLITE_NOTADB": "its store.sqlite is no database: the file is damaged or of something else",
    "SQLITE_CORRUPT": "its store.sqlite is damaged: restore the folder from a copy",
    "SQLITE_IOERR": "the disk failed while the store was used",
    "SQLITE_BUSY": "its store is locked by another program",
}
