"""A policy that an OpenAI-compatible server runs: token ids in, token ids and log-probabilities out.

What is asked for is vLLM's protocol of `/v1/completions` (0.10.2 and later): `prompt` as token ids,
`stop_token_ids`, `ignore_eos`, `seed`, `logprobs` and `return_token_ids`. A server that gives less is refused in
one line; no text is ever tokenised again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np

from etude.acting import engine
from etude.acting import law as laws
from etude.acting.text import completes
from etude.experience.endpoint import KEY, Endpoint, Server
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Limits, Tokenizer
from etude.experience.types import RAW, Author, Call, Ids, Law, given_call

SEEDS = 2**53  # whole numbers up to here survive any JSON reader
ROUNDING = 1e-3  # nats above 0 that a log-probability may be by rounding
NEVER = -9999.0  # what vLLM writes for a log-probability of minus infinity
NEEDS = "it must be vLLM 0.10.2 or later, or speak its protocol"


@dataclass
class ServerAgent:
    """Fulfils `experience.protocols.Agent`; `connect` makes one. Holds no state of its own; `meter` is charged."""

    endpoint: Endpoint
    model: str  # as the server calls it
    tokenizer: Tokenizer  # the model's own
    limit: int  # longest sequence, in tokens
    name: str = "actor"
    law: Law = RAW
    limits: Limits = field(default_factory=Limits)
    meter: Meter | None = None
    concurrency: int = 64

    def generate(
        self,
        contexts: Sequence[Ids],
        keys: Sequence[Keys],
        limits: Limits | None = None,
        law: Law | None = None,
        hooks: Sequence[Any] = (),
    ) -> list[Call]:
        """Continues each context, as `engine.generate` does, in requests of one row each, seeded by the row's key.

        `logp_raw` and `logp_sampled` are the server's. Under a law other than the model's own and greedy ones both
        are nan: a server does not say whether its log-probabilities are those before or after the law
        (vLLM: --logprobs-mode). Charges `prefilled` (each unique context once, as a prefix cache does) and `sampled`.

        Raises UserError for hooks, for whatever the engine refuses, and for a server that cannot be reached, refuses,
        or whose answer is not exactly what was asked for.
        """
        limits, law = limits or self.limits, law or self.law
        if hooks:
            raise UserError(
                f"{self.endpoint} takes no hooks: stopping, forcing and rewinding need a policy that acts here"
            )
        laws.check(law)
        engine.check(self.limit, contexts, keys, limits)
        rooms = [min(limits.max_tokens, self.limit - len(c)) for c in contexts]
        asked = [i for i, room in enumerate(rooms) if room]
        bodies = [self._body(contexts[i], keys[i], rooms[i], limits, law) for i in asked]
        answers = self.endpoint.ask("/v1/completions", bodies, self.concurrency) if asked else []
        calls = [replace(given_call(self.name, c, ()), law=law, stop="context") for c in contexts]
        for i, answer in zip(asked, answers, strict=True):
            calls[i] = self._call(np.asarray(contexts[i], np.int32), answer, rooms[i], limits, law)
        if self.meter is not None:
            unique = {np.asarray(contexts[i], np.int32).tobytes(): len(contexts[i]) for i in asked}
            self.meter.charge("prefilled", sum(unique.values()))
            self.meter.charge("sampled", sum(len(c.out) for c in calls))
        return calls

    def _body(self, context: Ids, keys: Keys, room: int, limits: Limits, law: Law) -> dict[str, Any]:
        """Everything that bends the law is named, since a server's defaults come from the model's own folder."""
        return {
            "model": self.model,
            "prompt": [int(t) for t in context],
            "max_tokens": room,
            "seed": keys.at("tokens").digest() % SEEDS,
            "temperature": law.temperature,
            "top_p": law.top_p,
            "top_k": law.top_k,
            "min_p": law.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(limits.stop),
            "stop_token_ids": sorted(self.tokenizer.stops | limits.stop_ids),
            "ignore_eos": True,  # only the stops above end an answer
            "logprobs": 0,  # the drawn token's alone
            "return_token_ids": True,
        }

    def _call(self, context: Ids, answer: Any, room: int, limits: Limits, law: Law) -> Call:
        choice = _choice(answer)
        if choice is None:
            raise self._refuse("does not hold exactly one choice", NEEDS)
        out, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        if not _whole(out) or not _whole(prompt):
            raise self._refuse("holds no token ids (return_token_ids)", NEEDS)
        if prompt != context.tolist():
            raise self._refuse("is for another prompt than the one sent", "does it cut prompts, or add tokens to them?")
        found = choice.get("logprobs")
        logp = found.get("token_logprobs") if isinstance(found, Mapping) else None
        if not isinstance(logp, list):
            raise self._refuse("holds no log-probabilities (logprobs)", NEEDS)
        if len(logp) != len(out):
            raise self._refuse(f"holds {len(logp)} log-probabilities for {len(out)} tokens", NEEDS)
        if len(out) > room:
            raise self._refuse(f"holds {len(out)} tokens where at most {room} were asked for", NEEDS)
        size = self.tokenizer.size
        if wrong := [t for t in out if not 0 <= t < size]:
            raise self._refuse(
                f"holds the token {wrong[0]} of a vocabulary of {size}", "name the policy that it serves"
            )
        for value in logp:
            if not (isinstance(value, int | float) and NEVER < value <= ROUNDING and math.isfinite(value)):
                raise self._refuse(f"holds the log-probability {value}", "its numbers are not sound")
        stop = self._stop(out, choice, room, limits)
        raw = np.minimum(np.asarray(logp, np.float32), 0)
        sampled = raw
        if not law.raw:
            greedy = law.temperature == 0  # what is certain, whatever the server reports
            sampled = np.full_like(raw, 0.0 if greedy else np.nan)
            raw = raw if greedy else sampled
        author = np.full(len(out), Author.SELF, np.int8)
        return Call(self.name, context, np.asarray(out, np.int32), author, raw, sampled, law, stop=stop)

    def _stop(self, out: Sequence[int], choice: Mapping[str, Any], room: int, limits: Limits) -> str:
        """Why the row ended, in the engine's words."""
        stops = self.tokenizer.stops | limits.stop_ids
        if early := [t for t in out[:-1] if t in stops]:
            raise self._refuse(f"goes on after the stop token {early[0]} (stop_token_ids)", NEEDS)
        if out and out[-1] in stops:
            return "stop"
        if limits.stop and out:
            decode = self.tokenizer.decode
            before = decode(out[:-1])
            if early_text := [s for s in limits.stop if s in before]:
                raise self._refuse(f"goes on after the stop string {early_text[0]!r} (stop)", NEEDS)
            if choice.get("stop_reason") in limits.stop or completes(decode, np.asarray(out, np.int32), limits.stop):
                return "stop"
        if len(out) == room:
            return "length" if room == limits.max_tokens else "context"
        why = choice.get("finish_reason")
        raise self._refuse(
            f"ends after {len(out)} of {room} tokens, at none of the policy's stops (finish_reason {why!r})",
            "start vLLM with --generation-config vllm, so that it has no stops of its own",
        )

    def _refuse(self, what: str, remedy: str) -> UserError:
        return UserError(f"the answer of {self.endpoint} {what}: {remedy}")


