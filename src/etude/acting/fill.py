"""Filling: how a policy that looks both ways acts.

An answer is a canvas of hidden tokens after its context, which forward passes fill a few at a time: each predicts all
hidden tokens from what is there, and those that are chosen stay for good. The canvas is cut into blocks, which are
filled from left to right. With blocks of one token it is left-to-right decoding; with one block the whole canvas is
filled in an order of the policy's own (Sahoo et al. 2024, arXiv 2406.07524; Nie et al. 2025, arXiv 2502.09992).

Shapes: `R` rows, `A` rows that are still filled, `M` tokens of a canvas, `m` hidden ones of a block, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from etude.acting import law as laws
from etude.acting.sample import sample
from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Clock, Limits, Policy, Roles, Score
from etude.experience.types import RAW, Author, Call, Group, Ids, Law, Problem

Rule = Literal["confidence", "margin", "random"]
LOGITS = frozenset({"logits"})


@dataclass(frozen=True)
class Fill:
    """Samples of an actor that looks both ways, filled in an order of choice.

    Within a block the tokens with the highest score are filled first, the first among equals: the probability of
    the token that was drawn (confidence), the lead of the likeliest token over the next (margin), or a draw (random).
    """

    block: int = 1  # tokens of a block; 0: the whole canvas
    at_once: int = 1  # tokens that a forward pass fills; a block whose size it does not divide gets as many passes
    rule: Rule = "confidence"  # which tokens of a block are filled first (see above)

    def __post_init__(self) -> None:
        if self.block < 0 or self.at_once < 1:
            raise UserError(f"fill: block must be at least 0 and at_once at least 1, not {self.block}, {self.at_once}")
        if self.rule not in get_args(Rule):
            raise UserError(f"fill: rule must be one of {', '.join(get_args(Rule))}, not {self.rule!r}")

    def __call__(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        """See `Acting`."""
        return sample({**roles, "actor": Filler(roles["actor"], self)}, problems, n, score, clock, keys)

    def passes(self, length: int) -> list[tuple[slice, int]]:
        """(block, tokens to fill) of every forward pass over a canvas; the first passes of a block fill one more where
        they cannot all fill as many.

        >>> Fill(block=10, at_once=3).passes(10)
        [(slice(0, 10, None), 3), (slice(0, 10, None), 3), (slice(0, 10, None), 2), (slice(0, 10, None), 2)]
        """
        size = self.block or length
        found = []
        for start in range(0, length, size):
            block = slice(start, min(start + size, length))
            each, more = divmod(block.stop - start, count := -(-(block.stop - start) // self.at_once))
            found += [(block, each + (i < more)) for i in range(count)]
        return found


class Filler:
    """An agent whose policy fills; fulfils `Agent`. Raises UserError for an actor without a policy of its own."""

    def __init__(self, actor: Any, how: Fill | None = None) -> None:
        if getattr(actor, "policy", None) is None:
            raise UserError("filling needs the actor's own forward pass, which a server does not give")
        self.actor, self.how = actor, how or Fill()
        self.name, self.tokenizer, self.limit = actor.name, actor.tokenizer, actor.limit

    def generate(
        self,
        contexts: Sequence[Ids],
        keys: Sequence[Keys],
        limits: Limits | None = None,
        law: Law | None = None,
        hooks: Sequence[Any] = (),
    ) -> list[Call]:
        """One call a context; see `fill`."""
        a = self.actor
        if a.hooks or hooks or a.processors:
            raise UserError("hooks and logits processors need text that grows from left to right, which is not filled")
        return fill(
            a.policy, contexts, keys, limits or a.limits, law or a.law, self.how, a.meter, self.name, a.max_rows
        )


@torch.inference_mode()
def fill(
    policy: Policy,
    contexts: Sequence[Ids],
    keys: Sequence[Keys],
    limits: Limits,
    law: Law = RAW,
    how: Fill | None = None,
    meter: Meter | None = None,
    agent: str = "actor",
    max_rows: int = 256,
) -> list[Call]:
    """Fills a canvas of `limits.max_tokens` tokens after each context; the calls, in input order.

    `out` ends with the first stop token ("stop"), or with the canvas ("length"). Each token's log-probabilities are
    those it had in the pass that chose it, given all that was there: with one token a pass their sum is that of the
    text in the order in which it was filled, which the tag `passes` holds (the pass of each token). Tokens chosen for
    the confidence in them no longer follow the law, which then says so. Token `p` of a row uses draw `p` of its own
    stream, so rows do not depend on one another.

    Charges `sampled` (every token filled), `discarded` (of those, what came after a stop token) and `prefilled`
    (whatever passes through the policy). Raises UserError for a policy that does not look both ways, a context that is
    empty or leaves no room for the canvas, and stop strings.
    """
    laws.check(law)
    how = how or Fill()
    _check(policy, contexts, limits)
    if how.rule == "confidence" and how.block != 1:
        law = replace(law, tilt=(*law.tilt, "confidence"))
    calls: list[Call] = []
    for start in range(0, len(contexts), max_rows):
        part = slice(start, start + max_rows)
        wave = _Wave(policy, contexts[part], keys[part], limits)
        for index, (block, count) in enumerate(how.passes(limits.max_tokens)):
            if len(wave.live):
                wave.step(index, block, count, law, how.rule)
        calls += wave.calls(agent, law, meter or Meter())
    return calls


def hidden_token(policy: Policy, user: str) -> int:
    """The token that hides others from `policy`. Raises UserError where it sees one side alone, or has no such
    token."""
    if policy.causal:
        raise UserError(f"{user} needs a policy that looks both ways; this one sees only what is before a token")
    if policy.tokenizer.mask is None:
        raise UserError(f"{user} needs a mask token, which this policy's tokenizer does not have (mask_token)")
    return policy.tokenizer.mask


def _check(policy: Policy, contexts: Sequence[Ids], limits: Limits) -> None:
    hidden_token(policy, "filling")
    if limits.max_tokens < 1:
        raise UserError(f"max_tokens {limits.max_tokens} is below 1")
    if limits.stop:
        raise UserError("stop strings need text that grows from left to right, which is not filled")
    for i, context in enumerate(contexts):
        if not len(context):
            raise UserError(f"context {i} is empty: begin with a start token")
        if len(context) + limits.max_tokens > policy.limit:
            raise UserError(
                f"prompt {i} has {len(context)} tokens, which with {limits.max_tokens} to fill is more than the "
                f"policy's limit of {policy.limit}: shorten the prompt or lower max_tokens"
            )


class _Wave:
    """Rows that are filled together. Tensors are [R, M] on the policy's device; `live` int64[A] names the rows that
    are not done: those in which something hidden stands before the first stop token, or anywhere if there is none."""

    def __init__(self, policy: Policy, contexts: Sequence[Ids], keys: Sequence[Keys], limits: Limits) -> None:
        self.policy, self.contexts, self.limits = policy, contexts, limits
        device = policy.device
        shape = (len(contexts), limits.max_tokens)
        self.packed = [torch.from_numpy(np.asarray(c, np.int64)).to(device) for c in contexts]
        self.canvas = torch.full(shape, hidden_token(policy, "filling"), device=device)
        self.hidden = torch.ones(shape, dtype=torch.bool, device=device)
        self.raw, self.sampled = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.passes = torch.zeros(shape, dtype=torch.int64, device=device)
        draws = [k.at("tokens").numpy().random(shape[1]) for k in keys]
        turns = [k.at("order").numpy().random(shape[1]) for k in keys]
        self.uniform, self.turn = (torch.from_numpy(np.stack(d)).to(device) for d in (draws, turns))
        stops = sorted(policy.tokenizer.stops | limits.stop_ids)
        self.stops = torch.tensor(stops, device=device)
        self.live = torch.arange(len(contexts), device=device)
        self.fed = 0

    def step(self, index: int, block: slice, count: int, law: Law, rule: Rule) -> None:
        """One forward pass, which fills `count` tokens of the block in every live row."""
        live = self.live
        place = self.hidden[live, block].nonzero()[:, 1].view(len(live), -1) + block.start  # [A, m]
        where = (live[:, None], place)
        uniform, turn = self.uniform[where].flatten(), self.turn[where].flatten()

        def settle(logits: Tensor, at: slice) -> tuple[Tensor, ...]:
            token, sampled = laws.choose(logits, law, uniform[at])
            raw = laws.at(logits, token) - logits.logsumexp(-1)
            if rule == "margin":
                best = logits.softmax(-1).topk(2).values
                return token, raw, sampled, best[:, 0] - best[:, 1]
            return token, raw, sampled, raw if rule == "confidence" else turn[at].to(raw.dtype)

        out = self.policy.forward(self._batch(place), LOGITS)
        token, raw, sampled, score = (x.view(place.shape) for x in out.map_logits(settle))
        chosen = score.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        where = (live[:, None], place.gather(1, chosen))
        for kept, new in ((self.canvas, token), (self.raw, raw), (self.sampled, sampled)):
            kept[where] = new.gather(1, chosen)
        self.hidden[where] = False
        self.passes[where] = index
        stop = torch.isin(self.canvas[live], self.stops) & ~self.hidden[live]
        open_before = self.hidden[live].cumsum(1)
        done = (stop & (open_before == 0)).any(1) | (open_before[:, -1] == 0)
        self.live = live[~done]

    def _batch(self, place: Tensor) -> Batch:
        """The live rows, of which the tokens at `place` int64[A, m] of their canvases are asked for."""
        rows = self.live.tolist()
        inputs = torch.cat([part for r in rows for part in (self.packed[r], self.canvas[r])])
        lengths = torch.tensor([len(self.contexts[r]) for r in rows], device=place.device) + self.canvas.shape[1]
        at = place + (torch.cumsum(lengths, 0) - self.canvas.shape[1])[:, None]
        row = torch.arange(len(rows), device=place.device).repeat_interleave(place.shape[1])
        self.fed += len(inputs)
        return Batch(inputs, lengths, at.flatten(), {"target": torch.zeros_like(row), "row": row})

    def calls(self, agent: str, law: Law, meter: Meter) -> list[Call]:
        """One call a row, and the charges."""
        canvas, hidden, passes = (x.cpu().numpy() for x in (self.canvas, self.hidden, self.passes))
        raw, sampled = self.raw.cpu().numpy(), self.sampled.cpu().numpy()
        stops = np.isin(canvas, self.stops.cpu().numpy()) & ~hidden
        found = []
        for r, context in enumerate(self.contexts):
            stopped = bool(stops[r].any())
            n = int(stops[r].argmax()) + 1 if stopped else canvas.shape[1]
            if not np.isfinite(raw[r, :n]).all():
                raise FloatingPointError(f"row {r}: the distribution of a hidden token is not finite")
            author = np.full(n, Author.SELF, np.int8)
            tags = {"passes": tuple(passes[r, :n].tolist())}
            out, stop = canvas[r, :n].astype(np.int32), "stop" if stopped else "length"
            found.append(Call(agent, context, out, author, raw[r, :n], sampled[r, :n], law, stop=stop, tags=tags))
        filled = int((~hidden).sum())
        for kind, amount in (
            ("prefilled", self.fed),
            ("sampled", filled),
            ("discarded", filled - sum(len(c.out) for c in found)),
        ):
            meter.charge(kind, amount)
        return found
