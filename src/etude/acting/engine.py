"""The generation engine: continues any token prefixes, a batch of ragged rows at a time.

A row depends on its context, its keys, the policy, the law, the limits and the hooks, never on the
rows around it: the token at position `p` of a row uses draw `p` of that row's own stream. So a row
that is cut anywhere and continued under the same keys writes the same text again.

Shapes: `R` rows, `L` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from etude.acting import law as laws
from etude.acting.hooks import Hook
from etude.acting.wave import Processor, Task, Wave
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Limits, Policy
from etude.experience.types import RAW, Call, Ids, Law, given_call


@torch.inference_mode()
def generate(
    policy: Policy,
    contexts: Sequence[Ids],
    keys: Sequence[Keys],
    limits: Limits,
    law: Law = RAW,
    hooks: Sequence[Hook] = (),
    processors: Sequence[Processor] = (),
    meter: Meter | None = None,
    agent: str = "actor",
    max_rows: int = 256,
) -> list[Call]:
    """Continues each context and returns its call, in input order.

    A row ends with the token that completes a stop token of the tokenizer, a stop id or a stop string
    of `limits` (kept in `out`; "stop"), at `limits.max_tokens` tokens whoever wrote them ("length"), where
    the policy's limit is reached ("context"), or when a hook says so ("hook"). `processors` are
    `transformers.LogitsProcessor`s; as there, they see contexts padded on the left and act before the
    law, which then names them as its tilt. Temperature 0 takes the first maximum. At most `max_rows`
    rows run at once; equal contexts among them are prefilled once.

    Charges `prefilled` (each unique context of a wave once, and forced and injected tokens), `sampled`
    (every token drawn) and `discarded` (of those, the ones that a hook rewound).

    Raises UserError for an empty context or one longer than the policy's limit, for limits or a law
    that are none, and FloatingPointError if a distribution holds NaN.
    """
    laws.check(law)
    check(policy.limit, contexts, keys, limits)
    if max_rows < 1:
        raise UserError(f"max_rows {max_rows} is below 1")
    if processors:
        names = tuple(str(getattr(p, "__name__", type(p).__name__)) for p in processors)
        law = replace(law, tilt=law.tilt + names)
    task = Task(policy, limits, law, hooks, processors, meter or Meter(), agent)
    calls: dict[int, Call] = {}
    rows: list[int] = []
    for i, context in enumerate(contexts):
        if len(context) < policy.limit:
            rows.append(i)
        else:
            calls[i] = replace(given_call(agent, context, ()), law=law, stop="context")
    for start in range(0, len(rows), max_rows):
        wave = rows[start : start + max_rows]
        calls.update(zip(wave, Wave(task, wave, contexts, keys).run(), strict=True))
    return [calls[i] for i in range(len(contexts))]


def check(limit: int, contexts: Sequence[Ids], keys: Sequence[Keys], limits: Limits) -> None:
    """Raises UserError for what cannot be continued by a policy whose sequences hold `limit` tokens."""
    if len(contexts) != len(keys):
        raise ValueError(f"{len(keys)} keys for {len(contexts)} contexts")
    if limits.max_tokens < 1:
        raise UserError(f"max_tokens {limits.max_tokens} is below 1")
    if "" in limits.stop:
        raise UserError("a stop string may not be empty")
    for i, context in enumerate(contexts):
        if not len(context):
            raise UserError(f"context {i} is empty: begin with a start token")
        if len(context) > limit:
            raise UserError(
                f"prompt {i} has {len(context)} tokens, but the policy's limit is {limit}: shorten the prompt"
            )
