"""Each view as HTML: what a request asks for, put into its template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request

from etude.app.view import curves, methods, tokens, trajectories
from etude.app.view.credit import advantages
from etude.app.view.runs import Config, Refused, Runs
from etude.app.view.text import FILTERS, plainly_visible
from etude.experience.store import Store
from etude.lab.charts import Line, sparkline

MOST_COMPARED = 12


def index(request: Request) -> str:
    """All runs."""
    found = _runs(request).summaries()
    lines = [(s, Markup(sparkline(s.curve, label="held-out accuracy so far", percent=True))) for s in found]
    return _render("runs.html", runs=lines, folder=_runs(request).folder)


def run(request: Request) -> str:
    """A run, or one of the pages below it."""
    runs, path = _runs(request), request.path_params["path"]
    if path in runs.names():
        return _run(request, runs, path)
    if path.endswith("/trajectories"):
        return _trajectories(request, runs, path.removesuffix("/trajectories"))
    name, word, id = path.rpartition("/trajectory/")
    if word and id.isdecimal() and len(id) < 19:
        return _trajectory(request, runs, name, int(id))
    raise Refused(404, f"there is no run {path!r} below {runs.folder}")


def compare(request: Request) -> str:
    """Curves of several runs together, and where they ended."""
    runs = _runs(request)
    chosen = list(dict.fromkeys(request.query_params.getlist("run")))
    if len(chosen) > MOST_COMPARED:
        raise Refused(400, f"at most {MOST_COMPARED} runs can be compared at once, not {len(chosen)}")
    logs = {name: _log(runs.path(name)) for name in chosen}
    evaluated = dict.fromkeys(n for log in logs.values() for n in log.measured())
    logged = dict.fromkeys(n for log in logs.values() for n in log.logged())
    offered = [*(f"held-out {n}" for n in evaluated), *logged]
    metric = request.query_params.get("metric") or (offered[0] if offered else "")
    if metric not in offered and metric:
        raise Refused(400, f"none of these runs has a metric {metric!r}")
    drawn = [curves.chart(_lines(logs, metric, over), metric, metric.removeprefix("held-out "), over)
             for over in curves.AXES] if metric else []  # fmt: skip
    rows = [(runs.summary(name), log, {n: log.last(n) for n in evaluated}) for name, log in logs.items()]
    shown = [n for n in curves.FIRST if n in logged]
    return _render("compare.html", rows=rows, metric=metric, offered=offered, charts=drawn, evaluated=list(evaluated),
                   logged=shown, others=[n for n in runs.names() if n not in logs])  # fmt: skip


def catalogue(request: Request) -> str:
    """All methods by family."""
    return _render("catalogue.html", families=methods.families())


def method(request: Request) -> str:
    """One method."""
    return _render("method.html", **methods.describe(request.path_params["slug"]))


def error(status: int, line: str) -> str:
    """A page that could not be shown."""
    return _render("error.html", status=status, line=line)


def _run(request: Request, runs: Runs, name: str) -> str:
    folder, summary = runs.path(name), runs.summary(name)
    if summary.state == "damaged":
        raise Refused(500, summary.error)
    log = _log(folder)
    with Store(folder, read_only=True) as store:
        events, total = store.events(), store.count()
    template = "live.html" if request.query_params.get("part") == "live" else "run.html"
    return _render(template, run=summary, log=log, charts=curves.charts(log), events=events, total=total,
                   budget=summary.config.part("budget"), options=methods.flat(summary.config.all))  # fmt: skip


def _trajectories(request: Request, runs: Runs, name: str) -> str:
    asked = trajectories.Filter.read(request.query_params)
    with Store(runs.path(name), read_only=True) as store:
        found = trajectories.page(store, asked)
        measured = dict.fromkeys(e["metric"] for e in store.evaluations())
    known = {m.partition("/")[2] for m in measured if m.startswith("accuracy/")} | {r["category"] for r in found.rows}
    return _render("trajectories.html", name=name, filter=asked, page=found, categories=sorted(known))


def _trajectory(request: Request, runs: Runs, name: str, id: int) -> str:
    folder = runs.path(name)
    config, colour = Config.read(folder), request.query_params.get("colour", "logp")
    if colour not in tokens.SCALES:
        raise Refused(400, f"tokens are coloured by {', '.join(tokens.SCALES)}, not by {colour!r}")
    with Store(folder, read_only=True) as store:
        found = store.trajectories(id=id)
        if not found:
            raise Refused(404, f"run {name!r} has no trajectory {id}")
        row, t = found[0], store.load(id)
        group = {
            r["id"]: r for r in store.trajectories(stage=row["stage"], step=row["step"], grp=row["grp"], limit=None)
        }
        given, why = advantages(store, config, row) if colour == "advantage" else ({}, "")
        tree = trajectories.tree(group, store.forks(row["stage"], row["step"]), id)
        beside = [n for n in (id - 1, id + 1) if store.count(id=n)]
        reader = tokens.Reader.of(folder, config)
        turns = tokens.turns(t, reader, colour, given.get(id))  # while the store's arrays are open
    return _render("trajectory.html", name=name, row=row, t=t, turns=turns, group=list(group.values()), tree=tree,
                   advantages=given, why=why, colour=colour, scale=tokens.SCALES[colour],
                   colours={c: tokens.SCALES[c].label for c in tokens.colours(t)}, reader=reader,
                   before=id - 1 in beside, after=id + 1 in beside)  # fmt: skip


def _lines(logs: dict[str, curves.Log], metric: str, over: str) -> list[Line]:
    """A metric of every run, each line called by its run."""
    out = []
    for name, log in logs.items():
        if metric.startswith("held-out "):
            found = log.evaluated(metric.removeprefix("held-out "), over, name)
            out += found if len(found) == 1 else [Line(f"{name}: {e.name}", e.x, e.y, e.low, e.high) for e in found]
        else:
            out += log.line(metric, over, name)
    return out


def _runs(request: Request) -> Runs:
    found: Runs = request.app.state.runs
    return found


def _log(folder: Path) -> curves.Log:
    with Store(folder, read_only=True) as store:
        return curves.Log(store)


def _render(template: str, **data: Any) -> str:
    return TEMPLATES.get_template(template).render(**data)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=plainly_visible,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= FILTERS
