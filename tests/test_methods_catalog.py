import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from etude.experience.errors import UserError
from etude.methods.api import describe
from etude.methods.catalog import CATALOG, FAMILIES, entry, load
from etude.methods.method import Method

WORKING = [slug for slug, row in CATALOG.items() if row.works]
BASELINES = {"sft", "rft", "grpo", "dr-grpo", "dapo", "rloo", "group-rl", "dpo"}


def test_the_catalogue_holds_95_papers_and_the_baselines():
    numbered = [row.number for row in CATALOG.values() if row.number is not None]
    assert numbered == list(range(1, 96))
    assert {slug for slug, row in CATALOG.items() if row.number is None} == BASELINES
    assert len(CATALOG) == 95 + len(BASELINES)  # a slug given twice would hide a row
    assert set(WORKING) >= BASELINES


def test_every_row_is_whole():
    for slug, row in CATALOG.items():
        assert slug == row.slug == slug.lower()
        assert slug.replace("-", "_").isidentifier()
        assert row.family in FAMILIES
        assert row.name
        assert row.title
        if row.number is not None:
            assert row.arxiv
        if row.arxiv:
            year, _, serial = row.arxiv.partition(".")
            assert len(year) == 4
            assert len(serial) in (4, 5)
            assert (year + serial).isdigit()
            assert 0 <= row.year - (2000 + int(year[:2])) <= 1  # put there, and perhaps published later
    papers = [row.arxiv for row in CATALOG.values() if row.arxiv]
    assert len(set(papers)) == len(papers)


@pytest.mark.parametrize("slug", WORKING)
def test_a_working_method_is_there_and_names_its_source(slug):
    module = import_module(CATALOG[slug].module)
    assert isinstance(module.METHOD, Method)
    assert module.METHOD.slug == slug
    assert module.__doc__
    assert CATALOG[slug].arxiv in module.__doc__
    for line in module.__doc__.splitlines():
        assert len(line) <= 120
    assert module.METHOD.config.__doc__
    shown = describe(slug)
    json.dumps(shown)
    assert shown["works"]
    assert shown["options"]


def test_unknown_and_planned_methods_are_one_line():
    with pytest.raises(UserError, match=r"unknown method 'gpro': did you mean .*grpo"):
        entry("gpro")
    planned = next(slug for slug, row in CATALOG.items() if not row.works) if len(WORKING) < len(CATALOG) else None
    if planned:
        with pytest.raises(UserError, match=f"method '{planned}' is planned"):
            load(planned)


def test_listing_imports_neither_torch_nor_the_methods():
    script = (
        "import sys; from etude.methods.catalog import CATALOG; works = [r.works for r in CATALOG.values()]\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'numpy', 'reasoning_gym')]\n"
        "methods = [r.module for r in CATALOG.values() if r.module in sys.modules]\n"
        "print(len(works), heavy, methods)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == [str(len(CATALOG)), "[] []\n"]


def test_the_readme_names_every_method_and_which_of_them_work():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = readme.split("## The catalogue")[1].split("\n## ")[0]
    for row in CATALOG.values():
        assert re.search(rf"[ *]{re.escape(row.slug)}[ ,*]", table), row.slug
        assert (f"**{row.slug}**" in table) == row.works, row.slug
