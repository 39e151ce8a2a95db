"""Judges of two answers: a world's own preference, a policy that is asked or scored, an endpoint.

A judge gets items (context, a, b, extra) and returns a `Verdict` for each. Those of this file but `Fair` see a pair in
one order; `Fair` asks in both, remembers, and charges. Nothing here lets a reply that cannot be read count for a side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from json import dumps
from typing import Any, Literal

from etude.experience.endpoint import Endpoint
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.parse import verdict
from etude.experience.protocols import Agent, Judge, Limits, Policy, Score, Verdict
from etude.experience.types import GREEDY, Problem, Prompt
from etude.feedback.score import score as logp_of
from etude.feedback.score import total

Item = tuple[str, str, str, Any]  # context, a, b, extra
Prefer = Callable[[Problem, str, str], float]  # the probability that the first answer beats the second
Name = str | int  # of a pair
Reply = Callable[[Sequence[str]], list[str]]  # what somebody answers to each question

TIE, UNREAD = Verdict(0.5, 0.5), Verdict(0.5, 0.5, parsed=False)
WORDS = ("first", "second", "tie")
VALUES = {"first": 1.0, "second": 0.0, "tie": 0.5}
QUESTION = """Two answers to the same question are shown. Say which of them is better.

Question:
{context}

First answer:
{a}

Second answer:
{b}

Reply with one word, first, second or tie, after "Verdict:".
Verdict:"""


@dataclass(frozen=True)
class Judging:
    """Who compares answers, and how."""

    who: str = "oracle"  # oracle (the world's own preference), a policy's name or folder, or the URL of an endpoint
    by: Literal["reply", "score"] = "reply"  # a policy: asked in words, or by how likely it finds either verdict
    model: str | None = None  # of an endpoint, as it calls it; None: the only one it serves
    noise: float = 0.0  # share of the oracle's verdicts that are turned round
    concurrency: int = 16  # requests to an endpoint that are under way at once
    tokens: int = 16  # longest reply

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 0.5:
            raise UserError(f"a judge's noise lies in [0, 0.5], not at {self.noise}")
        if self.concurrency < 1 or self.tokens < 1:
            raise UserError(f"concurrency and tokens must be at least 1, not {self.concurrency} and {self.tokens}")
        if self.who != "oracle" and self.noise:
            raise UserError(f"noise is an option of the judge oracle, not of {self.who}")
        if self.by == "score" and (self.who == "oracle" or self.url):
            raise UserError(f"by=score is how a policy judges, not {self.who}")
        if self.model is not None and not self.url:
            raise UserError(f"model is an option of an endpoint, not of {self.who}")

    @property
    def url(self) -> bool:
        """Whether it is an endpoint."""
        return self.who.startswith(("http://", "https://"))


@dataclass(frozen=True)
class About:
    """The `extra` of an item: its problem, and what tells this asking from others of the same pair, which a judge that
    draws answers anew (one that is remembered is not asked again)."""

    problem: Problem
    asking: str = ""


@dataclass(frozen=True)
class OracleJudge:
    """Draws verdicts from a known preference, turned round with probability `noise`; what it prefers to neither side
    (probability 1/2) is a tie. A draw is keyed by the problem, the pair and the asking (see `About`), so it does not
    depend on the order of the two."""

    prefer: Prefer
    keys: Keys
    noise: float = 0.0

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """Raises ValueError for an item whose `extra` is no `About`."""
        return [self._one(a, b, about) for _, a, b, about in items]

    def _one(self, a: str, b: str, about: Any) -> Verdict:
        if not isinstance(about, About):
            raise ValueError("an oracle judges problems: give About(problem) with each pair")
        if b < a:
            found = self._one(b, a, about)
            return Verdict(1 - found.value, 1 - found.probability)
        p = self.prefer(about.problem, a, b)
        if p == 0.5:
            return TIE
        p += self.noise * (1 - 2 * p)
        drawn = (
            self.keys.at(about.problem.id, about.asking, a, b).digest() / 2**128
        )  # uniform: one number needs no stream
        return Verdict(float(drawn < p), p)


def by_outcome(score: Score) -> Prefer:
    """The preference of a verifier: the higher reward, and of two right answers the one in fewer steps (lines, or what
    is parted by ";"); anything else is a tie."""

    def prefer(problem: Problem, a: str, b: str) -> float:
        one, other = score(problem, a), score(problem, b)
        if one.reward != other.reward:
            return float(one.reward > other.reward)
        if not (one.correct and other.correct) or steps_in(a) == steps_in(b):
            return 0.5
        return float(steps_in(a) < steps_in(b))

    return prefer


def steps_in(text: str) -> int:
    """How many steps a written solution has."""
    return len([part for part in re.split(r"[;\n]", text) if part.strip()])


@dataclass(frozen=True)
class AskedJudge:
    """Somebody who replies in words: the verdict is the word of `WORDS` that the reply gives (see `parse.verdict`). A
    reply that gives none, or several, is not parsed."""

    reply: Reply
    question: str = QUESTION

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """All items are asked at once."""
        replies = self.reply([self.question.format(context=c, a=a, b=b) for c, a, b, _ in items])
        return [self._read(text) for text in replies]

    def _read(self, text: str) -> Verdict:
        found = verdict(text, WORDS)
        if not found.ok:
            return UNREAD
        value = VALUES[found.last("verdict")]
        return Verdict(value, value)


@dataclass(frozen=True)
class ScoredJudge:
    """A policy that is not asked but scored: probability(a) = p(first) / (p(first) + p(second)) as its next words."""

    policy: Policy
    question: str = QUESTION

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """Raises UserError for a pair that is longer than the policy's context."""
        tokenizer = self.policy.tokenizer
        words = [tokenizer.encode(word) for word in WORDS[:2]]
        contexts = [tokenizer.prompt(self.question.format(context=c, a=a, b=b)) for c, a, b, _ in items]
        longest = max(map(len, contexts), default=0) + max(map(len, words))
        if longest > self.policy.limit:
            raise UserError(f"the judge's context holds {self.policy.limit} tokens, and a question to it has {longest}")
        logp = logp_of(self.policy, [c for c in contexts for _ in words], words * len(contexts))
        sums = [total(part) for part in logp]
        found = []
        for first, second in zip(sums[::2], sums[1::2], strict=True):
            p = 1 / (1 + math.exp(min(700.0, second - first)))
            found.append(Verdict(0.5 if first == second else float(first > second), p))
        return found


