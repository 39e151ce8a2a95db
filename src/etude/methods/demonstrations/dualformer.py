"""Dualformer: randomised, structured dropping of reasoning traces (arXiv 2410.09918, section 4).

Problem: a model taught on search traces with their plans is accurate but slow, and one taught on plans alone is fast
but poor. Idea: teach one model on both and on everything between. An example is a prompt x, a trace r and a plan s; the
loss is next-token cross-entropy on the target alone,

    y = (r', s, eos),    L = - sum_t log pi(y_t | x, y_<t) / number of target tokens in the batch,

where r' is what is left of r at a level drawn from a categorical law (p0 .. p4), anew at every visit of the example:

    level 0   the complete trace
    level 1   without the clauses that close a node
    level 2   level 1, and the clauses that create a node without their costs
    level 3   level 2, and each clause that is left dropped with probability `clause_drop`
    level 4   no trace

Like short cuts that people take, what is missing has to be bridged within the model: traces get shorter, and plans
better also without one. With p0 = 1 it is Searchformer, with p4 = 1 learning from solutions alone. How it answers is
chosen by the first token alone: forced to be that of a plan it answers fast, forced to be that of a trace slowly, and
left alone ("auto") as it likes; these are the acting plugs `fast` and `slow`.

A chain of thought has no clauses to close and no costs. Of the levels only 3 and 4 change it, so that the law
(0, 0, 0, 1, 0) is the paper's recipe for mathematics (section 5.3): each step is dropped with one probability, the
answer never. Its first token says nothing of the mode, so that it is only looked at as it likes to answer.

Adds to the shared parts: which level is drawn, and the modes. Departures: a decoder with the prompt masked instead of
an encoder-decoder; levels build on one another as in the paper's text (in the authors' code for mazes level 3 keeps
costs, and its rate is drawn from 10 to 40%); sizes and learning rate are for a laptop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from etude.acting.hooks import Force, When, Writing
from etude.acting.sample import GIVES, answers
from etude.curation.examples import Visited
from etude.curation.traces import FINAL, Grammar, Trace, joined, levels, parse, segments
from etude.experience.batch import Batch, By
from etude.experience.claims import Arm, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import register
from etude.experience.protocols import Acting, Agent, Clock, Limits, Roles, Score, Tokenizer, World
from etude.experience.rows import Row, example
from etude.experience.types import Call, Group, Ids, Law, Problem, Prompt
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting, named
from etude.methods.method import Method
from etude.objectives.nll import NLL
from etude.worlds.data import load_examples
from etude.worlds.oracles import load_oracle

Mode = Literal["fast", "slow"]
Control = Literal["none", "other", "scattered"]


@dataclass(frozen=True)
class Dualformer:
    """Dualformer's hyperparameters."""

    steps: int = 500  # updates
    batch: int = 64  # demonstrations an update
    law: tuple[float, ...] = (0.45, 1 / 6, 1 / 6, 1 / 6, 0.05)  # p0 .. p4: how often each level is drawn
    clause_drop: float = 0.3  # level 3: probability with which a clause, or a step, is dropped
    control: Control = "none"  # other: traces of other problems; scattered: as many tokens dropped, at random places
    data: str | None = None  # .jsonl or .parquet; None: the world's oracle demonstrates
    columns: tuple[str, ...] = ()  # ours=theirs, e.g. prompt=question
    demonstrations: int = 4000  # how many the oracle writes, one of each problem
    style: str = "plain"  # of the oracle's demonstrations: one that shows the trace
    normalise: By = "token"  # what the loss is a mean over
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, schedule="cosine", warmup=0.05))

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "demonstrations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self.law) != 5 or not (min(self.law) >= 0 and abs(sum(self.law) - 1) <= 1e-3):
            raise UserError(f"law must be five shares that sum to 1, one a level, not {list(self.law)}")
        if not 0 <= self.clause_drop <= 1:
            raise UserError(f"clause_drop is a probability, from 0 to 1, not {self.clause_drop}")
        if self.control not in ("none", "other", "scattered"):
            raise UserError(f"control must be none, other or scattered, not {self.control!r}")


@dataclass(frozen=True)
class Traced:
    """A demonstration: int32 tokens of the prompt, and the clauses of the completion."""

    prompt: Ids
    trace: Trace


