"""A claim that was run, as the record that `evidence/` keeps."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from etude.experience.claims import json_of
from etude.lab.evidence import FORMAT
from etude.lab.judge import Judged
from etude.lab.readings import MeanCurve, Reading
from etude.lab.verify import ArmResult, Result

POINTS = 60  # of a curve that is kept


def record(result: Result, note: str) -> dict[str, Any]:
    """Everything that was measured, with what it was measured by: see `lab.evidence` for the form. The ids of
    scored problems stand once, by metric, and every run's scores are in their order."""
    items = _item_ids(result)
    return {
        "format": FORMAT,
        "slug": result.slug,
        "verdict": result.verdict,
        "note": note or summary(result),
        "seeds": list(result.seeds),
        "minutes": result.minutes,
        "claim": result.claim.plain(),
        "code": dict(sorted(result.code.items())),
        "versions": {package: version(package) for package in ("etude", "torch", "numpy", "scipy")},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "items": items,
        "arms": [_arm(a, items) for a in result.arms],
        "endpoints": [_endpoint(j) for j in result.endpoints],
    }


def summary(result: Result) -> str:
    """What came out, in plain words, where nobody has written a better note."""
    held = sum(j.holds for j in result.endpoints)
    found = [(j.endpoint.name, "holds" if j.holds else "does not hold", j.why) for j in result.endpoints]
    said = "; ".join(f"{name} {holds} ({why})" for name, holds, why in found)
    return f"{held} of {len(result.endpoints)} endpoints hold at {len(result.seeds)} seeds. {said}."


def _item_ids(result: Result) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for reading in (r for a in result.arms for r in a.readings):
        for metric, scores in reading.items.items():
            found.setdefault(metric, set()).update(scores)
    return {metric: sorted(ids) for metric, ids in found.items()}


def _arm(a: ArmResult, items: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "name": a.arm.name,
        "method": a.arm.method,
        "role": a.arm.role,
        "lr": a.lr,
        "tuning": json_of(a.tuning),
        "runs": [_run(r, items) for r in a.readings],
        "curves": {name: _curve(c) for name, c in a.curves.items() if len(c.x)},
    }


def _run(r: Reading, items: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "seed": r.seed,
        "values": dict(r.values),
        "censored": list(r.censored),
        "cost": {kind: n for kind, n in r.cost.items() if n},
        "items": {metric: [r.items.get(metric, {}).get(i) for i in ids] for metric, ids in items.items()},
    }


def _curve(c: MeanCurve) -> dict[str, Any]:
    """At most POINTS points, the first and the last among them."""
    at = np.unique(np.linspace(0, len(c.x) - 1, min(len(c.x), POINTS)).round().astype(int))
    axes = {"x": c.x, "mean": c.mean, "low": c.low, "high": c.high}
    return {"over": "step", **{name: values[at].tolist() for name, values in axes.items()}}


def _endpoint(j: Judged) -> dict[str, Any]:
    e, i = j.endpoint, j.interval
    return {
        "name": e.name,
        "role": e.role,
        "metric": e.metric,
        "arms": list(e.arms),
        "margin": e.smallest,
        "ratio": e.ratio,
        "equal": e.equal,
        "every": e.every,
        "estimate": i.estimate,
        "low": i.low,
        "high": i.high,
        "values": list(j.values),
        "holds": j.holds,
        "opposite": j.opposite,
        "why": j.why,
    }
