"""Where stages meet that may not import one another. Everything here is structural.

Shapes: `R` rows in the engine, `V` vocabulary, `N` packed actions, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from etude.experience.keys import Keys
from etude.experience.types import Call, Group, Ids, Law, Message, Outcome, Problem, Prompt, Trajectory

if TYPE_CHECKING:
    import gymnasium
    import torch
    from torch import Tensor

    from etude.experience.batch import Batch


# --- state ---------------------------------------------------------------------------------------


class Stateful(Protocol):
    """Whatever a checkpoint must hold. States are made of tensors, arrays, numbers, strings,
    lists and dicts: nothing is pickled."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Clock:
    """Where a loop stands: `step` of `total` steps (0-based), in a named stage, and the share `spent` of
    the run's budget where it has one."""

    step: int
    total: int
    stage: str = "main"
    spent: float = 0.0

    @property
    def progress(self) -> float:
        """Share of the loop that is over, by steps or by budget, whichever is further: 0 at the first step
        and 1 after the last."""
        return max(self.step / self.total if self.total else 1.0, self.spent)


# --- worlds --------------------------------------------------------------------------------------


@runtime_checkable
class World(Protocol):
    """A task or environment. `problem` is a pure function of its arguments; problems of different
    splits ("train", "test") never coincide."""

    @property
    def name(self) -> str: ...
    @property
    def categories(self) -> tuple[str, ...]: ...

    def size(self, split: str) -> int | None:
        """How many problems a split has; None: as many as you like."""
        ...

    def problem(self, split: str, index: int, category: str | None = None) -> Problem: ...

    def score(self, problem: Problem, text: str) -> Outcome:
        """Judges a final answer. Text that does not parse is scored, never raised on."""
        ...


@runtime_checkable
class Interactive(World, Protocol):
    """A world of many turns."""

    def env(self, problem: Problem) -> gymnasium.Env[str, str]:
        """A text environment: observations and actions are strings; `info` may hold `correct`,
        `valid`, `events`, `admissible`. Environments with `snapshot() -> bytes` and
        `restore(bytes)` can be branched from."""
        ...


@runtime_checkable
class Preferring(World, Protocol):
    """A world that knows which of two answers is better: `prefer` is the probability in [0, 1] that a beats b."""

    def prefer(self, problem: Problem, a: str, b: str) -> float: ...


@runtime_checkable
class Game(Preferring, Protocol):
    """A world whose answers to a problem can be counted: a finite symmetric game between two who answer."""

    def responses(self, problem: Problem) -> tuple[str, ...]:
        """All answers that count as one; whatever else is written is the same bad answer."""
        ...


