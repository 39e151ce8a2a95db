"""What all comparisons with TRL's trainers need: quiet runs, equal options, and when each step ended."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

from etude.experience.errors import missing


class Ticks:
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def mark(self) -> None:
        """A step has ended."""
        self.times.append(time.perf_counter())

    def between(self) -> list[float]:
        """Seconds of every step but the first, whose beginning is not known."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    def callback(self) -> Any:
        """A `transformers.TrainerCallback` that marks."""
        from transformers import TrainerCallback

        ticks = self

        class Mark(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                ticks.mark()

        return Mark()


@contextmanager
def quiet_trl() -> Iterator[str]:
    """A scratch folder, and silence: trainers print and warn. Raises UserError where TRL is missing."""
    try:
        import transformers
        import trl  # noqa: F401
    except ImportError:
        raise missing("trl", "bench", "comparing with TRL") from None
    transformers.logging.set_verbosity_error()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as scratch, warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield scratch
        finally:
            logging.disable(before)


def trainer_options(scratch: str, steps: int, lr: float = 1e-4) -> dict[str, Any]:
    """Options of any of its trainers that make it do what ours does and nothing else: float32, all activations kept,
    plain AdamW at a constant rate, no reports."""
    return {
        "output_dir": scratch, "max_steps": steps, "learning_rate": lr, "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0, "optim": "adamw_torch", "weight_decay": 0.0, "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "logging_strategy": "no", "save_strategy": "no", "seed": 0,
    }  # fmt: skip
