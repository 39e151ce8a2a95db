"""The application: what is answered to whom. Reads only; speaks only to this machine.

Every answer carries a policy under which a page runs no script but ours, and text from runs is escaped by the
templates: what a model wrote is never more than text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from etude.app.view import pages
from etude.app.view.runs import Refused, Runs
from etude.experience.errors import UserError

HERE = Path(__file__).parent
HOSTS = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def application(folder: Path) -> ASGIApp:
    """The views of all runs below a folder."""
    app = Starlette(
        routes=[
            Route("/", _page(pages.index)),
            Route("/run/{path:path}", _page(pages.run)),
            Route("/compare", _page(pages.compare)),
            Route("/catalogue", _page(pages.catalogue)),
            Route("/catalogue/{slug}", _page(pages.method)),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        exception_handlers={HTTPException: _failed, Exception: _failed},
    )
    app.state.runs = Runs(folder)
    return Guard(app)


class Guard:
    """Lets through only questions (GET, HEAD) that were put to this machine by its own name, so that no foreign
    page can read runs through a name that it points here; and signs every answer with HEADERS."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items()),
                ]  # fmt: skip
            await send(message)

        answer: ASGIApp = self.app
        if scope["method"] not in ("GET", "HEAD"):
            answer = PlainTextResponse("this server only answers questions: GET\n", 405, {"allow": "GET, HEAD"})
        elif _host(scope) not in HOSTS:
            answer = PlainTextResponse(f"this server answers only to {' and '.join(HOSTS)}\n", 400)
        await answer(scope, receive, signed)


def _host(scope: Scope) -> str:
    """The host that was asked, without its port; empty where it is not named exactly once."""
    named = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    return named[0].partition(":")[0].lower() if len(named) == 1 else ""


def _page(view: Callable[[Request], str]) -> Callable[[Request], Response]:
    """A view as an endpoint, which Starlette runs in a thread; what it refuses is a page too."""

    def answer(request: Request) -> Response:
        try:
            return HTMLResponse(view(request))
        except Refused as error:
            return _error(error.status, str(error))
        except UserError as error:
            return _error(500, str(error))

    return answer


def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _error(error.status_code, f"there is no page {request.url.path}")
    return _error(500, "this page could not be made: the terminal of `etude view` says why")


def _error(status: int, line: str) -> Response:
    return HTMLResponse(pages.error(status, line), status)
