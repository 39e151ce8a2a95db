"""What happened, action-exact: problems, calls, trajectories, outcomes, groups.

Everything here is immutable and knows only NumPy. Axes: `T` tokens of one call, `K` steps of one
trajectory, `G` members of a group. Text is tokenised once, when an agent is called, and never
decoded and tokenised again on the way to a loss.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]

NOTHING: Mapping[str, Any] = MappingProxyType({})


def _read_only(values: dict[str, Any]) -> MappingProxyType[str, Any]:
    return MappingProxyType(values)


# What happened goes to workers and back whole, with its read-only mappings, which Python does not pickle by itself.
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


class Message(TypedDict):
    """One chat message, in the form every chat template takes."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Problem:
    """What a world asks.

    `id` names the problem within its world whatever order problems are drawn in; random streams
    are keyed by it. `options` are the reset options of an interactive world; `meta` is whatever the
    world's own verifier and oracle need.
    """

    id: str
    prompt: Prompt
    answer: str | None = None
    category: str = ""
    difficulty: float | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    meta: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


class Author(IntEnum):
    """Who put a token there. Only SELF tokens are the calling agent's own choices."""

    SELF = 0  # chosen by the agent that the call names
    GIVEN = 1  # a prompt, or a prefix forced on the agent
    WORLD = 2  # an observation
    INJECTED = 3  # put in by a hook while the agent was writing


@dataclass(frozen=True)
class Law:
    """The sampling law a call was drawn from. Temperature 0 means greedy.

    `tilt` names whatever else bent the law (logits processors, selection among candidates, search);
    empty means none did.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    tilt: tuple[str, ...] = ()

    @property
    def raw(self) -> bool:
        """Whether the law is the model's own at temperature 1."""
        return self == RAW


RAW = Law()
GREEDY = Law(temperature=0.0)


@dataclass(frozen=True, eq=False)
class Call:
    """One use of one agent: the very context it saw and what it put out.

    Arrays over the `T` tokens of `out`: `author` (an `Author` each), `logp_raw` (log-probability at
    temperature 1) and `logp_sampled` (under `law`), both nan where the author is not SELF, and
    `weight` (0 keeps a token out of every loss). `pos` and `branch` override positions and attention
    branches, over context and out together; None means plain left to right.
    """

    agent: str
    context: Ids
    out: Ids
    author: NDArray[np.int8]
    logp_raw: Floats
    logp_sampled: Floats
    law: Law = RAW
    weight: Floats | None = None  # None: 1 for SELF tokens, 0 for the rest
    stop: str = "stop"  # "stop" | "length" | "hook" | "context"
    tags: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    pos: Ids | None = None
    branch: Ids | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.out), len(self.author), len(self.logp_raw), len(self.logp_sampled)}
        if self.weight is not None:
            sizes.add(len(self.weight))
        if len(sizes) != 1:
            raise ValueError(f"a call's per-token arrays differ in length: {sorted(sizes)}")
        whole = len(self.context) + len(self.out)
        for override in (self.pos, self.branch):
            if override is not None and len(override) != whole:
                raise ValueError(f"{len(override)} positions or branches for context and output of {whole} tokens")

    @property
    def weights(self) -> Floats:
        """f32[T]: the loss weight of each token of `out`."""
        if self.weight is not None:
            return self.weight
        return (self.author == Author.SELF).astype(np.float32)


def given_call(agent: str, context: Sequence[int] | Ids, out: Sequence[int] | Ids, **kwargs: Any) -> Call:
    """A call whose output was demonstrated, not sampled: SELF tokens without log-probabilities."""
    n = len(out)
    nan = np.full(n, np.nan, np.float32)
    return Call(
        agent,
        np.asarray(context, np.int32),
        np.asarray(out, np.int32),
        np.full(n, Author.SELF, np.int8),
        nan,
        nan,
        **kwargs,
    )


@dataclass(frozen=True)
class StepInfo:
    """What a world said of one step. `call` is the index of the call that acted."""

    reward: float = 0.0
    valid: bool = True
    events: tuple[str, ...] = ()
    correct: bool | None = None
    terminated: bool = False
    truncated: bool = False
    call: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a trajectory ended. `correct` is the verifier's word (None: it has none to say).

    Rules such as "all failed" read `correct`, never the reward, which may hold shaping. `parts` are
    named contributions, logged one by one. `per_call` is f32[K], a reward for each call.
    """

    reward: float
    correct: bool | None = None
    parsed: str | None = None
    parts: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    per_call: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A list of calls and world steps that answers one problem.

    A fork names its `parent` (trajectory, call, token): its first call's context holds the shared
    text, so no action is held twice.
    """

    problem: Problem
    calls: tuple[Call, ...]
    steps: tuple[StepInfo, ...] = ()
    outcome: Outcome | None = None
    parent: tuple[Trajectory, int, int] | None = None
    member: int = 0
    text: str = ""  # what a verifier reads: the final answer, decoded once
    tags: Mapping[str, Any] = field(default_factory=lambda: NOTHING)

    @property
    def reward(self) -> float:
        """The outcome's reward. Raises ValueError before feedback has run."""
        if self.outcome is None:
            raise ValueError(f"problem {self.problem.id}: this trajectory has no outcome yet")
        return self.outcome.reward

    @property
    def correct(self) -> bool:
        """Whether the verifier said yes."""
        return self.outcome is not None and bool(self.outcome.correct)

    def tokens(self, agent: str | None = None) -> int:
        """How many tokens the agents (or one of them) chose."""
        return sum(int((c.author == Author.SELF).sum()) for c in self.calls if agent is None or c.agent == agent)

    def judged(self, outcome: Outcome) -> Trajectory:
        """The same trajectory with its outcome."""
        return replace(self, outcome=outcome)


@dataclass(frozen=True, eq=False)
class Group:
    """All members for one problem. `discarded` holds attempts that were made but not kept."""

    problem: Problem
    members: tuple[Trajectory, ...]
    discarded: tuple[Trajectory, ...] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rewards(self) -> NDArray[np.float64]:
        """f64[G]."""
        return np.array([m.reward for m in self.members])

    @property
    def solved(self) -> float:
        """Share of members that the verifier calls correct."""
        return float(np.mean([m.correct for m in self.members])) if self.members else 0.0

    @property
    def failed(self) -> bool:
        """Whether the verifier said no to every member; False where it had no word on one, and for no members."""
        verdicts = [m.outcome.correct if m.outcome else None for m in self.members]
        return bool(verdicts) and all(v is not None and not v for v in verdicts)
