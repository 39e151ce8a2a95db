"""Claims as data: what a method's paper says it improves, as an experiment that can fail.

Nothing here runs anything; `lab/` does. A claim is fixed before its seeds are run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import blake2b
from itertools import pairwise
from json import dumps
from typing import Any, Literal, get_args

from etude.experience.errors import UserError, unknown
from etude.experience.types import NOTHING

Role = Literal["effect", "guard", "vanish"]
Reduce = Literal["last", "first", "best", "mean", "gain", "area", "dip", "steps"]
MIN_SEEDS = 5  # fewer give no verdict


@dataclass(frozen=True)
class BaseRecipe:
    """A base model as data: trained on first use, one per seed, cached by `digest`.

    The corpus is demonstrations of `world`'s oracle in `styles` (name -> share), of which `noise`
    (share 0 to 1) hold a fault; training goes on until sampled accuracy (pass@1 at temperature 1)
    on the test split lies in `until`, or `max_steps`.
    """

    world: str
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)  # of the world
    styles: Mapping[str, float] = field(default_factory=lambda: {"plain": 1.0})
    noise: float = 0.0
    faults: tuple[str, ...] = ()
    policy: str = "tiny"
    shape: Mapping[str, int] = field(default_factory=lambda: NOTHING)  # where it differs from the zoo
    until: tuple[float, float] = (0.15, 0.40)
    batch: int = 64  # demonstrations a step
    lr: float = 1e-3
    max_steps: int = 4000
    check_every: int = 50  # steps between two looks at pass@1
    check_problems: int = 128
    max_tokens: int = 64  # longest answer when pass@1 is looked at

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON holds it."""
        plain: dict[str, Any] = json_of(self)
        return plain

    def digest(self, seed: int) -> str:
        """The cache key: everything that decides the weights."""
        return blake2b(dumps([self.plain(), seed], sort_keys=True).encode(), digest_size=10).hexdigest()


