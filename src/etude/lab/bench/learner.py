"""A supervised step on ragged rows against TRL's SFTTrainer, at the fastest of its settings that runs here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, cast

import numpy as np
import torch

from etude.experience.batch import Batch, normalise, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.rows import example
from etude.lab.bench.case import Case, Machine
from etude.lab.bench.engine import matrix_flops
from etude.lab.bench.peers import transformers_model, transformers_tokenizer
from etude.lab.bench.trl import Ticks, quiet_trl, trainer_options
from etude.learning.learner import Optim, Seat, Term, update
from etude.objectives.nll import NLL
from etude.policies.lm import LM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.zoo import load_policy

ROWS, STEPS, BLOCKS = 64, 6, 3  # rows a step; steps of a block, of which the first is left out; blocks of each side
SETTINGS: tuple[dict[str, Any], ...] = (
    {"train_sampling_strategy": "random"},
    {"train_sampling_strategy": "group_by_length"},
    {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
)  # its packing and padding-free modes need flash attention, which has no CPU kernel


def learner(machine: Machine) -> Iterator[Case]:
    """The cases."""
    for name in ("tiny", "small"):
        lm = cast(LM, load_policy(name, Keys(0)))
        yield _case(name, lm, ragged(lm.shape.vocab), machine)


def ragged(vocab: int, rows: int = ROWS * STEPS, longest: int = 256) -> list[np.ndarray]:
    """Rows of 8 to `longest` tokens, as many of each order of magnitude: lengths as answers have them."""
    draws = Keys(0).at("ragged").numpy()
    sizes = np.exp(draws.uniform(np.log(8), np.log(longest), rows)).astype(int)
    return [draws.integers(9, vocab, n).astype(np.int32) for n in sizes]


def _case(name: str, lm: LM, rows: Sequence[np.ndarray], machine: Machine) -> Case:
    gap = loss_gap(lm, rows[:ROWS])
    best = min(SETTINGS, key=lambda settings: median(block(lm, rows, settings)))
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(BLOCKS):  # timed anew: the block by which the best was chosen flatters it
        ours += own_block(lm, rows)
        theirs += block(lm, rows, best)
    tokens = sum(map(len, rows)) / STEPS
    said = ", ".join(f"{k}={v}" for k, v in best.items())
    return Case(
        f"supervised step, {name}, {ROWS} ragged rows", f"TRL SFTTrainer ({said})", tuple(ours), tuple(theirs), 1.5,
        floor=machine.floor(3 * matrix_flops(lm.shape) * tokens), same=f"loss within {gap:.0e}",
        note=f"{tokens:.0f} tokens a step",
    )  # fmt: skip


def loss_gap(lm: LM, rows: Sequence[np.ndarray]) -> float:
    """|our mean loss - the peer's| on the same rows. Raises UserError above 1e-4."""
    model = transformers_model(lm)
    batch = _batch(rows)
    with torch.no_grad():
        ours = float(NLL().loss(lm(batch, NLL.needs), batch).total)
        total = 0.0
        for ids in (torch.from_numpy(r.astype(np.int64))[None] for r in rows):
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    gap = abs(ours - total / sum(len(r) - 1 for r in rows))
    if gap > 1e-4:
        raise UserError(f"the loss of Etude and that of transformers differ by {gap:.1e}")
    return gap


def _batch(rows: Sequence[np.ndarray]) -> Batch:
    return normalise(pack([example(r[:1], r[1:]) for r in rows]), "token")


def own_block(lm: LM, rows: Sequence[np.ndarray]) -> list[float]:
    """Seconds of each step but the first, on fresh copies of the weights."""
    policy = copy.deepcopy(lm)
    seat, keys, meter, ticks = Seat(policy, Optim(lr=1e-4), STEPS), Keys(0), Meter(), Ticks()
    for step in range(STEPS):
        update(seat, [Term(_batch(rows[step * ROWS : (step + 1) * ROWS]), NLL())], keys.at(step), meter)
        ticks.mark()
    return ticks.between()


def block(lm: LM, rows: Sequence[np.ndarray], settings: dict[str, Any]) -> list[float]:
    """The same steps by TRL: seconds of each but the first."""
    with quiet_trl() as scratch:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        ticks = Ticks()
        options = {"per_device_train_batch_size": ROWS, **trainer_options(scratch, STEPS), **settings}
        trainer = SFTTrainer(
            model=transformers_model(lm),
            args=SFTConfig(**options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=Dataset.from_dict({"input_ids": [r.tolist() for r in rows]}),
            processing_class=transformers_tokenizer(cast(CharTokenizer, lm.tokenizer)),
            callbacks=[ticks.callback()],
        )
        trainer.train()
        return ticks.between()
