"""Delta learning: preferences between two weak sources of answers (arXiv 2507.06187, sections 2 to 5).

Problem: preference tuning is fed by answers of stronger models, or by a strong judge. Idea: a pair of answers that are
both worse than the model still shows which way is better. Imitating the better one pulls the model down to it; a
preference loss sees only the difference of the two, in which what they share, their common faults included, cancels, so
that the model moves along the direction of quality and beyond both.

A weak source W (a small model) and a weaker one w (smaller still, of the same family) answer the same prompts x. The
pair is y+ ~ W(x) over y- ~ w(x), by who wrote it and with no judge: single pairs may be the wrong way round, what
counts is the mean difference, the delta. The student pi, stronger than both, learns with length-normalised DPO against
itself as it starts, pi_0:

    h = 1/|y+| sum_t log[pi(y+_t) / pi_0(y+_t)] - 1/|y-| sum_t log[pi(y-_t) / pi_0(y-_t)]       (nats a token)
    L = - mean over pairs log sigmoid(beta h)

over the |y| tokens of an answer and its end, the prompt masked. beta = 5 is large because h is per token. At the start
the gradient is -(beta/2) times the mean of (s+ - s-), with s the score function per token of either answer: of the two
sources only their difference is left. In logistic regression (section 6) that is ((y+ - y-)/2) x for labels 0 and 1:
nothing where the teachers agree, and along w_W - w_w where they do not. Errors that the two do not share stay as noise,
and the student drifts along the delta for ever, at last for the worse: one epoch at a small learning rate, and early
stopping is part of the method.

This file adds the pairs by source, from policies, files of completions or the world's oracle, and their curation:
pairs with an empty, cut or over-long side, or with two identical ones, are dropped and counted. `objective` "nll" is the
paper's baseline, imitation of W's answers over as many updates; swapped pairs are the two sources exchanged, pairs
without a delta one source twice. Departures: weights are kept by held-back problems (the paper tunes the learning rate
and the length of training); the schedule falls to 0 (the authors' code: to a tenth); batches and rates are laptop-sized
(code: batch 32, peak rate 1e-8 to 5e-7 at 3B to 8B parameters).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import Examples, pairs
from etude.curation.pairing import differing, same_tokens
from etude.experience.batch import Batch
from etude.experience.claims import Arm, BaseRecipe, Claim, Endpoint, Metric
from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Interactive
from etude.experience.rows import Row, example
from etude.experience.types import Problem, Prompt
from etude.learning.best import Best, held_back, validation
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting, named
from etude.methods.method import Method
from etude.objectives.nll import NLL
from etude.objectives.pairs import dpo_norm
from etude.objectives.reference import ReferenceCache, with_reference
from etude.policies.zoo import load_policy
from etude.worlds.data import load_examples
from etude.worlds.oracles import load_oracle
from etude.worlds.registry import FILES

ORACLE = "oracle:"  # what the name of a source begins with that is a style of the world's oracle


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
        needed = self.objective == "dpo-norm" or self.shuffled
        if bool(self.data) == bool(self.chosen) or bool(self.data and self.rejected):
            raise UserError("say whose answers are preferred to whose: --chosen and --rejected, or --data with pairs")
        if needed and not (self.data or self.rejected):
            raise UserError("a preference needs both sides: say whose answers are --rejected")


def train(s: Setting, config: DeltaLearning) -> None:
    """Pairs, collected once; one fit on them; then the weights that did best on held-back problems. These are
    evaluated once more: metrics that begin with kept/."""
    if isinstance(s.world, Interactive):
        raise UserError(f"world {s.world.name!r} has many turns, and pairs are of single answers: use another")
    asked = problems(s, config)
    found = s.run.stage("collect", lambda: collect(s, config, asked))
    s.run.stage("fit", lambda: learn(s, config, Examples.from_state(found["data"]), found["steps"], asked))
    if config.validation:
        of = s.evaluate()
        kept = {f"kept/{name}": estimate for name, estimate in of.metrics.items()}
        s.run.evaluated(replace(of, metrics=kept, categories={}, items={}))


def learn(s: Setting, config: DeltaLearning, data: Examples, steps: int, asked: Sequence[Problem]) -> None:
    """The fit, which ends with the weights to keep."""
    paired = config.objective == "dpo-norm"
    objective = dpo_norm(config.beta) if paired else NLL()
    draw, reference, seen = examples(data, config.batch, s.run), s.reference(), ReferenceCache()
    best = s.run.track("best", Best(s.policy))
    measure = validation(s, held_back(s, config.validation, {p.prompt for p in asked})) if config.validation else None

    def source(clock: Clock, keys: Keys) -> Batch:
        batch = draw(clock, keys)
        return with_reference(batch, reference, seen, meter=s.run.meter) if paired else batch

    def watch(clock: Clock) -> None:
        s.watch(clock)
        if measure is not None and s.due(clock):
            score = measure()
            best.hear(score, clock.step)
            s.run.log({"validation": score})

    seat = Seat(s.policy, config.optim, steps)
    fit(s.run, seat, source, objective, steps, by=None if paired else "token", watch=watch)
    if measure is not None:
        best.restore()
        s.run.log({"kept_step": best.step})


# --- pairs by source -----------------------------------------------------------------------------


def problems(s: Setting, config: DeltaLearning) -> list[Problem]:
    """What is asked: the prompts of the first file there is, else the world's first training problems."""
    file = next((f for f in (config.data, config.chosen, config.rejected) if f and f.endswith(FILES)), None)
    if file is None:
        size = s.world.size("train")
        return [s.world.problem("train", i) for i in range(min(config.problems, size or config.problems))]
    kind: Any = "preference" if file == config.data else "completion"
    loaded = load_examples(file, kind, named(config.columns, "column"))[: config.problems]
    return [Problem(f"row/{i}", example.prompt) for i, example in enumerate(loaded)]


