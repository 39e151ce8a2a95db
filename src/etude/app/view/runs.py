"""The runs below a folder, and what one line says of each."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etude.experience.errors import UserError
from etude.experience.store import Store

STORE = "store.sqlite"


class Refused(Exception):
    """A page that cannot be shown: its HTTP status, and one line that says why."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


@dataclass(frozen=True)
class Summary:
    """A run at a glance. `accuracy` is its last held-out accuracy, `curve` all of them."""

    name: str
    state: str  # live, finished, interrupted or damaged
    started: float  # seconds since 1970
    config: Config
    steps: int = 0
    accuracy: dict[str, Any] | None = None
    curve: tuple[float, ...] = ()
    error: str = ""

    @property
    def done(self) -> str:
        """How many steps, of how many."""
        planned = self.config.part("options").get("steps", "")
        return f"{self.steps} of {planned}" if planned else str(self.steps)


@dataclass(frozen=True)
class Config:
    """A run's config.json; whatever it lacks is empty."""

    all: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Raises UserError where it is no JSON object."""
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}/config.json cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{folder}/config.json should hold a JSON object, as a run writes it")
        return cls(found)

    def part(self, name: str) -> dict[str, Any]:
        """What stands under a name, where that is an object."""
        found = self.all.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def method(self) -> str:
        """The method's slug."""
        return str(self.all.get("method", ""))

    @property
    def world(self) -> str:
        """The world that is learned in."""
        return str(self.part("common").get("world", ""))

    @property
    def policy(self) -> str:
        """What learns: a name of the zoo or a path."""
        return str(self.part("common").get("policy", ""))


class Runs:
    """Every run directory below a folder, by its path from there; or the one run that the folder is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.base = self.folder.parent if (self.folder / STORE).is_file() else self.folder
        self._seen: dict[str, tuple[Any, Summary]] = {}

    def names(self) -> Iterator[str]:
        """A run lies in no other run. Names that are not Unicode are left out: no link could carry them."""
        for path, folders, files in os.walk(self.folder):
            folders[:] = [] if STORE in files else [f for f in folders if not f.startswith(".")]
            name = os.path.relpath(path, self.base)
            if STORE in files and name.encode(errors="replace").decode() == name:
                yield name

    def path(self, name: str) -> Path:
        """Where a run lies. Raises Refused if there is none of this name."""
        if name not in self.names():
            raise Refused(404, f"there is no run {name!r} below {self.folder}")
        return self.base / name

    def summaries(self) -> list[Summary]:
        """All of them, the newest first."""
        found = [self.summary(name) for name in self.names()]
        return sorted(found, key=lambda s: (-s.started, s.name))

    def summary(self, name: str) -> Summary:
        """One of them. It is read again only when its store has changed."""
        folder = self.base / name
        stamp = (version(folder), state(folder))
        if self._seen.get(name, (None,))[0] != stamp:
            self._seen[name] = (stamp, summarise(name, folder))
        return self._seen[name][1]


def summarise(name: str, folder: Path) -> Summary:
    """Reads a run's line; a damaged one says so."""
    started = next((p.stat().st_mtime for p in (folder / "config.json", folder / STORE) if p.is_file()), 0.0)
    config = Config()
    try:
        config = Config.read(folder)
        with Store(folder, read_only=True) as store:
            # What is logged when a stage ends took no time: it is no step of learning.
            steps = sum(row["seconds"] != 0 for row in store.steps())
            found = store.evaluations("accuracy")
    except UserError as error:
        return Summary(name, "damaged", started, config, error=str(error))
    last = found[-1] if found else {}
    same = tuple(e["value"] for e in found if (e["world"], e["split"]) == (last["world"], last["split"]))
    return Summary(name, state(folder), started, config, steps, last or None, same)


def state(folder: Path) -> str:
    """Live while a process holds the run's lock, finished once its policy is there, else interrupted."""
    if _held(folder / "lock"):
        return "live"
    return "finished" if (folder / "policy").is_dir() else "interrupted"


def version(folder: Path) -> tuple[tuple[int, int], ...]:
    """Changes whenever the run's store does."""
    files = [folder / name for name in (STORE, f"{STORE}-wal", "config.json")]
    found = [f.stat() for f in files if f.is_file()]
    return tuple((s.st_mtime_ns, s.st_size) for s in found)


def _held(lock: Path) -> bool:
    """Whether the process that the lock names holds it.

    The lock itself is tried only while that process is there: a run that is being resumed must not find its
    lock taken by one who looks.
    """
    try:
        os.kill(int(lock.read_text()), 0)
    except PermissionError:  # it is there, and another user's
        pass
    except (OSError, ValueError, OverflowError):
        return False
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
