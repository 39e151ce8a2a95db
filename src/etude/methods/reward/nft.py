"""NFT: negative-aware fine-tuning (arXiv 2505.18116, sections 3 and 4).

Problem: rejection-sampling fine-tuning imitates the policy's right answers and throws the wrong ones away, though they
say where probability must not go. Idea: the policy that sampled is a mixture, of known weight, of a positive policy
(its answers, given that they are right) and a negative one (given that they are wrong). With r_q the share of right
answers to question q,

    pi_old = r_q pi+ + (1 - r_q) pi-        so that        pi- = (pi_old - r_q pi+) / (1 - r_q),

and where the policy in training is pi+, maximum likelihood on *wrong* answers becomes a loss on that same policy. For
token t of an answer with label r in {0, 1}, and the ratio R_t = pi(a_t) / pi_old(a_t) (no unit),

    l_t = - log R_t                                             if r = 1
    l_t = - log max_v( (1 - r_q R_t) / (1 - r_q), eps )         if r = 0

where max_v(x, eps) has the value of max(x, eps) and the gradient of x, so that a token whose probability has risen is
still pushed back. The loss is (1 / Z) sum over answers of w(q) sum_t l_t, Z a constant number of tokens (eq. 9-11).

The gradient of a wrong token is + k grad log pi with k = [r_q R / (1 - r_q)] / max((1 - r_q R) / (1 - r_q), eps). At
R = 1 the effective advantages are therefore +w and -w r_q / (1 - r_q): with w = 1 - r_q they are r - r_q, which is
Dr. GRPO, and with w = sqrt((1 - r_q) / r_q) they are (r - r_q) / std, which is GRPO. With negative = 0 it is RFT.

This file adds the objective. Groups that are all right or all wrong have no mixture and are drawn again. As in the
authors' code r_q is kept within 0.02 to 0.98, and log-ratios below 10. Departures: answers a question, questions a step
and the learning rate are laptop-sized (the paper: 16, 512, 1e-6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from etude.experience.batch import Batch, By
from etude.experience.claims import Arm, BaseRecipe, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.plugs import Kind, register
from etude.experience.protocols import Loss, Outputs
from etude.learning.group_rl import GroupRL, group_rl
from etude.learning.learner import Optim
from etude.methods.method import Method
from etude.objectives.terms import Pure, counted, logp_old, row_column, weighted

PromptWeight = Literal["one", "1-r", "sqrt"]
LEAST = 0.02  # r_q is kept this far from 0 and 1
LARGEST = 10.0  # log-ratio


@register(
    "objective",
    "nft",
    needs={"group", "correct", "logp_old"},
    refuses={"advantage", "tied"},
    law="raw",
    why="it weighs right and wrong answers itself, and only groups that hold both: use credit=none and selector=mixed",
)
@dataclass(frozen=True)
class NFTLoss(Pure):
    """The loss above, as a sum of weight x w(q) l_t over actions (f[N]); normalise by a constant.

    Reads the row columns `correct` (r) and `solved` (r_q). Raises UserError where the verifier has no word
    on an answer, or actions have no log-probability under the policy that sampled them.
    """

    eps: float = 1.0  # smallest value of the negative ratio, forward only
    prompt_weight: PromptWeight = "1-r"  # w(q): 1, 1 - r_q, or sqrt((1 - r_q) / r_q)
    negative: float = 1.0  # weight of wrong answers; 0 is RFT
    needs: ClassVar[frozenset[str]] = frozenset({"logp"})

    def __post_init__(self) -> None:
        if not self.eps > 0 or not self.negative >= 0:
            raise UserError(f"eps must be above 0 and negative at least 0, not {self.eps} and {self.negative}")
        if self.prompt_weight not in get_args(PromptWeight):
            raise UserError(f"prompt_weight must be one of {', '.join(get_args(PromptWeight))}")

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """See `Objective`."""
        right = row_column(batch, "correct", "nft", "its world needs a verifier") > 0.5  # bool[N]
        solved = row_column(batch, "solved", "nft", "pack the batch from groups").clamp(LEAST, 1 - LEAST)
        log_ratio = out.logp - logp_old(batch, "nft")
        ratio = log_ratio.clamp(max=LARGEST).exp()
        negative = straight_through(implicit_negative(ratio, solved), self.eps)
        term = torch.where(right, -log_ratio, -self.negative * negative.log())
        metrics = counted(batch, ratio=ratio, entropy=-out.logp, clamped=(~right & (ratio > 1)).to(ratio.dtype))
        return Loss(weighted(batch, self._prompt_weight(solved) * term), metrics)

    def _prompt_weight(self, solved: Tensor) -> Tensor:
        if self.prompt_weight == "one":
            return torch.ones_like(solved)
        return 1 - solved if self.prompt_weight == "1-r" else ((1 - solved) / solved).sqrt()


def implicit_negative(ratio: Tensor, solved: Tensor) -> Tensor:
    """pi- / pi_old of each token, from the positive policy's ratio R and r_q (f[N] each): section 3.2."""
    return (1 - solved * ratio) / (1 - solved)


