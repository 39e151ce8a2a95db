"""`etude verify`: runs the claims of methods and says what came out."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import tyro

from etude.app.flags import lines, parse
from etude.experience.errors import UserError, unknown

if TYPE_CHECKING:
    from etude.experience.claims import Claim, Metric
    from etude.lab.verify import ArmResult, Result, Told

Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="METHOD...")]
Text = Annotated[str | None, tyro.conf.DisallowNone]
Count = Annotated[int | None, tyro.conf.DisallowNone]


@dataclass(frozen=True)
class VerifyFlags:
    """Run the claims of methods against their baselines, on equal terms. What is finished is not run again."""

    methods: Names = ()  # names in `etude list`; NAME.WORD for one of several claims
    family: Text = None  # every method of a family that makes a claim
    seeds: Text = None  # as in 0,1,2; by default the claim's own, for which alone evidence is written
    jobs: Count = None  # runs at once, each on one core; by default one a core
    quick: bool = False  # a smoke run of seconds: shows that every arm runs, and writes no evidence
    note: Text = None  # a paragraph for the evidence, in place of the one made from the endpoints
    evidence: Text = None  # the folder that evidence is written to
    json: Text = None  # a file for everything that was measured


def verify(argv: Sequence[str]) -> None:
    """Runs the claim, prints tables and verdict, writes the evidence."""
    flags = parse(VerifyFlags, argv, "verify")
    named = chosen(flags.methods, flags.family)
    if len(named) > 1 and (flags.note or flags.json):
        raise UserError(f"a note or a JSON file goes with one claim, not with {len(named)}: name one")
    seeds = None if flags.seeds is None else parse_seeds(flags.seeds)
    for claim in named.values():
        if clash := set(seeds or ()) & set(claim.tuning_seeds):
            raise UserError(f"seed {min(clash)} is one that learning rates are tuned on: name others")
    workers = flags.jobs if flags.jobs is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise UserError(f"jobs must be at least 1, not {workers}")
    for i, (name, claim) in enumerate(named.items()):
        if i:
            print()
        _verify(name, claim, claim.seeds if seeds is None else seeds, workers, flags)


def chosen(names: Sequence[str], family: str | None) -> dict[str, Claim]:
    """The claims that are asked for, by name. Raises UserError where there is none."""
    from etude.methods.api import claims
    from etude.methods.catalog import CATALOG, FAMILIES, load

    found: dict[str, Claim] = {}
    if family is not None:
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES)
        for entry in (e for e in CATALOG.values() if e.family == family and e.works):
            found |= load(entry.slug).METHOD.claims
    for name in names:
        found |= claims(name)
    if not found:
        hint = f"no method of the family {family} makes one yet" if family else "name a method or a --family"
        raise UserError(f"there is no claim to verify: {hint}")
    return found


def _verify(name: str, claim: Claim, seeds: tuple[int, ...], workers: int, flags: VerifyFlags) -> None:
    from etude.lab.evidence import write_evidence, write_json
    from etude.lab.record import record
    from etude.lab.verify import Bench, quick

    with shown() as told, _home(flags.quick) as home:
        if flags.quick:
            claim = quick(claim)
            seeds = claim.seeds
        result = Bench(claim, workers, home, told).run(name, seeds)
    print(report(result))
    kept = record(result, flags.note or "")
    if flags.json:
        write_json(Path(flags.json), kept)
    if flags.quick:
        print("a smoke run: nothing was concluded, no evidence written")
    elif tuple(sorted(seeds)) == tuple(sorted(claim.seeds)):
        print(f"wrote {write_evidence(kept, flags.evidence)}")
    else:
        print(f"no evidence written: these are not the claim's seeds ({','.join(map(str, claim.seeds))})")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds as in "0,1,2". Raises UserError for what is no whole number of at least 0, or comes twice."""
    seeds = []
    for word in text.split(","):
        if not word.strip().isdecimal():
            raise UserError(f"seeds are whole numbers parted by commas, as in 0,1,2, not {text!r}")
        seeds.append(int(word))
    if twice := [s for s in seeds if seeds.count(s) > 1]:
        raise UserError(f"seed {twice[0]} is named twice in {text}: runs are paired by seed, each once")
    return tuple(seeds)


