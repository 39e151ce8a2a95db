"""Asking `etude view` for pages without a browser, and reading them."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs starlette: pip install 'etude[view]'")
pytest.importorskip("httpx2", reason="needs httpx2: pip install 'etude[dev]'")
from starlette.testclient import TestClient

from etude.app.view.server import application
from view_stores import forked, hostile, plain

NAME = "<i>&amp;'x' {{1237*11}}"  # of the hostile run


def client(folder) -> TestClient:
    return TestClient(application(folder), base_url="http://127.0.0.1:7878", raise_server_exceptions=False)


def runs_in(folder: Path) -> Path:
    """A folder of four runs: one, deep/two, tree and the hostile one."""
    plain(folder / "one")
    plain(folder / "deep" / "two", steps=4, finished=False)
    hostile(folder / NAME)
    forked(folder / "tree")
    return folder


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.text = "".join(self.pieces)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.pieces.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def got(web, url: str) -> Page:
    answer = web.get(url)
    assert answer.status_code == 200, answer.text
    return Page(answer.text)


def said(page: Page) -> str:
    return " ".join(" ".join(page.pieces).split())


def harmless(page: Page) -> None:
    """Only our own elements and attributes, and no text that has become one."""
    assert {s.get("src") for s in page.all("script")} <= {"/static/view.js"}
    assert not page.all("img")
    assert not page.all("i")
    for tag, attrs in page.elements:
        assert not [a for a in attrs if a.startswith("on") or a in ("style", "srcdoc", "autofocus")], (tag, attrs)
        for name in ("href", "src", "action"):
            assert not (attrs.get(name) or "").lower().lstrip().startswith(("javascript", "data")), (tag, attrs)
    assert "13607" not in page.text
    assert not {"\u202e", "\x1b"} & set(page.text)


# What in a page is too faint to read, as a script for a browser.
CONTRAST = """() => {
  const bright = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(c)) return c;
    }
    return "rgb(255, 255, 255)";
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const svg = e instanceof SVGElement, style = getComputedStyle(e);
    const ink = bright(svg ? style.fill : style.color), back = bright(paper(e));
    const ratio = (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
    if (ratio < 4.5 && e.tagName !== "title") poor.push([e.tagName, e.className, e.textContent.slice(0, 30), ratio]);
  }
  return poor;
}"""