@dataclass(frozen=True)
class Arm:
    """One side of a claim: a method by slug, with options, perhaps in a changed world (another one, or one of other
    `world_options`).

    `after` names the arm whose final policy this one starts from (at the same seed), so that a stage
    several arms share is run once; an arm of the role "stage" exists only for that. `uses` gives options the
    folders of other arms' final policies: a teacher, a judge, the two sources of pairs.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    world: str | None = None  # None: the claim's
    role: Literal["method", "baseline", "ablation", "control", "stage"] = "method"
    after: str | None = None
    uses: Mapping[str, str] = field(default_factory=lambda: NOTHING)  # option -> arm

    @property
    def earlier(self) -> tuple[str, ...]:
        """The arms that must be run before this one."""
        return (*(() if self.after is None else (self.after,)), *self.uses.values())


@dataclass(frozen=True)
class Metric:
    """One number of a run, read from its store.

    `source` "evaluation": a held-out measurement called `of` (accuracy, accuracy/CATEGORY, entropy, ...);
    "log": a metric logged at every step; "cost": a kind of the meter at the end. A curve is reduced to
    its last, first or best value, its mean over points, its gain (last - first), the area under it
    (mean height over the axis, by trapezoids), its dip (how far it falls below its highest value so
    far), or the place on the axis where it first reaches `threshold` (interpolated; censored at the end
    of the axis where it never does). The axis is `over`: "step", or a kind of the meter.
    """

    source: Literal["evaluation", "log", "cost"]
    of: str
    reduce: Reduce = "last"
    threshold: float | None = None
    over: str = "step"
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""  # shown after values; "%" also multiplies by 100

    def __post_init__(self) -> None:
        if self.reduce not in get_args(Reduce):
            raise unknown("reduction", self.reduce, get_args(Reduce))
        if (self.reduce == "steps") != (self.threshold is not None):
            raise UserError(f"metric {self.of!r}: a threshold goes with reduce=steps, and only with it")


@dataclass(frozen=True)
class Endpoint:
    """A contrast on one metric between arms, the one that should be better first.

    `effect`: the first arm beats the second: the estimate is at least `margin` (the smallest effect worth
    having) and its interval lies above zero. `guard`: the first is not worse than the second by more than
    `margin`: the interval lies above -margin. `vanish`: the effect is gone without the mechanism: the
    method, first, beats its ablation (the interval lies above zero, the estimate is at least `margin`); or
    with `equal`, two arms are the same: the whole interval lies within +-margin.

    Differences count in the metric's better direction, so positive is always good. With `ratio` the
    contrast is the ratio of positive values, its margin a factor (1 is no effect). With `every` each
    seed's own contrast must pass too: at least `margin` and above zero, or above -margin for a guard. More
    than two arms are an order: every neighbouring pair must hold. An arm may be written "arm:metric" to take
    another metric than `metric` for it, so that two conditions of one arm can be contrasted.

    Curves censored at the end of their axis are contrasted up to the end common to the pair. What is beyond
    is not known, so `equal` cannot hold for them, nor a guard whose arm goes on beyond that end.
    """

    name: str
    role: Role
    metric: str
    arms: tuple[str, ...]
    margin: float = 0.0
    ratio: bool = False
    equal: bool = False
    every: bool = False

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise unknown("endpoint role", self.role, get_args(Role))
        if len(self.arms) < 2 or (self.equal and len(self.arms) != 2):
            raise UserError(f"endpoint {self.name!r} contrasts two arms, or orders more, not {len(self.arms)}")
        if self.equal and (self.role != "vanish" or self.every):
            raise UserError(f"endpoint {self.name!r}: equal goes with role=vanish and without every")
        least = 1.0 if self.ratio else 0.0
        if not self.margin >= least and not (self.ratio and self.margin == 0.0):
            raise UserError(f"endpoint {self.name!r}: its margin must be at least {least:g}, not {self.margin}")

    @property
    def smallest(self) -> float:
        """The margin on the scale of the contrast: a difference, or a factor."""
        return max(self.margin, 1.0) if self.ratio else self.margin

    @property
    def pairs(self) -> tuple[tuple[tuple[str, str], tuple[str, str]], ...]:
        """The neighbouring pairs, each side as (arm, metric)."""
        sides = [(a.partition(":")[0], a.partition(":")[2] or self.metric) for a in self.arms]
        return tuple(pairwise(sides))


@dataclass(frozen=True)
class Claim:
    """An experiment, fixed before its seeds are run.

    Every arm runs in `world` with `options` (its own win over them), from `policy`: a BaseRecipe, taught
    once a seed, or a name of the zoo. A run ends when it has spent `equal` of any kind of the meter, or
    its steps are over. Each arm's learning rate is the one of `grid` with the best mean of the metric
    `tune` on `tuning_seeds`, which are never the claim's; an empty grid leaves the arms' own, and so does a stage
    that names its rate.
    """

    says: str  # what should come out, in a sentence
    world: str
    policy: BaseRecipe | str
    arms: tuple[Arm, ...]
    metrics: Mapping[str, Metric]
    endpoints: tuple[Endpoint, ...]
    tune: str  # metric
    world_options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    equal: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    grid: tuple[float, ...] = (3e-4, 1e-3)
    tuning_seeds: tuple[int, ...] = (1000,)
    minutes: float = 5.0  # expected, a seed, all arms, on two cores

    def __post_init__(self) -> None:
        named = [a.name for a in self.arms]
        if len(set(named)) != len(named):
            raise UserError(f"two arms of a claim are called alike: {', '.join(named)}")
        judged = {a.name for a in self.arms if a.role != "stage"}
        for e in self.endpoints:
            for side in (side for pair in e.pairs for side in pair):
                if side[0] not in judged:
                    raise unknown(f"arm of endpoint {e.name!r},", side[0], judged)
                if side[1] not in self.metrics:
                    raise unknown(f"metric of endpoint {e.name!r},", side[1], self.metrics)
        if self.tune not in self.metrics:
            raise unknown("metric to tune on,", self.tune, self.metrics)
        for i, a in enumerate(self.arms):
            for other in a.earlier:
                if other not in named[:i]:
                    raise UserError(
                        f"arm {a.name!r} takes the policy of {other!r}, which must be an arm listed before it"
                    )
        for what, seeds in (("seeds", self.seeds), ("tuning seeds", self.tuning_seeds)):
            if not seeds or len(set(seeds)) != len(seeds):
                raise UserError(f"{what} must be different numbers, at least one, not {list(seeds)}")
        if set(self.seeds) & set(self.tuning_seeds):
            raise UserError("tuning seeds must not be among the claim's seeds")

    def plain(self) -> dict[str, Any]:
        """The claim as JSON holds it: everything that decides its runs and its verdict."""
        plain: dict[str, Any] = json_of(self)
        return plain


def json_of(value: Any) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists."""
    if is_dataclass(value):
        return {f.name: json_of(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): json_of(v) for k, v in value.items()}
    return [json_of(v) for v in value] if isinstance(value, list | tuple) else value
