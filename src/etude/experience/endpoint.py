"""An OpenAI-compatible server over HTTP: its models, many requests at once, and refusals of one line.

What passes is tried again a few times, later each time: a connection that breaks, and the answers 429, 502 and 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from etude.experience.errors import UserError, missing

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
KEY = "ETUDE_API_KEY"  # the environment variable; a key is never an option, since options are written down
TRIES = 5
BACKOFF = 0.5  # seconds before the second try, doubled for each further one
BUSY = (429, 502, 503)
CONNECT = 10.0  # seconds to open a connection


@dataclass(frozen=True)
class Server:
    """A server that acts in the policy's place (vLLM's protocol); its API key, if any, is in ETUDE_API_KEY."""

    url: str | None = None  # such as http://127.0.0.1:8000; None: the policy acts itself
    model: str | None = None  # as the server calls it; None: the only one it serves
    concurrency: int = 64  # requests that are under way at once

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise UserError(f"concurrency must be at least 1, not {self.concurrency}")
        if self.url is not None:
            base_url(self.url)
        elif self.model is not None:
            raise UserError(f"model {self.model!r} of a server needs the server's url too")


@dataclass(frozen=True)
class Served:
    """A model as a server lists it."""

    id: str
    limit: int | None  # longest sequence, in tokens, where the server says
    parent: str | None  # the model that an adapter is on


class Endpoint:
    """A server by its URL, with or without `/v1`. Every method raises UserError, in one line, where the server cannot
    be reached, does not answer in `timeout` seconds, refuses the key, or fails for good.

    `options` is what the options are called that a refusal names. Raises UserError for a URL that is none, and where
    httpx is not installed.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0, options: str = "server") -> None:
        try:
            import httpx
        except ImportError:
            raise missing("httpx", "server", f"a {options} over HTTP") from None
        self.url, self.timeout, self.options = base_url(url), timeout, options
        self._key = key
        self._http = httpx
        self._trust = httpx.create_ssl_context()  # once: reading the certificates takes longer than a short answer

    def model(self, name: str | None) -> Served:
        """The model called `name`, or the only one that is no adapter. Raises UserError, with the names there are."""
        response = self.send("GET", "/v1/models", tries=1)
        try:
            cards = self.answer(response)["data"]
            found = {c["id"]: Served(c["id"], c.get("max_model_len"), c.get("parent")) for c in cards}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{self} lists no models at /v1/models: is it an OpenAI-compatible server?") from None
        names = ", ".join(sorted(found)) or "none"
        if name is None:
            own = [m for m in found.values() if m.parent is None]
            if len(own) != 1:
                raise UserError(f"{self} serves {names}: name the model with --{self.options}.model")
            return own[0]
        if name not in found:
            raise UserError(f"{self} has no model {name!r}: it serves {names}")
        model = found[name]
        if model.limit is None and model.parent in found:  # adapters are listed without it
            model = Served(model.id, found[model.parent].limit, model.parent)
        return model

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None, tries: int = TRIES) -> httpx.Response:
        """The answer to one request, whatever its status (but for a refused key, or one that stays busy)."""

        async def one() -> httpx.Response:
            async with self._client() as client:
                return await self._send(client, method, path, body, tries)

        return _run(one())

    def ask(self, path: str, bodies: Sequence[Mapping[str, Any]], concurrency: int) -> list[Any]:
        """What the server answers, as JSON, to each body in order; at most `concurrency` are under way at once.
        The first that fails ends them all."""

        found: list[Any] = [None] * len(bodies)
        left = iter(enumerate(bodies))

        async def worker() -> None:
            # A client each: a shared one would look through all its connections for every request.
            async with self._client() as client:
                for i, body in left:
                    found[i] = self.answer(await self._send(client, "POST", path, body, TRIES))

        async def every() -> list[Any]:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(bodies))):
                        group.create_task(worker())
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
            return found

        return _run(every())

    def answer(self, response: httpx.Response) -> Any:
        """A response's JSON. Raises UserError, with the server's own words, if it is a refusal or no JSON."""
        if not response.is_success:
            raise UserError(f"{self} refused {response.request.url.path} ({self.said(response)})")
        try:
            return response.json()
        except ValueError:
            text = " ".join(response.text.split())
            raise UserError(f"{self} answered {response.request.url.path} with what is not JSON: {text:.80}") from None

    def said(self, response: httpx.Response) -> str:
        """The status of a refusal and the server's own words, in one line."""
        try:
            found = response.json()
        except ValueError:
            found = response.text
        if isinstance(found, dict):
            found = found.get("error", found)
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail") or found
        return f"{response.status_code}: {self._plain(found)}"

    def __str__(self) -> str:
        return f"server {self.url}"

    def _client(self) -> httpx.AsyncClient:
        http = self._http
        return http.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            verify=self._trust,
            timeout=http.Timeout(self.timeout, connect=CONNECT),
        )

    async def _send(
        self, client: httpx.AsyncClient, method: str, path: str, body: Mapping[str, Any] | None, tries: int
    ) -> httpx.Response:
        http, failure = self._http, ""
        for attempt in range(tries):
            if attempt:
                await asyncio.sleep(BACKOFF * 2 ** (attempt - 1))
            try:
                response = await client.request(method, self.url + path, json=body)
            except (http.ReadTimeout, http.WriteTimeout):
                raise UserError(
                    f"{self} did not answer {path} within {self.timeout:g} s: lower --{self.options}.concurrency"
                ) from None
            except http.RequestError as error:
                failure = f"cannot be reached ({self._plain(error) or type(error).__name__})"
                continue
            if response.status_code in (401, 403):
                raise UserError(f"{self} refuses the API key ({self.said(response)}): set {KEY} to the one it wants")
            if response.status_code not in BUSY:
                return response
            failure = f"is busy ({self.said(response)})"
        raise UserError(f"{self} {failure}: see that it runs, as `vllm serve MODEL` does, and that the URL is right")

    def _plain(self, words: object) -> str:
        """At most 300 characters in one line, without the key, which servers like to repeat."""
        text = " ".join(str(words).split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


def base_url(url: str) -> str:
    """The URL that `/v1/...` is put after. Raises UserError if it is none, or holds a password.

    >>> base_url("http://127.0.0.1:8000/v1/")
    'http://127.0.0.1:8000'
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"a server's url is like http://127.0.0.1:8000, not {url!r}")
    if "@" in parts.netloc:
        raise UserError(f"a server's url may hold no password, since it is written down: put the key into {KEY}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end, also from within a loop that is running (a notebook's)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
