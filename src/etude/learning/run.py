"""One execution: config, seed, meter, log, stages, checkpoints, resume.

A method's training function is run again from its top when a run is resumed. Whatever it tracks is
given its saved state back, stages that are over are skipped, and loops go on at the step after the last
checkpoint. All draws are keyed by (stage, step, ...), so the run ends as if it had not been cut.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from etude.experience.database import plainly
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Clock, Stateful
from etude.experience.store import Store
from etude.experience.types import Group
from etude.learning.checkpoint import load_state, save_state
from etude.learning.ranks import SOLO, Ranks
from etude.learning.sharded import gathered

S = TypeVar("S", bound=Stateful)
KEEP = 2  # checkpoints


class Reporter(Protocol):
    """Hears of every finished step; the command line draws progress with it."""

    def step(self, clock: Clock, metrics: Mapping[str, float], run: Run) -> None: ...


@dataclass
class _Pending:
    """What the step in progress will commit."""

    metrics: dict[str, float] = field(default_factory=dict)
    groups: list[tuple[Group, bool]] = field(default_factory=list)
    evaluations: list[Any] = field(default_factory=list)


class _Unwritten:
    """The store of a process that does not lead: it keeps nothing."""

    def commit(self, *args: object, **kwargs: object) -> None: ...
    def mark(self) -> None: ...
    def rewind(self, mark: object) -> None: ...
    def close(self) -> None: ...


class Run:
    """A run directory and what happens in it.

    `checkpoint_every` counts steps. `config["budget"]` caps kinds of the meter: no step begins once one of them
    is spent. Of several processes (`ranks`) all run the same program and the leading one alone writes. Raises
    UserError, in all of them, where the folder holds another run, is in use, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        checkpoint_every: int = 20,
        reporter: Reporter | None = None,
        ranks: Ranks = SOLO,
    ) -> None:
        if checkpoint_every < 1:
            raise UserError(f"checkpoint_every must be at least 1, not {checkpoint_every}")
        self.folder = Path(folder)
        self.config = dict(config)
        self.seed = int(config.get("seed", 0))
        self.keys = Keys(self.seed)
        self.meter = Meter()
        self.budget: Mapping[str, float] = config.get("budget", {})  # of kinds of the meter
        self.reporter = reporter if ranks.leads else None
        self.ranks = ranks
        self.checkpoint_every = checkpoint_every
        self.store: Store | _Unwritten = _Unwritten()
        ranks.first(lambda: self._open(resume))
        self._path: tuple[str, ...] = ()
        self._tracked: dict[str, Stateful] = {}
        self._saved: dict[str, Any] = {}  # states read from the checkpoint and not yet claimed
        self.done: list[str] = []
        self._steps: dict[str, int] = {}
        self._looped: set[str] = set()
        self._results: dict[str, Any] = {}  # of stages inside the branches that are open
        self._pending = _Pending()
        self._branches = 0
        self._number = 0
        self.on_close = ExitStack()  # what else ends with the run
        try:
            ranks.together(self._restore)
        except BaseException:
            self.close()
            raise

    # --- state -----------------------------------------------------------------------------------

    def track(self, name: str, thing: S) -> S:
        """Puts `thing` under the run's care, for the stage that is open; gives its state back if
        the run was resumed. Raises ValueError if the name is taken."""
        full = "/".join((*self._path, name))
        if full in self._tracked:
            raise ValueError(f"two things are tracked as {full!r}")
        self._tracked[full] = thing
        if full in self._saved:
            thing.load_state_dict(self._saved.pop(full))
        return thing

    @property
    def stage_name(self) -> str:
        """The stage that is open, as a path; "main" outside any."""
        return "/".join(self._path) or "main"

    def stream(self, clock: Clock) -> Keys:
        """The random streams of one step."""
        return self.keys.at(clock.stage, clock.step)

    # --- stages, steps, branches ---------------------------------------------------------------

    def stage(self, name: str, body: Callable[[], Any]) -> Any:
        """Runs `body` once in the life of the run; its result, a state tree, is kept and returned
        again on resume. What `body` tracked is let go when it ends."""
        outer, self._path = self._path, (*self._path, name)
        key = self.stage_name
        try:
            if key in self.done:
                remedy = "restore it from a copy, or begin the run anew"
                return self._results[key] if key in self._results else load_state(self._result(key), remedy)
            result = body()
            self._commit(Clock(self._steps.get(key, 0), self._steps.get(key, 0), key))
            for full in [t for t in self._tracked if t.startswith(f"{key}/")]:
                del self._tracked[full]
            self.done.append(key)
            if self._branches:
                self._results[key] = result
            else:
                self._write(self._result(key), result)
                self.checkpoint()
            return result
        finally:
            self._path = outer

    @property
    def spent(self) -> float:
        """Share of the budget that is spent: of the kind that is nearest to its cap."""
        return max((self.meter[kind] / cap for kind, cap in self.budget.items()), default=0.0)

    def steps(self, total: int) -> Iterator[Clock]:
        """The steps of the stage that are still to do and within the budget. When the body of a step is over, what it
        logged is committed as one transaction, and a checkpoint is written if one is due. Raises
        UserError for no steps, ValueError for a second loop in one stage."""
        if total < 1:
            raise UserError(f"steps must be at least 1, not {total}")
        key = self.stage_name
        if key in self._looped:
            raise ValueError(f"stage {key!r} has had its loop: open a stage for another")
        self._looped.add(key)
        for step in range(self._steps.get(key, 0), total):
            if self.spent >= 1:
                return
            clock = Clock(step, total, key, self.spent)
            # Dropout and the like draw from torch's global stream: key it too.
            torch.manual_seed(self.stream(clock).at("torch").digest() % 2**63)
            began, charged = time.perf_counter(), self.meter["seconds"]
            yield clock
            seconds = self.ranks.agree(time.perf_counter() - began)
            # Less what loops in branches of this step have charged already.
            self.meter.charge("seconds", max(0.0, seconds - (self.meter["seconds"] - charged)))
            self._commit(clock, seconds)
            self._steps[key] = step + 1
            if not self._branches and (step + 1) % self.checkpoint_every == 0:
                self.checkpoint()

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Try something: on leaving, all that is tracked is as it was, bit for bit, and nothing
        was logged. Only the meter goes on counting."""
        outer, self._path = self._path, (*self._path, f"branch:{name}")
        states = {full: deepcopy(thing.state_dict()) for full, thing in self._tracked.items()}
        done, steps, looped = list(self.done), dict(self._steps), set(self._looped)
        results, pending = dict(self._results), self._pending
        random = torch.get_rng_state()
        self._branches += 1
        self._pending = _Pending()
        try:
            yield
        finally:
            self._branches -= 1
            self.done, self._steps, self._looped = done, steps, looped
            self._results, self._pending, self._path = results, pending, outer
            self._tracked = {full: self._tracked[full] for full in states}
            for full, thing in self._tracked.items():
                thing.load_state_dict(states[full])
            torch.set_rng_state(random)

    # --- log -------------------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, float]) -> None:
        """Metrics of the step in progress."""
        self._pending.metrics.update({k: float(v) for k, v in metrics.items()})

    def keep(self, groups: Sequence[Group], kept: Sequence[bool]) -> None:
        """Trajectories of the step in progress, with whether they were trained on. Charges `episodes`."""
        self.meter.charge("episodes", sum(len(g.members) + len(g.discarded) for g in groups))
        self._pending.groups.extend(zip(groups, kept, strict=True))

    def evaluated(self, evaluation: Any) -> None:
        """An evaluation made in the step in progress (see audits)."""
        self._pending.evaluations.append(evaluation)

    def _commit(self, clock: Clock, seconds: float = 0.0) -> None:
        pending, self._pending = self._pending, _Pending()
        if self._branches:
            return
        if pending.metrics or pending.groups or pending.evaluations:
            self.store.commit(
                clock.stage,
                clock.step,
                seconds=seconds,
                meter=self.meter.read(),
                metrics=pending.metrics,
                groups=pending.groups,
                evaluations=pending.evaluations,
            )
        if self.reporter is not None:
            self.reporter.step(clock, pending.metrics, self)

    # --- checkpoints -----------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Writes the state of the run as it stands between two steps."""
        self._number += 1
        states = {full: thing.state_dict() for full, thing in self._tracked.items()}
        state = {
            "done": self.done,
            "steps": self._steps,
            # What has not been claimed yet belongs to code that this resume has not reached.
            "tracked": {**self._saved, **states},
            "meter": self.meter.state_dict(),
            "mark": self.store.mark(),
        }
        self._write(self.folder / "checkpoints" / f"{self._number:06d}", state)
        if self.ranks.leads:
            for old in _checkpoints(self.folder)[:-KEEP]:
                _remove(old)

    def _write(self, folder: Path, state: Any) -> None:
        whole = gathered(state, self.ranks)
        if self.ranks.leads:
            save_state(folder, whole)

    def _open(self, resume: bool) -> None:
        self.store = Store(self.folder) if resume else _begin(self.folder, self.config)
        for left in (self.folder / "checkpoints").glob(".*"):  # by a kill while one was written or removed
            shutil.rmtree(left, ignore_errors=True)

    def _restore(self) -> None:
        found = _checkpoints(self.folder)
        if not found:
            self.store.rewind(None)
            return
        self._number = int(found[-1].name)
        state = load_state(found[-1], f"delete {found[-1]} to go on from the checkpoint before it")
        self.done = state["done"]
        self._steps = state["steps"]
        self._saved = state["tracked"]
        self.meter.load_state_dict(state["meter"])
        self.store.rewind(state["mark"])

    def _result(self, key: str) -> Path:
        return self.folder / "stages" / key.replace("/", "__")

    def close(self) -> None:
        """Lets go of the run directory, and of whatever else ends with the run."""
        try:
            self.on_close.close()
        finally:
            self.store.close()

    def discard(self) -> None:
        """Removes the run directory if nothing has been done in it yet."""
        if not self._steps and not self.done:
            self.close()
            if self.ranks.leads:
                shutil.rmtree(self.folder)


def open_run(folder: str | Path, reporter: Reporter | None = None, ranks: Ranks = SOLO) -> Run:
    """A run to go on with. Raises UserError if `folder` is not a run directory."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} should hold a JSON object, as a run writes it")
    every = config.get("checkpoint_every", 20)
    return Run(folder, config, resume=True, checkpoint_every=every, reporter=reporter, ranks=ranks)


def _begin(folder: Path, config: Mapping[str, Any]) -> Store:
    """Makes the run directory, which must be new or empty, with its config; leaves nothing behind where
    it cannot."""
    new = True
    try:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            new = False
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new directory, or go on with `etude resume {folder}`")
    except OSError as error:
        raise UserError(f"cannot make the run directory {folder}: {error.strerror}") from error
    try:
        store = Store(folder)
    except UserError:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        with plainly(folder):
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except UserError:
        store.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return store


def _checkpoints(folder: Path) -> list[Path]:
    home = folder / "checkpoints"
    return sorted(p for p in home.iterdir() if p.name.isdigit()) if home.is_dir() else []


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a kill in between leaves none half there."""
    grave = folder.with_name(f".{folder.name}.old")
    folder.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)
