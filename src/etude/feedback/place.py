"""Rewards placed on tokens, for critics and returns: the action column `reward`.

A place maps a trajectory and its outcome to f32[T], over the tokens of all its calls' outputs laid
end to end; places add up. An agent's own tokens are those it chose; rewards go nowhere else, since only
they become actions. What depends on the learner's log-probabilities, the KL penalty of RLHF, is
`etude.objectives.kl.kl_reward`, which adds to the same column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.protocols import Place
from etude.experience.types import Author, Floats, Group, Outcome, Trajectory
from etude.feedback.advantage import trajectory_of


def place(groups: Sequence[Group], batch: Batch, *places: Place) -> Batch:
    """Writes `reward` (f32[N]): the sum of `places` at each action of a batch packed from `groups`.

    Raises ValueError if a trajectory has no outcome or a place returns another length than T.
    """
    parts: list[Floats] = []
    call_starts: list[int] = []  # of every call, in the concatenation of `parts`
    first_call: list[int] = []  # of every trajectory, in `call_starts`
    start = 0
    for trajectory in (m for g in groups for m in g.members):
        if trajectory.outcome is None:
            raise ValueError(f"problem {trajectory.problem.id}: this trajectory has no outcome yet")
        lengths = [len(c.out) for c in trajectory.calls]
        total = np.zeros(sum(lengths), np.float32)
        for p in places:
            rewards = np.asarray(p(trajectory, trajectory.outcome), np.float32)
            if rewards.shape != total.shape:
                raise ValueError(f"a place gave {rewards.shape} rewards for {total.shape} tokens")
            total += rewards
        first_call.append(len(call_starts))
        call_starts += [start + offset for offset in accumulate(lengths, initial=0)][:-1]
        parts.append(total)
        start += len(total)
    call = torch.tensor(first_call)[trajectory_of(batch)] + batch.actions["call"]
    at = torch.tensor(call_starts)[call] + batch.actions["token"]
    return batch.with_actions(reward=torch.from_numpy(np.concatenate(parts))[at])


def terminal(trajectory: Trajectory, outcome: Outcome, agent: str | None = None) -> Floats:
    """The outcome's reward on the last token that `agent` (None: any agent) chose."""
    own = _own(trajectory, agent)
    rewards = np.zeros(len(own), np.float32)
    rewards[np.flatnonzero(own)[-1:]] = outcome.reward
    return rewards


def per_call(trajectory: Trajectory, outcome: Outcome, agent: str | None = None) -> Floats:
    """Each call's reward, `outcome.per_call`, on the last own token up to the end of that call (the
    first own token after it, if there is none before). Raises UserError if the outcome has none."""
    if outcome.per_call is None or len(outcome.per_call) != len(trajectory.calls):
        raise UserError(
            f"problem {trajectory.problem.id}: {len(trajectory.calls)} calls need as many rewards in "
            f"outcome.per_call, which is {outcome.per_call}"
        )
    return _at_calls(trajectory, np.asarray(outcome.per_call), agent)


def redistributed(contributions: Callable[[Trajectory], Sequence[float]], agent: str | None = None) -> Place:
    """The outcome's reward given to the calls: f[K] `contributions`, shifted equally so that they sum
    to it: the least change that keeps the return. RUDDER, arXiv:1806.07857, spreads its prediction
    error so; SPA-RL, arXiv:2505.20732, gives estimated progress."""

    def redistribute(trajectory: Trajectory, outcome: Outcome) -> Floats:
        share = np.asarray(contributions(trajectory), np.float64)
        if len(share) != len(trajectory.calls):
            raise ValueError(f"{len(share)} contributions for {len(trajectory.calls)} calls")
        return _at_calls(trajectory, share + (outcome.reward - share.sum()) / len(share), agent)

    return redistribute


def _own(trajectory: Trajectory, agent: str | None) -> NDArray[np.bool_]:
    """bool[T]: the tokens that `agent` chose."""
    return np.concatenate(
        [(c.author == Author.SELF) & (agent is None or c.agent == agent) for c in trajectory.calls]
        or [np.zeros(0, np.bool_)]
    )


def _at_calls(trajectory: Trajectory, rewards: NDArray[np.float64], agent: str | None) -> Floats:
    """f32[T]: one reward a call, on own tokens."""
    own = np.flatnonzero(_own(trajectory, agent))
    placed = np.zeros(sum(len(c.out) for c in trajectory.calls), np.float32)
    if len(own):
        ends = np.cumsum([len(c.out) for c in trajectory.calls])
        last = np.searchsorted(own, ends) - 1
        np.add.at(placed, own[last.clip(min=0)], rewards)
    return placed
