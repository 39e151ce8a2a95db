"""Seconds of training until the demo's policy answers four of five held-out problems, against TRL's GRPOTrainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any, cast

from etude.experience.errors import UserError
from etude.experience.protocols import Clock
from etude.lab.bench.case import Case
from etude.lab.bench.grpo import Settings, trainer
from etude.lab.bench.trl import quiet_trl
from etude.learning.learner import Optim
from etude.learning.run import Run
from etude.learning.setting import Common, Setting, setting
from etude.methods.api import method
from etude.policies.lm import LM

SEEDS, TARGET, STEPS, EVERY = (0, 1, 2), 0.8, 150, 5
SIZE = Settings(problems=32, members=8, tokens=16, steps=STEPS, lr=3e-4)


class Reached(Exception):
    """The policy is good enough."""


class Stopwatch:
    """Counts seconds of training, without those of evaluations, until one reaches the target."""

    def __init__(self, accuracy: Callable[[], float]) -> None:
        self.accuracy, self.spent, self.since = accuracy, 0.0, time.perf_counter()

    def ended(self, step: int) -> None:
        """A step is over; counted from 1. Raises Reached."""
        self.spent += time.perf_counter() - self.since
        if step % EVERY == 0 and self.accuracy() >= TARGET:
            raise Reached
        self.since = time.perf_counter()

    def until(self, training: Callable[[], Any]) -> float:
        """Seconds until the target. Raises UserError if it is not reached."""
        self.since = time.perf_counter()
        try:
            training()
        except Reached:
            return self.spent
        raise UserError(f"{TARGET:.0%} held-out accuracy was not reached in {STEPS} steps")


def demo() -> Case:
    """The case: pairs are seeds, each with its own base model."""
    ours, theirs = [], []
    for seed in SEEDS:
        ours.append(_with_setting(seed, _ours))
        theirs.append(_with_setting(seed, _theirs))
    return Case(
        f"seconds of training to {TARGET:.0%} held-out accuracy in the demo", "TRL GRPOTrainer", tuple(ours),
        tuple(theirs), 2.0, same="same base models, problems' distribution, rewards, hyperparameters",
        note=f"{SIZE.problems} x {SIZE.members} x {SIZE.tokens}, seeds {', '.join(map(str, SEEDS))}, evaluated "
        f"every {EVERY} steps and not counted",
    )  # fmt: skip


def _with_setting(seed: int, train: Callable[[Setting], float]) -> float:
    with TemporaryDirectory() as scratch:
        run = Run(f"{scratch}/run", {"seed": seed}, checkpoint_every=STEPS)
        try:
            common = Common(policy="tiny", base_low=0.3, seed=seed, max_tokens=SIZE.tokens, eval_every=0)
            return train(setting(run, common))
        finally:
            run.close()


def _ours(s: Setting) -> float:
    watch = Stopwatch(lambda: s.evaluate().accuracy.value)

    class Reporter:
        def step(self, clock: Clock, metrics: Mapping[str, float], run: Run) -> None:
            watch.ended(clock.step + 1)

    s.run.reporter = Reporter()
    grpo = method("grpo")
    config = grpo.config(steps=STEPS, problems=SIZE.problems, members=SIZE.members, optim=Optim(lr=SIZE.lr))
    return watch.until(lambda: grpo.train(s, config))


def _theirs(s: Setting) -> float:
    lm = cast(LM, s.policy)
    with quiet_trl() as scratch:
        from transformers import TrainerCallback

        def accuracy() -> float:
            lm.load_state_dict(other.model.state_dict(), strict=True)
            return s.evaluate().accuracy.value

        watch = Stopwatch(accuracy)

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                watch.ended(state.global_step)

        other = trainer(lm, scratch, SIZE, Callback())
        return watch.until(other.train)
