"""What the objectives share: a loss is the sum over actions of weight x term, metrics are sums."""

from __future__ import annotations

import torch
from torch import Tensor

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Policy


class Pure:
    """An objective with nothing to prepare."""

    def prepare(self, policy: Policy, batch: Batch, keys: Keys) -> Batch:
        """The batch as it is."""
        return batch


def weighted(batch: Batch, term: Tensor) -> Tensor:
    """The scalar sum over actions of weight x `term` (f[N]); 0 for a batch without weight."""
    return (batch.actions["weight"] * term).sum()


def column(batch: Batch, name: str, user: str, hint: str) -> Tensor:
    """f[N]: an action column, with 0 where the weight is 0, so that what is left out cannot put a nan
    into a gradient. Raises UserError if it is missing, or not finite where the weight is not 0."""
    value = batch.actions.get(name)
    if value is None:
        raise UserError(f"{user} needs the column {name!r}, which this batch does not have: {hint}")
    active = batch.actions["weight"] != 0
    bad = int((active & ~value.isfinite()).sum())
    if bad:
        raise UserError(f"{user}: {bad} of {int(active.sum())} weighted actions have no finite {name}: {hint}")
    return torch.where(active, value, torch.zeros_like(value))


def row_column(batch: Batch, name: str, user: str, hint: str) -> Tensor:
    """f[N]: a row column at each of its actions. Raises UserError if it is missing, or nan at an action with
    weight."""
    value = batch.row.get(name)
    if not isinstance(value, Tensor):
        raise UserError(f"{user} needs the row column {name!r}, which this batch does not have: {hint}")
    value = value[batch.row_of].to(batch.actions["weight"].dtype)
    if bool((value.isnan() & (batch.actions["weight"] != 0)).any()):
        raise UserError(f"{user}: some answers have no {name!r}: {hint}")
    return value


def logp_old(batch: Batch, user: str) -> Tensor:
    """f[N]: log-probabilities under the policy that acted: the column `logp_old`, else `logp_raw`.

    Raises UserError if they are missing (demonstrated tokens have none), or if any action was drawn
    from another law than the model's own, under which these are not the probabilities it had.
    """
    bent = [law for law in batch.laws if not law.raw]
    if bent:
        raise UserError(
            f"{user} takes ratios of log-probabilities at temperature 1, but this batch was sampled under {bent[0]}: "
            "sample with temperature 1 and without top-k, top-p, min-p or selection"
        )
    name = "logp_old" if "logp_old" in batch.actions else "logp_raw"
    return column(batch, name, user, "demonstrated tokens cannot enter a ratio; weigh them 0 or learn them by 'nll'")


def counted(batch: Batch, **values: Tensor) -> dict[str, tuple[float, float]]:
    """Metrics as (sum, count) over the actions with weight; each value is [N] and carries no gradient."""
    active = batch.actions["weight"] != 0
    sums = torch.stack([torch.where(active, v.detach(), 0.0).sum().double() for v in values.values()])
    *totals, count = torch.cat([sums, active.sum().double()[None]]).tolist()  # one transfer from the device
    return {name: (total, count) for name, total in zip(values, totals, strict=True)}
