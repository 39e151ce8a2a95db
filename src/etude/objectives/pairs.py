"""Preference losses over linked rows: DPO and its relatives.

A link of kind `pair` names one row in the role `chosen` and one or more `rejected`. A row's score is the
sum (or mean) over its actions with weight of logp, less `logp_ref` where there is a reference; its
reward is beta x score. Actions are in or out: any weight but 0 counts fully, so token weights that
`normalise` changed do no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import register
from etude.experience.protocols import Loss, Outputs, Policy
from etude.objectives.terms import column

LinkName = Literal["logistic", "soft", "squared", "hinge", "infonce"]


def normalise_pairs(batch: Batch) -> Batch:
    """Writes the row column `pair_weight`, 1 / (pairs in the batch): call it before splitting, in place of
    `normalise`, and the sum over micro-batches is exactly the mean over pairs.

    Raises UserError if a row belongs to no pair.
    """
    chosen, _ = _pairs(batch)
    weight = torch.full((batch.size,), 1.0 / len(chosen), dtype=torch.float64, device=chosen.device)
    return replace(batch, row={**batch.row, "pair_weight": weight})


@dataclass(frozen=True)
class PairLoss:
    """loss = mean over pairs of link(margin) + nll_coef x mean token NLL of the chosen row.

    With h = score(chosen) - score(rejected), `link` is
    logistic: -(1 - e) log sigmoid(beta h - gamma) - e log sigmoid(gamma - beta h), e = label_smoothing;
    soft: -q log sigmoid(beta h) - (1 - q) log sigmoid(-beta h), q = sigmoid(D), with D the difference of the row
    column `value` (chosen less rejected): least where beta h = D, and the hard logistic loss as D grows;
    squared: (h - 1 / (2 beta))^2; hinge: max(0, 1 - beta h);
    infonce: -log softmax of the chosen among all linked rows' rewards, any number rejected.
    `per_token` takes means instead of sums over tokens; without `reference` scores are plain logp. The reference is the
    action column `logp_ref`, or the row column of that name: log pi_ref of the whole row (see `reference_of`).

    Metrics: `accuracy` and `margin` (of rewards; against the best rejected), `reward_chosen`,
    `reward_rejected` (mean), `nll`. `prepare` calls `normalise_pairs` where nobody has.
    """

    link: LinkName = "logistic"
    beta: float = 0.1
    reference: bool = True
    per_token: bool = False
    gamma: float = 0.0  # target margin of rewards, logistic link
    label_smoothing: float = 0.0  # assumed share of flipped labels, logistic link
    nll_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.link not in (*_LINKS, "soft", "infonce"):
            raise UserError(f"link must be logistic, soft, squared, hinge or infonce, not {self.link!r}")
        if not (self.beta > 0 and 0 <= self.label_smoothing < 0.5 and self.nll_coef >= 0):
            raise UserError("beta must be above 0, label_smoothing in [0, 0.5) and nll_coef at least 0")
        if self.link != "logistic" and (self.gamma or self.label_smoothing):
            raise UserError("gamma and label_smoothing belong to the logistic link")

    @property
    def needs(self) -> frozenset[str]:
        """See `Objective`."""
        return frozenset({"logp"})

    def prepare(self, policy: Policy, batch: Batch, keys: Keys) -> Batch:
        """The whole batch, with each pair's weight."""
        return batch if "pair_weight" in batch.row else normalise_pairs(batch)

    def loss(self, out: Outputs, batch: Batch) -> Loss:
        """See `Objective`."""
        pair_weight = batch.row.get("pair_weight")
        if not isinstance(pair_weight, Tensor):
            raise ValueError("a pair loss needs the row column 'pair_weight': call normalise_pairs on the whole batch")
        chosen, rejected = _pairs(batch)
        active = (batch.actions["weight"] != 0).to(out.logp.dtype)
        tokens = batch.per_row(active).clamp_min(1)
        score = self._score(out.logp, batch, active)
        if self.per_token:
            score = score / tokens
        nll = -(batch.per_row(out.logp * active) / tokens)[chosen]
        absent = rejected < 0
        others = score[rejected].masked_fill(absent, -torch.inf)  # [P, K]
        if self.link == "infonce":
            rewards = self.beta * torch.cat([score[chosen][:, None], others], 1)
            term = rewards.logsumexp(1) - rewards[:, 0]
        elif others.shape[1] == 1:
            h = score[chosen] - others[:, 0]
            if self.link == "soft":
                term = _cross_entropy(self.beta * h, self._target(batch, chosen, rejected).to(h.dtype).sigmoid())
            else:
                term = _LINKS[self.link](h, self)
        else:
            raise UserError(f"the {self.link} link takes one rejected row a pair: use infonce for several")
        weight = pair_weight[chosen].to(term.dtype)
        metrics = self._metrics(score.detach(), others.detach(), chosen, absent)
        metrics["nll"] = (float(nll.detach().sum()), float(len(chosen)))
        return Loss((weight * (term + self.nll_coef * nll)).sum(), metrics)

    def _score(self, logp: Tensor, batch: Batch, active: Tensor) -> Tensor:
        """f[B]: the sum over a row's actions with weight of logp, less that of the reference."""
        if not self.reference:
            return batch.per_row(logp * active)
        written = batch.row.get("logp_ref")
        if isinstance(written, Tensor) and "logp_ref" not in batch.actions:
            return batch.per_row(logp * active) - written.to(logp.dtype)
        reference = column(batch, "logp_ref", "a preference loss", "attach it with `with_reference`")
        return batch.per_row((logp - reference) * active)

    def _target(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> Tensor:
        """f[P]: D, without gradient."""
        value = batch.row.get("value")
        if not isinstance(value, Tensor):
            raise UserError("soft targets need the row column 'value', which this batch does not have")
        return value[chosen] - value[rejected[:, 0]]

    def _metrics(self, score: Tensor, others: Tensor, chosen: Tensor, absent: Tensor) -> dict[str, tuple[float, float]]:
        """Sums over the P pairs; scores are [B] and [P, K]."""
        margin = self.beta * (score[chosen] - others.amax(1))
        rejected = self.beta * others.masked_fill(absent, 0.0).sum(1) / (~absent).sum(1)
        sums = torch.stack([(margin > 0).to(margin.dtype).sum(), margin.sum(), score[chosen].sum() * self.beta])
        accuracy, total, good = sums.tolist()
        n = float(len(chosen))
        return {
            "accuracy": (accuracy, n),
            "margin": (total, n),
            "reward_chosen": (good, n),
            "reward_rejected": (float(rejected.sum()), n),
        }


def _cross_entropy(margin: Tensor, q: Tensor | float) -> Tensor:
    """Of the probability `q` that the chosen is better with that of the margin."""
    return -q * logsigmoid(margin) - (1 - q) * logsigmoid(-margin)


def _logistic(h: Tensor, o: PairLoss) -> Tensor:
    return _cross_entropy(o.beta * h - o.gamma, 1 - o.label_smoothing)


def _squared(h: Tensor, o: PairLoss) -> Tensor:
    return (h - 1 / (2 * o.beta)).square()


def _hinge(h: Tensor, o: PairLoss) -> Tensor:
    return (1 - o.beta * h).clamp_min(0)


_LINKS: dict[str, Callable[[Tensor, PairLoss], Tensor]] = {
    "logistic": _logistic,
    "squared": _squared,
    "hinge": _hinge,
}


def _pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """(int64[P] chosen rows, int64[P, K] rejected rows, -1 where a pair has fewer than K)."""
    chosen: list[int] = []
    rejected: list[list[int]] = []
    for link in (link for link in batch.links if link.kind == "pair"):
        roles = dict.fromkeys(link.roles, 0)
        if set(roles) != {"chosen", "rejected"} or link.roles.count("chosen") != 1:
            raise UserError(f"a pair has one chosen and at least one rejected row, not the roles {link.roles}")
        chosen.append(link.rows[link.roles.index("chosen")])
        rejected.append([r for r, role in zip(link.rows, link.roles, strict=True) if role == "rejected"])
    alone = set(range(batch.size)) - set(chosen) - {r for rs in rejected for r in rs}
    if alone:
        raise UserError(f"a preference loss learns from pairs: {len(alone)} of {batch.size} rows belong to none")
    width = max(map(len, rejected))
    padded = [rs + [-1] * (width - len(rs)) for rs in rejected]
    device = batch.lengths.device
    return torch.tensor(chosen, device=device), torch.tensor(padded, device=device)


_REFERENCED = {"pairs", "reference"}


@register("objective", "dpo", needs=_REFERENCED)
def dpo(beta: float = 0.1, label_smoothing: float = 0.0, nll_coef: float = 0.0) -> PairLoss:
    """DPO, arXiv:2305.18290, equation 7; with label smoothing cDPO (E. Mitchell, 2023, equation 3); with
    the NLL term that of arXiv:2404.19733, equation 1."""
    return PairLoss("logistic", beta, label_smoothing=label_smoothing, nll_coef=nll_coef)


@register("objective", "soft-dpo", needs={*_REFERENCED, "value"}, why="its soft targets are differences of values")
def soft_dpo(beta: float = 0.1) -> PairLoss:
    """DPO on soft targets: regresses beta h on a difference of rewards (DNO, arXiv:2404.03715, algorithm 1; for rewards
    under a Bradley-Terry model, DPO with each label's probability in place of the label)."""
    return PairLoss("soft", beta)


@register("objective", "dpo-norm", needs=_REFERENCED)
def dpo_norm(beta: float = 5.0) -> PairLoss:
    """Length-normalised DPO, arXiv:2411.15124, section 5.1: beta multiplies means over tokens."""
    return PairLoss("logistic", beta, per_token=True)


@register("objective", "ipo", needs=_REFERENCED)
def ipo(beta: float = 0.1) -> PairLoss:
    """IPO, arXiv:2310.12036, equation 17 (there tau): regresses h on 1 / (2 beta)."""
    return PairLoss("squared", beta)


@register("objective", "slic", needs=_REFERENCED)
def slic(beta: float = 0.1) -> PairLoss:
    """Hinge on the normalised likelihood: SLiC, arXiv:2305.10425, as in RSO, arXiv:2309.06657."""
    return PairLoss("hinge", beta)


@register("objective", "simpo", needs={"pairs"})
def simpo(beta: float = 2.0, gamma: float = 1.0) -> PairLoss:
    """SimPO, arXiv:2405.14734, equation 6: mean logp without a reference, and a target margin."""
    return PairLoss("logistic", beta, reference=False, per_token=True, gamma=gamma)


@register("objective", "infonce", needs=_REFERENCED)
def infonce(beta: float = 0.1) -> PairLoss:
    """One chosen against all rejected: InfoNCE (arXiv:1807.03748, equation 4) on DPO's rewards."""
    return PairLoss("infonce", beta)