class Oracle(Protocol):
    """What knows the answer to a world's problems, step by step."""

    def solve(self, problem: Problem) -> tuple[tuple[str, ...], str]:
        """(steps, answer)."""
        ...

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether `step` rightly follows `steps`."""
        ...

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """Tiers of hints, from abstract to concrete; the answer itself is in none."""
        ...

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """A completion a learner could imitate, in one of `styles`."""
        ...

    @property
    def styles(self) -> tuple[str, ...]: ...


Score = Callable[[Problem, str], Outcome]
Reward = Callable[..., Sequence[float]]  # f(prompts, completions, **columns), TRL's signature


# --- policies ------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """Text to ids and back. `stops` are the ids that end a turn; `mask` hides a token from a policy that looks both
    ways (None: there is none)."""

    size: int
    pad: int
    stops: frozenset[int]
    notation: str  # the world notation this tokenizer is made for: "compact" or "natural"

    @property
    def mask(self) -> int | None: ...

    def encode(self, text: str) -> Ids: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def prompt(self, prompt: Prompt) -> Ids:
        """The context in which to answer: start token, chat template, generation prompt."""
        ...

    def completion(self, text: str) -> Ids:
        """A whole answer, with the token that ends it."""
        ...

    def observation(self, text: str) -> Ids:
        """What a world says between two turns, with the prompt for the next turn."""
        ...


class Decoder(Protocol):
    """A policy's incremental state for `R` rows. The engine is its only caller."""

    def prefill(self, contexts: Sequence[Ids], room: int) -> Tensor:
        """f32[R, V]: logits after each context; every row may grow by `room` tokens."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """int64[R] -> f32[R, V]: appends one token a row."""
        ...

    def select(self, rows: Tensor) -> None:
        """int64[R']: keeps, drops, reorders or repeats rows."""
        ...

    def rewind(self, lengths: Tensor) -> None:
        """int64[R]: cuts each row back to that many tokens."""
        ...


class Outputs(Protocol):
    """What `Policy.forward` computed: of the fields, only those asked for."""

    logp: Tensor  # f32[N] at temperature 1
    entropy: Tensor  # f32[N], nats
    hidden: Tensor  # f32[N, D]
    values: Tensor  # f32[N]
    aux: dict[str, Tensor]

    def map_logits(self, f: Callable[..., Any]) -> Any:
        """Applies `f(logits f32[n, V], slice) -> Tensor [n, ...] (or a tuple of them)` chunk by
        chunk and concatenates. Never more than one chunk of logits is alive, forward or backward."""
        ...

    def logits(self, part: slice) -> Tensor:
        """f32[n, V]: the logits of some actions. The caller keeps no more than one chunk alive; a
        loss that compares two policies calls this on one inside `map_logits` of the other."""
        ...


class Policy(Protocol):
    """What acts and learns. Only the policy family knows how to give `logp` for an action."""

    tokenizer: Tokenizer
    limit: int  # longest sequence, in tokens
    token_bytes: int  # memory that a token of a training step holds until the backward pass, about

    @property
    def device(self) -> torch.device: ...

    @property
    def causal(self) -> bool:
        """Whether a token sees only what is before it."""
        ...

    def forward(self, batch: Batch, needs: frozenset[str]) -> Outputs: ...
    def logp(self, batch: Batch) -> Tensor:
        """f32[N] at temperature 1, without gradient."""
        ...

    def decoder(self) -> Decoder: ...
    def fingerprint(self) -> str:
        """Changes whenever the policy would act otherwise: weights, adapters, taps."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


# --- acting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """When a continuation ends. `stop` strings are looked for in the text that is written."""

    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()  # besides the tokenizer's own stops


class Agent(Protocol):
    """A policy as others may use it: continues prefixes of its own tokens."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def limit(self) -> int:
        """Longest context and output together, in tokens."""
        ...

    def generate(
        self,
        contexts: Sequence[Ids],
        keys: Sequence[Keys],
        limits: Limits | None = None,
        law: Law | None = None,
        hooks: Sequence[Any] = (),
    ) -> list[Call]: ...


Roles = Mapping[str, Agent]


class Acting(Protocol):
    """A strategy: how roles are used on problems. It sees whole groups, and may score."""

    def __call__(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]: ...


# --- feedback, curation, objectives --------------------------------------------------------------


class Teacher(Protocol):
    """Someone to ask: an endpoint, a policy, or a world's own oracle."""

    def reply(self, messages: Sequence[Message], about: Problem | None = None) -> str: ...


class Verdict(NamedTuple):
    """A judge's word on a against b: `value` is 1 (a is better), 0 (b is) or what lies between (1/2: a tie),
    `probability` how likely it holds a to be the better one. A verdict that was not `parsed` is a tie."""

    value: float
    probability: float
    parsed: bool = True


class Judge(Protocol):
    """`items` are (context, a, b, extra), with what the judge may need besides the texts in `extra`."""

    def __call__(self, items: Sequence[tuple[str, str, str, Any]]) -> list[Verdict]: ...


class Critic(Protocol):
    """Values of states."""

    def values(self, batch: Batch) -> Tensor: ...


class Credit(Protocol):
    """Writes the action column `advantage` of a batch packed from `groups`."""

    def __call__(self, groups: Sequence[Group], batch: Batch) -> Batch: ...


class Select(Protocol):
    """Says which drawn groups to train on."""

    def __call__(self, group: Group) -> bool: ...


@dataclass
class Loss:
    """A summed loss over a (micro-)batch and metrics as (sum, count), so that they add up exactly."""

    total: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


class Objective(Protocol):
    """Two halves: `prepare` may draw, search or run frozen forwards; `loss` is pure."""

    @property
    def needs(self) -> frozenset[str]:
        """What the forward pass must compute: logp, entropy, logits, hidden, values."""
        ...

    def prepare(self, policy: Policy, batch: Batch, keys: Keys) -> Batch: ...
    def loss(self, out: Outputs, batch: Batch) -> Loss: ...


# --- curricula, audits ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a curriculum hears after a step: every drawn group, in order, kept or not, with the mean over
    its members of their mean absolute advantage over tokens (0 where the group was not kept)."""

    clock: Clock
    groups: Sequence[Group]
    kept: Sequence[bool]
    gain: Sequence[float]
    evaluations: Mapping[str, float] = field(default_factory=dict)


class Curriculum(Stateful, Protocol):
    """What to learn next."""

    def draw(self, n: int, clock: Clock, keys: Keys) -> list[Problem]: ...
    def observe(self, report: Report) -> None: ...


class Listener(Stateful, Protocol):
    """Whatever else must hear what came of every step."""

    def observe(self, report: Report) -> None: ...


class Schedule(Protocol):
    """A number that changes with the clock: KL weight, hint rate, discount, mixture."""

    def __call__(self, clock: Clock) -> float: ...


class Probe(Protocol):
    """Measures a policy on streams of its own and writes nothing."""

    def __call__(self, policy: Policy, keys: Keys) -> float: ...


class Gate(Protocol):
    """Decides whether to act, ask or abstain, and learns from what came of it."""

    def __call__(self, call: Call) -> bool: ...
    def observe(self, call: Call, outcome: Outcome) -> None: ...


Place = Callable[[Trajectory, Outcome], Any]  # f32[T], a reward for each of the trajectory's tokens
Segmenter = Callable[[Sequence[int]], list[tuple[int, int]]]
Scorer = Callable[[Sequence[Ids], Sequence[Ids]], list[Any]]
