"""Claims as data: what a method's paper says it improves, as an experiment that can fail.

Nothing here runs anything; `lab/` does. A claim is fixed before its seeds are run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from json import dumps
from typing import Any, Literal

from etude.experience.types import NOTHING


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
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}

    def digest(self, seed: int) -> str:
        """The cache key: everything that decides the weights."""
        return blake2b(dumps([self.plain(), seed], sort_keys=True).encode(), digest_size=10).hexdigest()


@dataclass(frozen=True)
class Arm:
    """One side of a claim: a method by slug, with options, perhaps in a changed world."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    world: str | None = None  # None: the claim's
    role: Literal["method", "baseline", "ablation", "control"] = "method"


@dataclass(frozen=True)
class Endpoint:
    """A contrast of two arms on one metric.

    `effect`: a minus b must exceed `margin`. `guard`: a must not be worse than b by more than
    `margin`. `vanish`: the method minus its ablation must be positive, or, with `equal`, |a - b| must
    lie within `margin`. `side` says whether higher or lower is better. `curve` reduces a metric's
    curve to a number first (last, area, dip, or steps to `threshold`).
    """

    name: str
    role: Literal["effect", "guard", "vanish"]
    metric: str
    a: str
    b: str
    margin: float = 0.0
    side: Literal["higher", "lower"] = "higher"
    equal: bool = False
    curve: Literal["last", "area", "dip", "steps"] = "last"
    threshold: float | None = None


@dataclass(frozen=True)
class Claim:
    """An experiment. `equal` caps any kinds of the meter for every arm; `grid` holds the learning
    rates each arm chooses from on `tuning_seeds`, which are never the claim's."""

    world: str
    base: BaseRecipe
    arms: tuple[Arm, ...]
    endpoints: tuple[Endpoint, ...]
    equal: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    grid: tuple[float, ...] = (3e-4, 1e-3)
    tuning_seeds: tuple[int, ...] = (1000,)
    minutes: float = 5.0  # expected, a seed, all arms, on two cores

    def __post_init__(self) -> None:
        known = {a.name for a in self.arms}
        for e in self.endpoints:
            for arm in (e.a, e.b):
                if arm not in known:
                    raise ValueError(f"endpoint {e.name!r} names the arm {arm!r}, which the claim does not have")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("tuning seeds must not be among the claim's seeds")
