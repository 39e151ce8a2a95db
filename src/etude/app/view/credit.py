"""The advantage of each member of a step's groups, worked out again from the rewards that the store keeps.

Runs store rewards, not advantages. Where the credit that a run's config names needs only rewards, the same
rule is asked again; where it needs more, nothing is shown.
"""

from __future__ import annotations

from typing import Any

from etude.app.view.runs import Config
from etude.experience.errors import UserError
from etude.experience.store import Store


def advantages(store: Store, config: Config, row: dict[str, Any]) -> tuple[dict[int, float], str]:
    """By trajectory id, for every trained member of the step of `row`; and what is to be said of it."""
    name = str(config.part("options").get("credit", ""))
    if not name or name == "none":
        return {}, "this method's config names no credit rule, so there is no advantage to show"
    if not row["kept"] or row["role"] != "member":
        return {}, "this trajectory was not trained on, so it has no advantage"
    try:
        rule = _rule(config, name)
    except UserError as error:
        return {}, f"the credit rule cannot be built: {error}"
    if rule is None:
        return {}, f"credit {name!r} needs more than rewards, and the store keeps no advantage"
    rows = store.trajectories(stage=row["stage"], step=row["step"], role="member", kept=True, limit=None)
    try:
        return _asked(rule, rows), f"worked out from the rewards of this step by credit {name!r}"
    except UserError as error:
        return {}, str(error)


def _rule(config: Config, name: str) -> Any:
    """The credit as the method builds it; None where it takes more than rewards."""
    from etude.experience.plugs import plug
    from etude.feedback.advantage import Advantage
    from etude.methods.api import method
    from etude.methods.options import build

    chosen = build(method(config.method).config, config.part("options"))
    options = chosen.options().get(("credit", name), {}) if hasattr(chosen, "options") else {}
    found = plug("credit", name)
    if not found.needs <= {"group"}:
        return None
    rule = found.build(**options)
    return rule if isinstance(rule, Advantage) else None


def _asked(rule: Any, rows: list[dict[str, Any]]) -> dict[int, float]:
    """Asks the rule about groups that hold nothing but rewards, a token of each trajectory counting as it did."""
    import torch

    from etude.experience.batch import Batch
    from etude.experience.types import Group, Outcome, Problem, Trajectory

    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["reward"] is None:
            raise UserError("some answers of this step have no reward")
        groups.setdefault(row["grp"], []).append(row)
    ordered = [row for members in groups.values() for row in members]
    tokens = torch.tensor([max(1, row["tokens"]) for row in ordered])
    owner = torch.repeat_interleave(torch.arange(len(ordered)), tokens)
    total = len(owner)
    batch = Batch(
        torch.zeros(total, dtype=torch.int64),
        tokens,
        torch.arange(total),
        {"row": owner, "weight": torch.ones(total)},
        {"trajectory": torch.arange(len(ordered))},
    )
    made = []
    for members in groups.values():
        problem = Problem(members[0]["problem_id"], "")
        made.append(Group(problem, tuple(Trajectory(problem, (), outcome=Outcome(m["reward"])) for m in members)))
    value = rule(made, batch).actions["advantage"]
    first = torch.cumsum(tokens, 0) - tokens
    return {row["id"]: float(value[i]) for row, i in zip(ordered, first.tolist(), strict=True)}
