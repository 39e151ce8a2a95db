"""Episodes in worlds of many turns, played in lockstep so that the engine sees all live ones at once.

The stream of a call is keys / problem / how often the problem came before / member / call. Members of a
group start alike: their environments are reset with the same seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from etude.acting.sample import said
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Acting, Agent, Clock, Roles, Score
from etude.experience.types import Call, Group, Ids, Problem, StepInfo, Trajectory
from etude.worlds.textenv import opening, outcome, step_info

if TYPE_CHECKING:
    import gymnasium

EnvOf = Callable[[Problem], "gymnasium.Env[str, str]"]


def episodes(
    env_of: EnvOf, meter: Meter | None = None, window: int | None = None, room: int = 64, max_turns: int = 100
) -> Acting:
    """The strategy that plays `env_of(problem)` with the actor, a call a turn; see `Episodes`."""
    return Episodes(env_of, meter or Meter(), window, room, max_turns)


@dataclass(frozen=True)
class Episodes:
    """`n` episodes of the actor in each problem's environment.

    The context of a turn is the opening, then what was said and shown in earlier turns: all of them, or
    the last `window`, and fewer where the actor's limit would leave less than `room` tokens to answer in.
    An episode also ends, truncated, after `max_turns` calls or where not even the last turn fits.

    What an environment raises (other than UserError) is a step that was not valid and ends its episode;
    such episodes are counted in the group's tag `env_errors` and hold the error in their own tag
    `env_error`. Outcomes are the environments' own: the scorer is not asked. Charges `steps`. Raises
    UserError if not one environment can be reset.
    """

    env_of: EnvOf
    meter: Meter
    window: int | None = None
    room: int = 64
    max_turns: int = 100

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"window {self.window} is below 1 turn")
        if self.room < 1 or self.max_turns < 1:
            raise UserError(f"room {self.room} and max_turns {self.max_turns} must be at least 1")

    def __call__(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        groups = self.play(roles, problems, n, score, clock, keys)
        refuse_unplayable(groups)
        return groups

    def play(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        """The groups, also where no environment could be reset."""
        actor = roles["actor"]
        before: Counter[str] = Counter()
        played: list[list[_Episode]] = []
        for problem in problems:
            node = keys.at(problem.id, before[problem.id])
            before[problem.id] += 1
            played.append([_Episode(problem, m, node) for m in range(n)])
        every = [e for group in played for e in group]
        for e in every:
            e.begin(self.env_of, actor)
        while live := [e for e in every if not e.over]:
            self._turn(actor, live)
        return [
            Group(problem, tuple(e.trajectory() for e in group), tags=_tags(group))
            for problem, group in zip(problems, played, strict=True)
        ]

    def _turn(self, actor: Agent, live: Sequence[_Episode]) -> None:
        """One call and one environment step of every live episode that has room for it."""
        ready, contexts = [], []
        for e in live:
            context = e.context(self.window, actor.limit, self.room)
            if context is None:
                e.truncate("context")
            else:
                ready.append(e)
                contexts.append(context)
        calls = actor.generate(contexts, [e.keys.at(e.member, len(e.calls)) for e in ready])
        for e, call in zip(ready, calls, strict=True):
            e.act(actor, call)
            if not e.over and len(e.calls) >= self.max_turns:
                e.truncate("max_turns")
        self.meter.charge("steps", len(ready))


def refuse_unplayable(groups: Sequence[Group]) -> None:
    """Raises UserError if not one environment could be reset."""
    every = [m for g in groups for m in g.members]
    if every and all("env_error" in m.tags and not m.calls for m in every):
        raise UserError(f"no environment could be reset: problem {every[0].problem.id}: {every[0].tags['env_error']}")


@dataclass
class _Episode:
    """One episode while it is played."""

    problem: Problem
    member: int
    keys: Keys  # of the problem
    calls: list[Call] = field(default_factory=list)
    steps: list[StepInfo] = field(default_factory=list)
    turns: list[Ids] = field(default_factory=list)  # of each turn, what was said and what came after it
    text: str = ""
    over: bool = False
    error: str = ""

    def begin(self, env_of: EnvOf, actor: Agent) -> None:
        try:
            self.env = env_of(self.problem)
            observation, _ = self.env.reset(seed=self.keys.at("env").digest() % 2**31)
        except UserError:
            raise
        except Exception as error:  # whatever the environment's code raises
            self._fail(error)
        else:
            self.opening = actor.tokenizer.prompt(opening(self.problem, observation))

    def context(self, window: int | None, limit: int, room: int) -> Ids | None:
        """int32[T], or None where the opening and the last turn leave no room."""
        turns = self.turns if window is None else self.turns[-window:]
        first, size = 0, len(self.opening) + sum(map(len, turns))
        while first < len(turns) - 1 and size > limit - room:
            size -= len(turns[first])
            first += 1
        if turns and size >= limit:
            return None
        return np.concatenate([self.opening, *turns[first:]])

    def act(self, actor: Agent, call: Call) -> None:
        """Takes the call's text to the environment."""
        self.calls.append(call)
        self.text = said(actor, call)
        try:
            observation, reward, terminated, truncated, info = self.env.step(self.text)
        except UserError:
            raise
        except Exception as error:  # whatever the environment's code raises
            self._fail(error)
            return
        self.steps.append(step_info(float(reward), terminated, truncated, info, len(self.calls) - 1))
        self.over = terminated or truncated
        if self.over:
            self.env.close()
            return
        tokenizer = actor.tokenizer
        ended = len(call.out) > 0 and int(call.out[-1]) in tokenizer.stops
        end = tokenizer.completion("")[-1:]  # given where the agent did not write it, so that turns look alike
        said_ids = call.out if ended else np.concatenate([call.out, end])
        self.turns.append(np.concatenate([said_ids, tokenizer.observation(observation)]))

    def truncate(self, why: str) -> None:
        """Ends the episode where the world would have gone on."""
        last = self.steps[-1]
        self.steps[-1] = replace(last, truncated=True, events=(*last.events, why))
        self.over = True
        self.env.close()

    def _fail(self, error: Exception) -> None:
        self.error = f"{type(error).__name__}: {error}"
        call = max(len(self.calls) - 1, 0)
        self.steps.append(StepInfo(valid=False, events=("env_error",), truncated=True, call=call))
        self.over = True

    def trajectory(self) -> Trajectory:
        tags = {"env_error": self.error} if self.error else {}
        return Trajectory(
            self.problem,
            tuple(self.calls),
            tuple(self.steps),
            outcome(self.steps),
            member=self.member,
            text=self.text,
            tags=tags,
        )


def _tags(group: Sequence[_Episode]) -> dict[str, int]:
    errors = sum(bool(e.error) for e in group)
    return {"env_errors": errors} if errors else {}
