"""The command line as a user meets it: in this process, in one of its own, or on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from etude.app.main import main

ETUDE = [sys.executable, "-m", "etude.app.main"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
QUICK = ("--policy", "table", "--no-base", "--steps", "2", "--problems", "2", "--members", "2",
         "--max-tokens", "4", "--eval-problems", "2")  # fmt: skip


class Said(NamedTuple):
    """What a command left: its exit code and its two outputs."""

    code: int
    out: str
    err: str


def refused(said: Said) -> str:
    """The one line of a refusal; fails where it is anything else."""
    assert said.code == 2, said
    assert said.out == ""
    assert said.err.startswith("etude: ")
    assert said.err.count("\n") == 1
    return said.err.strip()


def runner(capfd) -> Callable[..., Said]:
    """Runs a command in this process."""

    def run(*argv: object) -> Said:
        capfd.readouterr()
        code = main([str(a) for a in argv])
        return Said(code, *capfd.readouterr())

    return run


def spawn(*argv: object, **more: object) -> subprocess.Popen[str]:
    """Starts a command in a process of its own."""
    return subprocess.Popen(
        [*ETUDE, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **ONE_THREAD}, **more,
    )  # fmt: skip


def on_terminal(command: list[str], typed: bytes = b"", until: bytes = b"", seconds: float = 60) -> str:
    """What `command` shows on a terminal, to its end or until `until` is seen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(ONE_THREAD, TERM="xterm", COLUMNS="120")
        os.execv(command[0], command)
    shown, end = b"", time.monotonic() + seconds
    if typed:
        os.write(terminal, typed)
    try:
        while time.monotonic() < end and not (until and until in shown):
            shown += os.read(terminal, 65536)
    except OSError:  # it has ended
        pass
    os.close(terminal)  # hangs up whatever is still there
    os.waitpid(pid, 0)
    return shown.decode(errors="replace")


def sums(path: Path, rows: int = 20) -> Path:
    """A data file of easy sums, for every kind of method."""
    lines = [
        json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1), "completion": str(i + 1), "extra": i})
        for i in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
