"""`etude train` and `etude resume`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any

import tyro

from etude.app.flags import parse
from etude.app.progress import progress
from etude.experience.errors import UserError
from etude.experience.store import Store
from etude.methods.catalog import CATALOG

Folder = Annotated[str | None, tyro.conf.DisallowNone, tyro.conf.arg(metavar="DIR")]
Name = Annotated[str | None, tyro.conf.DisallowNone]


@dataclass(frozen=True)
class Output:
    """Where a run goes."""

    out: Folder = None  # a new or empty directory; by default one under runs/
    name: Name = None  # what the run is called; by default the method
    json: bool = False  # print the result for a program


def train(argv: Sequence[str]) -> None:
    """Trains with a method; its flags are its hyperparameters and what all methods share."""
    if not argv or argv[0].startswith("-"):
        works = ", ".join(e.slug for e in CATALOG.values() if e.works)
        if argv and argv[0] in ("-h", "--help"):
            print(f"usage: etude train METHOD [flags]\n\nmethods that work now: {works}\n"
                  "`etude train METHOD --help` shows a method's flags.")  # fmt: skip
            return
        raise UserError(f"train needs a method first: one of {works}")
    slug, flags = argv[0], argv[1:]
    from etude.learning.setting import Common
    from etude.methods.api import method
    from etude.methods.api import train as run_method

    chosen = method(slug)
    flat = [
        ("shared", Annotated[Common, tyro.conf.arg(name="")], field(default_factory=Common)),
        ("own", Annotated[chosen.config, tyro.conf.arg(name="")], field(default_factory=chosen.config)),
        ("output", Annotated[Output, tyro.conf.arg(name="")], field(default_factory=Output)),
    ]
    parsed: Any = parse(make_dataclass("Train", flat), flags, f"train {slug}", CATALOG[slug].title)
    options = {f.name: getattr(part, f.name) for part in (parsed.shared, parsed.own) for f in fields(part)}
    began = time.perf_counter()
    with progress() as reporter:
        run = run_method(slug, out=parsed.output.out, name=parsed.output.name, reporter=reporter, **options)
    _report(run, time.perf_counter() - began, parsed.output.json)


@dataclass(frozen=True)
class ResumeFlags:
    """Go on with a run that was cut."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # its directory
    json: bool = False  # print the result for a program


def resume(argv: Sequence[str]) -> None:
    """Runs the rest of a run."""
    flags = parse(ResumeFlags, argv, "resume")
    from etude.methods.api import resume as resume_run

    began = time.perf_counter()
    with progress() as reporter:
        run = resume_run(flags.run, reporter)
    _report(run, time.perf_counter() - began, flags.json)


def _report(run: Any, seconds: float, as_json: bool) -> None:
    """The result of a run: held-out accuracy at its first and last evaluation."""
    if not run.ranks.leads:
        return
    with Store(run.folder, read_only=True) as store:
        found = store.evaluations("accuracy")
    result: dict[str, Any] = {"run": str(run.folder), "seconds": round(seconds, 1), "cost": run.meter.read()}
    if found:
        result |= {
            key: {k: e[k] for k in ("value", "low", "high", "n")}
            for key, e in (("before", found[0]), ("after", found[-1]))
        }
    if as_json:
        print(json.dumps(result))
        return
    sys.stderr.flush()
    name = run.config.get("name", "run")
    if not found:
        print(f"{name}: done in {seconds:.0f} s (run: {run.folder})")
        return
    for label, e in (("before", found[0]), ("after", found[-1])):
        interval = f"95% interval {e['low']:.1%} to {e['high']:.1%}, n = {e['n']}"
        print(f"held-out accuracy {label}: {e['value']:.1%} ({interval})")
    a, b = found[0]["value"], found[-1]["value"]
    print(f"{name}: held-out accuracy {100 * a:.1f}% -> {100 * b:.1f}% in {seconds:.0f} s (run: {run.folder})")
