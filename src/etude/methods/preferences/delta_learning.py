"""Delta learning draft."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import Examples, completion, pairs
from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Interactive
from etude.experience.rows import Row
from etude.experience.types import Problem
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

ORACLE = "oracle:"


@dataclass(frozen=True)
class DeltaLearning:
    """Delta learning's hyperparameters."""

    chosen: str = ""  # whose answers are preferred: a policy, a file of completions, or oracle:STYLE
    rejected: str = ""  # whose answers are not, in the same three ways
    data: str | None = None  # .jsonl or .parquet of prompt, chosen, rejected, in place of both
    columns: tuple[str, ...] = ()  # ours=theirs, of files
    problems: int = 2000  # prompts asked, each for one pair
    batch: int = 32  # pairs an update
    epochs: int = 1  # passes over the pairs
    beta: float = 5.0  # how strongly the reference holds, per token
    objective: Literal["dpo-norm", "nll"] = "dpo-norm"  # nll: the baseline that imitates the chosen answers
    shuffled: bool = False  # control: every pair is turned round with a chance of one half
    validation: int = 256  # held-back training problems that choose the weights to keep; 0: the last are kept
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, schedule="cosine", warmup=0.03))


def train(s: Setting, config: DeltaLearning) -> None:
    asked = prompts(s, config)
    data = Examples.from_state(s.run.stage("collect", lambda: collected(s, config, asked).state_dict()))
    s.run.stage("fit", lambda: learn(s, config, data, asked))
    if config.validation:
        e = s.evaluate()
        s.run.evaluated(replace(e, metrics={f"kept/{k}": v for k, v in e.metrics.items()}, categories={}, items={}))


def learn(s: Setting, config: DeltaLearning, data: Examples, asked: Sequence[Problem]) -> None:
    steps = max(1, len(data.units()) * config.epochs // config.batch)
    reference, seen = s.reference(), ReferenceCache()
    draw = examples(data, config.batch, s.run)

    def source(clock: Clock, keys: Keys) -> Batch:
        batch = draw(clock, keys)
        return with_reference(batch, reference, seen, meter=s.run.meter) if config.objective == "dpo-norm" else batch

    best = s.run.track("best", Best(s.policy))
    measure = validation(s, held_back(s, config.validation, {p.prompt for p in asked})) if config.validation else None
    every = s.common.eval_every

    def watch(clock: Clock) -> None:
        s.watch(clock)
        if measure is not None and (clock.step in (0, clock.total) or (every and clock.step % every == 0)):
            score = measure()
            s.run.log({"validation": score})
            best.hear(score, clock.step)

    objective = dpo_norm(config.beta) if config.objective == "dpo-norm" else NLL()
    by = None if config.objective == "dpo-norm" else "token"
    fit(s.run, Seat(s.policy, config.optim, steps), source, objective, steps, by=by, watch=watch)
    if measure is not None:
        s.run.log({"kept_step": best.step})
        best.restore()


def prompts(s, config):
    return [s.world.problem("train", i) for i in range(config.problems)]


def collected(s: Setting, config: DeltaLearning, asked: Sequence[Problem]) -> Examples:
    good = answers(s, config.chosen, "chosen", asked)
    bad = answers(s, config.rejected, "rejected", asked)
    kept = [(p, a, b) for p, a, b in zip(asked, good, bad, strict=True) if a and b and a != b]
    right = lambda xs: float(np.mean([s.score(p, x).reward for p, x in zip(asked, xs)]))
    s.run.log({"pairs": len(kept), "chosen_reward": right(good), "rejected_reward": right(bad)})
    if config.shuffled:
        turn = s.run.keys.at("shuffle").numpy().random(len(kept)) < 0.5
        kept = [(p, b, a) if t else (p, a, b) for (p, a, b), t in zip(kept, turn)]
    row = lambda p, t: completion(s.policy.tokenizer, p.prompt, t, s.policy.limit)
    chosen = [row(p, a) for p, a, _ in kept]
    if config.objective == "nll":
        return Examples(chosen)
    return pairs(chosen, [row(p, b) for p, _, b in kept])


def answers(s: Setting, source: str, role: str, asked: Sequence[Problem]) -> list[str]:
    if source.startswith(ORACLE):
        oracle = load_oracle(s.world)
        style = source.removeprefix(ORACLE)
        return [oracle.demonstrate(p, style, s.run.keys.at("demonstrate", role, p.id)) for p in asked]
    policy = load_policy(source, s.run.keys.at("init"), device=s.common.device)
    roles = {"actor": PolicyAgent(policy, "actor", s.law, s.limits, s.run.meter)}
    groups = sample(roles, asked, 1, s.score, Clock(0, 1), s.run.keys.at("collect", role))
    return [m.text if m.calls[-1].stop == "stop" else "" for g in groups for m in g.members]


METHOD = Method("delta-learning", DeltaLearning, train)
