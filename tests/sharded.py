"""Updates and runs that must come out alike in one process and in several under torchrun; see test_learning_sharded.

As a script, which torchrun starts, it does all of it and leaves the numbers in a file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import etude
from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import completion
from etude.experience.batch import Batch, normalise, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Clock
from etude.experience.store import Store
from etude.learning.learner import Optim, Seat, Term, update
from etude.learning.ranks import SOLO, Ranks, join
from etude.learning.run import Run
from etude.learning.sharded import full, local, shard, whole
from etude.learning.shared_acting import shared_acting
from etude.learning.weights import Weights
from etude.objectives.clipped_pg import ClippedPG
from etude.objectives.nll import NLL
from etude.policies.lm import LM
from etude.policies.outputs import Outputs
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape
from small import LIMITS, Echo, small_lm

TINY = "tiny:depth=1,width=32"
SHORT = {"world": "chain_sum", "max_tokens": 8, "eval_problems": 4, "base": False}
WORDS = ("12=3", "4=56789", "7=1", "0123=4567", "8=8", "55=0", "1=2345678901234")


def lm(tied: bool = True) -> LM:
    tokenizer = CharTokenizer()
    shape = Shape(tokenizer.size, 16, 2, heads=2, kv_heads=1, head_dim=8, ffn=32, limit=32, tie_embeddings=tied)
    return LM(shape, tokenizer, Keys(0).torch())


def foreign() -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config

    from etude.policies.foreign import ForeignLM

    torch.manual_seed(0)
    tokenizer = CharTokenizer()
    config = GPT2Config(vocab_size=tokenizer.size, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return ForeignLM(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


def batch(words: tuple[str, ...] = WORDS) -> Batch:
    rows = [completion(CharTokenizer(), *word.split("="), 32) for word in words]
    data = normalise(pack(rows), "token")
    ones = torch.ones(len(data.at))
    return data.with_actions(advantage=ones, logp_raw=-4 * ones)


class Broken(NLL):
    """Not a number in the micro-batches that hold a long row."""

    def loss(self, out: Any, batch: Batch) -> Any:
        found = super().loss(out, batch)
        return replace(found, total=found.total * (float("nan") if int(batch.lengths.max()) > 12 else 1.0))


def learnt(policy: Any, ranks: Ranks, objective: Any = None, steps: int = 3, words: Any = WORDS, **optim: Any) -> Any:
    """The metrics of a few updates, and the weights after them."""
    policy = shard(policy, ranks)
    began = policy.fingerprint()
    seat, meter = Seat(policy, Optim(lr=1e-2, **optim), steps), Meter()
    found = [update(seat, [Term(batch(words), objective or NLL())], Keys(0).at(i), meter) for i in range(steps)]
    before = {n: full(p).detach().clone() for n, p in policy.named_parameters()}
    with whole(policy) as gathered:
        same = all(torch.equal(before[n], p) for n, p in gathered.named_parameters())
        logp = gathered.logp(batch()).tolist()
        if ranks.leads:  # alone: nothing is asked of the others
            assert policy.logp(batch()).tolist() == logp
            forward = policy.forward(batch(), frozenset({"logp"}))
            assert forward.logp.tolist() == pytest.approx(
                logp, abs=1e-5
            )  # with a gradient products may round otherwise
    assert policy.logp(batch()).tolist() == pytest.approx(logp, abs=1e-5)
    now = policy.fingerprint()
    assert now == policy.fingerprint()
    assert (now != began) == any(not m["skipped_update"] for m in found)
    weights = torch.cat([p.flatten() for p in before.values()]).tolist()
    return {"metrics": found, "weights": weights, "logp": logp, "same": same, "meter": meter.read()}


def updates(ranks: Ranks) -> dict[str, Any]:
    """Policies, objectives and ways to cut a batch."""
    once = {
        "tied": learnt(lm(), ranks),
        "untied": learnt(lm(tied=False), ranks),
        "micro-batches": learnt(lm(), ranks, tokens=9),
        "fewer rows than processes": learnt(lm(), ranks, words=WORDS[:1]),
        "entropy": learnt(lm(), ranks, ClippedPG(entropy_coef=0.1), clip=0.1),
        "not finite": learnt(lm(), ranks, Broken(), tokens=9),
        "transformers": learnt(foreign(), ranks),
    }
    kept = Outputs.__init__.__defaults__
    Outputs.__init__.__defaults__ = (*kept[:-1], 2 * CharTokenizer().size)  # logits are made two actions at a time
    once["chunks"] = learnt(lm(tied=False), ranks, ClippedPG(entropy_coef=0.1))
    Outputs.__init__.__defaults__ = kept
    return once


def pairs(path: Path) -> Path:
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "3" * (i + 1)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def runs(home: Path) -> None:
    """Methods from their names, one after the other in the same processes."""
    file = pairs(home / "pairs.jsonl")
    etude.train("dpo", out=home / "dpo", policy=TINY, data=str(file), steps=3, batch=4, **SHORT)
    etude.train(
        "sft", out=home / "sft", policy=TINY, demonstrations=16, batch=6, steps=3, lora={"rank": 2}, **SHORT
    )  # fmt: skip
    few = {"problems": 3, "members": 3, "steps": 2}
    etude.train("grpo", out=home / "table", policy="table", **few, **SHORT)
    taught = {**SHORT, "base": True, "base_low": 0.0, "base_high": 1.0}
    etude.train("grpo", out=home / "base", policy=TINY, **few, **taught)


def shares(policy: LM, ranks: Ranks) -> dict[str, float]:
    """Bytes of parameters and of AdamW's state in this process, and seconds of an update."""
    learner = shard(policy, ranks)
    seat = Seat(learner, Optim(), 8)
    data = batch(WORDS * 32)
    times = []
    for i in range(5):
        began = time.perf_counter()
        update(seat, [Term(data, NLL())], Keys(0).at(i), Meter())
        times.append(time.perf_counter() - began)
    moments = [v for state in seat.optimizer.state.values() for n, v in state.items() if n != "step"]
    return {"parameters": held(learner.parameters()), "optimiser": held(moments), "seconds": min(times)}


