"""A comparison as files: report.json, curves.csv, finals.csv, and report.html, which needs nothing beside it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from etude.experience.errors import UserError
from etude.lab.charts import Line, line_chart
from etude.lab.compare import AXES, Comparison, Side
from etude.lab.evidence import plain, write_json
from etude.lab.statistics import Interval

Row = Sequence[Any]
STYLE = (
    ":root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}"
    "body{max-width:60rem;margin:0 auto;padding:1rem}"
    "svg{width:100%;height:auto}div{overflow-x:auto}"
    "table{border-collapse:collapse}th,td{padding:.25rem .75rem;text-align:right;border-bottom:1px solid #8884}"
    "th:first-child,td:first-child{text-align:left}"
)


def write_report(found: Comparison, folder: Path) -> None:
    """Writes the four files, each whole or not at all. Raises UserError where the disk refuses."""
    write_json(folder / "report.json", plain_report(found))
    for name, text in (("curves.csv", _csv(curve_rows(found))), ("finals.csv", _csv(final_rows(found)))):
        _write(folder / name, text)
    _write(folder / "report.html", html(found))


def plain_report(found: Comparison) -> dict[str, Any]:
    """Everything, as JSON holds it: the ends of intervals that are not finite become null."""
    report: dict[str, Any] = plain(_everything(found))
    return report


def _everything(found: Comparison) -> dict[str, Any]:
    return {
        "common": asdict(found.plan.common),
        "budget": dict(found.plan.budget),
        "seeds": list(found.plan.seeds),
        "methods": [
            {
                "method": side.method,
                "final": asdict(side.final()),
                "area": {"over": found.plan.axis, **asdict(side.final("area"))},
                "difference": asdict(side.difference) if side.difference else None,
                "categories": {c: asdict(side.final(f"accuracy/{c}")) for c in found.categories},
                "runs": [{"seed": r.seed, "values": dict(r.values), "cost": dict(r.cost)} for r in side.readings],
                "curves": {axis: {k: v.tolist() for k, v in vars(c).items()} for axis, c in side.curves.items()},
            }
            for side in found.sides
        ],
    }


def curve_rows(found: Comparison) -> Iterator[Row]:
    """The mean curves, a row a point."""
    yield "method", "axis", "x", "mean", "low", "high"
    for side in found.sides:
        for axis, c in side.curves.items():
            for point in zip(c.x, c.mean, c.low, c.high, strict=True):
                yield side.method, axis, *(f"{v:.6g}" for v in point)


def final_rows(found: Comparison) -> Iterator[Row]:
    """The last accuracies, the area and the costs, a row a run."""
    metrics = ["accuracy", "area", *(f"accuracy/{c}" for c in found.categories)]
    kinds = costs(found)
    yield "method", "seed", *metrics, *kinds
    for side in found.sides:
        for r in side.readings:
            values = [*(r.values[m] for m in metrics), *(r.cost.get(k, 0.0) for k in kinds)]
            yield side.method, r.seed, *(f"{v:.6g}" for v in values)


def summary_rows(found: Comparison) -> list[list[str]]:
    """The final table: accuracy over seeds, difference to the first method, area, mean costs."""
    first, kinds = found.sides[0].method, costs(found)
    rows = [["method", "accuracy", f"less {first}", f"area over {found.plan.axis}", *kinds]]
    for side in found.sides:
        difference = shown(side.difference) if side.difference else ""
        spent = [f"{side.cost(k):.3g}" for k in kinds]
        rows.append([side.method, shown(side.final()), difference, shown(side.final("area")), *spent])
    return rows


def category_rows(found: Comparison) -> list[list[str]]:
    """Final accuracy by category."""
    rows = [["method", *found.categories]]
    return rows + [[s.method, *(shown(s.final(f"accuracy/{c}")) for c in found.categories)] for s in found.sides]


def costs(found: Comparison) -> list[str]:
    """The kinds of the meter that any run was charged."""
    return list(dict.fromkeys(k for s in found.sides for r in s.readings for k, n in r.cost.items() if n))


def shown(i: Interval) -> str:
    """In percent, with its interval where there is one."""
    if not math.isfinite(i.estimate):
        return "none"
    if not math.isfinite(i.high):
        return f"{100 * i.estimate:.1f}%"
    return f"{100 * i.estimate:.1f}% ({100 * i.low:.1f} to {100 * i.high:.1f})"


def html(found: Comparison) -> str:
    """One page: the tables, and the curves against every axis."""
    common = found.plan.common
    title = f"{', '.join(s.method for s in found.sides)} on {common.world}"
    caps = ", ".join(f"{kind} {cap:g}" for kind, cap in found.plan.budget.items()) or "the methods' steps"
    seeds = ", ".join(map(str, found.plan.seeds))
    charts = [
        line_chart(
            [_line(s, axis) for s in found.sides],
            title=f"held-out accuracy against {axis}",
            x_label=axis,
            y_label="accuracy",
            percent=True,
        )
        for axis in AXES
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{escape(title)}</h1>",
            f"<p>Policy {escape(common.policy)}, seeds {seeds}, budget: {escape(caps)}. Intervals at 95% over "
            "seeds. Every method with its own hyperparameters: a comparison, not a claim.</p>",
            "<h2>Final accuracy and cost</h2>",
            _html_table(summary_rows(found)),
            *(["<h2>By category</h2>", _html_table(category_rows(found))] if found.categories else []),
            "<h2>Learning curves</h2>",
            *charts,
            "</html>\n",
        ]
    )


def _line(side: Side, axis: str) -> Line:
    c = side.curves[axis]
    return Line(side.method, c.x.tolist(), c.mean.tolist(), c.low.tolist(), c.high.tolist())


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(c)}</th>' for c in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in body]
    return "<div><table>" + "\n".join(lines) + "</table></div>"


def _csv(rows: Iterator[Row]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