def collect(s: Setting, config: DeltaLearning, asked: Sequence[Problem]) -> dict[str, Any]:
    """The examples to learn from, and over how many updates: as many for imitation as for preference. Logs the pairs,
    what was dropped and why, and what the two sources are like. Raises UserError where nothing is left."""
    good, bad = both_sides(s, config, asked)
    chosen, rejected = ([row_of(s, p, text) for p, text in zip(asked, of, strict=True)] for of in (good, bad))
    whole: list[tuple[Row, Row]] = []
    dropped = Counter(absent=0, empty=0, long=0)
    for a, b in zip(chosen, rejected, strict=True):
        if isinstance(a, Row) and isinstance(b, Row):
            whole.append((a, b))
        else:
            dropped[a if isinstance(a, str) else str(b)] += 1
    kept, identical = differing(whole, same_tokens)
    s.run.log({"pairs": len(kept), "dropped/identical": identical, **{f"dropped/{k}": n for k, n in dropped.items()}})
    s.run.log({**described(s, asked, good, "chosen"), **described(s, asked, bad, "rejected")})
    if config.shuffled:
        turned = s.run.keys.at("shuffled").numpy().random(len(kept)) < 0.5
        kept = [(b, a) if turn else (a, b) for (a, b), turn in zip(kept, turned, strict=True)]
    imitated = [row for row in chosen if isinstance(row, Row)]
    count = len(kept) if config.data or config.rejected else len(imitated)
    if not count:
        raise UserError(
            f"none of {len(asked)} prompts has two whole, different answers to prefer one of: {dict(dropped)}"
        )
    data = Examples(imitated) if config.objective == "nll" else pairs(*zip(*kept, strict=True))
    return {"data": data.state_dict(), "steps": max(1, count * config.epochs // config.batch)}


def both_sides(
    s: Setting, config: DeltaLearning, asked: Sequence[Problem]
) -> tuple[list[str | None], list[str | None]]:
    """The chosen and the rejected answer to each problem; None where there is no finished one."""
    if config.data:
        loaded = load_examples(config.data, "preference", named(config.columns, "column"))[: len(asked)]
        return [e.chosen for e in loaded], [e.rejected for e in loaded]
    chosen = answers(s, config.chosen, "chosen", asked, config.columns)
    return chosen, answers(s, config.rejected, "rejected", asked, config.columns) if config.rejected else [None] * len(
        asked
    )


def answers(s: Setting, source: str, role: str, asked: Sequence[Problem], columns: Sequence[str]) -> list[str | None]:
    """What a source answers. One source in both roles answers twice, independently. Raises UserError for a source
    that is not there."""
    if source.startswith(ORACLE):
        oracle, style = load_oracle(s.world), source.removeprefix(ORACLE)
        if style not in oracle.styles:
            raise unknown("style of the oracle", style, oracle.styles)
        return [oracle.demonstrate(p, style, s.run.keys.at("demonstrate", role, p.id)) for p in asked]
    if source.endswith(FILES):
        found = {e.prompt: e.completion for e in load_examples(source, "completion", named(columns, "column"))}
        return [found.get(p.prompt) for p in asked]
    policy = load_policy(source, s.run.keys.at("init"), device=s.common.device)
    roles = {"actor": PolicyAgent(policy, role, s.law, s.limits, s.run.meter)}
    groups = sample(roles, asked, 1, s.score, Clock(0, 1), s.run.keys.at("answer", role))
    return [m.text if m.calls[-1].stop == "stop" else None for group in groups for m in group.members]


def row_of(s: Setting, problem: Problem, text: str | None) -> Row | str:
    """The row that teaches the student an answer, in its own tokens; else the word for why there is none."""
    if text is None:
        return "absent"
    if not text.strip():
        return "empty"
    tokenizer = s.policy.tokenizer
    row = example(tokenizer.prompt(problem.prompt), tokenizer.completion(text))
    return row if len(row) <= s.policy.limit else "long"


def described(s: Setting, asked: Sequence[Problem], texts: Sequence[str | None], role: str) -> dict[str, float]:
    """A source's mean length in characters, and its mean reward where the problems are the world's own."""
    given = [(p, text) for p, text in zip(asked, texts, strict=True) if text is not None]
    if not given:
        return {}
    out = {f"{role}/length": float(np.mean([len(text) for _, text in given]))}
    if not given[0][0].id.startswith("row/"):
        out[f"{role}/reward"] = float(np.mean([s.score(p, text).reward for p, text in given]))
    return out


METHOD = Method("delta-learning", DeltaLearning, train)
