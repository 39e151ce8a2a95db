"""Methods side by side: the same base models, problems and paired seeds, each with its own hyperparameters.

A comparison describes; it settles nothing, since no learning rate is chosen for it and no margin fixed
before it. For that there are claims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from etude.experience.claims import BaseRecipe, Metric
from etude.experience.errors import UserError
from etude.experience.store import Store
from etude.lab.jobs import HOME, Job, run_jobs
from etude.lab.readings import MeanCurve, Reading, mean_curve, read_curve, read_run
from etude.lab.statistics import Interval, paired
from etude.learning.group_rl import GroupRL
from etude.learning.setting import Common, base_recipe, parse_budget, world_for
from etude.methods.api import method
from etude.methods.options import build
from etude.policies.zoo import load_policy
from etude.worlds.oracles import find_oracle

AXES = {"tokens": "sampled", "episodes": "episodes", "seconds": "seconds", "steps": "step"}
ACCURACY = Metric("evaluation", "accuracy", unit="%")
ENDLESS = 10**6  # steps, where the budget is what ends a run


@dataclass(frozen=True)
class Side:
    """One method: its readings by seed (`accuracy`, `accuracy/CATEGORY`, and the `area` under its accuracy), its
    mean curve by axis, and its final accuracy less the first method's, paired by seed (None for the first)."""

    method: str
    readings: tuple[Reading, ...]
    curves: Mapping[str, MeanCurve]
    difference: Interval | None

    def final(self, metric: str = "accuracy") -> Interval:
        """A metric of the finished runs, over seeds."""
        return paired([r.values[metric] for r in self.readings])

    def cost(self, kind: str) -> float:
        """The mean over seeds of what was charged."""
        return float(np.mean([r.cost.get(kind, 0.0) for r in self.readings]))


@dataclass(frozen=True)
class Plan:
    """What will be compared: of every method, in the order they were named, a run at every seed."""

    common: Common
    budget: Mapping[str, float]
    seeds: tuple[int, ...]
    jobs: Mapping[str, tuple[Job, ...]]

    @property
    def axis(self) -> str:
        """What the area under a curve is taken over: what all methods may spend equally, else steps."""
        return next(iter(self.budget), "step")


@dataclass(frozen=True)
class Comparison:
    """What came of a plan, method by method."""

    plan: Plan
    categories: tuple[str, ...]
    sides: tuple[Side, ...]


def plan(slugs: Sequence[str], common: Common, seeds: Sequence[int], steps: int | None = None) -> Plan:
    """The runs of a comparison; nothing is run or written.

    `steps` goes to every method that has the option. Without it, a budget in `common` is what ends the runs of
    the group-RL family: their steps are raised to ENDLESS, and curricula, which follow the loop's progress, follow
    the budget. Other methods keep their own plan, since their learning rates are timed by their steps, and end
    with it or with the budget. Raises UserError for fewer than two methods, one named twice, and what is known
    not to run: a method, world, policy, option or budget that is none, or a base model in a world that has no
    oracle to teach it.
    """
    if len(slugs) < 2 or len(set(slugs)) < len(slugs):
        raise UserError(f"compare takes two or more methods, each once, not {' '.join(slugs) or 'none'}")
    budget = parse_budget(common.budget)
    jobs = {slug: tuple(job(slug, common, seed, steps) for seed in seeds) for slug in slugs}
    taught = find_oracle(world_for(load_policy(common.policy), common)) is not None
    for slug, (first, *_) in jobs.items():
        config = method(slug).config
        build(config, {k: v for k, v in first.options.items() if k == "steps"})
        if isinstance(first.policy, BaseRecipe) and not taught:
            raise UserError(
                f"method {slug!r} cannot be run in world {common.world!r}, which has no oracle to teach its base "
                "model: name another world, or base=false"
            )
    return Plan(common, budget, tuple(seeds), jobs)


def compare(
    plan: Plan,
    workers: int = 1,
    home: Path = HOME,
    told: Callable[[str, float, int], None] = lambda phase, over, of: None,
) -> Comparison:
    """Runs what is not finished yet, seed by seed, and gathers everything. Raises UserError where a run fails."""
    todo = [job for at_seed in zip(*plan.jobs.values(), strict=True) for job in at_seed]
    shares: dict[str, float] = {j.digest: 0.0 for j in todo}

    def heard(job: Job, share: float) -> None:
        shares[job.digest] = share
        told("runs", sum(shares.values()), len(shares))

    run_jobs(todo, home, workers, heard)
    categories = _categories(todo[0].folder(home))
    metrics = {"accuracy": ACCURACY, "area": replace(ACCURACY, reduce="area", over=plan.axis)}
    metrics |= {f"accuracy/{c}": replace(ACCURACY, of=f"accuracy/{c}") for c in categories}
    over = {name: replace(ACCURACY, over=kind) for name, kind in AXES.items()}
    sides: list[Side] = []
    for slug, jobs in plan.jobs.items():
        folders = [j.folder(home) for j in jobs]
        readings = tuple(read_run(f, metrics, s) for f, s in zip(folders, plan.seeds, strict=True))
        curves = {name: mean_curve([read_curve(f, m) for f in folders]) for name, m in over.items()}
        sides.append(Side(slug, readings, curves, _less(readings, sides[0].readings) if sides else None))
    return Comparison(plan, categories, tuple(sides))


def job(slug: str, common: Common, seed: int, steps: int | None) -> Job:
    """The run of a method at a seed."""
    chosen = method(slug)
    recipe = base_recipe(common) if chosen.start == "base" else None
    options = {k: v for k, v in asdict(common).items() if k not in ("policy", "base", "seed")}
    if common.budget and steps is None and issubclass(chosen.config, GroupRL):
        options["steps"] = ENDLESS
    elif steps is not None and hasattr(chosen.config, "steps"):
        options["steps"] = steps
    return Job(slug, seed, slug, common.policy if recipe is None else recipe, options)


def _less(readings: Sequence[Reading], first: Sequence[Reading]) -> Interval:
    return paired([a.values["accuracy"] - b.values["accuracy"] for a, b in zip(readings, first, strict=True)])


def _categories(folder: Path) -> tuple[str, ...]:
    with Store(folder, read_only=True) as store:
        names = dict.fromkeys(str(e["metric"]) for e in store.evaluations())
    return tuple(n.removeprefix("accuracy/") for n in names if n.startswith("accuracy/"))
