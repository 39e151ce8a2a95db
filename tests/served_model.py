"""A small server that speaks vLLM's protocol over our own policy and engine, and the faults a server may have.

Only what `acting.server` may rely on is there: /v1/models, /v1/completions, and loading and unloading adapters.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest

from etude.acting.engine import generate
from etude.acting.text import completes
from etude.experience.keys import Keys
from etude.experience.protocols import Limits
from etude.experience.types import Law
from etude.policies.adapters import load_adapter

uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'etude[dev]'")
starlette = pytest.importorskip("starlette", reason="needs starlette: pip install 'etude[dev]'")
pytest.importorskip("httpx", reason="needs httpx: pip install 'etude[server]'")

from starlette.applications import Starlette  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402
from starlette.routing import Route  # noqa: E402


class ServedModel:
    """`policy` as the model "base". `fault` is changed by tests: a name that a request meets, or ""."""

    def __init__(self, policy, key=None, limit=None, lora=True):
        self.policies = {"base": policy}
        self.roots = {}
        self.key, self.limit, self.lora = key, limit or policy.limit, lora
        self.fault = ""
        self.failures = 0  # of requests that are still to fail, each once
        self.delay = lambda i: 0.0  # seconds before the i-th request is answered
        self.seen = []  # bodies of completions
        self.headers = []
        self.used = Counter()  # by model: completions
        self.loads = []
        self.inside = self.most = 0  # requests at once

    async def models(self, request):
        if denied := self._denied(request):
            return denied
        if self.fault == "no models":
            return JSONResponse({"hello": "world"})
        cards = [
            {"id": name, "object": "model", "max_model_len": self.limit if name == "base" else None,
             "parent": None if name == "base" else "base"}
            for name in self.policies
        ]  # fmt: skip
        if self.fault == "two models":
            cards.append({"id": "other", "parent": None})
        if self.fault == "no length":
            cards[0]["max_model_len"] = None
        return JSONResponse({"object": "list", "data": cards})

    async def load(self, request):
        if not self.lora:
            return JSONResponse({"detail": "Not Found"}, 404)
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if name in self.policies:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        base = deepcopy(self.policies["base"])
        stale = self.fault == "stale adapter" and self.loads
        self.policies[name] = base if stale else load_adapter(base, path)
        self.loads.append(name)
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request):
        if self.policies.pop((await request.json())["lora_name"], None) is None:
            return refusal(404, "The lora adapter cannot be found.")
        return Response("Success")

    async def complete(self, request):
        self.headers.append(dict(request.headers))
        if denied := self._denied(request):
            return denied
        body = await request.json()
        if self.failures:
            self.failures -= 1
            if self.fault == "reset":
                transport = request._receive.__self__.transport
                transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                transport.abort()  # the peer hears a reset
            return refusal(429 if self.fault == "too many" else 503, "later, please")
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            self.seen.append(body)
            await asyncio.sleep(self.delay(len(self.seen)))
            return self._answer(body)
        finally:
            self.inside -= 1

    def _denied(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return refusal(401, f"wrong key {request.headers.get('authorization')}")
        return None

    def _answer(self, body):
        policy = self.policies.get(body["model"])
        if policy is None:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > self.limit:
            return refusal(400, "maximum context length exceeded")
        self.used[body["model"]] += 1
        law = Law(body["temperature"], body["top_k"], body["top_p"], body["min_p"])
        stop_ids = frozenset(body["stop_token_ids"])
        call = generate(
            policy, [np.array(body["prompt"], np.int32)], [Keys(body["seed"])],
            Limits(body["max_tokens"], tuple(body["stop"]), stop_ids), law,
        )[0]  # fmt: skip
        out, text = call.out.tolist(), policy.tokenizer.decode(call.out.tolist())
        by_text = next((s for s in body["stop"] if s and completes(policy.tokenizer.decode, call.out, [s])), None)
        choice = {
            "index": 0,
            "text": text,
            "finish_reason": "stop" if call.stop == "stop" else "length",
            "stop_reason": out[-1] if out[-1] in stop_ids else by_text,
            "logprobs": {"token_logprobs": call.logp_raw.astype(float).tolist(), "tokens": [""] * len(out)},
            "token_ids": out if body.get("return_token_ids") else None,
            "prompt_token_ids": body["prompt"] if body.get("return_token_ids") else None,
        }
        return self._spoilt({"object": "text_completion", "model": body["model"], "choices": [choice]}, choice)

    def _spoilt(self, answer, choice):
        logp = choice["logprobs"]["token_logprobs"]
        match self.fault:
            case "refused":
                return refusal(400, "no such parameter\nas that")
            case "broken":
                return Response("Internal Server Error", 500)
            case "no json":
                return Response("<html>\nhello</html>")
            case "a list":
                return JSONResponse([1])
            case "two choices":
                answer["choices"] *= 2
            case "no ids":
                del choice["token_ids"], choice["prompt_token_ids"]
            case "null ids":
                choice["token_ids"] = None
            case "other prompt":
                choice["prompt_token_ids"] = [0, *choice["prompt_token_ids"]]
            case "no logprobs":
                choice["logprobs"] = None
            case "fewer logprobs":
                logp.pop()
            case "null logprob":
                logp[0] = None
            case "nan logprob":
                logp[0] = float("nan")
            case "positive logprob":
                logp[0] = 0.5
            case "never logprob":
                logp[0] = -9999.0
            case "rounded logprob":
                logp[0] = 1e-6
            case "beyond vocabulary":
                choice["token_ids"][0] = 105
            case "negative id":
                choice["token_ids"][0] = -1
            case "too long":
                choice["token_ids"] += [50] * 100
                logp += [-1.0] * 100
            case "cut short":
                choice.update(token_ids=choice["token_ids"][:1], finish_reason="stop")
                del logp[1:]
            case "runs on":
                choice["token_ids"][0] = 2
        return Response(json.dumps(answer), media_type="application/json")


def refusal(status, message):
    return JSONResponse({"error": {"message": message, "type": "Error", "code": status}}, status)


@contextmanager
def serving(model: ServedModel):
    """Its URL while it runs in a thread of this process."""
    routes = [
        Route("/v1/models", model.models),
        Route("/v1/completions", model.complete, methods=["POST"]),
        Route("/v1/load_lora_adapter", model.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", model.unload, methods=["POST"]),
    ]
    with socket.socket() as heard:
        heard.bind(("127.0.0.1", 0))
        heard.listen(128)
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off", http="h11")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [heard]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{heard.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)