def straight_through(x: Tensor, least: float) -> Tensor:
    """The value of max(x, least) with the gradient of x."""
    return x + (x.clamp(min=least) - x).detach()


@dataclass(frozen=True)
class NFT(GroupRL):
    """NFT's hyperparameters."""

    members: int = 16  # G, answers to each problem
    minibatches: int = 4  # updates on what a step collected; from the second on the ratio matters
    normalise: By = "constant"  # Z, a constant number of tokens, so that no answer's length enters
    selector: str = "mixed"  # groups in which some answers are right and some wrong
    max_draws: int = 3  # at most three times the problems, then the step goes on with what there is
    credit: str = "none"  # the loss weighs answers itself
    objective: str = "nft"  # the loss (`etude list --parts`)
    eps: float = 1.0  # smallest value of the negative ratio, forward only
    prompt_weight: PromptWeight = "1-r"  # w(q): one, 1-r (as Dr. GRPO) or sqrt (as GRPO)
    negative: float = 1.0  # weight of wrong answers; 0 is RFT on the same answers
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4))

    def options(self) -> Mapping[tuple[Kind, str], Mapping[str, Any]]:
        """Builds the objective with these hyperparameters."""
        own = {"eps": self.eps, "prompt_weight": self.prompt_weight, "negative": self.negative}
        return {("objective", "nft"): own}


STEP = {"problems": 32, "members": 16, "minibatches": 4, "selector": "mixed", "max_draws": 3, "normalise": "constant"}

CLAIM = Claim(
    says="After as many sampled tokens, learning from wrong answers too ends at a higher pass@1 than learning from "
    "right ones alone (RFT), with more entropy left along the way, and no worse than Dr. GRPO with its clip.",
    world="chain_sum",
    policy=BaseRecipe("chain_sum", noise=0.6, until=(0.20, 0.40), max_tokens=16),
    options={**STEP, "steps": 1000, "max_tokens": 16, "eval_every": 20, "eval_problems": 1024},
    arms=(
        Arm("nft", "nft"),
        Arm("rft", "nft", {"negative": 0.0}, role="ablation"),
        Arm("dr-grpo", "group-rl", {"objective": "dapo", "credit": "dr-grpo"}, role="baseline"),
    ),
    metrics={
        "pass@1": Metric("evaluation", "accuracy", unit="%"),
        "entropy": Metric("evaluation", "entropy", "mean", unit="nats"),
        "area": Metric("evaluation", "accuracy", "area", unit="%"),
    },
    endpoints=(
        Endpoint("pass@1 over right answers alone", "effect", "pass@1", ("nft", "rft"), 0.03),
        Endpoint("more entropy than right answers alone", "effect", "entropy", ("nft", "rft"), every=True),
        Endpoint("as good as Dr. GRPO", "guard", "pass@1", ("nft", "dr-grpo"), 0.03),
    ),
    equal={"sampled": 3e5},
    tune="pass@1",
    grid=(1e-4, 3e-4),
    minutes=8.0,
)

METHOD = Method("nft", NFT, group_rl, claim=CLAIM)
