"""Rollouts on Ray actors: other processes act, on this machine or on a cluster, and this one learns.

A draw of problems is parted into chunks of whole groups, which go to whichever actor is free. The parts depend
only on how many problems and actors there are, and streams are keyed by problem, member and call, so neither
which actor plays a chunk, nor when, nor whether it had to be played twice changes what comes back. To an actor
go problems, keys and weights; back come groups, costs and warnings. World, verifier and rewards run there.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from etude.acting.agent import PolicyAgent
from etude.acting.episodes import refuse_unplayable
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Acting, Clock, Interactive, Roles, Score
from etude.experience.types import Group, Problem
from etude.learning.actors import Order, Place, Snapshot, connect, lost, spawn, why
from etude.learning.weights import Weights

if TYPE_CHECKING:
    from etude.learning.setting import Setting

log = logging.getLogger(__name__)

CHUNKS = 4  # of a draw, an actor
DEATHS = 3  # of actors on the same chunk, after which the run is given up
PATIENCE = 300.0  # seconds to wait for a first actor to be ready


class Rollouts:
    """The actors of one run, and whatever was given to them. `close` ends them.

    `frozen` holds parameters that do not learn and that an actor cannot load by itself. Raises UserError where Ray
    is not installed or the cluster is not reached.
    """

    def __init__(self, setting: Setting, frozen: Mapping[str, Tensor]) -> None:
        common, self.policy, self.score = setting.common, setting.policy, setting.score
        self.many_turns = isinstance(setting.world, Interactive)
        self.options = common.ray
        self.ray, self._disconnect = connect(self.options)
        self._build = (common, setting.run.keys, self._put(frozen), Place(os.getcwd(), sys.path))
        self._guard = threading.Lock()  # between closing and replacing actors
        self._turn = threading.Lock()  # one draw at a time
        self._closed = False
        self._starting: dict[Any, Any] = {}  # task -> actor
        self._actors: list[Any] = []
        self._heard: set[str] = set()
        self.thread = ThreadPoolExecutor(1)  # collects ahead of the learner
        self._last = Snapshot("", [])
        self.weights = self.snapshot()  # that act
        for _ in range(self.options.actors):
            self._start()

    def snapshot(self) -> Snapshot:
        """The policy's weights as they are now; broadcast again only where they have changed."""
        fingerprint = self.policy.fingerprint()
        if fingerprint != self._last.fingerprint:
            self._last = Snapshot(fingerprint, self._put(Weights(self.policy).state_dict()))
        return self._last

    def groups(self, orders: Sequence[Order], meter: Meter) -> list[Group]:
        """Every order carried out by some actor; the groups in the orders' order. Charges `meter`.

        Raises UserError for what an actor raised as such, where `DEATHS` actors have died on one order or on
        starting, and where none is ready after `PATIENCE` seconds.
        """
        with self._turn:
            done = self._carry_out(orders)
        groups: list[Group] = []
        for i in range(len(orders)):
            groups += done[i].groups
            for kind, n in done[i].costs.items():
                meter.charge(kind, n)
            for warning in done[i].warnings:
                if warning not in self._heard:
                    self._heard.add(warning)
                    log.warning("%s", warning)
        return groups

    def _carry_out(self, orders: Sequence[Order]) -> dict[int, Any]:
        todo, done = deque(range(len(orders))), dict[int, Any]()
        deaths: Counter[int | None] = Counter()
        busy: dict[Any, tuple[Any, int]] = {}  # task -> actor, order
        while len(done) < len(orders):
            working = [*self._starting.values(), *(actor for actor, _ in busy.values())]
            for actor in self._actors:
                if todo and actor not in working:
                    i = todo.popleft()
                    busy[actor.act.remote(orders[i])] = actor, i
            ready, _ = self.ray.wait([*busy, *self._starting], timeout=None if busy else PATIENCE)
            if not ready:
                raise self._nobody()
            task = ready[0]
            actor, chunk = busy.pop(task, None) or (self._starting.pop(task), None)
            try:
                result = self.ray.get(task)
            except self.ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            except lost() as error:
                deaths[chunk] += 1
                if deaths[chunk] == DEATHS:
                    what = "while they started" if chunk is None else f"on problem {_names(orders[chunk].problems)}"
                    raise UserError(f"{DEATHS} Ray actors died {what}; the last: {why(error)}") from None
                self._actors.remove(actor)
                self._start()
                log.warning("a Ray actor died and is replaced: %s", why(error))
                if chunk is not None:
                    todo.appendleft(chunk)
            else:
                if chunk is not None:
                    done[chunk] = result
        return done

    def _start(self) -> None:
        """One more actor, which begins to build what it needs."""
        with self._guard:
            if self._closed:
                raise UserError("the run was closed while its Ray actors worked")
            actor = spawn(self.options)
            self._actors.append(actor)
            self._starting[actor.start.remote(*self._build)] = actor

    def _put(self, state: Mapping[str, Tensor]) -> list[Any]:
        """A reference to the tensors, as in a `Snapshot`."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        return [self.ray.put(save(tensors))]

    def _nobody(self) -> UserError:
        found = self.ray.cluster_resources()
        wanted = f"{self.options.threads} CPUs" + (f" and {self.options.gpus} GPUs" if self.options.gpus else "")
        has = f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs"
        return UserError(f"no Ray actor was ready after {PATIENCE:.0f} s: each needs {wanted}, the cluster has {has}")

    def close(self) -> None:
        """Ends the actors, what is being collected, and a Ray of the run's own."""
        with self._guard:
            self._closed = True
            for actor in self._actors:
                self.ray.kill(actor)
        self.thread.shutdown(cancel_futures=True)
        self._disconnect()


@dataclass(frozen=True)
class OnActors:
    """An acting strategy as Ray actors carry it out: `act` on whole groups, the same groups as in this process.

    `follow`: every call acts with the policy as it is then; else with `rollouts.weights`. Raises UserError for roles or
    a score other than the run's own, which the actors have.
    """

    rollouts: Rollouts
    act: Acting
    meter: Meter
    follow: bool = True

    def __call__(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        pool, agent = self.rollouts, roles.get("actor")
        plain = isinstance(agent, PolicyAgent) and agent.policy is pool.policy and not agent.hooks + agent.processors
        if not isinstance(agent, PolicyAgent) or not plain or len(roles) > 1 or score != pool.score:
            raise UserError("Ray actors have the run's policy and score alone: other roles or scores need ray.actors=0")
        if self.follow:
            pool.weights = pool.snapshot()
        orders, first = [], 0
        for size in sizes(len(problems), pool.options.actors):
            part = problems[first : first + size]
            first += size
            orders.append(Order(self.act, part, n, agent.law, agent.limits, clock, keys, pool.weights))
        groups = pool.groups(orders, self.meter)
        if pool.many_turns:
            refuse_unplayable(groups)
        return groups


def sizes(problems: int, actors: int) -> list[int]:
    """How many problems each chunk has: all in one for one actor; for more, `CHUNKS` chunks an actor, alike in size,
    wide enough for the engine and small enough that nobody waits long for the last.

    >>> sizes(32, 1), sizes(32, 2), sizes(9, 2)
    ([32], [4, 4, 4, 4, 4, 4, 4, 4], [2, 1, 1, 1, 1, 1, 1, 1])
    """
    count = min(problems, 1 if actors == 1 else CHUNKS * actors)
    return [problems // count + (i < problems % count) for i in range(count)]


def _names(problems: Sequence[Problem]) -> str:
    return problems[0].id + (f" or the {len(problems) - 1} after it" if len(problems) > 1 else "")
