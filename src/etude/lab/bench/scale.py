"""How the cost of a GRPO step grows: with the tokens of a step, with answers to a prompt, with the prompt's length."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import cast

from etude.acting.agent import PolicyAgent
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Limits
from etude.experience.types import Outcome, Problem
from etude.lab.bench.case import Growth, Machine, Work, seconds
from etude.lab.bench.engine import stopping
from etude.lab.bench.grpo import answered, step_batch
from etude.learning.learner import Optim, Seat, Term, update
from etude.objectives.clipped_pg import grpo
from etude.policies.lm import LM
from etude.policies.zoo import load_policy

TIMES = (1, 2, 4, 8, 16)
REPEATS = 3
# prompts, answers to each, characters of a prompt, tokens of an answer; at size 1
SMALLEST = {"tokens a step": (8, 8, 32, 32), "answers to a prompt": (8, 4, 32, 32), "prompt length": (4, 8, 48, 32)}


def scale(machine: Machine) -> Iterator[Growth]:
    """The cases."""
    for work, (prompts, members, characters, tokens) in SMALLEST.items():
        costs = []
        for times in TIMES:
            p = prompts * times if work == "tokens a step" else prompts
            g = members * times if work == "answers to a prompt" else members
            c = characters * times if work == "prompt length" else characters
            step = _step(p, g, c, tokens)
            costs.append(median(seconds(step) for _ in range(REPEATS)))
        yield Growth(f"GRPO step, tiny, by {work}", TIMES, tuple(costs))


def _step(prompts: int, members: int, characters: int, tokens: int) -> Work:
    """A step of this size, warm."""
    lm = stopping(cast(LM, load_policy("tiny", Keys(0))), ())
    seat = Seat(lm, Optim(lr=1e-4), REPEATS + 1)
    draws = Keys(0).at("letters").numpy()
    asked = [Problem(str(i), "".join(map(chr, draws.integers(65, 91, characters)))) for i in range(prompts)]
    agent = PolicyAgent(lm, limits=Limits(max_tokens=tokens))

    def step() -> None:
        batch, _ = step_batch(answered(agent, asked, lambda problem, text: Outcome(0.0), members))
        update(seat, [Term(batch, grpo())], Keys(0), Meter())

    step()
    return step
