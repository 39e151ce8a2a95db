"""What a process costs: time until its first training step is over, and peak memory with a large vocabulary."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from etude.experience.errors import UserError
from etude.lab.bench.case import Case, Machine

if TYPE_CHECKING:
    from etude.policies.lm import LM

VOCAB = 49_152
REPEATS = 3


def load(machine: Machine) -> Iterator[Case]:
    """The cases."""
    yield Case(
        "process start to the end of the first GRPO step, tiny, 8 x 8 x 64", "TRL GRPOTrainer",
        *_both("first", lambda began, said: float(said) - began), bar=2.0,
    )  # fmt: skip
    yield Case(
        "peak memory of a GRPO step, vocabulary 49k, 8 x 8 x 64", "TRL GRPOTrainer",
        *_both("peak", lambda began, said: float(said)), bar=1 / 0.6, unit="MB",
        note="growth of the process's peak over what it held before the step",
    )  # fmt: skip


def _both(what: str, read: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What processes of both sides say, taken in turn."""
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(REPEATS):
        for side, values in found.items():
            began = time.time()
            words = [sys.executable, "-m", "etude.lab.bench.load", side, what]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"{what} of {side} could not be measured: {last}")
            values.append(read(began, done.stdout.split()[-1]))
    return tuple(found["ours"]), tuple(found["theirs"])


def held() -> float:
    """MB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak() -> float:
    """MB that it held at most. Not `getrusage`, whose peak begins with that of the process which started this one."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def ours_first() -> float:
    """When the first step of a run was over."""
    from etude.methods.api import train

    class Reporter:
        ended = 0.0

        def step(self, clock: Any, metrics: Any, run: Any) -> None:
            self.ended = self.ended or time.time()

    reporter = Reporter()
    with TemporaryDirectory() as scratch:
        train("grpo", policy="tiny", base=False, out=f"{scratch}/run", steps=1, problems=8, members=8, eval_every=0,
              eval_problems=1, reporter=reporter)  # fmt: skip
    return reporter.ended


def theirs_first() -> float:
    """The same of TRL's."""
    from etude.experience.keys import Keys
    from etude.lab.bench.grpo import Settings, trainer
    from etude.lab.bench.trl import Ticks, quiet_trl
    from etude.policies.zoo import load_policy

    ticks, lm = Ticks(), cast("LM", load_policy("tiny", Keys(0)))
    with quiet_trl() as scratch:
        trainer(lm, scratch, Settings(steps=1), ticks.callback()).train()
    return time.time() - (time.perf_counter() - ticks.times[0])


def ours_peak() -> float:
    """MB by which a step raises the peak."""
    from etude.acting.agent import PolicyAgent
    from etude.experience.keys import Keys
    from etude.experience.meter import Meter
    from etude.experience.protocols import Limits
    from etude.lab.bench.grpo import answered, problems, step_batch
    from etude.learning.learner import Optim, Seat, Term, update
    from etude.objectives.clipped_pg import grpo
    from etude.worlds.registry import load_world

    lm = wide()
    before = held()
    world = load_world("chain_sum", notation="compact")
    groups = answered(PolicyAgent(lm, limits=Limits(max_tokens=64)), problems(world), world.score, 8)
    update(Seat(lm, Optim(lr=1e-4), 1), [Term(step_batch(groups)[0], grpo())], Keys(0), Meter())
    return peak() - before


def theirs_peak() -> float:
    """The same of TRL's."""
    from etude.lab.bench.grpo import Settings, trainer
    from etude.lab.bench.trl import Ticks, quiet_trl

    with quiet_trl() as scratch:
        ready = trainer(wide(), scratch, Settings(steps=1), Ticks().callback())
        before = held()
        ready.train()
    return peak() - before


def wide() -> Any:
    """`tiny` with a vocabulary as pretrained models have it."""
    from dataclasses import replace

    from etude.experience.keys import Keys
    from etude.policies.lm import LM
    from etude.policies.zoo import load_policy

    tiny: Any = load_policy("tiny", Keys(0))
    return LM(replace(tiny.shape, vocab=VOCAB), tiny.tokenizer, Keys(0).torch())


if __name__ == "__main__":
    side, what = sys.argv[1:]
    print(globals()[f"{side}_{what}"]())