def connect(
    server: Server,
    tokenizer: Tokenizer,
    *,
    name: str = "actor",
    law: Law = RAW,
    limits: Limits | None = None,
    meter: Meter | None = None,
    limit: int | None = None,
    timeout: float = 600.0,
) -> ServerAgent:
    """The agent that acts through `server`, whose key is read from the environment (ETUDE_API_KEY).

    `limit` is the policy's own longest sequence, where it has one; the server's holds where it is shorter. `timeout` is
    in seconds, of a whole request. Raises UserError where the server cannot be reached, lacks the model, or does not
    say how long its sequences may be while `limit` is not given.
    """
    if server.url is None:
        raise UserError("a server needs a url, such as --server.url http://127.0.0.1:8000")
    endpoint = Endpoint(server.url, os.environ.get(KEY, "").strip() or None, timeout)
    model = endpoint.model(server.model)
    known = [n for n in (limit, model.limit) if n is not None]
    if not known:
        raise UserError(f"{endpoint} does not say how long sequences may be (max_model_len of {model.id}): {NEEDS}")
    return ServerAgent(
        endpoint, model.id, tokenizer, min(known), name, law, limits or Limits(), meter, server.concurrency
    )


def _choice(answer: Any) -> Mapping[str, Any] | None:
    """The only choice of an answer; None if it is not of that form."""
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], Mapping):
        return choices[0]
    return None


def _whole(ids: Any) -> TypeGuard[list[int]]:
    return isinstance(ids, list) and all(type(t) is int for t in ids)
