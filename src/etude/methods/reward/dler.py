"""DLER: doing length penalty right (arXiv 2510.15110; the authors' released code).

Problem: models that reason write far more than they need, and training them to be short costs accuracy. Idea: the
crudest penalty, a limit beyond which an answer gets reward 0, is good enough; what costs accuracy is the optimisation.
Truncation turns many rewards to 0, so the standard deviation of each small group is a poor scale; the upper clip
silences the rare tokens that lead to other ways of answering, and entropy collapses; groups that are all cut, and later
all right, give no gradient and leave the update to problems that are easy and short.

Problem q has G answers o_i of |o_i| tokens, generated to at most L tokens, with rewards R_i (no unit). For token t of
o_i, the ratio s_it = pi(o_it) / pi_old(o_it), d_it = log pi(o_it) - log pi_ref(o_it), pi_ref the policy at the start:

    R'_i  = R_i if o_i ended within L tokens, else 0                               truncation
    keep q only if its R'_i differ, and draw others until the batch is full        dynamic sampling
    A_i   = R'_i - mean over the group of R',   Anorm = (A - mean(A)) / std(A)     mean and std over the batch's tokens
    L     = - mean over tokens [ min(s Anorm, clip(s, 1 - 0.2, 1 + 0.28) Anorm) - 0.0005 d^2 / 2 ]

where several updates are made on a batch. Difficulty-aware DLER: L depends on the share c of the group's answers that
are right, through `thresholds` and `lengths`; the paper takes 2000 tokens for c > 0.5, else 4000. Update-selective
merging, for training data that is poorer than what the policy can do: at the end theta = theta_start + 0.7 top(theta -
theta_start), top being the largest quarter of each tensor.

This file adds the credit rule, the objective's constants and the composition; the penalty (`feedback/truncation.py`),
the selector `varied` and the merge (`policies/merge.py`) are shared. L is `max_tokens`. With credit = grpo, selector =
all and clip_high = clip_low it is GRPO under the same penalty. The released code adds two terms that the paper does not
mention, both off here: a cut answer keeps a tenth of its reward (`stop_properly`), and right answers get 0.1 more
advantage (`boost`); it reads rewards before that tenth to choose groups, this one after; its clip is dual (`dual_clip`
10). Departures: problems a step, updates on it and the learning rate are laptop-sized (the paper: 512, 8 of 64
problems, 1e-6); minibatches are of answers, not of whole groups; where `max_draws` do not fill a batch the step goes on
with what there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from etude.experience.batch import Batch, By
from etude.experience.claims import Arm, BaseRecipe, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.plugs import Kind, register
from etude.experience.protocols import Clock
from etude.experience.types import Group
from etude.feedback.advantage import Advantage, degenerate, trajectory_of
from etude.feedback.truncation import check_limits
from etude.learning.group_rl import GroupRL, group_rl
from etude.learning.learner import Optim
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.clipped_pg import ClippedPG
from etude.policies.merge import check_shares, merge

Whiten = Literal["batch-token", "batch-row"]


@register("credit", "dler", needs={"group"}, gives={"advantage"}, owns={"advantage", "whitening"})
@dataclass(frozen=True)
class DLERCredit:
    """Writes Anorm (f32[N]); a group of equal rewards has 0 and is no part of the batch's statistics.

    `whiten` over the actions of the batch, as the released code does, or over its answers; std is the sample's. `boost`
    is added to actions of right answers that kept a reward.
    """

    whiten: Whiten = "batch-token"
    boost: float = 0.0

    def __post_init__(self) -> None:
        if self.whiten not in get_args(Whiten):
            raise UserError(f"whiten must be one of {', '.join(get_args(Whiten))}, not {self.whiten!r}")
        if not self.boost >= 0:
            raise UserError(f"boost must be at least 0, not {self.boost}")

    def __call__(self, groups: Sequence[Group], batch: Batch) -> Batch:
        batch = Advantage("mean", self.whiten, ddof=1, eps=1e-8)(groups, batch)
        if not self.boost:
            return batch
        better = [m.correct and m.reward > 0 and not degenerate(g) for g in groups for m in g.members]
        right = torch.tensor(better)[trajectory_of(batch)]
        return batch.with_actions(advantage=batch.actions["advantage"] + self.boost * right)


@register("objective", "dler", needs={"advantage", "logp_old"}, law="raw")
def dler_loss(
    clip_low: float = 0.2, clip_high: float = 0.28, kl_coef: float = 5e-4, dual_clip: float | None = None
) -> ClippedPG:
    """The loss above; normalise by token."""
    return ClippedPG(clip_low, clip_high, dual_clip, kl_coef=kl_coef, kl="k2")


@dataclass(frozen=True)
class DLER(GroupRL):
    """DLER's hyperparameters."""

    members: int = 16  # G, answers to each problem
    minibatches: int = 8  # updates on what a step collected; from the second on the ratio matters
    normalise: By = "token"  # what the loss is a mean over
    max_draws: int = 4  # at most four times the problems, then the step goes on with what there is
    shaping: str = "truncation"  # answers beyond their limit get 0 (reward in `etude list --parts`)
    selector: str = "varied"  # groups whose rewards differ, after truncation
    credit: str = "dler"  # how rewards become advantages (`etude list --parts`)
    objective: str = "dler"  # the loss (`etude list --parts`)
    clip_low: float = 0.2  # the ratio is not taken below 1 - clip_low
    clip_high: float = 0.28  # the ratio is not taken above 1 + clip_high
    kl_coef: float = 5e-4  # weight of the k2 divergence from the starting policy
    dual_clip: float | None = None  # bound of the loss where the advantage is negative (the released code: 10)
    whiten: Whiten = "batch-token"  # mean and std over the batch's tokens, or over its answers
    boost: float = 0.0  # advantage added to right answers (the released code: 0.1)
    thresholds: tuple[float, ...] = ()  # rising shares of right answers that part hard problems from easy ones
    lengths: tuple[int, ...] = ()  # tokens: limits from hard to easy, one more than thresholds; none: max_tokens
    stop_properly: float = 0.0  # factor on the reward of a cut answer (the released code: 0.1)
    merge: bool = False  # whether the last policy is merged with the one at the start
    keep: float = 0.25  # merge: share of each tensor's entries whose change is kept
    scale: float = 0.7  # merge: factor on the changes that are kept
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self.thresholds, self.lengths)
        check_shares(self.keep, self.scale)
        if self.members < 2:
            raise UserError(f"answers are compared within a group: members must be at least 2, not {self.members}")

    def options(self) -> Mapping[tuple[Kind, str], Mapping[str, Any]]:
        """Builds penalty, credit and objective with these hyperparameters."""

        def own(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names}

        return {
            ("reward", "truncation"): own("thresholds", "lengths", "stop_properly"),
            ("credit", "dler"): own("whiten", "boost"),
            ("objective", "dler"): own("clip_low", "clip_high", "kl_coef", "dual_clip"),
        }


