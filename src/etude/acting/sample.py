"""One-call strategies: plain samples, and the best of several.

The stream of a call is keys / problem / how often the problem came before / member / call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import register
from etude.experience.protocols import Acting, Agent, Clock, Roles, Score
from etude.experience.types import Call, Group, Problem, Trajectory

GIVES = ("group", "correct", "logp_old")


def sample(roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys) -> list[Group]:
    """`n` answers of the actor to each problem, scored."""
    return [Group(p, members) for p, members in zip(problems, answers(roles, problems, n, 1, score, keys), strict=True)]


@register("acting", "sample", gives=GIVES)
def plain() -> Acting:
    """Independent samples of the actor."""
    return sample


@register("acting", "best-of-n", gives=GIVES, law="tilted")
@dataclass(frozen=True)
class BestOfN:
    """Each member is the one that the scorer likes best (the first among equals) of `candidates`
    samples; the others are kept as discarded. What is selected no longer follows the law it was drawn
    from, and says so. The first candidate is what `sample` would have drawn."""

    candidates: int = 4

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise UserError(f"best-of-n needs at least 1 candidate, not {self.candidates}")

    def __call__(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        groups = []
        for problem, drawn in zip(problems, answers(roles, problems, n, self.candidates, score, keys), strict=True):
            members, rest = [], []
            for m in range(n):
                pool = drawn[m * self.candidates : (m + 1) * self.candidates]
                best = max(pool, key=lambda t: t.reward)
                members.append(replace(best, calls=tuple(self._tilted(c) for c in best.calls)))
                rest += [t for t in pool if t is not best]
            groups.append(Group(problem, tuple(members), tuple(rest)))
        return groups

    def _tilted(self, call: Call) -> Call:
        return replace(call, law=replace(call.law, tilt=(*call.law.tilt, f"best-of-{self.candidates}")))


def answers(
    roles: Roles, problems: Sequence[Problem], n: int, candidates: int, score: Score, keys: Keys
) -> list[tuple[Trajectory, ...]]:
    """For each problem `n` x `candidates` scored one-call trajectories of the actor, candidates of
    a member together. All are sampled in one batch."""
    actor = roles["actor"]
    before: Counter[str] = Counter()
    contexts, streams = [], []
    for problem in problems:
        context = actor.tokenizer.prompt(problem.prompt)
        node = keys.at(problem.id, before[problem.id])
        before[problem.id] += 1
        contexts += [context] * (n * candidates)
        streams += [node.at(m, c) for m in range(n) for c in range(candidates)]
    calls = iter(actor.generate(contexts, streams))
    groups = []
    for problem in problems:
        drawn = []
        for i in range(n * candidates):
            call = next(calls)
            text = said(actor, call)
            drawn.append(Trajectory(problem, (call,), outcome=score(problem, text), member=i // candidates, text=text))
        groups.append(tuple(drawn))
    return groups


def said(agent: Agent, call: Call) -> str:
    """The call's text, without the stop token that ends it."""
    out = call.out.tolist()
    if out and out[-1] in agent.tokenizer.stops:
        out.pop()
    return agent.tokenizer.decode(out)
