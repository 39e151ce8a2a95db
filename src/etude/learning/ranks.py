"""Who this process is among those that torchrun started, and what they tell one another.

Without torchrun there is one process, which leads, and nothing here costs anything. Objects travel pickled, between
processes of one job that trust each other; no pickle is written to or read from a disk.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from etude.experience.errors import UserError

T = TypeVar("T")

# Longest wait for another process, which may be teaching a base model or acting. One that died is not waited
# for: torchrun ends the others.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Ranks:
    """This process's `rank` among `size` of the job, and its number `local` on this machine. All but the leading
    one (rank 0) keep nothing on the disk. Every method but `device` is to be called in all processes alike."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def together(self, body: Callable[[], T]) -> list[T]:
        """What `body` gives in each process, by rank. A UserError in one of them is raised in all."""
        if self.size == 1:
            return [body()]
        import torch.distributed as dist

        mine: tuple[T | None, str | None]
        try:
            mine = (body(), None)
        except UserError as error:
            mine = (None, str(error))
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        for _, said in found:
            if said is not None:
                raise UserError(said)
        return [value for value, _ in found]

    def first(self, body: Callable[[], T]) -> T:
        """What `body` gives in the leading process, where alone it runs."""
        return self.together(lambda: body() if self.leads else None)[0]  # type: ignore[return-value]

    def agree(self, value: T) -> T:
        """The leading process's value."""
        return self.first(lambda: value)

    def device(self, name: str) -> str:
        """Where this process computes: of `cuda` the GPU that is its own. Raises UserError where there is none."""
        if self.size == 1 or not name.startswith("cuda"):
            return name
        import torch

        if name != "cuda":
            raise UserError(f"under torchrun each process takes the GPU of its number: device=cuda, not {name}")
        if self.local >= (count := torch.cuda.device_count()):
            raise UserError(
                f"process {self.local} of this machine has no GPU of its own, torch finds {count}: "
                "start as many processes as there are GPUs, or use device=cpu"
            )
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"


SOLO = Ranks()


def launched() -> bool:
    """Whether torchrun started this process beside others."""
    return _number("WORLD_SIZE", 1) > 1 and {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def leading() -> bool:
    """Whether this process leads its job; true without torchrun."""
    return not launched() or _number("RANK", 0) == 0


def join() -> Ranks:
    """Meets the other processes of the job, if there are any."""
    if not launched():
        return SOLO
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size(), _number("LOCAL_RANK", 0))


def _leave() -> None:
    """Lets go of the other processes. Then waits for gloo's threads, which may be about to let go of tensors: one
    that needs Python when Python has ended aborts the process."""
    import torch.distributed as dist

    dist.destroy_process_group()
    time.sleep(0.5)


def speaks() -> bool:
    """Whether this process is to say why its job fails: the first that asks, once in all processes. The others fail
    of the same, or because the first has gone."""
    if not launched():
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        return store.add(f"etude/failed/{_number('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:  # torchrun itself has gone
        return True


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
