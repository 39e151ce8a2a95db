"""A server that acts with what the learner learns: the adapter, loaded anew whenever it has changed.

Every version has a name of its own on the server. Loading in place under one name would be shorter, but vLLM keeps
prefixes by the adapter's name, and would go on from those of the old weights (vllm-project/vllm issue 42125).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from secrets import token_hex
from typing import Any

import numpy as np
from safetensors import SafetensorError

from etude.acting.server import ServerAgent, connect
from etude.experience.endpoint import Server
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Limits
from etude.experience.types import Call, Ids, Law
from etude.feedback.score import score
from etude.learning.run import Run
from etude.policies.adapters import adapter_off, adapter_tensors, save_adapter

SAMPLE = 8  # rows that tell whether the server acts with the policy's weights
GAP = 0.5  # nats a token that its log-probabilities may differ from the policy's, in the mean of their sizes
NOTICED, CLOSER = 0.01, 3.0  # nats, and a ratio of two such means


class ServedAdapter:
    """The adapter of `policy` on a server, in PEFT's format in the run's folder `server/`, which both must see.

    Loads the adapter at once. Raises UserError where the server cannot be used (see `acting.server.connect`) or
    does not load it.
    """

    def __init__(self, server: Server, policy: Any, run: Run) -> None:
        self.policy, self.run, self.home = policy, run, run.folder / "server"
        self.agent = connect(server, policy.tokenizer, limit=policy.limit)
        self.name = ""  # of the version that is loaded
        self._digest = b""
        self._checked = False
        for left in sorted(self.home.glob("etude-*")):  # by a run that was cut
            self._drop(left.name)
        shutil.rmtree(self.home, ignore_errors=True)
        self.follow()

    def actor(self, law: Law, limits: Limits, meter: Meter | None) -> ServedActor:
        """The policy as an agent that acts on the server."""
        return ServedActor(self, law, limits, meter)

    def follow(self) -> str:
        """The name of the policy's adapter on the server, loaded if it is not the one that is there. Raises UserError
        if the server does not load it, or the disk refuses."""
        digest = self._read()
        if digest != self._digest:
            old, new = self.name, f"etude-{token_hex(8)}"
            self._write(new)
            if old:  # first: a server may have room for one
                self._drop(old)
            self._load(new)
            self.name, self._digest, self._checked = new, digest, False
        return self.name

    def check(self, calls: Sequence[Call], meter: Meter | None) -> None:
        """Compares a few of the first calls of each version with the policy's own scores of them, and logs
        `server_gap`, the mean |difference| of their log-probabilities in nats. Charges `scored`.

        Raises UserError where another model acts (a gap above `GAP`), or the model without the adapter (a gap above
        `NOTICED`, and above `CLOSER` times the one to the policy without its adapter).
        """
        known = [c for c in calls if len(c.out) and not np.isnan(c.logp_raw).any()]
        if self._checked or not known:
            return
        few = known[:: -(-len(known) // SAMPLE)]
        gap = self._gap(few, meter)
        with adapter_off(self.policy):
            bare = self._gap(few, meter)
        self.run.log({"server_gap": gap})
        endpoint, model = self.agent.endpoint, self.agent.model
        if not gap <= GAP:
            raise UserError(
                f"{endpoint} gives its tokens other log-probabilities than the policy, by {gap:.2f} nats in the mean "
                f"(at most {GAP}): is its model {model!r} of the same checkpoint as --policy?"
            )
        if gap > max(NOTICED, CLOSER * bare):
            raise UserError(
                f"{endpoint} acts as the policy does without its adapter ({bare:.3f} nats apart, with it {gap:.3f}): "
                "it answered that the adapter was loaded, but does not use it"
            )
        self._checked = True

    def _gap(self, calls: Sequence[Call], meter: Meter | None) -> float:
        own = score(self.policy, [c.context for c in calls], [c.out for c in calls], meter=meter)
        return float(np.abs(np.concatenate([c.logp_raw for c in calls]) - np.concatenate(own)).mean(dtype=np.float64))

    def _read(self) -> bytes:
        """A digest of the adapter's weights, so that whatever changes them is noticed."""
        digest = blake2b(digest_size=16)
        for name, tensor in sorted(adapter_tensors(self.policy).items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()

    def _write(self, name: str) -> None:
        """The adapter as a folder that appears whole or not at all."""
        scratch = self.home / f".{name}.partial"
        try:
            save_adapter(self.policy, scratch)
            scratch.rename(self.home / name)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise UserError(f"cannot write the adapter to {self.home}: {error}") from None

    def _load(self, name: str) -> None:
        path = (self.home / name).resolve()
        response = self.agent.endpoint.send(
            "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}
        )
        if not response.is_success:
            said = self.agent.endpoint.said(response)
            raise UserError(
                f"{self.agent.endpoint} did not load the adapter in {path} ({said}): start vLLM where it can read that "
                "folder, with --enable-lora, a --max-lora-rank of at least --lora.rank, and in its environment "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )

    def _drop(self, name: str) -> None:
        """Has the server forget a version that nobody asks for any more (it may have forgotten it already)."""
        self.agent.endpoint.send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        shutil.rmtree(self.home / name, ignore_errors=True)


class ServedActor:
    """Fulfils `experience.protocols.Agent`: acts with the policy's weights as they are now."""

    def __init__(self, adapter: ServedAdapter, law: Law, limits: Limits, meter: Meter | None) -> None:
        agent = adapter.agent
        self.adapter, self.law, self.limits, self.meter = adapter, law, limits, meter
        self.name, self.tokenizer, self.limit = agent.name, agent.tokenizer, agent.limit

    def generate(
        self,
        contexts: Sequence[Ids],
        keys: Sequence[Keys],
        limits: Limits | None = None,
        law: Law | None = None,
        hooks: Sequence[Any] = (),
    ) -> list[Call]:
        """See `ServerAgent.generate`."""
        agent: ServerAgent = replace(self.adapter.agent, model=self.adapter.follow(), meter=self.meter)
        calls = agent.generate(contexts, keys, limits or self.limits, law or self.law, hooks)
        self.adapter.check(calls, self.meter)
        return calls
