"""OTR: one-token rollout (arXiv 2509.26313, section 3).

Problem: supervised fine-tuning forces every demonstrated token, also those that the policy would never say, and
bends it away from what it knew. Idea: keep the demonstration as the context, and make every position an episode of
one action. The policy draws tokens, a token is right if it is the demonstrated one, and REINFORCE does the rest: no
text is generated, and what is learnt lies within what the policy can say.

At position t of a demonstration, with the policy pi over V tokens and the demonstrated token x_t, draw K tokens with
replacement from pi' = softmax(logits / kappa), reward R(a) = 1 if a = x_t and else beta, and take

    l_t = - (1/K) sum_j R(a_j) log pi(a_j),        j = 1..K

with a gradient through log pi alone (nats). The loss is the mean over demonstrations of the mean of l_t over their
tokens. There is no baseline, no importance weight for kappa, no clip; every update draws anew, because log pi(a) of
a token pushed down has no lower bound, and only being drawn from the present policy keeps that harmless. The value
of the loss is no measure of progress (`nll` and `hit`, the share of draws that are right, are).

What it is in expectation: `exact` sums over the vocabulary instead of drawing,

    l_t = - sum_a pi'(a) R(a) log pi(a),        pi' held constant,

and at kappa = 1 its gradient is (1 - beta) pi(x_t) times that of SFT: dynamic fine-tuning (arXiv 2508.05629), which
is `exact` with beta = 0. So OTR learns a token in proportion to the probability it has. It cannot teach what is
never drawn (at 0.001, three in four positions draw it not once in 256), takes smaller steps than SFT at equal
learning rate, and stops by itself on what is learnt.

This file adds the objective, and `train` puts it where SFT has its own. `flat` is the ablation: every position weighs
the batch's mean of pi(x_t), which leaves SFT with a smaller step. The paper gives K = 256 and says that beta is
slightly negative and kappa above 1; beta = -0.1 and kappa = 1.3 are readings of that, and so is that the optimiser
is SFT's. Draws invert the cumulative distribution at numbers hashed from a stream a position, so that they do not
depend on how a batch is split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from etude.experience.batch import Batch, By
from etude.experience.claims import Arm, BaseRecipe, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import register
from etude.experience.protocols import Loss, Outputs, Policy
from etude.learning.imitation import Imitation, imitate
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.reference import with_reference
from etude.objectives.terms import counted, weighted


@register(
    "objective",
    "otr",
    needs={"demonstrations"},
    why="it would take wrong answers for some: use `etude train otr`",
)
@dataclass(frozen=True)
class OneTokenRollout:
    """The loss above, as a sum of weight x l_t over actions; normalise by sequence.

    `prepare` gives every action a stream (int64[N]) from which alone its draws follow. Raises UserError for options
    that cannot be.
    """

    samples: int = 256  # K
    beta: float = -0.1  # reward of a wrong token
    kappa: float = 1.3  # temperature of the draws
    exact: bool = False  # sum over the vocabulary instead
    flat: bool = False  # ablation: all positions weigh alike
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.kappa > 0:
            raise UserError(f"samples must be at least 1 and kappa above 0, not {self.samples} and {self.kappa}")
        if not self.beta <= 1:
            raise UserError(
                f"beta, the reward of a wrong token, must be at most that of a right one, 1, not {self.beta}"
            )

    def prepare(self, policy: Policy, batch: Batch, keys: Keys) -> Batch:
        """The batch with a stream of draws an action, and where all weigh alike with how much (f32[N])."""
        stream = torch.from_numpy(keys.numpy().integers(2**63, size=len(batch.at)))
        columns = {"stream": stream.to(batch.at.device)}
        if self.flat:
            p = with_reference(batch, policy).actions["logp_ref"].exp()
            weight = batch.actions["weight"]
            columns["confidence"] = ((weight * p).sum() / weight.sum().clamp_min(1e-12)).expand(len(p))
        return batch.with_actions(**columns)

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """See `Objective`."""
        actions = batch.actions

        def term(logits: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
            """l_t, the negative log-likelihood and the share of right draws of n positions, from f32[n, V]."""
            right = actions["target"][part, None]
            logp = logits.log_softmax(-1)
            nll = -logp.gather(-1, right).squeeze(-1)
            if self.flat:
                return (1 - self.beta) * actions["confidence"][part] * nll, nll, (-nll).exp()
            law = (logits.detach() / self.kappa).softmax(-1)
            if self.exact:
                reward = torch.full_like(law, self.beta).scatter(-1, right, 1.0)
                return -(law * reward * logp).sum(-1), nll, law.gather(-1, right).squeeze(-1)
            drawn = draw(law, actions["stream"][part], self.samples)
            hit = drawn == right
            reward = hit.to(logp.dtype) * (1 - self.beta) + self.beta
            return -(reward * logp.gather(-1, drawn)).mean(-1), nll, hit.to(logp.dtype).mean(-1)

        term_, nll, hit = out.map_logits(term)
        return Loss(weighted(batch, term_), counted(batch, nll=nll, hit=hit))


def draw(law: Tensor, streams: Tensor, count: int) -> Tensor:
    """int64[n, count]: tokens drawn with replacement from the probabilities f32[n, V], each row by its own stream."""
    total = law.cumsum(-1)
    u = uniforms(streams, count).to(law.dtype) * total[:, -1:]
    return torch.searchsorted(total, u, right=True).clamp_max(law.shape[-1] - 1)


def uniforms(streams: Tensor, count: int) -> Tensor:
    """f32[n, count] in [0, 1), in steps of 2^-24: the first outputs of SplitMix64 (Steele, Lea and Flood 2014, figure
    14) seeded with each of the streams (int64[n]). Its constants are written as int64, which wraps."""
    z = streams[:, None] + torch.arange(1, count + 1, device=streams.device) * -0x61C8864680B583EB
    z = (z ^ shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return shifted(z ^ shifted(z, 31), 40).float() * 2.0**-24


def shifted(z: Tensor, bits: int) -> Tensor:
    """int64 shifted right with zeros coming in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class OTR(Imitation):
    """OTR's hyperparameters."""

    samples: int = 256  # K, tokens drawn at each position
    beta: float = -0.1  # reward of a token that is not the demonstrated one, whose own is 1
    kappa: float = 1.3  # temperature of the draws; 1 is the policy's own
    exact: bool = False  # the loss's expectation, without draws; with kappa=1 and beta=0 it is DFT
    flat: bool = False  # ablation: every position weighs the batch's mean probability of its token
    normalise: By = "sequence"  # what the loss is a mean over


