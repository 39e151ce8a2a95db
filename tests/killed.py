"""A run of two stages, a branch and refills that is killed at random moments and resumed.

Run as a script it kills its own children; `tests/test_learning_resume.py` reads what it prints. One process
imports torch once and forks, single-threaded, so that ten kills take seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import Examples, completion
from etude.curricula.curriculum import Uniform
from etude.experience.protocols import Clock
from etude.experience.store import Store
from etude.feedback.advantage import Advantage
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit, on_policy
from etude.learning.run import Run, open_run
from etude.learning.select import Mixed
from etude.learning.weights import Weights
from etude.objectives.clipped_pg import ClippedPG
from etude.objectives.nll import NLL
from small import LIMITS, Echo, small_lm, weights_of


def work(folder: Path) -> None:
    """The whole run, from wherever it stands."""
    begun = (folder / "config.json").exists()
    run = open_run(folder) if begun else Run(folder, {"seed": 3, "checkpoint_every": 3}, checkpoint_every=3)
    world, policy = Echo(slack=2), small_lm(3)
    run.track("policy", Weights(policy))
    roles = {"actor": PolicyAgent(policy, limits=LIMITS, meter=run.meter)}
    optim = Optim(lr=1e-3, schedule="cosine", warmup=0.25)

    def warm() -> None:
        rows = []
        for i in range(24):
            problem = world.problem("train", i)
            rows.append(completion(policy.tokenizer, problem.prompt, problem.answer or "", policy.limit))
        fit(run, Seat(policy, optim, 8), examples(Examples(rows), 4, run), NLL(), 8)

    def rl(stage_steps: int, watch: Callable[[Clock], None] | None = None) -> None:
        on_policy(
            run, Seat(policy, optim, 2 * stage_steps), roles, steps=stage_steps, curriculum=Uniform(world),
            act=sample, score=world.score, credit=Advantage(), objective=ClippedPG(), problems=3, members=4,
            select=Mixed(), max_draws=4, epochs=2, minibatches=2, watch=watch,
        )  # fmt: skip

    def try_something(clock: Clock) -> None:
        if clock.step % 4 == 2:
            with run.branch("try"):
                rl(2)

    run.stage("warm", warm)
    run.stage("rl", lambda: rl(10, try_something))
    run.close()
    np.savez(folder / "weights.npz", **weights_of(policy))


def in_child(folder: Path) -> int:
    """Forks a process that works; returns its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(folder)
            code = 0
        finally:
            os._exit(code)
    return pid


def finish(folder: Path) -> None:
    _, status = os.waitpid(in_child(folder), 0)
    if status:
        raise SystemExit(f"the run in {folder} failed")


def read(folder: Path) -> dict[str, object]:
    """All that must not differ: metrics, costs, texts and weights."""
    with Store(folder, read_only=True) as store:
        steps = [
            (s["stage"], s["step"], {k: v for k, v in s["meter"].items() if k != "seconds"}) for s in store.steps()
        ]
        metrics = {n: (m.stage.tolist(), m.step.tolist(), m.value.tolist()) for n, m in store.metrics().items()}
        texts = [
            (t["stage"], t["step"], t["problem_id"], t["member"], t["kept"], t["text"], t["reward"])
            for t in store.trajectories()
        ]
    weights = {n: w.tobytes().hex() for n, w in np.load(folder / "weights.npz").items()}
    return {"steps": steps, "metrics": metrics, "texts": texts, "weights": weights}


def main(home: Path, kills: int) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    finish(home / "whole")
    seconds = time.perf_counter() - began
    expected = json.dumps(read(home / "whole"), default=str)
    dice = random.Random(0)
    died = 0
    for k in range(kills):
        folder = home / f"killed{k}"
        for _ in range(2):  # killed twice, so that a resumed run is killed too
            pid = in_child(folder)
            time.sleep(dice.uniform(0.05, 0.95) * seconds)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            died += os.WIFSIGNALED(status)
        finish(folder)
        found = json.dumps(read(folder), default=str)
        if found != expected:
            a, b = json.loads(expected), json.loads(found)
            raise SystemExit(f"kill {k}: differs in {[n for n in a if a[n] != b[n]]}")
    print(json.dumps({"kills": died, "seconds": seconds, "steps": len(read(home / "whole")["steps"])}))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
