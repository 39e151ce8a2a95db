"""Pages that the site makes from the sources: the parts by stage, and one page a method. Nothing is written twice."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import etude
from etude.experience.claims import Claim
from etude.experience.plugs import Kind, names, plug
from etude.lab.evidence import read_evidence
from etude.lab.pages import method_evidence, table
from etude.methods.api import method
from etude.methods.catalog import CATALOG, FAMILIES, Entry, load, load_parts

SOURCE = Path(etude.__file__).parent
STAGES = {
    "experience": "what happened, and the protocols where stages meet",
    "worlds": "what hands out problems, takes actions and judges",
    "policies": "what acts and learns",
    "acting": "how policies are used to act",
    "feedback": "how good it was",
    "curation": "experience turned into training data",
    "objectives": "what a learner minimises",
    "curricula": "what comes next, and how fast",
    "audits": "what was learnt, what was lost",
    "learning": "optimiser steps, loops, runs, base models",
    "lab": "claims, comparisons, statistics, reports",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the methods that work into the navigation."""
    assert config.nav is not None
    pages = [{FAMILIES[f].capitalize(): [{e.name: _path(e)} for e in _working(f)]} for f in FAMILIES if _working(f)]
    config.nav.insert(-1, {"Methods": [{"All methods": "methods/index.md"}, *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    load_parts()
    files.append(File.generated(config, "parts.md", content=parts_page()))
    files.append(File.generated(config, "methods/index.md", content=index_page()))
    for entry in CATALOG.values():
        if entry.works:
            files.append(File.generated(config, _path(entry), content=method_page(entry)))
    return files


def parts_page() -> str:
    """The parts by stage: every module, and every plug that can be named on the command line."""
    out = [
        "# Parts",
        "",
        "What methods are made of, by the stage it belongs to. A folder imports only from those above it.",
    ]
    for stage, what in STAGES.items():
        out += ["", f"## {stage}", "", f"{what.capitalize()}.", ""]
        rows = [(f"`{p.stem}`", _first(ast.get_docstring(ast.parse(p.read_text())))) for p in _modules(stage)]
        out.append(table([("module", "holds"), *rows]))
    out += ["", "## Plugs", "", "Parts with a name, for `etude train group-rl --KIND NAME` (kind `acting` is `--act`)."]
    for kind in get_args(Kind):
        if names(kind):
            rows = [(f"`{n}`", _first(inspect.getdoc(plug(kind, n).build))) for n in names(kind)]
            out += ["", f"### {kind}", "", table([("name", "what it is"), *rows])]
    return "\n".join(out)


def index_page() -> str:
    """Every method of the catalogue by family."""
    out = ["# Methods"]
    for family, what in FAMILIES.items():
        rows = []
        for e in (e for e in CATALOG.values() if e.family == family):
            name = f"[{e.name}]({e.slug}.md)" if e.works else e.name
            source = f"[{e.title}](https://arxiv.org/abs/{e.arxiv})" if e.arxiv else e.title
            rows.append((str(e.number or ""), name, source, "works" if e.works else "planned"))
        out += ["", f"## {what.capitalize()}", "", table([("", "method", "source", "status"), *rows])]
    return "\n".join(out)


def method_page(entry: Entry) -> str:
    """A method: its text, hyperparameters, claim and evidence."""
    made, text = method(entry.slug), inspect.cleandoc(load(entry.slug).__doc__ or "")
    head, _, rest = text.partition("\n")
    out = [f"# {entry.name}", "", f"{head}", "", rest.strip()]
    if entry.arxiv:
        out += ["", f"Source: [{entry.title}](https://arxiv.org/abs/{entry.arxiv}), {entry.year}."]
    out += ["", "## Run it", "", f"```\netude train {entry.slug} {_where(made.claim)}\n```", ""]
    out += ["## Hyperparameters", "", table([("name", "default", "what it is"), *hyperparameters(made.config())])]
    for name, claim in made.claims.items():
        word = name.partition(".")[2]
        out += ["", f"## Claim{f': {word}' if word else ''}", "", *_claim(claim.plain()), "", "### Evidence", ""]
        found = read_evidence(name)
        out.append(method_evidence(found, f"../evidence/{name}") if found else "Not run yet.")
    return "\n".join(out)


def _where(claim: Claim | None) -> str:
    """Options that run a method where its claim runs it."""
    if claim is None:
        return "--world chain_sum --policy tiny"
    return f"--world {claim.world} --policy {claim.policy if isinstance(claim.policy, str) else claim.policy.policy}"


def _claim(claim: Mapping[str, Any]) -> list[str]:
    """A claim's arms, metrics and endpoints."""
    arms = [(a["name"], a["role"], f"`{a['method']}`", _options(a["options"])) for a in claim["arms"]]
    metrics = [
        (n, m["source"], f"`{m['of']}`", m["reduce"], m["better"], m["unit"]) for n, m in claim["metrics"].items()
    ]
    ends = [(e["name"], e["role"], " > ".join(e["arms"]), e["metric"], f"{e['margin']:g}") for e in claim["endpoints"]]
    return [
        claim["says"],
        "",
        table([("arm", "role", "method", "options"), *arms]),
        "",
        table([("metric", "from", "what", "reduced to", "better", "unit"), *metrics]),
        "",
        table([("endpoint", "role", "arms, the better first", "metric", "margin"), *ends]),
    ]


def hyperparameters(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, default, comment) of every field, nested ones as outer.inner, from the comments in the source."""
    comments: dict[str, str] = {}
    for cls in reversed(type(config).__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from hyperparameters(value, f"{prefix}{field.name}.")
        else:
            yield f"`{prefix}{field.name}`", f"`{value}`", comments.get(field.name, "")


def _modules(stage: str) -> list[Path]:
    return sorted(p for p in (SOURCE / stage).glob("*.py") if p.name != "__init__.py")


def _working(family: str) -> list[Entry]:
    return [e for e in CATALOG.values() if e.family == family and e.works]


def _path(entry: Entry) -> str:
    return f"methods/{entry.slug}.md"


def _first(text: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join((text or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.:]) ", paragraph, maxsplit=1)[0].rstrip(":")


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{k} = {v}" for k, v in options.items()) or "its own"
