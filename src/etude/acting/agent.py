"""A policy that others may use: the engine with a name, a law and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from etude.acting.engine import generate
from etude.acting.fill import Filler
from etude.acting.hooks import Hook
from etude.acting.wave import Processor
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Acting, Agent, Clock, Limits, Policy, Roles, Score, Tokenizer
from etude.experience.types import GREEDY, RAW, Call, Group, Ids, Law, Problem


class PolicyAgent:
    """Fulfils `experience.protocols.Agent`. Holds no state of its own; `meter` is charged."""

    def __init__(
        self,
        policy: Policy,
        name: str = "actor",
        law: Law = RAW,
        limits: Limits | None = None,
        meter: Meter | None = None,
        hooks: Sequence[Hook] = (),
        processors: Sequence[Processor] = (),
        max_rows: int = 256,
    ) -> None:
        self.policy, self.name, self.tokenizer, self.limit = policy, name, policy.tokenizer, policy.limit
        self.law, self.limits, self.meter = law, limits or Limits(), meter
        self.hooks, self.processors, self.max_rows = tuple(hooks), tuple(processors), max_rows

    def generate(
        self,
        contexts: Sequence[Ids],
        keys: Sequence[Keys],
        limits: Limits | None = None,
        law: Law | None = None,
        hooks: Sequence[Hook] = (),
    ) -> list[Call]:
        """Continues each context; see `engine.generate`, and `fill` for a policy that looks both ways. The agent's own
        limits and law hold where none are given, and its own hooks are asked before `hooks`."""
        if not self.policy.causal:
            return Filler(self).generate(contexts, keys, limits, law, hooks)
        return generate(
            self.policy,
            contexts,
            keys,
            limits or self.limits,
            law or self.law,
            (*self.hooks, *hooks),
            self.processors,
            self.meter,
            self.name,
            self.max_rows,
        )


@dataclass(frozen=True)
class Under:
    """An agent under another law than its own, with hooks that are asked before others."""

    agent: Agent
    law: Law | None = None
    hooks: tuple[Hook, ...] = ()

    @property
    def name(self) -> str:
        """As the agent's, and so in what follows."""
        return self.agent.name

    @property
    def tokenizer(self) -> Tokenizer:
        return self.agent.tokenizer

    @property
    def limit(self) -> int:
        return self.agent.limit

    def generate(
        self,
        contexts: Sequence[Ids],
        keys: Sequence[Keys],
        limits: Limits | None = None,
        law: Law | None = None,
        hooks: Sequence[Hook] = (),
    ) -> list[Call]:
        return self.agent.generate(contexts, keys, limits, law or self.law, (*self.hooks, *hooks))


def greedily(act: Acting) -> Acting:
    """The strategy with every role taking its likeliest token."""

    def greedy(
        roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        return act({name: Under(agent, GREEDY) for name, agent in roles.items()}, problems, n, score, clock, keys)

    return greedy
