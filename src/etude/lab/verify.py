"""Running a claim: learning rates chosen on tuning seeds, all arms on paired seeds, endpoints, verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from etude.experience.claims import Arm, BaseRecipe, Claim
from etude.experience.errors import UserError
from etude.lab.jobs import HOME, Job, run_jobs
from etude.lab.judge import Judged, Verdict, judge, verdict
from etude.lab.readings import MeanCurve, Reading, mean_curve, read_curve, read_run

Told = Callable[[str, float, int], None]  # a phase, how many of its runs are over (with shares), of how many


@dataclass(frozen=True)
class ArmResult:
    """What came of one arm: the learning rate it chose (None: its own), what every rate scored on the tuning
    seeds, its readings at the claim's seeds, its curves over them by metric (the first of those that share one)."""

    arm: Arm
    lr: float | None
    tuning: tuple[tuple[float, tuple[float, ...]], ...]
    readings: tuple[Reading, ...]
    curves: Mapping[str, MeanCurve]


@dataclass(frozen=True)
class Result:
    """A claim that was run."""

    slug: str
    claim: Claim
    seeds: tuple[int, ...]
    arms: tuple[ArmResult, ...]
    endpoints: tuple[Judged, ...]
    verdict: Verdict
    code: Mapping[str, str]  # digest of the code of each method

    @property
    def minutes(self) -> float:
        """Spent in the runs that are judged, tuning and base models aside; the same when nothing is run again."""
        return sum(r.cost.get("seconds", 0.0) for a in self.arms for r in a.readings) / 60


@dataclass
class Bench:
    """Where a claim is run: `workers` runs at once below `home`. `told` hears how far it is."""

    claim: Claim
    workers: int
    home: Path = HOME
    told: Told = lambda phase, over, of: None
    lrs: dict[str, float] = field(default_factory=dict)  # chosen, by arm

    def run(self, slug: str, seeds: Sequence[int]) -> Result:
        """Everything. Raises UserError where an arm cannot be run."""
        tuning = self.tune()
        arms = [a for a in self.claim.arms if a.role != "stage"]
        jobs = {a.name: [self.job(a, s) for s in seeds] for a in arms}
        self._run("seeds", [job for of in jobs.values() for job in of])
        results = tuple(self._result(a, jobs[a.name], tuning.get(a.name, ())) for a in arms)
        readings = {r.arm.name: r.readings for r in results}
        judged = tuple(judge(e, readings, self.claim.metrics) for e in self.claim.endpoints)
        code = {job.method: job.code for of in jobs.values() for job in of}
        return Result(slug, self.claim, tuple(seeds), results, judged, verdict(judged, len(seeds)), code)

    def job(self, arm: Arm, seed: int, lr: float | None = None) -> Job:
        """The run of an arm at a seed, at its chosen learning rate or at `lr`."""
        claim = self.claim
        earlier = {name: self.job(next(a for a in claim.arms if a.name == name), seed) for name in arm.earlier}
        options = {**claim.options, **arm.options}
        rate = lr if lr is not None else self.lrs.get(arm.name)
        if rate is not None:
            options["optim"] = {**options.get("optim", {}), "lr": rate}
        options |= {
            "world": arm.world or claim.world,
            "world_options": arm.options.get("world_options", {} if arm.world else dict(claim.world_options)),
            "budget": [f"{kind}={cap:g}" for kind, cap in claim.equal.items()],
        }
        after = None if arm.after is None else earlier[arm.after]
        uses = {option: earlier[name] for option, name in arm.uses.items()}
        return Job(arm.name, seed, arm.method, claim.policy, options, after, uses)

    def tune(self) -> dict[str, tuple[tuple[float, tuple[float, ...]], ...]]:
        """Chooses every arm's learning rate; returns what each scored. A rate at which a run fails scores nan. A stage
        that names its own keeps it."""
        claim, found = self.claim, {}
        if not claim.grid:
            return {}
        for level in _levels(claim.arms):
            level = [a for a in level if not (a.role == "stage" and "lr" in a.options.get("optim", {}))]
            jobs = {(a.name, lr): [self.job(a, s, lr) for s in claim.tuning_seeds] for a in level for lr in claim.grid}
            failed = self._run("tuning", [job for of in jobs.values() for job in of], failing=True)
            for arm in level:
                rows = tuple((lr, tuple(self._tuned(job, failed) for job in jobs[arm.name, lr])) for lr in claim.grid)
                self.lrs[arm.name] = _best(arm, rows, claim.metrics[claim.tune].better == "higher")
                found[arm.name] = rows
        return found

    def _tuned(self, job: Job, failed: Mapping[str, str]) -> float:
        if job.digest in failed:
            return math.nan
        return read_run(job.folder(self.home), self.claim.metrics, job.seed).values[self.claim.tune]

    def _result(self, arm: Arm, jobs: Sequence[Job], tuning: tuple[tuple[float, tuple[float, ...]], ...]) -> ArmResult:
        folders = [job.folder(self.home) for job in jobs]
        metrics = self.claim.metrics
        readings = tuple(read_run(f, metrics, job.seed) for f, job in zip(folders, jobs, strict=True))
        drawn: dict[tuple[str, str, str], str] = {}  # metrics that reduce one curve share it
        for name, m in metrics.items():
            if m.source != "cost":
                drawn.setdefault((m.source, m.of, m.over), name)
        curves = {name: mean_curve([read_curve(f, metrics[name]) for f in folders]) for name in drawn.values()}
        return ArmResult(arm, self.lrs.get(arm.name), tuning, readings, curves)

    def _run(self, phase: str, jobs: Sequence[Job], failing: bool = False) -> Mapping[str, str]:
        shares: dict[str, float] = {job.digest: 0.0 for job in jobs}

        def heard(job: Job, share: float) -> None:
            shares[job.digest] = share
            self.told(phase, sum(shares.values()), len(shares))

        return run_jobs(jobs, self.home, self.workers, heard, failing)


def quick(claim: Claim) -> Claim:
    """The claim as a smoke run of seconds: two seeds, a few updates from random weights, one learning rate. It
    shows that every arm runs, and nothing else."""
    policy = claim.policy
    if isinstance(policy, BaseRecipe):
        sizes = ",".join(f"{k}={v}" for k, v in policy.shape.items())
        policy = f"{policy.policy}:{sizes}" if sizes else policy.policy
    options = {**claim.options, "eval_problems": 16, "eval_every": 0}
    equal = {**claim.equal, "updates": 4, "sampled": 4000}
    return replace(claim, policy=policy, options=options, equal=equal, seeds=claim.seeds[:2], grid=())


def _levels(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms, those that start from others after them."""
    levels: list[list[Arm]] = []
    depth: dict[str, int] = {}
    for arm in arms:
        depth[arm.name] = max((depth[name] + 1 for name in arm.earlier), default=0)
        if depth[arm.name] == len(levels):
            levels.append([])
        levels[depth[arm.name]].append(arm)
    return levels


def _best(arm: Arm, rows: Sequence[tuple[float, Sequence[float]]], higher: bool) -> float:
    """The first rate with the best mean."""
    scores = {lr: float(np.mean(values)) for lr, values in rows}
    finite = {lr: s if higher else -s for lr, s in scores.items() if math.isfinite(s)}
    if not finite:
        raise UserError(f"arm {arm.name!r} failed at every learning rate of the grid on its tuning seeds")
    return max(finite, key=lambda lr: finite[lr])