@dataclass(frozen=True)
class Randomised:
    """The row of a demonstration at one visit: a level is drawn, and what it drops is left out.

    Row columns: `level`, `kept` (tokens left of the trace) and `bare` (1 where a level below 4 left none).
    Raises UserError where the whole demonstration is longer than `limit` tokens.
    """

    tokenizer: Tokenizer
    law: Sequence[float]
    clause_drop: float
    limit: int
    scattered: bool = False

    def __call__(self, shown: Traced, keys: Keys) -> Row:
        law = np.asarray(self.law)
        level = int(keys.at("level").numpy().choice(5, p=law / law.sum()))
        left = levels(self.clause_drop)[level](shown.trace, keys.at("drop"))
        whole, out = self._ids(shown.trace), self._ids(left)
        end = len(self._ids(tuple(c for c in left if c.tag in FINAL)))
        kept = len(out) - end
        if self.scattered:
            places = keys.at("scatter").numpy().permutation(len(whole) - end)[:kept]
            out = np.concatenate([whole[np.sort(places)], whole[len(whole) - end :]])
        if len(shown.prompt) + len(whole) > self.limit:
            raise UserError(
                f"a demonstration of {len(shown.prompt) + len(whole)} tokens is longer than the policy's context of "
                f"{self.limit}: {joined(shown.trace)!r:.60}"
            )
        bare = float(kept == 0 and level < 4)
        return example(shown.prompt, out, level=float(level), kept=float(kept), bare=bare)

    def _ids(self, trace: Trace) -> Ids:
        return self.tokenizer.completion(joined(trace))


