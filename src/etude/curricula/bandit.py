"""A non-stationary bandit: arms whose values follow what they paid lately, drawn by a softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from etude.experience.errors import UserError

Unsampled = Literal["untouched", "decay"]


class Bandit:
    """Values Q of the arms, all 0 at first.

    An arm that was paid r moves to (1 - alpha) Q + alpha r; one that was not drawn stays "untouched", or
    under "decay" is taken to have been paid 0. Arms are drawn in proportion to exp(Q / tau): TD(0)
    without a next state, and Boltzmann exploration (Sutton & Barto 2018, sections 2.5 and 2.8).
    Raises UserError for alpha outside (0, 1] or tau not above 0.

    >>> bandit = Bandit(["easy", "hard"], alpha=0.5, tau=0.4)
    >>> bandit.pay({"easy": 0.0, "hard": 0.8})
    >>> bandit.values
    {'easy': 0.0, 'hard': 0.4}
    >>> bandit.probabilities().round(2).tolist()
    [0.27, 0.73]
    """

    def __init__(self, arms: Sequence[str], alpha: float, tau: float, unsampled: Unsampled = "untouched") -> None:
        if not 0 < alpha <= 1:
            raise UserError(f"a bandit's alpha lies above 0 and at most at 1, not at {alpha}")
        if not tau > 0:
            raise UserError(f"a bandit's tau must be above 0, not {tau}")
        if unsampled not in get_args(Unsampled):
            raise UserError(f"unsampled must be {' or '.join(get_args(Unsampled))}, not {unsampled!r}")
        self.alpha, self.tau, self.unsampled = alpha, tau, unsampled
        self.values = dict.fromkeys(arms, 0.0)

    def probabilities(self) -> NDArray[np.float64]:
        """f64[arms], in the arms' order."""
        scaled = np.array(list(self.values.values())) / self.tau
        weight = np.exp(scaled - scaled.max())
        return np.asarray(weight / weight.sum())

    def draw(self, generator: np.random.Generator) -> str:
        """One arm."""
        return list(self.values)[int(generator.choice(len(self.values), p=self.probabilities()))]

    def pay(self, rewards: Mapping[str, float]) -> None:
        """What the drawn arms earned."""
        for arm, value in self.values.items():
            if arm in rewards:
                self.values[arm] = (1 - self.alpha) * value + self.alpha * rewards[arm]
            elif self.unsampled == "decay":
                self.values[arm] = (1 - self.alpha) * value

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state["values"])
