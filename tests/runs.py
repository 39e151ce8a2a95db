"""Looking at runs, and cutting them, in the tests of methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from etude.experience.protocols import Clock
from etude.experience.store import Store
from etude.learning.run import Run


class Cut(Exception):
    """Ends a run, as a kill would."""


class Cutter:
    """A reporter that cuts at the n-th committed step."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, clock: Clock, metrics: Any, run: Run) -> None:
        self.left -= 1
        if self.left == 0:
            raise Cut


def weights(run: Run) -> dict[str, Tensor]:
    """The tensors of the final policy by name; those of the policies inside one by FOLDER/name."""
    home = Path(run.folder) / "policy"
    files = sorted(home.rglob("*.safetensors"))
    named = {f: "" if f.parent == home else f"{f.parent.relative_to(home)}/" for f in files}
    return {named[f] + name: tensor for f in files for name, tensor in load_file(f).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two policies are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(run: Run) -> str:
    """All that a run logged, without its times."""
    with Store(run.folder, read_only=True) as store:
        metrics = {n: (m.stage.tolist(), m.step.tolist(), m.value.tolist()) for n, m in store.metrics().items()}
        evaluations = [(e["stage"], e["step"], e["metric"], e["value"]) for e in store.evaluations()]
        texts = [(t["stage"], t["step"], t["text"], t["reward"], t["kept"]) for t in store.trajectories(limit=None)]
        meters = [{**s["meter"], "seconds": 0} for s in store.steps()]
    return json.dumps([metrics, evaluations, texts, meters])
