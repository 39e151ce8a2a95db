"""Runs of arms at seeds: planned as data, run side by side, gone on with, and never run twice.

A job's folder is named by a digest of all that decides its run: the method's code and the shared stages',
its options, seed and starting policy. Whatever wants a run that is there already takes it as it is.
Every job computes on one thread, so that how many run at once changes no result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from etude.experience.claims import BaseRecipe, json_of
from etude.experience.errors import UserError
from etude.experience.protocols import Clock
from etude.experience.types import NOTHING
from etude.lab.code import code_digest
from etude.methods.catalog import entry

HOME = Path("runs") / "lab"
TICK = 0.5  # seconds between two looks at how far the jobs are


@dataclass(frozen=True, eq=False)
class Job:
    """One arm at one seed. `options` are what `train` takes; with `after` it starts from the policy that
    job ended with, else from `policy`. `uses` are options that take the folder of a job's final policy."""

    arm: str
    seed: int
    method: str
    policy: BaseRecipe | str
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    after: Job | None = None
    uses: Mapping[str, Job] = field(default_factory=lambda: NOTHING)

    @property
    def earlier(self) -> tuple[Job, ...]:
        """The jobs whose policies it takes."""
        return (*(() if self.after is None else (self.after,)), *self.uses.values())

    @property
    def code(self) -> str:
        """Of the code that decides the run."""
        return code_digest(entry(self.method).module)

    @cached_property
    def digest(self) -> str:
        """Of everything that decides the run, files that are read included, and nothing else (not of what the arm is
        called)."""
        start = self.after.digest if self.after else json_of(self.policy)
        known = [self.method, self.code, self.seed, start, json_of(self.options), self._files()]
        known += [[option, job.digest] for option, job in sorted(self.uses.items())]
        return blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=6).hexdigest()

    def _files(self) -> list[str]:
        """What the files hold that any option names, FILE:NAME included, and the folder of the starting policy."""
        files = [path for text in _texts(self.options) for path in (Path(text), Path(text.split(":")[0]))]
        found = [_content(path) for path in dict.fromkeys(files) if path.is_file()]
        folder = isinstance(self.policy, str) and Path(self.policy).is_dir()
        return [*found, _content(Path(str(self.policy)))] if folder else found

    def folder(self, home: Path) -> Path:
        """Its run directory."""
        return home / f"{self.method}-{self.seed}-{self.digest}"

    def finished(self, home: Path) -> bool:
        """Whether it has been run to its end: the policy is the last thing a run writes."""
        return (self.folder(home) / "policy").is_dir()


def _texts(value: Any) -> Iterator[str]:
    """All texts in an option, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)


def _content(path: Path) -> str:
    """A digest of a file, or of all files in a folder by name."""
    digest = blake2b(digest_size=8)
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


Heard = Callable[[Job, float], None]  # a job and the share of it that is over
Failed = Mapping[str, str]  # digest of a job -> what stopped it, in one line


def run_jobs(jobs: Sequence[Job], home: Path, workers: int, heard: Heard, failing: bool = False) -> Failed:
    """Runs what is not finished, `workers` at once, each after the job it starts from.

    A job that ends in a UserError is among the failed where `failing` is allowed; otherwise that error is
    raised, once the jobs in progress have been let go. Raises KeyboardInterrupt as it comes; what was
    begun goes on at the next call.
    """
    todo = {_key(j, home): j for j in _with_stages(jobs) if not j.finished(home)}
    for job in _with_stages(jobs):
        if job.finished(home):
            heard(job, 1.0)
    failed: dict[str, str] = {}
    waiting = list(todo.values())
    if not waiting:
        return failed
    with _pool(workers) as (pool, queue):
        running: dict[Future[str], Job] = {}
        while waiting or running:
            ready = [j for j in waiting if all(e.finished(home) for e in j.earlier)]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                after = job.after.folder(home) if job.after else None
                uses = {option: other.folder(home) for option, other in job.uses.items()}
                running[pool.submit(_work, job, job.folder(home), after, uses)] = job
            done, _ = wait(running, timeout=TICK, return_when=FIRST_COMPLETED)
            while not queue.empty():
                key, share = queue.get()
                if todo[key] in running.values():  # what a run told may arrive after its end
                    heard(todo[key], share)
            for future in done:
                job = running.pop(future)
                if said := _result(future):
                    failed[job.digest] = said
                    if not failing:
                        raise UserError(f"arm {job.arm!r}, seed {job.seed}: {said}")
                    waiting = [j for j in waiting if all(_key(e, home) != _key(job, home) for e in j.earlier)]
                heard(job, 1.0)
    return failed


def _with_stages(jobs: Sequence[Job]) -> list[Job]:
    """The jobs and those whose policies they take, each once, earlier ones first."""
    found: dict[str, Job] = {}
    for job in jobs:
        for one in (*_with_stages(job.earlier), job):
            found.setdefault(one.digest, one)
    return list(found.values())


def _key(job: Job, home: Path) -> str:
    return job.folder(home).name


def _result(future: Future[str]) -> str:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError("a run was killed (out of memory?): the same command goes on, perhaps with --jobs 1") from None


@contextmanager
def _pool(workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    queue = context.Queue()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(queue,))
    try:
        yield pool, queue
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- inside a worker -----------------------------------------------------------------------------

_QUEUE: Any = None


def _begin(queue: Any) -> None:
    global _QUEUE
    _QUEUE = queue
    import torch

    torch.set_num_threads(1)


class _Teller:
    """A run's reporter that tells the parent process how far it is, and ends with it: a run that nobody waits for
    would hold its folder against the command that goes on with it."""

    def __init__(self, key: str) -> None:
        self.key = key

    def step(self, clock: Clock, metrics: Mapping[str, float], run: Any) -> None:
        """Hears of a finished step."""
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)
        if not clock.stage.startswith("base"):
            _QUEUE.put((self.key, min(0.99, max(clock.progress, run.spent))))


def _work(job: Job, folder: Path, after: Path | None, uses: Mapping[str, Path]) -> str:
    """Runs a job, or the rest of it, from where the job before it ended; returns what stopped it, "" if nothing
    did. Folders are the parent's word: this process may have been started after the code changed."""
    from etude.learning.base import base
    from etude.methods.api import resume, train

    teller = _Teller(folder.name)
    try:
        if (folder / "config.json").exists():
            resume(folder, teller)
            return ""
        shutil.rmtree(folder, ignore_errors=True)  # killed while it was made
        if after is not None:
            policy = str(after / "policy")
        elif isinstance(job.policy, BaseRecipe):
            policy = str(base(job.policy, job.seed, teller))
        else:
            policy = job.policy
        start = {"policy": policy, "base": False, "seed": job.seed}
        start |= {option: str(other / "policy") for option, other in uses.items()}
        train(job.method, out=folder, name=job.arm, reporter=teller, **start, **job.options)
    except UserError as error:
        return str(error)
    return ""
