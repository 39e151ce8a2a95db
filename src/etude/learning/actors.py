"""One Ray actor, and how Ray is started, reached and left. Ray is imported only here, when it is used."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load
from torch import Tensor

from etude.acting.agent import PolicyAgent
from etude.acting.episodes import Episodes
from etude.experience.errors import UserError, missing
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Acting, Clock, Interactive, Limits
from etude.experience.types import Group, Law, Problem
from etude.learning.weights import Weights
from etude.policies.zoo import load_policy

if TYPE_CHECKING:
    from etude.learning.setting import Common


@dataclass(frozen=True)
class Ray:
    """Processes that act while this one learns, by Ray; actors 0 acts in this process."""

    actors: int = 0  # that act, each with its own copy of policy and world; 0: this process acts
    address: str | None = None  # of a Ray cluster, or auto; None: a Ray of the run's own, on this machine
    lag: int = 0  # steps that the weights that act may be behind those that learn; 0: strictly on-policy
    threads: int = 1  # of an actor
    gpus: float = 0.0  # share of a GPU that an actor takes; 0: it acts on the CPU

    def __post_init__(self) -> None:
        if self.actors < 0 or self.lag < 0 or self.threads < 1 or not self.gpus >= 0:
            raise UserError("ray.actors, ray.lag and ray.gpus must be at least 0, and ray.threads at least 1")
        for name in ("address", "lag"):
            if getattr(self, name) and not self.actors:
                raise UserError(f"ray.{name} needs actors to act: give ray.actors at least 1")


@dataclass(frozen=True)
class Snapshot:
    """A policy's trainable weights in Ray's object store, under the fingerprint of the policy they make."""

    fingerprint: str
    ref: list[Any]  # to safetensors; in a list, so that an actor fetches them only where it has others


@dataclass(frozen=True)
class Place:
    """Where the learner runs: relative paths and modules mean the same to an actor that has them too."""

    folder: str
    path: list[str]


@dataclass(frozen=True)
class Order:
    """What an actor is asked for: `n` members for each of `problems`."""

    act: Acting
    problems: Sequence[Problem]
    n: int
    law: Law
    limits: Limits
    clock: Clock
    keys: Keys
    weights: Snapshot  # with which to act


@dataclass(frozen=True)
class Rolled:
    """What an actor gives back."""

    groups: list[Group]
    costs: Mapping[str, float]  # by kind of the meter
    warnings: list[str]  # that were logged on the way


class Actor:
    """Acts in a process of its own, with what it builds there from the options of the run."""

    def start(self, common: Common, keys: Keys, frozen: list[Any], place: Place) -> None:
        """Builds policy, world and score; `frozen` refers to parameters that replace its own."""
        from etude.learning.setting import equipped  # which imports this module

        if os.path.isdir(place.folder):
            os.chdir(place.folder)
        sys.path += [entry for entry in place.path if entry not in sys.path]
        torch.set_num_threads(common.ray.threads)
        self.common, self.fingerprint = common, ""
        policy: Any = load_policy(common.policy, keys.at("init"), device=common.device if common.ray.gpus else "cpu")
        self.policy, self.world, self.score = equipped(policy, common, keys)
        self.weights = Weights(self.policy)
        own = self.weights.frozen()
        with torch.no_grad():
            for name, value in fetch(frozen).items():
                own[name].copy_(value)
        self.heard = _Heard()
        logging.getLogger("etude").addHandler(self.heard)

    def act(self, order: Order) -> Rolled:
        """Carries out an order, with the weights it names."""
        if order.weights.fingerprint != self.fingerprint:
            self.weights.load_state_dict(fetch(order.weights.ref))
            self.fingerprint = order.weights.fingerprint
        meter = Meter()
        act = order.act
        if isinstance(self.world, Interactive):  # that no environment can be reset is judged over all orders
            act = Episodes(self.world.env, meter, room=self.common.max_tokens).play
        roles = {"actor": PolicyAgent(self.policy, "actor", order.law, order.limits, meter)}
        groups = act(roles, order.problems, order.n, self.score, order.clock, order.keys)
        return Rolled(groups, {kind: n for kind, n in meter.read().items() if n}, self.heard.take())


class _Heard(logging.Handler):
    """Keeps warnings, which nobody would see in an actor's own log, until they are taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def take(self) -> list[str]:
        """What was logged since the last call."""
        taken, self.messages = self.messages, []
        return taken


def fetch(reference: list[Any]) -> dict[str, Tensor]:
    """Tensors that `Rollouts` put into the object store."""
    import ray

    return load(ray.get(reference[0]))


def spawn(options: Ray) -> Any:
    """A handle of a new actor, which Ray starts in the background. An actor that dies is not restarted by Ray."""
    import ray

    return ray.remote(num_cpus=options.threads, num_gpus=options.gpus, max_restarts=0)(Actor).remote()


def connect(options: Ray) -> tuple[Any, Callable[[], None]]:
    """The module `ray`, connected, and how to let go of it again: what was not started here is left running.

    A Ray of the run's own listens on the loopback interface alone, has no dashboard, reports to nobody, keeps its
    files in a temporary folder and ends with this process, however that ends (where it was killed, two of Ray's
    agents look up only after a minute). Raises UserError where Ray is not installed, does not start, or the
    cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if options.address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # 0: loopback, on Linux too
    try:
        import ray
    except ModuleNotFoundError:
        raise missing("ray", "ray", "acting on Ray actors") from None
    if ray.is_initialized():
        return ray, lambda: None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    scratch = None
    if options.address is None:
        # Not below TMPDIR: the path of a socket may have 107 characters at most.
        scratch = tempfile.mkdtemp(prefix="etude-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
        cpus = options.actors * options.threads
        quiet |= {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": scratch}
    try:
        _knock(options.address)
        ray.init(address=options.address or "local", **quiet)
    except Exception as error:  # whatever Ray raises: ConnectionError, RuntimeError, ValueError, OSError, its own
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
        what = f"the Ray cluster {options.address} cannot be reached" if options.address else "Ray does not start here"
        raise UserError(f"{what}: {str(error).strip().splitlines()[0]}") from None

    def leave() -> None:
        ray.shutdown()
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)

    # Ray prints the death of a worker on our standard output, where a program may be reading; we say it ourselves.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    return ray, leave


def _knock(address: str | None) -> None:
    """Raises OSError where nobody listens, after which Ray itself would look for many minutes."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def lost() -> tuple[type[Exception], ...]:
    """What Ray raises where an actor, or the node with it or its result, is gone."""
    from ray.exceptions import ObjectLostError, RayActorError

    return RayActorError, ObjectLostError


def why(error: Exception) -> str:
    """Ray's word on how an actor was lost, in a line.

    >>> why(Exception("The actor died.\\n\\tpid: 7\\nWorker exit detail: End of file. There are some causes."))
    'End of file'
    """
    text = " ".join(str(error).split())
    detail = re.search(r"Worker exit detail: (.*?)(\. |$)", text)
    return detail[1] if detail else text.partition(". ")[0]
