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

Answers are sampled at temperature 1: greedy ones show the likeliest of the levels, not the mixture.

Adds to the shared parts: which level is drawn, and what a row is at that level. Departures: a decoder with the prompt
masked instead of an encoder-decoder; levels build on one another as in the paper's text (in the authors' code for mazes
level 3 keeps costs, and its rate is drawn from 10 to 40%); sizes and learning rate are for a laptop. The claim is about
few mazes, where traces regularise. With more mazes it needs more updates than complete traces do: after the claim's
2,000 on 1,000 mazes, seen once, slow plans were optimal in 83%, and in 92% for complete traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from etude.acting.modes import Moded
from etude.curation.examples import Visited
from etude.curation.traces import FINAL, Grammar, Trace, joined, levels, parse, segments
from etude.experience.batch import Batch, By
from etude.experience.claims import Arm, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Tokenizer, World
from etude.experience.rows import Row, example
from etude.experience.types import Ids
from etude.learning.demonstrations import demonstrated
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.nll import NLL

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
    """

    tokenizer: Tokenizer
    law: Sequence[float]
    clause_drop: float
    scattered: bool = False

    def __call__(self, shown: Traced, keys: Keys) -> Row:
        law = np.asarray(self.law)
        level = int(keys.at("level").numpy().choice(5, p=law / law.sum()))
        left = levels(self.clause_drop)[level](shown.trace, keys.at("drop"))
        out, plan = (ids(self.tokenizer, t) for t in (left, tuple(c for c in left if c.tag in FINAL)))
        kept = len(out) - len(plan)
        if self.scattered:
            searched = ids(self.tokenizer, shown.trace)[: -len(plan)]
            places = keys.at("scatter").numpy().permutation(len(searched))[:kept]
            out = np.concatenate([searched[np.sort(places)], plan])
        bare = float(kept == 0 and level < 4)
        return example(shown.prompt, out, level=float(level), kept=float(kept), bare=bare)


def ids(tokenizer: Tokenizer, trace: Trace) -> Ids:
    """int32[T] tokens that are taught: of the clauses' text, and eos."""
    return tokenizer.completion(joined(trace))


def train(s: Setting, config: Dualformer) -> None:
    """One `fit` over demonstrations whose traces are dropped anew at every visit."""
    if "modes" in s.world.problem("test", 0).meta:
        s.views |= {"fast": Moded("fast"), "slow": Moded("slow")}
    shown, skipped = traced(s, config)
    if config.control == "other":
        shown = exchanged(shown)
    row = Randomised(s.policy.tokenizer, config.law, config.clause_drop, config.control == "scattered")
    draw = examples(Visited(shown, row), config.batch, s.run)

    def source(clock: Clock, keys: Keys) -> Batch:
        batch = draw(clock, keys)
        drawn = {name: batch.row[name] for name in ("level", "kept", "bare")}
        means = {name: float(column.mean()) for name, column in drawn.items() if isinstance(column, Tensor)}
        s.run.log({**means, **({"skipped": float(skipped)} if clock.step == 0 else {})})
        return batch

    seat = Seat(s.policy, config.optim, config.steps)
    fit(s.run, seat, source, NLL(), config.steps, by=config.normalise, watch=s.watch)


def traced(s: Setting, config: Dualformer) -> tuple[list[Traced], int]:
    """The demonstrations of a file or of the world's oracle, and how many were skipped as not of the form. Raises
    UserError where none is, and for one that is longer than the policy's context."""
    grammar, tokenizer = grammar_of(s.world), s.policy.tokenizer
    shown = demonstrated(s, config.data, config.columns, config.demonstrations, config.style)
    found = []
    for prompt, text in shown:
        trace = parse(text, grammar)
        if trace is None:
            continue
        found.append(Traced(tokenizer.prompt(prompt), trace))
        length = len(found[-1].prompt) + len(ids(tokenizer, trace))
        if length > s.policy.limit:
            raise UserError(
                f"a demonstration of {length} tokens is longer than the policy's context of {s.policy.limit}: "
                f"{text!r:.60}"
            )
    if not found:
        raise UserError(f"no demonstration is a trace that ends in a plan or an answer: {shown[-1][1]!r:.60}")
    return found, len(shown) - len(found)


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
SHORTER = 4 / 3  # a quarter fewer tokens

CLAIM = Claim(
    says="Taught on 200 mazes with as many updates, a model that saw randomly dropped traces searches in fewer tokens "
    "than one that saw complete traces, with plans no worse, both when asked to be slow and when left alone; asked to "
    "be fast, its plans are better than those of a model that saw plans alone. Traces of other mazes, as many tokens "
    "dropped at random places, and, for fast plans, no examples without a trace make worse plans.",
    arms=(
        Arm("dualformer", "dualformer", {"law": LAW}),
        Arm("complete-trace", "dualformer", {"law": (1.0, 0.0, 0.0, 0.0, 0.0)}, role="baseline"),
        Arm("solution-only", "dualformer", {"law": (0.0, 0.0, 0.0, 0.0, 1.0)}, role="baseline"),
        Arm("other-traces", "dualformer", {"law": LAW, "control": "other"}, role="ablation"),
        Arm("scattered", "dualformer", {"law": LAW, "control": "scattered"}, role="ablation"),
    ),
    world="grid_maze",
    world_options={"n": 3, "least": 2},
    policy="tiny:width=64,depth=3,heads=4,ffn=192",
    options={
        "steps": 2000,
        "batch": 16,
        "demonstrations": 200,
        "optim": {"beta2": 0.98, "schedule": "wsd"},
        "max_tokens": 80,
        "eval_every": 0,
        "eval_problems": 400,
    },
    metrics={
        "slow": Metric("evaluation", "slow/part/optimal", unit="%"),
        "fast": Metric("evaluation", "fast/part/optimal", unit="%"),
        "auto": Metric("evaluation", "part/optimal", unit="%"),
        "trace": Metric("evaluation", "slow/part/trace", better="lower", unit="tokens"),
        "auto-trace": Metric("evaluation", "part/trace", better="lower", unit="tokens"),
        "trained": Metric("cost", "trained", better="lower", unit="tokens"),
    },
    tune="auto",
    grid=(1.5e-3, 3e-3),
    endpoints=(
        Endpoint("shorter traces", "effect", "trace", ("dualformer", "complete-trace"), SHORTER, ratio=True),
        Endpoint("plans when slow", "guard", "slow", ("dualformer", "complete-trace"), 0.02),
        Endpoint("shorter, left alone", "effect", "auto-trace", ("dualformer", "complete-trace"), SHORTER, ratio=True),
        Endpoint("plans, left alone", "guard", "auto", ("dualformer", "complete-trace"), 0.02),
        Endpoint("plans when fast", "effect", "fast", ("dualformer", "solution-only"), 0.05),
        Endpoint("slow, over traces of other mazes", "vanish", "slow", ("dualformer", "other-traces"), 0.05),
        Endpoint("fast, over traces of other mazes", "vanish", "fast", ("dualformer", "other-traces"), 0.05),
        Endpoint("slow, over tokens dropped at random", "vanish", "slow", ("dualformer", "scattered"), 0.05),
        Endpoint("fast, over no examples without trace", "vanish", "fast", ("dualformer", "complete-trace"), 0.05),
    ),
    minutes=2.0,
)

METHOD = Method("dualformer", Dualformer, train, start="random", claim=CLAIM)