def held(tensors: Iterable[torch.Tensor]) -> float:
    """Bytes in this process."""
    return float(sum(t.numel() * t.element_size() for t in map(local, tensors)))


def acted(ranks: Ranks) -> dict[str, Any]:
    """Answers to problems of which some are asked twice, shared out and not, and what each was charged."""
    world, policy, meters = Echo(), small_lm(), (Meter(), Meter())
    asked = [world.problem("train", i) for i in (0, 1, 0, 2, 1, 3, 0)]
    acts = (shared_acting(sample, policy, ranks, meters[0]), sample)
    found = []
    for act, meter in zip(acts, meters, strict=True):
        roles = {"actor": PolicyAgent(policy, limits=LIMITS, meter=meter)}
        groups = act(roles, asked, 3, world.score, Clock(0, 1), Keys(0))
        found.append([(g.problem.id, [(m.text, m.reward, m.calls[0].logp_raw.tolist()) for m in g.members])
                      for g in groups])  # fmt: skip
    return {"answers": found, "meters": [m.read() for m in meters]}


def refusals(ranks: Ranks) -> list[str]:
    """What a process hears where another, or what another does, is at fault."""
    world, said = Echo(), []

    def fault() -> None:
        if ranks.leads:
            raise UserError("the first process is at fault")

    def other() -> None:
        act = shared_acting(sample, small_lm(), ranks)
        roles = {"actor": PolicyAgent(small_lm(), limits=LIMITS)}
        act(roles, [world.problem("train", ranks.rank)], 1, world.score, Clock(0, 1), Keys(0))

    policy: Any = shard(lm(), ranks)

    def penalised() -> None:
        seat = Seat(policy, Optim(), 1)
        update(seat, [Term(batch(), NLL())], Keys(0), Meter(), penalties=[lambda p: next(p.parameters()).sum()])

    def later() -> None:
        policy.add_head("values", Keys(0).torch())

    for body in (lambda: ranks.together(fault), other, penalised, later, lambda: policy.decoder()):
        try:
            body()
            said.append("")
        except (UserError, RuntimeError) as error:
            said.append(str(error))
    return said


def branched(folder: Path, ranks: Ranks) -> bool:
    """Whether a branch leaves no trace in weights and optimiser."""
    run = Run(folder, {}, ranks=ranks)
    policy = shard(lm(), ranks)
    run.track("policy", Weights(policy))
    seat = run.track("seat", Seat(policy, Optim(lr=1e-2), 8))

    def learn(times: int) -> list[float]:
        found = [update(seat, [Term(batch(), NLL())], Keys(0), run.meter) for _ in range(times)]
        return [m[name] for m in found for name in ("loss", "grad_norm")]

    learn(2)
    with run.branch("try"):
        tried = learn(2)
        with torch.no_grad():
            policy.forward(batch(), frozenset({"logp"}))  # leaves weights of the branch gathered
    again = learn(2)
    run.close()
    return tried == again


def metrics(folder: Path) -> dict[str, list[float]]:
    with Store(folder, read_only=True) as store:
        return {name: series.value.tolist() for name, series in store.metrics().items()}


def main(home: Path) -> None:
    torch.set_num_threads(1)
    ranks = join()
    runs(home)
    mine = everything(home, ranks)
    found = ranks.together(lambda: mine)
    if ranks.leads:
        (home / "found.json").write_text(json.dumps(found))


def alone(home: Path) -> dict[str, Any]:
    home.mkdir()
    runs(home)
    return everything(home, SOLO)


def everything(home: Path, ranks: Ranks) -> dict[str, Any]:
    return {
        "updates": updates(ranks),
        "shares": shares(lm(), ranks),
        "acted": acted(ranks),
        "refusals": refusals(ranks),
        "branched": branched(home / "branch", ranks),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