def policy_replies(agent: Agent, keys: Keys, limits: Limits) -> Reply:
    """The agent's greedy replies."""

    def reply(questions: Sequence[str]) -> list[str]:
        contexts = [agent.tokenizer.prompt(q) for q in questions]
        calls = agent.generate(contexts, [keys.at(i) for i in range(len(contexts))], limits, GREEDY)
        return [agent.tokenizer.decode([t for t in c.out.tolist() if t not in agent.tokenizer.stops]) for c in calls]

    return reply


def endpoint_replies(endpoint: Endpoint, model: str, tokens: int, concurrency: int) -> Reply:
    """What an OpenAI-compatible chat endpoint replies at temperature 0; "" where an answer holds no text.

    Raises UserError, in one line, where it cannot be reached or refuses.
    """

    def reply(questions: Sequence[str]) -> list[str]:
        bodies = [
            {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0.0,
                "max_tokens": tokens,
            }
            for question in questions
        ]
        return [_content(answer) for answer in endpoint.ask("/v1/chat/completions", bodies, concurrency)]

    return reply


def _content(answer: Any) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


class Fair:
    """`judge` without its liking for a position: every pair is asked about in both orders (unless it sees none:
    `both` false) and the verdicts are averaged, so that two that contradict each other are a tie. One that was not
    parsed in either order is a tie and is counted in `unparsed`. Two equal answers tie unasked.

    What was asked before is remembered, unless `remember` is false. Charges `judge`, each order a call. State for a run
    to track.
    """

    def __init__(self, judge: Judge, meter: Meter | None = None, both: bool = True, remember: bool = True) -> None:
        self.judge, self.meter, self.both, self.remember = judge, meter, both, remember
        self.seen: dict[Name, Verdict] = {}
        self.unparsed = 0

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict for each, of a against b."""
        names = [_name(item) if self.remember else i for i, item in enumerate(items)]
        todo: dict[Name, Item] = {}
        for name, (context, a, b, extra) in zip(names, items, strict=True):
            if a != b and name not in self.seen:
                todo[name] = (context, min(a, b), max(a, b), extra)
        found = dict(zip(todo, self._ask(list(todo.values())), strict=True))
        if self.remember:
            self.seen |= found
            found = self.seen
        verdicts = []
        for name, (_, a, b, _) in zip(names, items, strict=True):
            verdicts.append(TIE if a == b else found[name] if a < b else turned(found[name]))
        return verdicts

    def _ask(self, items: list[Item]) -> list[Verdict]:
        if not items:
            return []
        asked = [*items, *((c, b, a, extra) for c, a, b, extra in items)] if self.both else items
        said = self.judge(asked)
        if self.meter is not None:
            self.meter.charge("judge", len(asked))
        other = map(turned, said[len(items) :]) if self.both else said
        found = [_mean(one, two) for one, two in zip(said, other, strict=False)]
        self.unparsed += sum(not v.parsed for v in found)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {name: list(v) for name, v in self.seen.items()}, "unparsed": self.unparsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = {name: Verdict(*v) for name, v in state["seen"].items()}
        self.unparsed = state["unparsed"]


def turned(v: Verdict) -> Verdict:
    """The verdict on b against a."""
    return Verdict(1 - v.value, 1 - v.probability, v.parsed)


def _mean(one: Verdict, two: Verdict) -> Verdict:
    if not (one.parsed and two.parsed):
        return UNREAD
    return Verdict((one.value + two.value) / 2, (one.probability + two.probability) / 2)


def _name(item: Item) -> str:
    """Of a pair, whichever answer comes first."""
    context, a, b, _ = item
    return blake2b(dumps((context, min(a, b), max(a, b))).encode(), digest_size=12).hexdigest()


def text_of(prompt: Prompt) -> str:
    """A prompt as a judge reads it; of a chat, each message under its role."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