def train(s: Setting, config: OTR) -> None:
    """One `fit` over the demonstrations, in epochs, each update with draws of its own."""
    imitate(s, config, OneTokenRollout(config.samples, config.beta, config.kappa, config.exact, config.flat))


PARTS = {
    "sums": {"world": "chain", "kinds": {"sum": [4, 4]}, "numbers": [1, 6]},
    "sorting": {
        "world": "number_sorting",
        "min_numbers": 4,
        "max_numbers": 4,
        "min_value": 0.0,
        "max_value": 9.0,
        "max_decimals": 0,
    },
}
SHAPE = {"width": 64, "depth": 2, "heads": 4, "ffn": 192}

# 0.83 of a mixture of two sums to one sorting, whose demonstrations are wrong 40% of the time, is 96% and 57%.
BASE = BaseRecipe(
    "mix",
    {"parts": PARTS, "shares": {"sums": 2, "sorting": 1}},
    noise=0.4,
    faults=("order",),
    shape=SHAPE,
    until=(0.83, 0.95),
    lr=2e-3,
    max_tokens=24,
    check_problems=256,
)
OTHER_HAND = {"noise": 0.3, "faults": ["detour"]}  # three in ten begin with letters and end on a wrong number
OPTIONS = {"batch": 64, "normalise": "sequence", "max_tokens": 24, "eval_problems": 512, "audit": True, **OTHER_HAND}
OURS = {"samples": 64, "kappa": 1.0}

METRICS = {
    "sorting": Metric("evaluation", "accuracy/sorting", unit="%"),
    "sums": Metric("evaluation", "accuracy/sums", unit="%"),
    "sorting, greedy": Metric("evaluation", "greedy/accuracy/sorting", unit="%"),
    "sums, greedy": Metric("evaluation", "greedy/accuracy/sums", unit="%"),
    "both, greedy": Metric("evaluation", "greedy/accuracy", unit="%"),
    "kl": Metric("evaluation", "kl", better="lower", unit="nats"),
}

# Tuned on both skills alike: by sorting alone every arm would take the rate at which it forgets all sums.
CLAIM = Claim(
    says="Taught sorting from another's demonstrations, of which three in ten go astray, a policy that half knows it "
    "sorts better by OTR than by SFT, sampled, and keeps more of the sums it knew; the sampled and the exact loss do "
    "the same; without the weight by its own probability nothing of this is left.",
    world="mix",
    world_options={"parts": PARTS, "shares": {"sums": 0, "sorting": 1}},
    policy=BASE,
    options={**OPTIONS, "steps": 500, "eval_every": 100},
    arms=(
        Arm("otr", "otr", OURS),
        Arm("sft", "sft", role="baseline"),
        Arm("exact", "otr", {**OURS, "exact": True}, role="control"),
        Arm("beta-0", "otr", {**OURS, "beta": 0.0}, role="control"),
        Arm("flat", "otr", {**OURS, "flat": True}, role="ablation"),
    ),
    metrics=METRICS,
    endpoints=(
        Endpoint("keeps more of the sums", "effect", "sums", ("otr", "sft"), 0.10),
        Endpoint("sorts better, sampled", "effect", "sorting", ("otr", "sft"), 0.10),
        Endpoint("sorts as well, greedy", "guard", "sorting, greedy", ("otr", "sft"), 0.03),
        Endpoint("keeps more than with flat weights", "vanish", "sums", ("otr", "flat"), 0.10),
        Endpoint("sorts better than with flat weights", "vanish", "sorting", ("otr", "flat"), 0.10),
        Endpoint("exact: the same sums", "vanish", "sums", ("otr", "exact"), 0.10, equal=True),
        Endpoint("exact: the same sorting", "vanish", "sorting", ("otr", "exact"), 0.05, equal=True),
        Endpoint("beta 0: the same sorting", "vanish", "sorting", ("otr", "beta-0"), 0.05, equal=True),
    ),
    tune="both, greedy",
    grid=(1e-4, 3e-4, 1e-3),
    minutes=2.0,
)

COLD = Claim(
    says="A policy that has never sorted learns it by SFT, and not by OTR, which weighs what is never drawn by 0.",
    world="mix",
    world_options=CLAIM.world_options,
    policy=replace(
        BASE, options={"parts": PARTS, "shares": {"sums": 1, "sorting": 0}}, noise=0.0, faults=(), until=(0.95, 1.0)
    ),
    options={**OPTIONS, "steps": 200, "eval_every": 100},
    arms=(Arm("sft", "sft", role="baseline"), Arm("otr", "otr", OURS)),
    metrics=METRICS,
    endpoints=(Endpoint("only SFT sorts", "effect", "sorting, greedy", ("sft", "otr"), 0.30),),
    tune="sorting, greedy",
    grid=(3e-4, 1e-3),
    minutes=0.5,
)

METHOD = Method("otr", OTR, train, claim=CLAIM, more={"cold": COLD})
