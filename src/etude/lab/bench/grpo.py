"""A GRPO step against TRL's GRPOTrainer: the same run as a user would start it at both."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import pack_groups
from etude.experience.batch import Batch, normalise
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Agent, Clock, Limits, Score, World
from etude.experience.types import Group, Problem
from etude.lab.bench.case import Case, Machine
from etude.lab.bench.engine import matrix_flops
from etude.lab.bench.peers import transformers_model, transformers_tokenizer
from etude.lab.bench.trl import Ticks, quiet_trl, trainer_options
from etude.objectives.clipped_pg import grpo as objective
from etude.policies.lm import LM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.zoo import load_policy, save_policy
from etude.worlds.registry import load_world

WORLD, BLOCKS = "chain_sum", 3  # blocks of steps of each side


@dataclass(frozen=True)
class Settings:
    """What both sides are told."""

    problems: int = 8
    members: int = 8
    tokens: int = 64  # longest answer
    steps: int = 6  # of a block, whose first is not timed
    lr: float = 1e-4


SIZE = Settings()


def grpo(machine: Machine) -> Iterator[Case]:
    """The cases."""
    lm = cast(LM, load_policy("tiny", Keys(0)))
    gap = gradient_gap(lm)
    ours: list[float] = []
    theirs: list[float] = []
    flops = 0.0
    for _ in range(BLOCKS):
        times, costs = own_steps(lm)
        ours += times
        theirs += their_steps(lm)
        tokens = costs["prefilled"] + costs["sampled"] + 3 * costs["trained"]
        flops += matrix_flops(lm.shape) * tokens / SIZE.steps / BLOCKS
    work = f"GRPO step, tiny, {SIZE.problems} prompts x {SIZE.members} samples x {SIZE.tokens} tokens"
    yield Case(
        work, "TRL GRPOTrainer", tuple(ours), tuple(theirs), 2.0, floor=machine.floor(flops),
        same=f"loss and gradient within {gap:.0e}", note="random weights, most answers of full length",
    )  # fmt: skip
    from etude.lab.bench.demo import demo

    yield demo()


def problems(world: World) -> list[Problem]:
    """The prompts of a step."""
    return [world.problem("train", i) for i in range(SIZE.problems)]


def reward(world: World, asked: Mapping[Any, Problem]) -> Any:
    """The world's verifier as a TRL reward function."""

    def verified(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [world.score(asked[p], c).reward for p, c in zip(prompts, completions, strict=True)]

    return verified


def own_steps(lm: LM) -> tuple[list[float], Mapping[str, float]]:
    """Seconds of each step but the first of a run as a user would start it, and what all of it cost."""
    from etude.methods.api import train

    ticks = Ticks()

    class Reporter:
        def step(self, clock: Clock, metrics: Any, run: Any) -> None:
            if clock.step < clock.total:
                ticks.mark()

    with TemporaryDirectory() as scratch:
        save_policy(lm, Path(scratch) / "lm")
        run = train(
            "grpo", world=WORLD, policy=f"{scratch}/lm", out=f"{scratch}/run", steps=SIZE.steps,
            problems=SIZE.problems, members=SIZE.members, max_tokens=SIZE.tokens, eval_every=0, eval_problems=1,
            checkpoint_every=10**6, reporter=Reporter(), optim={"lr": SIZE.lr},
        )  # fmt: skip
    return ticks.between(), run.meter.read()


def their_steps(lm: LM) -> list[float]:
    """The same by TRL."""
    ticks = Ticks()
    with quiet_trl() as scratch:
        trainer(lm, scratch, SIZE, ticks.callback()).train()
    return ticks.between()


def trainer(lm: LM, scratch: str, size: Settings, callback: Any) -> Any:
    """TRL's trainer on this world, set to what ours does."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    world = load_world(WORLD, notation=lm.tokenizer.notation)
    asked = {p.prompt: p for p in (world.problem("train", i) for i in range(size.problems * size.steps))}
    return GRPOTrainer(
        model=transformers_model(lm),
        reward_funcs=reward(world, asked),
        args=GRPOConfig(
            **trainer_options(scratch, size.steps, size.lr), per_device_train_batch_size=size.problems * size.members,
            num_generations=size.members, max_completion_length=size.tokens, beta=0.0, loss_type="grpo",
            temperature=1.0,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(asked)}),
        processing_class=transformers_tokenizer(cast(CharTokenizer, lm.tokenizer)),
        callbacks=[callback],
    )  # fmt: skip


def gradient_gap(lm: LM) -> float:
    """The largest difference in loss and gradient on the same groups, the gradient's over its norm. Raises UserError
    above 1e-4."""
    policy = copy.deepcopy(lm)
    world = load_world(WORLD, notation="compact")
    agent = PolicyAgent(policy, limits=Limits(max_tokens=SIZE.tokens))
    groups = answered(agent, problems(world), world.score, SIZE.members)
    batch, advantage = step_batch(groups)
    loss = objective().loss(policy(batch, objective().needs), batch).total
    loss.backward()
    with quiet_trl() as scratch:
        theirs = trainer(lm, scratch, SIZE, Ticks().callback())
        theirs.current_gradient_accumulation_steps = 1
        theirs.model.train()
        other = theirs._compute_loss(theirs.model, padded(groups, advantage))
        other.backward()
        gradients = {n: p.grad for n, p in theirs.model.named_parameters() if p.grad is not None}
    own = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None and n != "lm_head.weight"}
    # `transformers` does not train the input embedding of the padding, which random weights may sample.
    for g in (own, gradients):
        g["model.embed_tokens.weight"][lm.tokenizer.pad] = 0
    norm = torch.cat([g.flatten() for g in own.values()]).norm()
    gap = max(float((own[n] - g).abs().max() / norm) for n, g in gradients.items())
    gap = max(gap, float((loss - other).detach().abs()))
    if gap > 1e-4:
        raise UserError(f"the GRPO loss or gradient of Etude and of TRL differ by {gap:.1e}")
    return gap


def answered(agent: Agent, asked: Sequence[Problem], score: Score, members: int) -> list[Group]:
    """What a step trains on."""
    return sample({"actor": agent}, asked, members, score, Clock(0, 1), Keys(0))


def step_batch(groups: Sequence[Group]) -> tuple[Batch, Tensor]:
    """The packed answers, and advantages f32[B] that are drawn at random: groups of random weights are all wrong, and
    would have none."""
    batch = pack_groups(groups, "actor")
    advantage = torch.from_numpy(Keys(0).at("advantage").numpy().normal(size=batch.size)).float()
    return normalise(batch.with_actions(advantage=advantage[batch.row_of]), "sequence"), advantage


def padded(groups: Sequence[Group], advantage: Tensor) -> dict[str, Tensor]:
    """The same answers as TRL lays them out: prompts padded on the left, answers on the right."""
    calls = [m.calls[0] for g in groups for m in g.members]
    left, right = (max(len(getattr(c, side)) for c in calls) for side in ("context", "out"))
    shape = {"prompt": (len(calls), left), "completion": (len(calls), right)}
    kinds = [(f"{name}_{kind}", size) for name, size in shape.items() for kind in ("ids", "mask")]
    out = {name: torch.zeros(size, dtype=torch.int64) for name, size in kinds}
    for r, call in enumerate(calls):
        out["prompt_ids"][r, left - len(call.context) :] = torch.from_numpy(call.context.astype("int64"))
        out["prompt_mask"][r, left - len(call.context) :] = 1
        out["completion_ids"][r, : len(call.out)] = torch.from_numpy(call.out.astype("int64"))
        out["completion_mask"][r, : len(call.out)] = 1
    return {**out, "advantages": advantage}
