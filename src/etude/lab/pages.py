"""Evidence as Markdown and pictures: docs/EVIDENCE.md, and the evidence part of each method's page.

Pure functions of records and the catalogue: the same evidence gives the same text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etude.lab.charts import Line, endpoint_charts, line_chart
from etude.lab.statistics import paired
from etude.methods.catalog import CATALOG, FAMILIES, Entry

Record = Mapping[str, Any]
HEAD = """# Evidence

What each method's claim gave when it was run: against its baselines, with its mechanism removed, on equal budgets and
paired seeds. How to read it: an *effect* must reach its margin with an interval above zero, a *guard* must not fall
below its margin, and what rests on the mechanism must *vanish* without it. Intervals are at 95%, over seeds, or over
seeds and problems where problems are scored. A claim is reproduced only if all endpoints hold. `etude evidence --write`
writes this page; `etude verify METHOD` runs a claim.
"""


def evidence_page(records: Mapping[str, Record]) -> str:
    """docs/EVIDENCE.md, from the records there are by the name of their claim."""
    rows = [row for family in FAMILIES for entry in _of(family) for row in overview_rows(entry, records)]
    out = [HEAD, "## All methods", "", table([("", "method", "status", "main endpoint", "estimate"), *rows])]
    for name, record in records.items():
        slug, _, word = name.partition(".")
        title = f"{CATALOG[slug].name}: {word}" if word else CATALOG[slug].name
        out += ["", f"## {title}", "", method_evidence(record, f"evidence/{name}")]
    return "\n".join(out).rstrip() + "\n"


def method_evidence(record: Record, plots: str) -> str:
    """What a record says, in words, tables and plots, which stand at `plots`.svg and `plots`-endpoints.svg (and -2, -3
    for endpoints in other units)."""
    claim, slug = record["claim"], record["slug"]
    metric = main_metric(record)
    return "\n".join(
        [
            claim["says"],
            "",
            f"**{record['verdict']}**, {len(record['seeds'])} seeds. {record['note']}",
            "",
            f"![{metric} of every arm]({plots}.svg)",
            "",
            *(f"![Endpoints with their intervals]({plots}{end})\n" for end in _ends(len(endpoint_charts(record)))),
            table(_endpoint_rows(record)),
            "",
            table(_arm_rows(record)),
            "",
            f"World `{claim['world']}`, equal {_budget(claim)}. Run it again with `etude verify {slug}` "
            f"({record['machine']}; {', '.join(f'{k} {v}' for k, v in record['versions'].items())}).",
        ]
    )


def plots(record: Record) -> dict[str, str]:
    """The pictures of a record, by the end of their file's name: its main metric over the run, and its endpoints."""
    metric = main_metric(record)
    shown = record["claim"]["metrics"][metric]
    lines = [
        Line(a["name"], *(_numbers(a["curves"][metric][axis]) for axis in ("x", "mean", "low", "high")))
        for a in record["arms"]
        if metric in a["curves"]
    ]
    percent = shown["unit"] == "%"
    title = f"{shown['of']}, mean of {len(record['seeds'])} seeds"
    curve = line_chart(lines, title=title, x_label="steps", y_label=shown["unit"], percent=percent)
    charts = endpoint_charts(record)
    return {".svg": curve, **dict(zip(_ends(len(charts)), charts, strict=True))}


def main_metric(record: Record) -> str:
    """The metric of the first endpoint whose arms have a curve of it."""
    drawn = record["arms"][0]["curves"]
    return next((e["metric"] for e in record["endpoints"] if e["metric"] in drawn), record["endpoints"][0]["metric"])


def overview_rows(entry: Entry, records: Mapping[str, Record]) -> list[tuple[str, ...]]:
    """(number, claim, status, main endpoint, its estimate and interval) of one method, and of each further claim."""
    number = "" if entry.number is None else f"{entry.number:02}"
    rows: list[tuple[str, ...]] = [(number, entry.slug, "works" if entry.works else "planned", "", "")]
    for name, record in records.items():
        if name.partition(".")[0] == entry.slug:
            first = record["endpoints"][0]
            row = (number, name, record["verdict"], first["name"], _interval(record, first))
            if name == entry.slug:
                rows[0] = row
            else:
                rows.append(row)
    return rows


def _ends(charts: int) -> list[str]:
    """How the files of so many endpoint charts end."""
    return ["-endpoints.svg", *(f"-endpoints-{i}.svg" for i in range(2, charts + 1))]


def _of(family: str) -> list[Entry]:
    return [entry for entry in CATALOG.values() if entry.family == family]


def _endpoint_rows(record: Record) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("endpoint", "role", "estimate (95% interval)", "", "why")]
    for e in record["endpoints"]:
        rows.append((e["name"], e["role"], _interval(record, e), "holds" if e["holds"] else "fails", e["why"]))
    return rows


def _arm_rows(record: Record) -> list[tuple[str, ...]]:
    metrics = record["claim"]["metrics"]
    kinds = sorted({k for a in record["arms"] for r in a["runs"] for k in r["cost"]} & {"sampled", "trained", "steps"})
    head = [f"{n} ({m['unit']})" if m["unit"] else n for n, m in metrics.items()]
    rows: list[tuple[str, ...]] = [("arm", "method", "learning rate", *head, *kinds)]
    for a in record["arms"]:
        cells = [a["name"], a["method"], "own" if a["lr"] is None else f"{a['lr']:g}"]
        for name, metric in metrics.items():
            scale = 100 if metric["unit"] == "%" else 1
            i = paired([scale * v for v in _numbers([r["values"][name] for r in a["runs"]])])
            cells.append(f"{i.estimate:.3g} ± {i.high - i.estimate:.2g}")
        cells += [f"{sum(r['cost'].get(k, 0) for r in a['runs']) / len(a['runs']):.3g}" for k in kinds]
        rows.append(tuple(cells))
    return rows


def _interval(record: Record, e: Record) -> str:
    estimate, low, high = (_shown(record, e, e[k]) for k in ("estimate", "low", "high"))
    unit = record["claim"]["metrics"][e["metric"]]["unit"]
    unit = "times" if e["ratio"] else "points" if unit == "%" else unit
    return f"{estimate:.3g} {unit} ({low:.3g} to {high:.3g})"


def _shown(record: Record, e: Record, value: float | None) -> float:
    """Shares as points; a number that JSON does not have is nan."""
    if value is None:
        return math.nan
    percent = record["claim"]["metrics"][e["metric"]]["unit"] == "%" and not e["ratio"]
    return 100 * value if percent else float(value)


def _budget(claim: Record) -> str:
    caps = ", ".join(f"{kind} {cap:g}" for kind, cap in claim["equal"].items())
    return caps or f"steps ({claim['options'].get('steps', 'each method its own')})"


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; its first row is the head."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
