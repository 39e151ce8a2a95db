"""The gradient norms that an earlier run logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from etude.curricula.refine import Floats, Norm
from etude.experience.errors import UserError
from etude.experience.store import Store

METRICS: dict[Norm, str] = {"l2": "grad_norm", "l1": "grad_norm_l1"}


def logged_norms(run: str | Path, norm: Norm, total: int | None = None) -> Floats:
    """f64[T]: the norm of the gradient at each update of a run's last stage of learning, as the update used it: after
    clipping. An update that was not made is nan; updates of one step share the mean that the step logged.

    Raises UserError for a run that is not there, that logged no norms, or that made other than `total` updates.
    """
    with Store(run, read_only=True) as store:
        stages = [*store.metrics(METRICS["l2"]).values()]
        if not stages or not len(stages[0].value):
            raise UserError(f"{run} logged no gradient norms: name a run that has learnt something")
        stage = str(stages[0].stage[-1])
        logged = store.metrics(stage=stage)
    if METRICS[norm] not in logged:
        raise UserError(f"{run} logged no {METRICS[norm]}: run it again with this version")
    steps = 1 + max(int(series.step.max()) for series in logged.values())
    sizes = {}
    for name in {METRICS["l2"], METRICS[norm]}:
        sizes[name] = np.full(steps, np.nan)
        sizes[name][logged[name].step] = logged[name].value
    each, clip = _config(Path(run))
    clipped = np.minimum(1.0, clip / np.maximum(sizes[METRICS["l2"]], 1e-12))
    norms = np.repeat(sizes[METRICS[norm]] * clipped, each)
    if total is not None and len(norms) != total:
        raise UserError(
            f"{run} made {len(norms)} updates and this run makes {total}: a schedule is refined from a run of the same "
            "length"
        )
    return norms


def _config(run: Path) -> tuple[int, float]:
    """How many updates a step of the run had, and the largest norm of its gradients."""
    try:
        options: dict[str, Any] = json.loads((run / "config.json").read_text()).get("options", {})
    except (OSError, ValueError) as error:
        raise UserError(f"{run}/config.json cannot be read: {error}") from None
    each = int(options.get("epochs", 1)) * int(options.get("minibatches", 1))
    return each, float(options.get("optim", {}).get("clip", np.inf))
