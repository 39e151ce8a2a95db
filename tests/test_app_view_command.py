"""The command `etude view`: serving, misuse, what it imports and what is packaged."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import pytest

from app_cli import refused, runner, spawn
from etude.app.view import command
from view_pages import runs_in


@pytest.fixture
def etude(capfd):
    return runner(capfd)


def asked(url: str, path: str) -> tuple[int, str]:
    """A server's status and whole answer to a path that no client has tidied."""
    host = url.removeprefix("http://").rstrip("/")
    with socket.create_connection(host.split(":"), timeout=10) as line:
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: line.recv(65536), b"")).decode()
    return int(answer.split()[1]), answer


def test_the_command_serves_and_ends_with_an_interrupt(tmp_path):
    server = spawn("view", runs_in(tmp_path), "--port", "0")
    try:
        line = server.stdout.readline()
        url = re.match(r"(http://127\.0\.0\.1:\d+/) shows the runs below", line)[1]
        status, text = asked(url, "/")
        assert status == 200
        assert "deep/two" in text
        assert "uvicorn" not in text
        for path in ("/run/../../etc/passwd", "/run/one/../../../etc/passwd", "/static/../server.py", "//etc/passwd"):
            assert asked(url, path)[0] == 404
    finally:
        server.send_signal(2)
    assert server.wait(10) == 0
    assert server.stderr.read() == ""


def test_only_this_machine_is_heard():
    with command.listen(0) as heard:
        assert heard.getsockname()[0] == "127.0.0.1"


def test_misuse_is_a_line(etude, tmp_path):
    assert "there is no folder" in refused(etude("view", tmp_path / "none"))
    assert "port must lie between" in refused(etude("view", tmp_path, "--port", "70000"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be used (Address already in use)" in refused(
            etude("view", tmp_path, "--port", taken.getsockname()[1])
        )


def test_a_missing_package_is_a_line(tmp_path):
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from etude.app.main import main; sys.exit(main(['view', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "etude: etude view needs the package uvicorn: pip install 'etude[view]'\n"


def test_the_server_needs_nothing_heavy():
    code = (
        "import sys; from etude.app.view.server import application\n"
        "heavy = {'torch', 'transformers', 'scipy'} & sys.modules.keys(); sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_pages_need_is_packaged():
    import tomllib

    from etude.app.view.server import HERE

    project = tomllib.loads((HERE.parents[3] / "pyproject.toml").read_text())
    packaged = project["tool"]["setuptools"]["package-data"]["etude"]
    for name in ("templates", "static"):
        assert f"app/view/{name}/*" in packaged
        assert list((HERE / name).iterdir())