@contextmanager
def _home(scratch: bool) -> Iterator[Path]:
    """Where the runs go; a smoke run's are thrown away."""
    from etude.lab.jobs import HOME

    if not scratch:
        yield HOME
        return
    with TemporaryDirectory(prefix="etude-") as folder:
        yield Path(folder)


@contextmanager
def shown() -> Iterator[Told]:
    """How far a claim is, with the remaining time: a bar on a terminal, else a line whenever a run is over."""
    if sys.stderr.isatty():
        from etude.app.progress import bars

        with bars() as drawn:
            tasks: dict[str, int] = {}

            def draw(phase: str, over: float, of: int) -> None:
                if phase not in tasks:
                    tasks[phase] = drawn.add_task(phase, total=of, line="runs")
                drawn.update(tasks[phase], completed=over)

            yield draw
        return
    began: dict[str, tuple[float, float]] = {}  # of each phase: when, and how far it was already
    last: dict[str, int] = {}

    def say(phase: str, over: float, of: int) -> None:
        now = time.monotonic()
        start, there = began.setdefault(phase, (now, over))
        if last.get(phase) == int(over + 1e-9):
            return
        last[phase] = int(over + 1e-9)
        left = ""
        if over > there and over < of:
            left = f", about {(now - start) / (over - there) * (of - over) / 60:.0f} min left"
        print(f"{phase}: {last[phase]} of {of} runs{left}", file=sys.stderr, flush=True)

    yield say


def report(result: Result) -> str:
    """The tables and the verdict."""
    claim = result.claim
    out = [f"{result.slug}: {claim.says}", "", lines(_arm_rows(claim, result.arms)), ""]
    rows = [("endpoint", "role", "estimate", "95% interval", "", "why")]
    for j in result.endpoints:
        scale = 1.0 if j.endpoint.ratio else _scale(claim.metrics[j.endpoint.metric])
        i = j.interval
        span = f"{scale * i.low:.3g} to {scale * i.high:.3g}"
        rows.append(
            (
                j.endpoint.name,
                j.endpoint.role,
                f"{scale * i.estimate:.3g}",
                span,
                "holds" if j.holds else "fails",
                j.why,
            )
        )
    out += [lines(rows), "", f"verdict: {result.verdict} ({len(result.seeds)} seeds, {result.minutes:.1f} min)"]
    return "\n".join(out)


def _arm_rows(claim: Claim, arms: Sequence[ArmResult]) -> list[tuple[str, ...]]:
    """Mean and interval over seeds of every metric, then the mean cost by kind."""
    from etude.lab.statistics import paired

    kinds = sorted({k for a in arms for r in a.readings for k, n in r.cost.items() if n and k != "seconds"})
    head = ["arm", "lr", *(f"{n} ({m.unit})" if m.unit else n for n, m in claim.metrics.items()), *kinds, "seconds"]
    rows = [tuple(head)]
    for a in arms:
        cells = [a.arm.name, "own" if a.lr is None else f"{a.lr:g}"]
        for name, metric in claim.metrics.items():
            scale = _scale(metric)
            i = paired([scale * r.values[name] for r in a.readings])
            cells.append(
                f"{i.estimate:.3g} +- {i.high - i.estimate:.2g}" if math.isfinite(i.high) else f"{i.estimate:.3g}"
            )
        for kind in (*kinds, "seconds"):
            cells.append(f"{sum(r.cost.get(kind, 0.0) for r in a.readings) / len(a.readings):.3g}")
        rows.append(tuple(cells))
    return rows


def _scale(metric: Metric) -> float:
    return 100.0 if metric.unit == "%" else 1.0
