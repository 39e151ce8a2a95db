"""Worlds of many turns: text environments on `gymnasium.Env` that can be saved, restored and replayed.

How an acting stage uses one. The first context is `opening(problem, observation)`, for the observation
that `reset` gave. Every `step` gives an observation (the next message to the agent) and an `info`:

    valid       whether the action was understood
    events      names of what happened, a tuple of strings
    admissible  actions that would be understood now, where the world knows them
    correct     the verifier's word so far (None: none yet)
    outcome     at the last step only: {"correct": bool, "reward": float} of the whole episode

`step_info` turns what `step` gave into a StepInfo, and `outcome` the StepInfos into an Outcome.
"""

from __future__ import annotations

import json
import string
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from etude.experience.errors import UserError
from etude.experience.types import Message, Outcome, Problem, Prompt, StepInfo

CHARSET = frozenset(string.printable)
LONGEST_ACTION = 1000  # characters; what goes beyond is cut off
LONGEST_OBSERVATION = 20_000

Turn = tuple[str, float, bool, dict[str, Any]]  # observation, reward, terminated, info


class TextEnv(gymnasium.Env[str, str]):
    """A text environment for one problem, of at most `max_turns` actions.

    A snapshot is JSON of the seed and the actions so far, restored by replay, so a subclass must be
    deterministic given its seed. A subclass gives `begin` and `act`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(self, problem: Problem, max_turns: int) -> None:
        self.problem = problem
        self.max_turns = max_turns
        self.observation_space = Text(LONGEST_OBSERVATION, min_length=0, charset=CHARSET)
        self.action_space = Text(LONGEST_ACTION, min_length=0, charset=CHARSET)
        self._seed: int | None = None
        self._actions: list[str] = []
        self._reward = 0.0
        self.over = True  # also before the first reset

    @abstractmethod
    def begin(self, seed: int | None) -> tuple[str, dict[str, Any]]:
        """Starts an episode: (observation, info)."""

    @abstractmethod
    def act(self, action: str) -> Turn:
        """One action: (observation, reward, terminated, info); info holds `correct` if it can."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Starts afresh. `options` are gymnasium's; the problem's own options are already in it."""
        super().reset(seed=seed)
        self._seed, self._actions, self._reward, self.over = seed, [], 0.0, False
        observation, info = self.begin(seed)
        return printable(observation), _complete(info)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises UserError before `reset` and after the end."""
        if self.over:
            raise UserError(f"problem {self.problem.id}: the episode is over or not begun: call reset first")
        action = action[:LONGEST_ACTION]
        self._actions.append(action)
        observation, reward, terminated, info = self.act(action)
        self._reward += reward
        truncated = not terminated and len(self._actions) >= self.max_turns
        self.over = terminated or truncated
        info = _complete(info)
        if self.over:
            info["outcome"] = {"correct": bool(info["correct"]), "reward": self._reward}
        return printable(observation), reward, terminated, truncated, info

    def snapshot(self) -> bytes:
        """The state as JSON."""
        return json.dumps({"problem": self.problem.id, "seed": self._seed, "actions": self._actions}).encode()

    def restore(self, state: bytes) -> None:
        """Goes back (or on) to a snapshot of the same problem. Raises UserError on any other bytes."""
        try:
            data = json.loads(state)
            problem, seed, actions = data["problem"], data["seed"], data["actions"]
        except (ValueError, KeyError, TypeError):
            raise UserError("restore needs what snapshot gave: JSON with problem, seed and actions") from None
        if problem != self.problem.id:
            raise UserError(f"a snapshot of problem {problem!r} cannot be restored into problem {self.problem.id!r}")
        self.reset(seed=seed)
        for action in actions:
            self.step(action)


def replay(actions: Iterable[str], env: gymnasium.Env[str, str], seed: int | None = None) -> list[StepInfo]:
    """Plays actions from the start until they or the episode end; one StepInfo for each played."""
    env.reset(seed=seed)
    steps: list[StepInfo] = []
    for action in actions:
        _, reward, terminated, truncated, info = env.step(action)
        steps.append(step_info(float(reward), terminated, truncated, info, len(steps)))
        if terminated or truncated:
            break
    return steps


def step_info(reward: float, terminated: bool, truncated: bool, info: Mapping[str, Any], call: int) -> StepInfo:
    """What `step` gave, for the call that acted."""
    valid, events = bool(info.get("valid", True)), tuple(info.get("events", ()))
    return StepInfo(reward, valid, events, info.get("correct"), terminated, truncated, call)


def outcome(steps: Sequence[StepInfo]) -> Outcome:
    """The outcome of an episode: the sum of its rewards, the verifier's last word (False if it never
    spoke), and the reward of every call."""
    per_call = [0.0] * (max((s.call for s in steps), default=-1) + 1)
    for s in steps:
        per_call[s.call] += s.reward
    correct = next((s.correct for s in reversed(steps) if s.correct is not None), False)
    return Outcome(sum(s.reward for s in steps), correct, per_call=tuple(per_call))


def opening(problem: Problem, observation: str) -> Prompt:
    """What an agent is asked first: the problem's prompt, and what `reset` showed after it."""
    if not observation:
        return problem.prompt
    if isinstance(problem.prompt, str):
        return f"{problem.prompt}\n\n{observation}" if problem.prompt else observation
    *before, last = problem.prompt
    joined: Message = {"role": last["role"], "content": f"{last['content']}\n\n{observation}"}
    return (*before, joined)


def printable(text: str) -> str:
    """The text as the observation space has it: printable ASCII, other characters as "?"."""
    return "".join(c if c in CHARSET else "?" for c in text)[:LONGEST_OBSERVATION]


def _complete(info: dict[str, Any]) -> dict[str, Any]:
    return {"correct": None, "valid": True, "events": (), "admissible": (), **info}