def train(s: Setting, config: DLER) -> None:
    """The loop; with `merge` then, as a stage of its own, the merge with the policy at the start."""
    if not config.merge:
        group_rl(s, config)
        return
    if s.common.lora.rank or s.run.ranks.size > 1:
        raise UserError("merge needs whole weights in one process: train without it, then use `etude merge`")
    s.run.stage("rl", lambda: group_rl(s, config))
    s.run.stage("merge", lambda: merge_with_start(s, config))


def merge_with_start(s: Setting, config: DLER) -> None:
    """Merges in place, and looks at what came of it."""
    merge(s.reference(), s.policy, config.keep, config.scale)
    s.watch(Clock(1, 1, s.run.stage_name))


def _chains(**kinds: tuple[int, int]) -> dict[str, Any]:
    """Chains of ones and twos, whose last digit is asked, with every number of terms equally often."""
    shares = {name: {"terms": terms, "share": terms[1] - terms[0] + 1} for name, terms in kinds.items()}
    return {"kinds": shares, "numbers": (1, 2), "modulus": 10}


# n terms take 2 n - 2 tokens, or with every step stated two to four times some three times as many.
WORLD = _chains(short=(4, 5), medium=(6, 8), long=(9, 11))
BASE = BaseRecipe(
    "chain", WORLD, styles={"plain": 0.12, "verbose": 0.88}, policy="tiny",
    shape={"width": 64, "depth": 3, "ffn": 192}, until=(0.70, 0.80), lr=3e-3, max_tokens=96,
)  # fmt: skip
GRPO = {"credit": "grpo", "clip_high": 0.2, "selector": "all"}
ONE = {"world_options": _chains(medium=(7, 7)), "max_tokens": 12, "steps": 80}

