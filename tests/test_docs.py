"""The documentation does what it says: its Python runs, its commands parse, its docstrings' examples hold."""

import doctest
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import etude
from etude.app.main import COMMANDS, main
from etude.methods.catalog import CATALOG

CHECKOUT = Path(etude.__file__).parents[2]
DOCS = CHECKOUT / "docs"
PAGES = [CHECKOUT / "README.md", *sorted(DOCS.glob("[a-zS]*.md")), *sorted((DOCS / "how-to").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


class Parsed(Exception):
    """The flags were understood."""


def commands():
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.splitlines():
                if line.startswith("etude ") and not line.startswith("etude:"):
                    yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.stem}: {line}")


@pytest.mark.parametrize("words", commands())
def test_the_commands_of_the_pages_are_understood(words, monkeypatch):
    module = import_module(f"etude.app.{COMMANDS[words[0]][0]}")
    parse = module.parse

    def only_parse(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(module, "parse", only_parse)
    with pytest.raises(Parsed):
        main(words)


def test_examples_in_docstrings_hold():
    tried = 0
    for info in pkgutil.walk_packages(etude.__path__, "etude."):
        tried += doctest.testmod(import_module(info.name), raise_on_error=True).attempted
    assert tried >= 10


def test_the_site_builds_without_a_dead_link(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=CHECKOUT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for slug, entry in CATALOG.items():
        page = tmp_path / "site" / "methods" / f"{slug}.html"
        assert page.is_file() == entry.works
    text = (tmp_path / "site" / "methods" / "nft.html").read_text()
    assert "smallest value of the negative ratio" in text  # a hyperparameter, by its comment
    assert "right answers alone" in text  # an endpoint
    assert "https://fonts." not in text


def test_the_table_of_the_scale_guide_is_what_its_script_prints():
    said = subprocess.run([sys.executable, DOCS / "scale.py"], capture_output=True, text=True, check=True).stdout
    table, _, answers = said.strip().partition("\n\n")
    page = (DOCS / "SCALE.md").read_text()
    assert table in page
    assert answers.rpartition(", ")[2] in page
