"""The policies a run passes through, kept for their mixture, and how exploitable they are in a game."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.audits.exploitability import mean_exploitability, strategies
from etude.experience.keys import Keys
from etude.experience.protocols import Game, Policy
from etude.learning.setting import Setting
from etude.policies.mixture import Mixture
from etude.policies.zoo import load_policy, save_policy


class Iterates:
    """pi_1..pi_t of the setting's policy: how many, in a game the sum of their strategies, and, where they are to be
    kept, they themselves in the run's folder. State for a run to track.

    In a game two probes are set: `exploitability` is that of the uniform mixture of the iterates so far, exactly, and
    `exploitability_last` that of the policy as it stands.
    """

    def __init__(self, s: Setting, keep: bool) -> None:
        self.policy, self.keep, self.home = s.policy, keep, s.run.folder / "iterates"
        self.count = 0
        self.sum: NDArray[np.float64] = np.zeros(())  # f64[X, M + 1]
        self.game = s.world if isinstance(s.world, Game) else None
        if self.game is not None:
            self.problems = [s.world.problem("test", i) for i in range(s.common.eval_problems)]
            s.probes |= {"exploitability": self._average, "exploitability_last": self._last}

    def add(self) -> None:
        """The policy as it stands is the next iterate. Raises UserError if the disk refuses."""
        if self.keep:
            save_policy(self.policy, self._folder(self.count))
        if self.game is not None:
            self.sum = self.sum + strategies(self.policy, self.game, self.problems)
        self.count += 1

    def mixture(self) -> Mixture:
        """The uniform mixture of the iterates that were kept; of the policy as it stands where there are none."""
        kept = [load_policy(str(self._folder(i)), device=str(self.policy.device)) for i in range(self.count)]
        return Mixture(kept or [self.policy])

    def save(self, folder: Path) -> None:
        """Their mixture as a policy's folder, in their place."""
        if not folder.exists():
            save_policy(self.mixture(), folder)
        shutil.rmtree(self.home, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sum": self.sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.sum = state["count"], state["sum"]

    def _folder(self, i: int) -> Path:
        return self.home / f"{i:04d}"

    def _average(self, policy: Policy, keys: Keys) -> float:
        if not self.count:
            return self._last(policy, keys)
        assert self.game is not None
        return mean_exploitability(self.game, self.problems, self.sum / self.count)

    def _last(self, policy: Policy, keys: Keys) -> float:
        assert self.game is not None
        return mean_exploitability(self.game, self.problems, strategies(self.policy, self.game, self.problems))