CLAIM = Claim(
    says="Under the same truncation penalty, which more than halves the length of answers, DLER is right more often "
    "than GRPO on the problems that need the longest ones, by its dynamic sampling, and loses nothing overall. Where "
    "all problems are equally long there is nothing to gain.",
    world="chain",
    world_options=WORLD,
    policy=BASE,
    options={
        "steps": 100, "problems": 8, "members": 8, "minibatches": 4, "max_tokens": 20,
        "eval_tokens": 96, "eval_every": 25, "eval_problems": 1024,
    },
    arms=(
        Arm("dler", "dler"),
        Arm("grpo", "dler", GRPO, role="baseline"),
        Arm("no-filter", "dler", {"selector": "all"}, role="ablation"),
        Arm("dler-one-length", "dler", ONE, role="control"),
        Arm("grpo-one-length", "dler", {**GRPO, **ONE}, role="control"),
    ),
    metrics={
        "accuracy": Metric("evaluation", "accuracy", unit="%"),
        "accuracy before": Metric("evaluation", "accuracy", "first", unit="%"),
        "long": Metric("evaluation", "accuracy/long", unit="%"),
        "length": Metric("evaluation", "length", better="lower", unit="tokens"),
        "length before": Metric("evaluation", "length", "first", better="lower", unit="tokens"),
        "entropy": Metric("evaluation", "entropy", unit="nats"),
        "live": Metric("log", "live", "mean", unit="%"),
    },
    endpoints=(
        Endpoint("long problems over GRPO", "effect", "long", ("dler", "grpo"), 0.05),
        Endpoint("half as long as before", "effect", "length", ("dler", "dler:length before"), 2.0, ratio=True),
        Endpoint("as accurate as before", "guard", "accuracy", ("dler", "dler:accuracy before"), 0.02),
        Endpoint("long problems over no dynamic sampling", "vanish", "long", ("dler", "no-filter")),
        Endpoint("one length, no gain", "vanish", "accuracy", ("dler-one-length", "grpo-one-length"), 0.05, equal=True),
    ),
    tune="accuracy", grid=(1e-4, 2e-4), minutes=2.0,
)  # fmt: skip

TOKENS = replace(
    CLAIM,
    says="DLER draws more answers for every update; GRPO with as many sampled tokens is no better on long problems.",
    arms=(CLAIM.arms[0], Arm("grpo-longer", "dler", {**GRPO, "steps": 225, "eval_every": 75}, role="baseline")),
    metrics={**CLAIM.metrics, "tokens": Metric("cost", "sampled")},
    endpoints=(Endpoint("long problems at equal tokens", "guard", "long", ("dler", "grpo-longer"), 0.05),),
)

ENTROPY = replace(
    CLAIM,
    says="DLER ends with more entropy than GRPO under the same penalty.",
    arms=CLAIM.arms[:2],
    endpoints=(Endpoint("entropy over GRPO", "effect", "entropy", ("dler", "grpo")),),
)

NARROW = {"world_options": _chains(short=(4, 5)), "max_tokens": 8, "steps": 60, "merge": True}
LOOK = {"steps": 1}  # seen before its one update
MERGING = replace(
    CLAIM,
    says="Trained on short problems alone the policy forgets how to answer longer ones; what is merged into the start "
    "regains most of that, and still answers in fewer tokens.",
    options={**CLAIM.options, "eval_every": 0, "optim": {"lr": 2e-4}},
    arms=(
        Arm("narrow-end", "dler", {**NARROW, "keep": 1.0, "scale": 1.0}, role="stage"),
        Arm("merged-end", "dler", NARROW, role="stage"),
        Arm("merged", "dler", LOOK, after="merged-end"),
        Arm("narrow", "dler", LOOK, role="ablation", after="narrow-end"),
        Arm("start", "dler", LOOK, role="baseline"),
    ),
    metrics={
        "accuracy": Metric("evaluation", "accuracy", "first", unit="%"),
        "long": Metric("evaluation", "accuracy/long", "first", unit="%"),
        "length": Metric("evaluation", "length", "first", better="lower", unit="tokens"),
    },
    endpoints=(
        Endpoint("long problems regained", "effect", "long", ("merged", "narrow"), 0.05),
        Endpoint("near the start again", "guard", "accuracy", ("merged", "start"), 0.10),
        Endpoint("a third shorter than the start", "effect", "length", ("merged", "start"), 1.5, ratio=True),
    ),
    grid=(), minutes=1.0,
)  # fmt: skip

METHOD = Method("dler", DLER, train, claim=CLAIM, more={"tokens": TOKENS, "entropy": ENTROPY, "merging": MERGING})
