"""Feedback that only a group can give: how often each of its answers beats the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.experience.protocols import Judge
from etude.experience.types import Problem
from etude.feedback.judge import About, text_of

Floats = NDArray[np.float64]


def compared(
    judge: Judge, problems: Sequence[Problem], answers: Sequence[Sequence[str]], asking: str = ""
) -> list[Floats]:
    """f64[G, G] for each problem: W[i, j] is the value of answer i against answer j, 1/2 on the diagonal, and
    W[i, j] + W[j, i] = 1. Every pair is judged, all problems' in one call. An `asking` makes every comparison one of
    its own, drawn anew where the judge draws; without one, equal pairs get equal verdicts."""
    items: list[tuple[str, str, str, Any]] = []
    for problem, of in zip(problems, answers, strict=True):
        context = text_of(problem.prompt)
        for i, j in combinations(range(len(of)), 2):
            about = About(problem, f"{asking}/{i}/{j}" if asking else "")
            items.append((context, of[i], of[j], about))
    verdicts = iter(judge(items))
    wins = []
    for of in answers:
        w = np.full((len(of), len(of)), 0.5)
        for i, j in combinations(range(len(of)), 2):
            w[i, j] = next(verdicts).value
            w[j, i] = 1 - w[i, j]
        wins.append(w)
    return wins


def win_rates(wins: Floats) -> Floats:
    """f64[G, G] -> f64[G]: the mean value of each answer against all others, itself left out: an estimate of
    r(x, y) = E_y' P(y > y' | x) with y' from what the group was drawn from. Their mean is 1/2 whatever the verdicts
    were. A group of one has 1/2."""
    size = len(wins)
    if size < 2:
        return np.full(size, 0.5)
    value: Floats = (wins.sum(1) - wins.diagonal()) / (size - 1)
    return value


def pooled(values: Floats, answers: Sequence[str]) -> Floats:
    """f64[G] -> f64[G]: equal answers share the mean of their values."""
    _, of = np.unique(np.asarray(answers, dtype=object), return_inverse=True)
    mean: Floats = np.bincount(of, values) / np.bincount(of)
    return mean[of]


def fitted_rewards(met: Iterable[tuple[str, Sequence[str], Floats]]) -> dict[str, dict[str, float]]:
    """A Bradley-Terry reward for every answer to every question, from all groups (question, answers, wins) that met."""
    wins: dict[str, Counter[tuple[str, str]]] = {}
    for question, answers, w in met:
        of = wins.setdefault(question, Counter())
        for i, j in permutations(range(len(answers)), 2):
            of[answers[i], answers[j]] += w[i, j]
    rewards = {}
    for question, of in wins.items():
        known = sorted({one for one, _ in of})
        matrix = np.array([[of[a, b] * (a != b) for b in known] for a in known])
        rewards[question] = dict(zip(known, bradley_terry(matrix).tolist(), strict=True))
    return rewards


def bradley_terry(wins: Floats, prior: float = 0.1, steps: int = 50) -> Floats:
    """f64[M, M] -> f64[M]: the rewards, of mean 0, under which P(i > j) = sigmoid(r_i - r_j) makes `wins` likeliest.

    wins[i, j] counts how often i beat j (1952, R. A. Bradley and M. E. Terry). `prior` wins and losses of each against
    a player of reward 0 keep the rewards of those finite that never won or lost. Newton's method.
    """
    met = wins + wins.T
    r = np.zeros(len(wins))
    for _ in range(steps):
        p = 1 / (1 + np.exp(r[None] - r[:, None]))  # P(i > j)
        own = 1 / (1 + np.exp(-r))
        gradient = (wins - met * p).sum(1) + prior * (1 - 2 * own)
        curvature = met * p * (1 - p)
        np.fill_diagonal(curvature, 0.0)
        hessian = np.diag(curvature.sum(1) + 2 * prior * own * (1 - own)) - curvature
        step = np.linalg.solve(hessian, gradient)
        r = r + step / max(1.0, float(np.abs(step).max()) / 2)  # no further than 2 at once
        if np.abs(step).max() < 1e-10:
            break
    return r - r.mean()
