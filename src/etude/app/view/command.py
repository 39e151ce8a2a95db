"""`etude view`: runs, trajectories and the catalogue in a browser."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from etude.app.flags import parse
from etude.experience.errors import UserError, missing

HOST = "127.0.0.1"


@dataclass(frozen=True)
class ViewFlags:
    """Look at runs in a browser. The server reads only, and only this machine can ask it."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = "runs"  # every run below it
    port: int = 7878  # 0: any that is free
    open: bool = False  # open the browser too


def view(argv: Sequence[str]) -> None:
    """Serves until it is interrupted."""
    flags = parse(ViewFlags, argv, "view")
    folder = Path(flags.folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {flags.folder}: name one that holds runs, as in `etude view runs`")
    try:
        import uvicorn

        from etude.app.view.server import application
    except ImportError as error:
        raise missing(error.name or "starlette", "view", "etude view") from None
    listening = listen(flags.port)
    url = f"http://{HOST}:{listening.getsockname()[1]}/"
    print(f"{url} shows the runs below {flags.folder}; Ctrl-C ends it", flush=True)
    if flags.open:
        import webbrowser

        webbrowser.open(url)
    config = uvicorn.Config(
        application(folder), log_level="warning", server_header=False, timeout_graceful_shutdown=1, lifespan="off"
    )
    with listening, suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def listen(port: int) -> socket.socket:
    """A socket that hears this machine only. Raises UserError where the port cannot be had."""
    if not 0 <= port < 2**16:
        raise UserError(f"port must lie between 0 and 65535, not {port}")
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen()
    except OSError as error:
        found.close()
        raise UserError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None
    return found