@dataclass(frozen=True)
class Moded:
    """Answers of the actor whose first tokens are forced to be those with which a plan ("fast") or a trace ("slow")
    begins in the problem's world. Raises UserError for a world whose answers do not tell the two apart."""

    mode: Mode

    def __call__(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        actor = roles["actor"]
        begun = _Begun(actor, [actor.tokenizer.encode(self._beginning(p)) for p in problems for _ in range(n)])
        drawn = answers({**roles, "actor": begun}, problems, n, 1, score, keys)
        return [Group(problem, members) for problem, members in zip(problems, drawn, strict=True)]

    def _beginning(self, problem: Problem) -> str:
        if "modes" not in problem.meta:
            raise UserError(
                f"problem {problem.id}: the first token of an answer does not say whether a trace follows, so it "
                f"cannot be asked for a {self.mode} one: use a world of searches, such as grid_maze"
            )
        return str(problem.meta["modes"][self.mode])


@register("acting", "fast", gives=GIVES)
def fast() -> Acting:
    """Straight to the plan: its first token is forced."""
    return Moded("fast")


@register("acting", "slow", gives=GIVES)
def slow() -> Acting:
    """First a search: the first token of its trace is forced."""
    return Moded("slow")


class _Begun:
    """An agent whose row i must begin with `beginnings[i]`; fulfils `Agent`."""

    def __init__(self, agent: Agent, beginnings: Sequence[Ids]) -> None:
        self.agent, self.beginnings = agent, beginnings
        self.name, self.tokenizer, self.limit = agent.name, agent.tokenizer, agent.limit
        self.when = When(counts=frozenset({0}))

    def generate(
        self,
        contexts: Sequence[Ids],
        keys: Sequence[Keys],
        limits: Limits | None = None,
        law: Law | None = None,
        hooks: Sequence[Any] = (),
    ) -> list[Call]:
        return self.agent.generate(contexts, keys, limits, law, (self, *hooks))

    def __call__(self, row: Writing) -> Force:
        return Force(self.beginnings[row.row].tolist())


def train(s: Setting, config: Dualformer) -> None:
    """One `fit` over demonstrations whose traces are dropped anew at every visit."""
    if "modes" in s.world.problem("test", 0).meta:
        s.views |= {"fast": Moded("fast"), "slow": Moded("slow")}
    shown, skipped = traced(s, config)
    if config.control == "other":
        shown = exchanged(shown)
    row = Randomised(s.policy.tokenizer, config.law, config.clause_drop, s.policy.limit, config.control == "scattered")
    draw = examples(Visited(shown, row), config.batch, s.run)

    def source(clock: Clock, keys: Keys) -> Batch:
        batch = draw(clock, keys)
        means = {name: float(batch.row[name].mean()) for name in ("level", "kept", "bare")}  # type: ignore[union-attr]
        s.run.log({**means, **({"skipped": float(skipped)} if clock.step == 0 else {})})
        return batch

    seat = Seat(s.policy, config.optim, config.steps)
    fit(s.run, seat, source, NLL(), config.steps, by=config.normalise, watch=s.watch)


def traced(s: Setting, config: Dualformer) -> tuple[list[Traced], int]:
    """The demonstrations of a file or of the world's oracle, and how many were skipped as not of the form. Raises
    UserError where none is."""
    grammar = grammar_of(s.world)
    found, unread = [], ""
    count = 0
    for prompt, text in from_file(config) if config.data else from_oracle(s, config):
        count += 1
        trace = parse(text, grammar)
        if trace is None:
            unread = text
        else:
            found.append(Traced(s.policy.tokenizer.prompt(prompt), trace))
    if not found:
        raise UserError(f"no demonstration is a trace that ends in a plan or an answer: {unread!r:.60}")
    return found, count - len(found)


def from_file(config: Dualformer) -> list[tuple[Prompt, str]]:
    """(prompt, completion) of each row of a data file."""
    assert config.data is not None
    loaded = load_examples(config.data, "completion", named(config.columns, "column"))
    return [(e.prompt, e.completion) for e in loaded]


def from_oracle(s: Setting, config: Dualformer) -> list[tuple[Prompt, str]]:
    """(prompt, completion) of training problems, as the world's oracle writes them."""
    oracle = load_oracle(s.world)
    if config.style not in oracle.styles:
        raise UserError(f"style must be one of {', '.join(oracle.styles)}, not {config.style!r}")
    problems = [s.world.problem("train", i) for i in range(config.demonstrations)]
    return [(p.prompt, oracle.demonstrate(p, config.style, s.run.keys.at("demonstrate", p.id))) for p in problems]


def grammar_of(world: World) -> Grammar:
    """The world's own grammar of traces, or else that of a chain of thought in its notation."""
    own: Grammar | None = getattr(world, "grammar", None)
    return own or segments(";\n" if getattr(world, "notation", "natural") == "compact" else "\n")


def exchanged(shown: Sequence[Traced]) -> list[Traced]:
    """The same demonstrations, each with the trace of the next: its own prompt and plan, but another's search. Raises
    UserError for one alone."""
    if len(shown) < 2:
        raise UserError("control=other needs at least 2 demonstrations to exchange their traces")
    return [
        Traced(a.prompt, (*(c for c in b.trace if c.tag not in FINAL), *(c for c in a.trace if c.tag in FINAL)))
        for a, b in zip(shown, [*shown[1:], shown[0]], strict=True)
    ]


LAW = (0.35, 0.15, 0.15, 0.15, 0.2)  # fast answers have to be learnt from few steps
DUAL = Arm("dualformer", "dualformer", {"law": LAW})
OTHER = Arm("other-traces", "dualformer", {"law": LAW, "control": "other"}, role="ablation")
MAZES: dict[str, Any] = {
    "world": "grid_maze",
    "world_options": {"n": 4, "least": 3},
    "policy": "tiny:width=64,depth=3,heads=4,ffn=192",
    "options": {
        "steps": 2000,
        "batch": 16,
        "demonstrations": 1000,
        "optim": {"beta2": 0.98},
        "max_tokens": 120,
        "eval_every": 0,
        "eval_problems": 400,
    },
    "metrics": {
        "slow": Metric("evaluation", "slow/part/optimal", unit="%"),
        "fast": Metric("evaluation", "fast/part/optimal", unit="%"),
        "auto": Metric("evaluation", "part/optimal", unit="%"),
        "trace": Metric("evaluation", "slow/part/trace", better="lower", unit="tokens"),
        "auto-trace": Metric("evaluation", "part/trace", better="lower", unit="tokens"),
        "trained": Metric("cost", "trained", better="lower", unit="tokens"),
    },
    "tune": "auto",
    "grid": (1.5e-3, 3e-3),
}

CLAIM = Claim(
    says="After as many updates, a model taught on randomly dropped traces searches in fewer tokens than one taught on "
    "complete traces, and its plans are no worse, asked to be slow or left alone; not so with traces of other mazes, "
    "or with as many tokens dropped at random places.",
    arms=(
        DUAL,
        Arm("complete-trace", "dualformer", {"law": (1.0, 0.0, 0.0, 0.0, 0.0)}, role="baseline"),
        OTHER,
        Arm("scattered", "dualformer", {"law": LAW, "control": "scattered"}, role="ablation"),
    ),
    endpoints=(
        Endpoint("shorter traces", "effect", "trace", ("dualformer", "complete-trace"), 4 / 3, ratio=True),
        Endpoint("plans when slow", "guard", "slow", ("dualformer", "complete-trace"), 0.02),
        Endpoint(
            "shorter traces when left alone",
            "effect",
            "auto-trace",
            ("dualformer", "complete-trace"),
            4 / 3,
            ratio=True,
        ),
        Endpoint("plans when left alone", "guard", "auto", ("dualformer", "complete-trace"), 0.02),
        Endpoint("over traces of other mazes", "vanish", "slow", ("dualformer", "other-traces"), 0.05),
        Endpoint("over tokens dropped at random", "vanish", "slow", ("dualformer", "scattered"), 0.05),
    ),
    minutes=3.0,
    **MAZES,
)

FAST = Claim(
    says="After as many updates on few mazes, plans written without a trace are better if the model was also taught on "
    "traces, complete and in parts, than if it was taught on plans alone; not so with traces of other mazes.",
    arms=(
        DUAL,
        Arm("solution-only", "dualformer", {"law": (0.0, 0.0, 0.0, 0.0, 1.0)}, role="baseline"),
        OTHER,
    ),
    endpoints=(
        Endpoint("plans when fast", "effect", "fast", ("dualformer", "solution-only"), 0.05),
        Endpoint("over traces of other mazes", "vanish", "fast", ("dualformer", "other-traces"), 0.05),
    ),
    minutes=1.5,
    **MAZES,
)

METHOD = Method("dualformer", Dualformer, train, start="random", claim=CLAIM, more={"fast": FAST})
