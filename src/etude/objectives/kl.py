"""Divergences: sampled estimates on log-probabilities, full sums on logits, and f-divergences.

Sampled estimates take log-probabilities of actions that were drawn from the policy itself, and estimate
KL(policy || reference). Used as losses their mean gradients differ: that of k2 is the gradient of this
KL, that of k1 is zero, and that of k3 is the gradient of KL(reference || policy). As a reward
(`kl_reward`), k1 gives the gradient of KL(policy || reference).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from etude.experience.batch import Batch
from etude.objectives.terms import column, logp_old

Estimator = Literal["k1", "k2", "k3"]
Generator = Literal["forward", "js", "alpha"]


def k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """log p - log p_ref: unbiased, of either sign. J. Schulman, "Approximating KL divergence", 2020."""
    return logp - logp_ref


def k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """(log p - log p_ref)^2 / 2: biased, low variance (Schulman 2020)."""
    return (logp - logp_ref).square() / 2


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """u - 1 - log u with u = p_ref / p: unbiased and never negative (Schulman 2020)."""
    log_u = logp_ref - logp
    return torch.expm1(log_u) - log_u


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_reward(batch: Batch, coef: float, estimator: Estimator = "k1") -> Batch:
    """Takes coef x KL off the action column `reward` (0 where there is none yet), with the
    log-probabilities the actions were drawn with. arXiv:1909.08593, section 2, equation 2.

    Raises UserError without `logp_ref`, or if the actions were not drawn at temperature 1.
    """
    old = logp_old(batch, "a KL reward")
    ref = column(batch, "logp_ref", "a KL reward", "attach it with `with_reference`")
    penalty = coef * ESTIMATORS[estimator](old, ref)
    return batch.with_actions(reward=batch.actions.get("reward", torch.zeros_like(penalty)) - penalty)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) over the vocabulary, nats: logits f[n, V] -> f[n]."""
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return _kl(p, q)


def js_divergence(p_logits: Tensor, q_logits: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: logits f[n, V] -> f[n].

    The generalised Jensen-Shannon divergence of arXiv:2306.13649, equation 1, for beta in (0, 1);
    divided by beta it tends to KL(p || q) as beta -> 0, and by 1 - beta to KL(q || p) as beta -> 1.
    """
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    weight = torch.tensor([beta, 1 - beta], dtype=p.dtype, device=p.device).log()
    m = torch.logaddexp(weight[0] + p, weight[1] + q)
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def f_divergence(logp: Tensor, logp_ref: Tensor, kind: Generator, alpha: float = 0.5) -> Tensor:
    """f(u), u = p / p_ref, for actions drawn from the *reference*: its mean is the f-divergence.

    `forward` is u - 1 - log u, whose mean is KL(ref || policy); `js` is twice the Jensen-Shannon
    divergence; `alpha` in (0, 1) goes from the reverse KL at 0 to the forward KL at 1. All have
    f(1) = f'(1) = 0. Ali and Silvey 1966; Csiszar 1967; for RL with rehearsal arXiv:2509.07430.
    """
    log_u = logp - logp_ref
    if kind == "forward":
        return torch.expm1(log_u) - log_u
    u = log_u.exp()
    if kind == "js":
        return u * log_u - (u + 1) * ((u + 1) / 2).log()
    return (((1 - alpha) * log_u).exp() - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities f[n, V] -> f[n]."""
    return (p.exp() * (p - q)).sum(-1)
