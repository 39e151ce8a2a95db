"""`etude bench`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import tyro

from etude.app.flags import parse
from etude.experience.errors import missing, unknown

SUITES = {
    "engine": "generation against transformers.generate",
    "learner": "supervised steps on ragged rows against TRL",
    "grpo": "a GRPO step against TRL",
    "load": "process start and peak memory against TRL",
    "scale": "how the cost of a step grows",
}
Suite = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUITE")]
File = Annotated[str | None, tyro.conf.DisallowNone, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class BenchFlags:
    """Etude and the libraries that people use now, side by side in one run; prints Markdown tables."""

    suite: Suite = "all"  # engine, learner, grpo, load, scale, or all
    json: File = None  # write every figure there as well, as they are found


def bench(argv: Sequence[str]) -> None:
    """Runs the suites, printing each line when it is known."""
    flags = parse(BenchFlags, argv, "bench")
    if flags.suite not in (*SUITES, "all"):
        raise unknown("suite", flags.suite, (*SUITES, "all"))
    try:
        peers = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    except PackageNotFoundError as error:
        raise missing(str(error.name), "bench", "comparing with the libraries of others") from None
    from etude.lab.bench.case import machine
    from etude.lab.evidence import write_json

    found = machine()
    results: dict[str, list[dict[str, Any]]] = {}

    def keep() -> None:
        if flags.json:
            write_json(Path(flags.json), {"machine": asdict(found), "suites": results})

    keep()  # a file that cannot be written is known before the runs
    print(
        f"{platform.processor() or platform.machine()}, {found.threads} threads: {found.flops / 1e9:.0f} GFLOP/s, "
        f"{found.bytes / 1e9:.0f} GB/s; {peers}\n"
    )
    for suite in SUITES if flags.suite == "all" else [flags.suite]:
        head = ""
        for case in getattr(import_module(f"etude.lab.bench.{suite}"), suite)(found):
            if case.head != head:
                print(head := case.head)
            print(case.row(), flush=True)
            results.setdefault(suite, []).append(case.plain())
            keep()
        print()
