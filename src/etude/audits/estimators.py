"""What groups of samples say of a policy, with 95% intervals over problems.

The unit of sampling is the problem: samples of one problem resemble one another, so intervals treat
the `P` problems, not the `P x G` samples, as independent. Pure functions; groups without members count
as absent; no groups give an estimate of nan over 0 problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from etude.experience.types import Author, Group

Z = 1.959963984540054  # the normal's 97.5% quantile


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval, over `n` problems."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


ABSENT = Estimate(math.nan, math.nan, math.nan, 0)


def exact(value: float) -> Estimate:
    """A number that was not sampled over problems."""
    return Estimate(value, value, value, 1)


def share(values: Sequence[float], most: int | None = None) -> Estimate:
    """The mean of one number in [0, 1] a problem, with Wilson's interval at Kish's effective sample size,
    mean (1 - mean) / var(mean), which is at most `most`.

    With one binary number a problem this is Wilson's interval itself. Its width is never 0, and near 0
    and 1 its coverage holds where that of Student's t falls to a half and less.
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    if n == 0:
        return ABSENT
    mean = float(x.mean())
    spread = float(x.var())
    effective = float(n)  # all problems alike, right or wrong: one trial each
    if spread > 1e-15:
        effective *= mean * (1 - mean) / spread
    elif 0 < mean < 1:  # alike, yet samples within a problem differ: as many trials as allowed
        effective = float(most or n)
    low, high = wilson(mean, min(effective, most or math.inf))
    return Estimate(mean, low, high, n)


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95% score interval for a share `p` of `n` trials (Wilson 1927)."""
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def ratio(total: Sequence[float], count: Sequence[float]) -> Estimate:
    """sum(total) / sum(count), one of each a problem, with Student's t over the linearised residuals
    (Cochran 1977, section 6.4). The mean of plain numbers is the ratio to ones. One problem alone has
    an infinite interval."""
    from scipy.special import stdtrit  # the quantile; scipy.stats takes half a second to import

    x, m = np.asarray(total, np.float64), np.asarray(count, np.float64)
    n = len(x)
    if n == 0 or m.sum() <= 0:
        return ABSENT
    value = float(x.sum() / m.sum())
    if n == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    residual = (x - value * m) / m.mean()
    half = float(stdtrit(n - 1, 0.975) * math.sqrt((residual**2).sum() / (n - 1) / n))
    return Estimate(value, value - half, value + half, n)


def accuracy(groups: Sequence[Group]) -> Estimate:
    """Share of correct samples, every problem counting the same."""
    present = _present(groups)
    return share([g.solved for g in present], sum(len(g.members) for g in present))


def accuracy_by_category(groups: Sequence[Group]) -> dict[str, Estimate]:
    """`accuracy` within each category of problems, by name."""
    names = sorted({g.problem.category for g in groups})
    return {name: accuracy([g for g in groups if g.problem.category == name]) for name in names}


def pass_at_k(groups: Sequence[Group], k: int) -> Estimate:
    """The chance that one of `k` samples is correct, by the unbiased estimator of Chen et al. (2021,
    arXiv 2107.03374, eq. 1): for a problem with `c` of `n` correct, 1 - C(n-c, k) / C(n, k).

    Raises ValueError if a group has fewer than `k` members.
    """
    present = _present(groups)
    _check_k(present, k)
    values = []
    for g in present:
        n, c = len(g.members), sum(m.correct for m in g.members)
        # The product form of the paper: no factorial is ever formed.
        values.append(1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0)
    return share(values)


def majority_at_k(groups: Sequence[Group], k: int) -> Estimate:
    """The chance that the most frequent parsed answer of `k` samples is correct (self-consistency,
    Wang et al. 2022, arXiv 2203.11171).

    Exact for each problem: the mean over all subsets of `k` of its samples, ties broken evenly.
    Samples without a parsed answer do not vote. Raises ValueError if a group has fewer than `k` members.
    """
    present = _present(groups)
    _check_k(present, k)
    return share([_majority(g, k) for g in present])


def length(groups: Sequence[Group]) -> Estimate:
    """Mean number of tokens that the agents chose in a sample."""
    return _per_problem(groups, lambda g: [(m.tokens(), 1.0) for m in g.members])


def entropy(groups: Sequence[Group]) -> Estimate:
    """Mean entropy in nats of the choice of a token, estimated by -log p of the tokens that were drawn.

    Unbiased for the states visited, and only for tokens drawn at temperature 1 without truncation:
    calls under another law are left out, as are demonstrated tokens.
    """

    def surprise(group: Group) -> Iterator[tuple[float, float]]:
        for member in group.members:
            for call in member.calls:
                if call.law.raw:
                    drawn = call.logp_raw[(call.author == Author.SELF) & np.isfinite(call.logp_raw)]
                    yield float(-drawn.sum(dtype=np.float64)), float(len(drawn))

    return _per_problem(groups, surprise)


def parts(groups: Sequence[Group]) -> dict[str, Estimate]:
    """Mean of every named part of the outcomes, over the samples that have it, by name."""
    names = {name for g in groups for m in g.members if m.outcome for name in m.outcome.parts}

    def of(group: Group, name: str) -> Iterator[tuple[float, float]]:
        for member in group.members:
            if member.outcome is not None and name in member.outcome.parts:
                yield member.outcome.parts[name], 1.0

    return {name: _per_problem(groups, lambda g, name=name: of(g, name)) for name in sorted(names)}  # type: ignore[misc]


def _present(groups: Sequence[Group]) -> list[Group]:
    return [g for g in groups if g.members]


def _check_k(groups: Sequence[Group], k: int) -> None:
    fewest = min((len(g.members) for g in groups), default=k)
    if not 1 <= k <= fewest:
        raise ValueError(f"k must lie between 1 and the {fewest} samples a problem has, not {k}")


def _per_problem(groups: Sequence[Group], parts: Callable[[Group], Iterable[tuple[float, float]]]) -> Estimate:
    sums = [np.sum([(0.0, 0.0), *parts(g)], axis=0) for g in _present(groups)]
    return ratio([s[0] for s in sums], [s[1] for s in sums])


def _majority(group: Group, k: int) -> float:
    """The chance that a correct answer wins the vote of `k` of the group's samples, drawn without
    replacement."""
    votes = Counter(m.outcome.parsed for m in group.members if m.outcome and m.outcome.parsed is not None)
    right = {m.outcome.parsed for m in group.members if m.outcome and m.outcome.parsed is not None and m.correct}
    silent = len(group.members) - votes.total()
    ways = 0.0
    for winner in right:
        others = [c for name, c in votes.items() if name != winner]
        for wins in range(1, min(votes[winner], k) + 1):
            ways += math.comb(votes[winner], wins) * _losing(others, silent, wins, k - wins)
    return ways / math.comb(len(group.members), k)


def _losing(others: Sequence[int], silent: int, wins: int, rest: int) -> float:
    """How many ways there are to draw `rest` samples from the other answers (`others` samples each)
    and the silent ones so that no answer is drawn more than `wins` times; a way in which j answers are
    drawn exactly `wins` times counts 1 / (1 + j)."""
    ways = np.zeros((rest // wins + 1, rest + 1))  # [ties, drawn]
    ways[0] = _choices(silent, rest, rest)
    for count in others:
        below = _choices(count, wins - 1, rest)
        grown = np.stack([np.convolve(row, below)[: rest + 1] for row in ways])
        if count >= wins:
            grown[1:, wins:] += math.comb(count, wins) * ways[:-1, : rest + 1 - wins]
        ways = grown
    return float((ways[:, rest] / (1 + np.arange(len(ways)))).sum())


def _choices(count: int, most: int, rest: int) -> NDArray[np.float64]:
    """f64[rest + 1]: in how many ways 0, 1, ... of `count` samples can be drawn, `most` at most."""
    return np.array([float(math.comb(count, j)) if j <= most else 0.0 for j in range(rest + 1)])
