"""Delta learning: preferences between two weak sources of answers (arXiv 2507.06187, sections 2 to 6).

Problem: preference tuning is fed by answers of stronger models, or by a strong judge. Idea: two answers that are both
worse than the model still show which way is better. Imitating the better one pulls the model down to it; a preference
loss sees only their difference, in which what they share, common faults included, cancels, and the model moves along
the direction of quality, beyond both.

A weak source W (a small model) and a weaker one w (smaller still, of the same family) answer the same prompts x. The
pair is y+ ~ W(x) over y- ~ w(x), by who wrote it and with no judge: single pairs may be the wrong way round, what
counts is the mean difference, the delta. The student pi, stronger than both, learns with length-normalised DPO against
itself as it starts, pi_0:

    h = 1/|y+| sum_t log[pi(y+_t) / pi_0(y+_t)] - 1/|y-| sum_t log[pi(y-_t) / pi_0(y-_t)]       (nats a token)
    L = - mean over pairs log sigmoid(beta h)

over the |y| tokens of an answer and its end, the prompt masked. beta = 5 is large because h is per token. At the start
dL = -(beta/2) x mean of (s+ - s-), s the gradient of an answer's mean log-probability: only the difference of the
sources is left. In logistic regression (section 6) that is ((y+ - y-)/2) x for labels of +-1: nothing where teachers
agree. Errors that the two do not share stay as noise, and the student drifts along the delta for ever, at last for the
worse: one epoch, a small learning rate and early stopping are part of the method.

This file adds the pairs by source: policies, files of completions, or the world's oracle. Pairs with a missing, cut,
empty or over-long side and those of two identical ones are dropped and counted. `objective` "nll" is the paper's
baseline, imitation of W over as many updates; to swap the pairs exchange the sources, for no delta name one twice.
Departures: the weights to keep are chosen by held-back problems (the paper tunes rate and length of training); the
schedule falls to 0 (authors' code: to a tenth); rates and sizes are laptop-sized (code: peak rates of 1e-8 to 5e-7).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from etude.curation.examples import Examples, pairs
from etude.curation.pairing import differing, same_tokens
from etude.experience.batch import Batch
from etude.experience.claims import Arm, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Interactive
from etude.experience.rows import Row
from etude.experience.types import Problem
from etude.learning.best import Best, held_back, validation
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting, named
from etude.learning.sources import ORACLE, Texts, answers, taught
from etude.methods.method import Method
from etude.objectives.nll import NLL
from etude.objectives.pairs import dpo_norm
from etude.objectives.reference import ReferenceCache, with_reference
from etude.worlds.data import load_examples
from etude.worlds.registry import FILES


@dataclass(frozen=True)
class DeltaLearning:
    """Delta learning's hyperparameters."""

    chosen: str = ""  # W: a policy's name or folder, a file of completions, or oracle:STYLE
    rejected: str = ""  # w, in the same three ways
    data: str | None = None  # .jsonl or .parquet of prompt, chosen and rejected, in place of both
    columns: tuple[str, ...] = ()  # ours=theirs, of files
    problems: int = 2000  # prompts, each for one pair (paper: 16k to 150k)
    batch: int = 32  # pairs an update
    epochs: int = 1  # passes over the pairs
    beta: float = 5.0  # how strongly the reference holds, per token
    objective: Literal["dpo-norm", "nll"] = "dpo-norm"  # nll: imitate the chosen answers, over as many updates
    shuffled: bool = False  # control: every pair is turned round with a chance of one half
    validation: int = 256  # held-back training problems that choose the weights to keep; 0: keep the last
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, schedule="cosine", warmup=0.03))

    def __post_init__(self) -> None:
        for name in ("problems", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.beta <= 0 or self.validation < 0:
            raise UserError(f"beta must be above 0 and validation at least 0, not {self.beta} and {self.validation}")
        if self.data and (self.chosen or self.rejected):
            raise UserError("pairs come from --data or from --chosen and --rejected, not from both")
        if bool(self.chosen) < bool(self.rejected) or (
            self.objective == "dpo-norm" and self.chosen and not self.rejected
        ):
            raise UserError("a preference has two sides: name both --chosen and --rejected")
        if self.objective == "nll" and self.shuffled:
            raise UserError("shuffled turns pairs round, and objective=nll learns from none: leave out one of them")

    @property
    def file(self) -> str | None:
        """Where prompts come from that are not the world's."""
        return self.data or next((f for f in (self.chosen, self.rejected) if f.endswith(FILES)), None)


def train(s: Setting, config: DeltaLearning) -> None:
    """Pairs, collected once; one fit on them; then the weights that did best on held-back problems. These are
    evaluated once more: metrics that begin with kept/."""
    if not (config.data or config.chosen):
        raise UserError("say whose answers are preferred to whose: --chosen and --rejected, or --data with pairs")
    if isinstance(s.world, Interactive):
        raise UserError(f"world {s.world.name!r} has many turns, and pairs are of single answers: use another")
    asked = problems(s, config)
    held = held_back(s, config.validation, [p.prompt for p in asked]) if config.validation else []
    found = s.run.stage("collect", lambda: collect(s, config, asked))
    s.run.stage("fit", lambda: learn(s, config, Examples.from_state(found["data"]), found["steps"], held))
    if held:
        of = s.evaluate()
        kept = {f"kept/{name}": estimate for name, estimate in of.metrics.items()}
        s.run.evaluated(replace(of, metrics=kept, categories={}, items={}))


def learn(s: Setting, config: DeltaLearning, data: Examples, steps: int, held: Sequence[Problem]) -> None:
    """The fit. It ends with the weights that did best on the problems `held` back, or its last where there are none."""
    paired = config.objective == "dpo-norm"
    objective = dpo_norm(config.beta) if paired else NLL()
    draw, reference, seen = examples(data, config.batch, s.run), s.reference(), ReferenceCache()
    best, measure = s.run.track("best", Best(s.policy)), validation(s, held)

    def source(clock: Clock, keys: Keys) -> Batch:
        batch = draw(clock, keys)
        return with_reference(batch, reference, seen, meter=s.run.meter) if paired else batch

    def watch(clock: Clock) -> None:
        s.watch(clock)
        if held and s.due(clock):
            score = measure()
            best.hear(score, clock.step)
            s.run.log({"validation": score})

    seat = Seat(s.policy, config.optim, steps)
    fit(s.run, seat, source, objective, steps, by=None if paired else "token", watch=watch)
    if held:
        best.restore()
        s.run.log({"kept_step": best.step})


# --- pairs by source -----------------------------------------------------------------------------


def problems(s: Setting, config: DeltaLearning) -> list[Problem]:
    """What is asked: the prompts of the first file there is, else the world's first training problems, of which a
    finite world keeps those for validation."""
    file = config.file
    if file is None:
        size = s.world.size("train")
        count = config.problems if size is None else min(config.problems, max(1, size - config.validation))
        return [s.world.problem("train", i) for i in range(count)]
    kind: Any = "preference" if config.data else "completion"
    loaded = load_examples(file, kind, named(config.columns, "column"))[: config.problems]
    return [Problem(f"row/{i}", example.prompt) for i, example in enumerate(loaded)]


def both_sides(s: Setting, config: DeltaLearning, asked: Sequence[Problem]) -> tuple[Texts, Texts]:
    """The chosen and the rejected answer to each problem."""
    if config.data:
        loaded = load_examples(config.data, "preference", named(config.columns, "column"))[: len(asked)]
        return [e.chosen for e in loaded], [e.rejected for e in loaded]
    chosen = answers(s, config.chosen, "chosen", asked, config.columns)
    nobody: Texts = [None] * len(asked)
    return chosen, answers(s, config.rejected, "rejected", asked, config.columns) if config.rejected else nobody


def collect(s: Setting, config: DeltaLearning, asked: Sequence[Problem]) -> dict[str, Any]:
    """The examples to learn from, and over how many updates: as many for imitation as for preference. Logs the pairs,
    what was dropped and why, and what the two sources are like. Raises UserError where nothing is left."""
    good, bad = both_sides(s, config, asked)
    chosen, rejected = ([taught(s, p, text) for p, text in zip(asked, of, strict=True)] for of in (good, bad))
    whole: list[tuple[Row, Row]] = []
    dropped = Counter(absent=0, empty=0, long=0)
    for a, b in zip(chosen, rejected, strict=True):
        if isinstance(a, Row) and isinstance(b, Row):
            whole.append((a, b))
        else:
            dropped[a if isinstance(a, str) else str(b)] += 1
    kept, dropped["identical"] = differing(whole, same_tokens)
    s.run.log({"pairs": len(kept), **{f"dropped/{why}": count for why, count in dropped.items()}})
    s.run.log({**described(s, config, asked, good, "chosen"), **described(s, config, asked, bad, "rejected")})
    if config.shuffled:
        turned = s.run.keys.at("shuffled").numpy().random(len(kept)) < 0.5
        kept = [(b, a) if turn else (a, b) for (a, b), turn in zip(kept, turned, strict=True)]
    imitated = [row for row in chosen if isinstance(row, Row)]
    count = len(kept) if config.data or config.rejected else len(imitated)
    if not count:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
        raise UserError(f"none of {len(asked)} prompts has two answers to choose between ({why})")
    data = Examples(imitated) if config.objective == "nll" else pairs(*zip(*kept, strict=True))
    return {"data": data.state_dict(), "steps": max(1, count * config.epochs // config.batch)}


def described(s: Setting, config: DeltaLearning, asked: Sequence[Problem], texts: Texts, role: str) -> dict[str, float]:
    """A source's mean length in characters and, where the problems are the world's, its mean reward."""
    given = [(p, text) for p, text in zip(asked, texts, strict=True) if text is not None]
    out = {f"{role}/length": np.mean([len(text) for _, text in given])} if given else {}
    if given and config.file is None:
        out[f"{role}/reward"] = np.mean([s.score(p, text).reward for p, text in given])
    return {name: float(value) for name, value in out.items()}


# --- the claims ----------------------------------------------------------------------------------


def arm(name: str, chosen: str, rejected: str, role: Any = "control", **options: Any) -> Arm:
    """An arm that starts from the stage "student" and learns from two sources: other arms, or the oracle."""
    sources = {"chosen": chosen, "rejected": rejected}
    if chosen.startswith(ORACLE):
        return Arm(name, "delta-learning", {**options, **sources}, role=role, after="student")
    return Arm(name, "delta-learning", options, role=role, after="student", uses=sources)


def stage(name: str, steps: int, lr: float, after: str | None = None, **options: Any) -> Arm:
    """A stage of supervised learning from the oracle, from random weights or after another."""
    optim = {"lr": lr, "schedule": "cosine", "warmup": 0.05}
    shared = {"steps": steps, "batch": 64, "eval_every": 0, "optim": optim}
    return Arm(name, "sft", {**shared, **options}, role="stage", after=after)


TINY = "tiny:width=64,depth=2,heads=2,ffn=192"

CLAIM = Claim(
    says="A student whose sampled answers are right more often than two weak models' gains from preferences for the "
    "better one over the other, while imitating it makes the student worse. Swapped pairs do so too, and sources "
    "without a delta give nothing.",
    world="chain",
    world_options={"kinds": {"sum": [4, 4]}},
    policy=TINY,
    options={"max_tokens": 16, "eval_every": 10, "eval_problems": 512},
    arms=(
        # One model that adds up well is taught three rates of faults: the same ones, but more of them the weaker it is.
        stage("first", 1200, 2e-3, demonstrations=6000),
        stage("weaker", 150, 1e-3, "first", demonstrations=6000, noise=0.8),
        stage("weak", 150, 1e-3, "first", demonstrations=6000, noise=0.45),
        stage("student", 150, 1e-3, "first", demonstrations=6000, noise=0.25),
        arm("delta", "weak", "weaker", "method"),
        arm("imitation", "weak", "weaker", "baseline", objective="nll"),
        arm("swapped", "weaker", "weak"),
        arm("no-delta", "weak", "weak", "ablation"),
        arm("shuffled", "weak", "weaker", "ablation", shuffled=True),
    ),
    metrics={
        "start": Metric("evaluation", "accuracy", "first", unit="%"),
        "end": Metric("evaluation", "accuracy", unit="%"),
        "kept": Metric("evaluation", "kept/accuracy", unit="%"),
        "entropy": Metric("evaluation", "entropy", unit="nats"),
    },
    endpoints=(
        Endpoint("the student as kept over its start", "effect", "kept", ("delta", "delta:start"), 0.03),
        Endpoint("imitation ends below the start", "effect", "end", ("imitation:start", "imitation"), 0.03),
        Endpoint("swapped pairs end below the start", "effect", "end", ("swapped:start", "swapped"), 0.03),
        Endpoint("over one weak model against itself", "vanish", "kept", ("delta", "no-delta"), 0.03),
        Endpoint("over shuffled pairs", "vanish", "kept", ("delta", "shuffled"), 0.03),
        Endpoint("no gain without a delta", "vanish", "kept", ("no-delta", "no-delta:start"), 0.03, equal=True),
    ),
    tune="end",
    grid=(1e-4, 2e-4),
    minutes=2.0,
)

THREE, TWO = f"{ORACLE}3", f"{ORACLE}2"  # sections, of the same words as far as they go

SECTIONS = Claim(
    says="A student whose outlines have five sections, shown that three are better than two, comes to write more than "
    "it did, and more the longer it learns. Imitating three it falls towards three, the reverse shortens, and three "
    "over three others does nothing.",
    world="sections",
    policy=TINY,
    options={"max_tokens": 128, "eval_every": 10, "eval_problems": 128},
    arms=(
        stage("student", 400, 2e-3, demonstrations=25600, style="drawn"),
        arm("delta", THREE, TWO, "method", validation=0),
        arm("imitation", THREE, TWO, "baseline", validation=0, objective="nll"),
        arm("swapped", TWO, THREE, validation=0),
        arm("no-delta", THREE, f"{THREE}-reworded", "ablation", validation=0),
    ),
    metrics={
        "start": Metric("evaluation", "part/sections", "first"),
        "end": Metric("evaluation", "part/sections"),
        "mean": Metric("evaluation", "part/sections", "mean"),
        "outlines": Metric("evaluation", "accuracy", unit="%"),
    },
    endpoints=(
        Endpoint("more sections than at the start", "effect", "end", ("delta", "delta:start"), 0.5),
        Endpoint("and rising", "effect", "end", ("delta", "delta:mean")),
        Endpoint("imitation shortens", "effect", "end", ("imitation:start", "imitation"), 1.0),
        Endpoint("swapped pairs shorten", "effect", "end", ("swapped:start", "swapped"), 0.3),
        Endpoint("over three against three", "vanish", "end", ("delta", "no-delta"), 0.5),
        Endpoint("three against three is nothing", "vanish", "end", ("no-delta", "no-delta:start"), 0.3, equal=True),
    ),
    tune="end",
    grid=(3e-5, 1e-4),
    minutes=1.5,
)

BETTER, WORSE = f"{ORACLE}0.35", f"{ORACLE}0.05"  # teachers by their cosine with the truth
LABELS = {"problems": 4000, "batch": 100, "epochs": 20, "beta": 1.0, "validation": 1000}
SGD = {"algorithm": "sgd", "schedule": "constant", "warmup": 0.0, "clip": 1e9}
STUDENT = {**LABELS, "objective": "nll", "chosen": f"{ORACLE}0.60-apart", "epochs": 8, "validation": 0}

LOGISTIC = Claim(
    says="In logistic regression a student whose cosine with the truth is 0.6 gains from preferences of a teacher of "
    "0.35 over one of 0.05 that shares most of its errors. Imitation of the better teacher takes it down to that one's "
    "accuracy, swapped pairs take it down too, and shuffled ones give nothing.",
    world="points",
    world_options={"features": 100, "classes": 2, "condition": 1, "sharpness": 1000.0, "points": 5000, "test": 2000},
    policy="classifier:features=100,classes=2",
    options={"max_tokens": 1, "eval_temperature": 0.0, "eval_every": 20, "eval_problems": 2000, "optim": SGD},
    arms=(
        Arm("student", "delta-learning", {**STUDENT, "optim": {**SGD, "lr": 0.5}}, role="stage"),
        arm("delta", BETTER, WORSE, "method", **LABELS),
        arm("imitation", BETTER, WORSE, "baseline", **LABELS, objective="nll"),
        arm("swapped", WORSE, BETTER, **LABELS),
        arm("shuffled", BETTER, WORSE, "ablation", **LABELS, shuffled=True),
    ),
    metrics={name: CLAIM.metrics[name] for name in ("start", "end", "kept")},
    endpoints=(
        Endpoint("the student as kept over its start", "effect", "kept", ("delta", "delta:start"), 0.02),
        Endpoint("imitation ends below the start", "effect", "end", ("imitation:start", "imitation"), 0.03),
        Endpoint("swapped pairs end below the start", "effect", "end", ("swapped:start", "swapped"), 0.02),
        Endpoint("over shuffled pairs", "vanish", "kept", ("delta", "shuffled"), 0.015),
    ),
    tune="end",
    grid=(0.1, 0.3),
    minutes=1.0,
)

METHOD = Method("delta-learning", DeltaLearning, train, claim=CLAIM, more={"sections": SECTIONS, "logistic": LOGISTIC})
