"""Linear decay and schedule refinement (arXiv 2310.07831: the last-iterate theorem, its corollaries for linear decay
and for known gradient norms, and schedule refinement for SGD and for Adam; the authors' released code).

Problem: theory for averaged iterates recommends schedules that nobody uses. Idea: bound the *last* iterate instead. For
convex f, T updates x_{t+1} = x_t - eta_t g_t that begin at distance D of the optimum, and any positive weights w_t,

    eta_t = w_t (sum_{p>t} w_p) / (sum_p w_p)    gives    E[f(x_T)] - f* <= (D^2 + sum_t w_t^2 |g_t|^2) / (2 sum_t w_t)

Constant weights, best where only |g_t| <= G is known, give linear decay, eta_t = D / (G sqrt T) (1 - t/T), and the
bound D G / sqrt T without a log factor. If the norms of a run of the same length are known, the best weights are
w_t ~ |g_t|^-2, with bound D / sqrt(sum_t |g_t|^-2): updates of large gradients become small, so that a warm-up, a
plateau or a fast anneal appear where the run needs them. Two passes in one run therefore:

1. Learn for T updates under linear decay and log G_t, the norm of each mini-batch gradient as the update used it.
2. H = running median of G over a share `smoothing` of the run; w_t = H_t^-2 with l2 norms (SGD), H_t^-1 with l1
   norms (Adam, whose updates are of about unit size in every coordinate); shape_t = eta_t / max_p eta_p in [0, 1].
3. Go back to the start and learn for T updates under peak rate x shape.

The learning rate is the peak of both passes and should be swept again for a refined schedule, whose area is another.
The search costs one more run. With `passes` 1 it is plain supervised learning under the schedule that `optim` names.

This file adds the two passes; the mathematics stands in `curricula.refine`, and any method takes the schedule of an
earlier run as `optim.schedule refined:RUN`. Departures: norms that are not above 0 are filled in, the first one is
kept within the range of its neighbours, and a degenerate shape (gradients that vanish, as on separable data, put all
weight on the last updates) falls back to linear decay, saying why; the paper has no rule for these. The second pass
sees other batches than the first, so that w_t does not depend on g_t, as the theorem asks. `noise` is no part of the
method: it adds gradient noise to a window of updates, in every pass alike, to isolate what refinement is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from etude.curation.examples import Examples
from etude.curricula.gradient_log import logged_norms
from etude.curricula.refine import SMOOTHING, Floats, Norm, bound, effective, refine
from etude.experience.batch import Batch, By, normalise, pack
from etude.experience.claims import Arm, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Policy, Probe
from etude.learning.demonstrations import demonstrations
from etude.learning.learner import Optim, Seat
from etude.learning.loops import Source, examples, fit
from etude.learning.setting import Setting
from etude.learning.weights import Weights
from etude.methods.method import Method
from etude.objectives.nll import NLL
from etude.policies.classifier import Classifier, labelled
from etude.worlds.points import PointsWorld

LOOKED_AT = 256  # demonstrations in the probe of the training loss; of points, all


@dataclass(frozen=True)
class LRRefinement:
    """The hyperparameters of refinement."""

    steps: int = 600  # T, updates in each pass
    batch: int = 32  # demonstrations an update
    passes: Literal[1, 2] = 2  # 2: measure, refine, learn anew; 1: learn once, under the schedule of optim
    norm: Literal["auto", "l2", "l1"] = "auto"  # of the gradients; auto: l2 for sgd, else l1
    smoothing: float = SMOOTHING  # share of the run that the median of norms is taken over
    shuffle: bool = False  # ablation: the norms are shuffled in time before they are refined
    noise: float = 0.0  # standard deviation of what is added to every coordinate of the gradient ...
    noise_from: float = 0.0  # ... from this share of the updates ...
    noise_to: float = 1.0  # ... to this one
    data: str | None = None  # .jsonl or .parquet; None: the world's oracle demonstrates, or its points
    columns: tuple[str, ...] = ()  # ours=theirs, e.g. prompt=question
    demonstrations: int = 2000  # how many the oracle writes
    style: str = "plain"  # of the oracle's demonstrations
    normalise: By = "token"  # what the loss is a mean over
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, schedule="linear"))  # its schedule is the first pass's

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "demonstrations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.passes not in (1, 2):
            raise UserError(f"passes must be 1 or 2, not {self.passes}")
        if not 0 <= self.smoothing <= 1:
            raise UserError(f"smoothing is a share of the run, from 0 to 1, not {self.smoothing}")
        if self.noise < 0 or not 0 <= self.noise_from < self.noise_to <= 1:
            raise UserError("noise must be at least 0, and its window go from a share of the updates to a later one")

    @property
    def measure(self) -> Norm:
        """Which norm of the gradients."""
        if self.norm != "auto":
            return self.norm
        return "l2" if self.optim.algorithm == "sgd" else "l1"


class NoiseWindow:
    """Adds N(0, `std`^2) to every coordinate of the gradient, in updates of a share in [`start`, `end`) of a pass.

    It wraps the source of batches, which tells it where the pass stands, and is the mask of its updates.
    """

    def __init__(self, source: Source, std: float, start: float, end: float, keys: Keys) -> None:
        self.source, self.std, self.start, self.end, self.keys = source, std, start, end, keys
        self.clock = Clock(0, 1)

    def draw(self, clock: Clock, keys: Keys) -> Batch:
        """The batch of a step."""
        self.clock = clock
        return self.source(clock, keys)

    def __call__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        if not self.start <= self.clock.step / self.clock.total < self.end:
            return
        draws = self.keys.at(self.clock.step).numpy()
        for p in parameters:
            if p.grad is not None:
                noise = draws.standard_normal(tuple(p.shape), np.float32)
                p.grad.add_(torch.from_numpy(noise).to(p.grad), alpha=self.std)


def train(s: Setting, config: LRRefinement) -> None:
    """Both passes, or the one."""
    data = demonstrations(s, config.data, config.columns, config.demonstrations, config.style)
    s.probes.update(probes(s, data))
    shape, optim = None, config.optim
    if config.passes == 2:
        weights = Weights(s.policy)
        start = s.run.stage("start", lambda: deepcopy(weights.state_dict()))
        norms = s.run.stage("first", lambda: measured(s, config, data))
        if s.run.spent >= 1:  # the budget leaves nothing for a second pass
            return
        shape = s.run.stage("refine", lambda: refined(s, config, norms))
        s.run.stage("restart", lambda: weights.load_state_dict(start))
        optim = replace(optim, warmup=0.0)
    learn(s, config, data, Seat(s.policy, optim, config.steps, shape))


def learn(s: Setting, config: LRRefinement, data: Examples, seat: Seat) -> None:
    """One pass: T updates on batches and with noise of its own."""
    source = examples(data, config.batch, s.run)
    noise = None
    if config.noise:
        keys = s.run.keys.at(s.run.stage_name, "noise")
        noise = NoiseWindow(source, config.noise, config.noise_from, config.noise_to, keys)
        source = noise.draw
    fit(s.run, seat, source, NLL(), config.steps, by=config.normalise, watch=s.watch, mask=noise)


def measured(s: Setting, config: LRRefinement, data: Examples) -> Floats:
    """The first pass, and the norm of its gradients: f64[T], or fewer where the budget ends before."""
    learn(s, config, data, Seat(s.policy, config.optim, config.steps))
    return s.run.ranks.first(lambda: logged_norms(s.run.folder, config.measure))


def refined(s: Setting, config: LRRefinement, norms: Floats) -> Floats:
    """The shape of the second pass, f64[T], with a log of what it is like."""
    if config.shuffle:
        norms = s.run.keys.at("shuffle").numpy().permutation(norms)
    found = refine(norms, config.measure, config.smoothing)
    flat = np.ones(config.steps)
    s.run.log(
        {
            "refined/start": float(found.shape[0]),  # as a share of the peak rate
            "refined/peak": found.peak,  # where it is, as a share of the updates
            "refined/effective": effective(found.weights) / config.steps,  # share of the updates that hold the weight
            "refined/fallback": float(bool(found.fallback)),
            # what the theory for l2 norms promises, over what it promises of linear decay
            "refined/bound": bound(flat if found.fallback else found.weights, found.norms) / bound(flat, found.norms),
        }
    )
    if found.fallback:
        warnings.warn(f"the second pass has linear decay: {found.fallback}", stacklevel=2)
    return found.shape


def probes(s: Setting, data: Examples) -> dict[str, Probe]:
    """`loss`: the mean -log p of training demonstrations, nats; `excess`: how far that of a linear classifier is above
    the least it can have."""
    points = s.world if isinstance(s.world, PointsWorld) and isinstance(s.policy, Classifier) else None
    seen = labelled(*points.arrays("train")) if points else pack(data.rows[:LOOKED_AT])
    seen = normalise(seen, "token").to(s.policy.device)

    def loss(policy: Policy, keys: Keys) -> float:
        return -float((policy.logp(seen) * seen.actions["weight"]).sum())

    found: dict[str, Any] = {"loss": loss}
    if points and not s.policy.hidden:
        found["excess"] = lambda policy, keys: loss(policy, keys) - points.least_loss
    return found


SGD = {"algorithm": "sgd", "clip": 1e9, "schedule": "linear"}
POINTS = {"steps": 600, "batch": 16, "eval_every": 0, "eval_problems": 64, "checkpoint_every": 300}
TEXT = {"steps": 1000, "demonstrations": 4000, "max_tokens": 16, "eval_every": 0, "eval_problems": 64,
        "checkpoint_every": 300, "optim": {"clip": 1e9, "schedule": "linear"}}  # fmt: skip
MIDDLE = {"noise": 1.0, "noise_from": 1 / 3, "noise_to": 2 / 3}
LATE = {"noise": 1.0, "noise_from": 0.7, "noise_to": 1.0}
HALF_DECADES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
CLOSED = 1 / 0.3  # of the gap to the optimum, 70% is closed where it is this many times smaller


def under(schedule: str, **options: Any) -> dict[str, Any]:
    """The options of an arm that learns once, under a named schedule."""
    return {**options, "passes": 1, "optim": {**SGD, "schedule": schedule}}


METRICS = {
    "excess": Metric("evaluation", "excess", better="lower", unit="nats"),
    "loss": Metric("evaluation", "loss", better="lower", unit="nats"),
}

CLAIM = Claim(
    says="Where a third of a run's gradients are drowned in noise, in its middle or at its end, the refined schedule "
    "learns around them and closes at least 70% of the gap that linear decay leaves to the optimum; without noise, or "
    "from the same norms in another order, it gains nothing.",
    world="points",
    world_options={"features": 20, "classes": 4, "condition": 100.0, "flips": 0.1},
    policy="classifier:features=20,classes=4",
    options={**POINTS, "optim": SGD},
    arms=(
        Arm("refined", "lr-refinement", MIDDLE),
        Arm("linear", "lr-refinement", under("linear", **MIDDLE), role="baseline"),
        Arm("constant", "lr-refinement", under("constant", **MIDDLE), role="baseline"),
        Arm("shuffled", "lr-refinement", {**MIDDLE, "shuffle": True}, role="ablation"),
        Arm("refined-late", "lr-refinement", LATE),
        Arm("linear-late", "lr-refinement", under("linear", **LATE), role="baseline"),
        Arm("refined-quiet", "lr-refinement", role="control"),
        Arm("linear-quiet", "lr-refinement", under("linear"), role="control"),
    ),
    metrics=METRICS,
    endpoints=(
        Endpoint("noise in the middle", "effect", "excess", ("refined", "linear"), CLOSED, ratio=True, every=True),
        Endpoint(
            "noise at the end", "effect", "excess", ("refined-late", "linear-late"), CLOSED, ratio=True, every=True
        ),
        Endpoint("over a constant rate", "effect", "excess", ("refined", "constant"), CLOSED, ratio=True, every=True),
        Endpoint("over norms in another order", "vanish", "excess", ("refined", "shuffled"), CLOSED, ratio=True),
        Endpoint("no gain from another order", "guard", "loss", ("linear", "shuffled"), 0.1),
        Endpoint("no gain without noise", "vanish", "loss", ("refined-quiet", "linear-quiet"), 0.01, equal=True),
    ),
    tune="loss",
    grid=HALF_DECADES,
    minutes=0.5,
)

DECAY = Claim(
    says="On convex logistic regression, each at its best peak rate, linear decay to zero ends at a lower training "
    "loss than a constant rate, 1/sqrt(t) and 1/t, and no higher than cosine decay.",
    world="points",
    world_options={"features": 40, "classes": 4, "condition": 100.0, "flips": 0.2},
    policy="classifier:features=40,classes=4",
    options=POINTS,
    arms=(
        Arm("linear", "lr-refinement", under("linear")),
        Arm("cosine", "lr-refinement", under("cosine"), role="baseline"),
        Arm("constant", "lr-refinement", under("constant"), role="baseline"),
        Arm("inverse-sqrt", "lr-refinement", under("inverse-sqrt"), role="baseline"),
        Arm("inverse", "lr-refinement", under("inverse"), role="baseline"),
    ),
    metrics=METRICS,
    endpoints=(
        Endpoint("over a constant rate", "effect", "loss", ("linear", "constant"), 0.02, every=True),
        Endpoint("over 1/sqrt(t)", "effect", "loss", ("linear", "inverse-sqrt"), 0.01, every=True),
        Endpoint("over 1/t", "effect", "loss", ("linear", "inverse"), 0.02, every=True),
        Endpoint("as good as cosine decay", "guard", "loss", ("linear", "cosine"), 0.005),
    ),
    tune="loss",
    grid=HALF_DECADES,
    tuning_seeds=(1000, 1001),
    minutes=0.3,
)

LM = Claim(
    says="For a small language model under Adam the l1 norms of a first run make a warm-up of their own, which norms "
    "in another order do not, and the run that follows them is no worse than linear decay.",
    world="chain_sum",
    policy="tiny:width=64,depth=2,heads=4,ffn=192",
    options=TEXT,
    arms=(
        Arm("refined", "lr-refinement"),
        Arm("linear", "lr-refinement", {"passes": 1}, role="baseline"),
        Arm("shuffled", "lr-refinement", {"shuffle": True}, role="ablation"),
    ),
    metrics={
        "loss": Metric("evaluation", "loss", better="lower", unit="nats"),
        "accuracy": Metric("evaluation", "accuracy", unit="%"),
        "start": Metric("log", "refined/start", better="lower"),
        "peak": Metric("log", "refined/peak", unit="%"),
    },
    endpoints=(
        Endpoint("as good as linear decay", "guard", "loss", ("refined", "linear"), 0.08),
        Endpoint("begins below its peak", "vanish", "start", ("refined", "shuffled"), 0.2, every=True),
    ),
    tune="loss",
    grid=(2e-3, 3e-3, 4.5e-3),
    minutes=1.5,
)

METHOD = Method("lr-refinement", LRRefinement, train, start="random", claim=CLAIM, more={"decay": DECAY, "lm": LM})
