"""The catalogue, and of each method its text, source, claim and evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from markupsafe import Markup

from etude.app.view.curves import AXES, HEIGHT, WIDTH
from etude.app.view.runs import Refused
from etude.experience.claims import Claim
from etude.experience.errors import UserError
from etude.lab.charts import Line, endpoint_charts, line_chart
from etude.lab.evidence import current, read_evidence
from etude.methods.catalog import CATALOG, FAMILIES, Entry, load


def families() -> list[tuple[str, str, list[Entry]]]:
    """Every family: its name, what it does, its methods."""
    return [(name, what, [e for e in CATALOG.values() if e.family == name]) for name, what in FAMILIES.items()]


def describe(slug: str) -> dict[str, Any]:
    """All that a method's page shows. Raises Refused if there is no such method."""
    if slug not in CATALOG:
        raise Refused(404, f"there is no method {slug!r} in the catalogue")
    entry = CATALOG[slug]
    found: dict[str, Any] = {"entry": entry, "family": FAMILIES[entry.family], "claims": []}
    if entry.works:
        from etude.methods.api import describe as described

        claims = load(slug).METHOD.claims
        found |= {
            "doc": described(slug)["doc"],
            "options": list(flat(described(slug)["options"])),
            "claims": [(name, c.plain(), evidence(name, c)) for name, c in claims.items()],
            "source": _source(entry),
        }
    return found


def flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested options as `outer.inner`."""
    out: list[tuple[str, Any]] = []
    for name, value in options.items():
        out += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(f"{prefix}{name}", value)]
    return out


def evidence(name: str, claim: Claim) -> dict[str, Any] | None:
    """The record of a claim as it was run, with its drawings; None if it was not. `current` says whether the claim
    has stayed the same since."""
    record = read_evidence(name)
    if record is None:
        return None
    try:
        drawn = {"curves": _curves(record), "intervals": [Markup(svg) for svg in endpoint_charts(record, WIDTH)]}
        return {"record": record, "current": current(record, claim), **drawn}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the evidence of {name!r} is damaged: {type(error).__name__} {error}") from None


def _curves(record: Mapping[str, Any]) -> list[Markup]:
    """A chart for each metric, a line for each arm."""
    names = dict.fromkeys(metric for arm in record["arms"] for metric in arm["curves"])
    out = []
    for metric in names:
        found = [(arm["name"], arm["curves"][metric]) for arm in record["arms"] if metric in arm["curves"]]
        lines = [Line(str(name), *(_numbers(c[axis]) for axis in ("x", "mean", "low", "high"))) for name, c in found]
        over = str(found[0][1]["over"])
        svg = line_chart(
            lines, title=metric, x_label=AXES.get(over, over), y_label=metric, percent=_percent(record, metric),
            width=WIDTH, height=HEIGHT,
        )  # fmt: skip
        out.append(Markup(svg))
    return out


def _percent(record: Mapping[str, Any], metric: str) -> bool:
    known = record.get("claim", {}).get("metrics", {}).get(metric, {})
    return known.get("unit") == "%"


def _numbers(values: Sequence[Any]) -> list[float]:
    """JSON has no nan: null stands for it."""
    return [math.nan if v is None else float(v) for v in values]


def _source(entry: Entry) -> str:
    spec = find_spec(entry.module)
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
