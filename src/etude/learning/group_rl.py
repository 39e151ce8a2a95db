"""`group_rl`: the preset of `on_policy` for groups of sampled answers and a verifier.

Which curriculum, acting strategy, selector, credit and objective it uses are names of registered plugs;
the composition is checked before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from etude.experience.batch import By
from etude.experience.errors import UserError
from etude.experience.plugs import Kind, Plug, check, plug, register
from etude.experience.protocols import Limits, World
from etude.learning import parts  # noqa: F401  registers the plugs
from etude.learning.learner import Optim, Seat
from etude.learning.loops import on_policy
from etude.learning.setting import Setting

SLOTS: tuple[Kind, ...] = ("curriculum", "acting", "reward", "selector", "credit", "objective")


@dataclass(frozen=True)
class GroupRL:
    """Reinforcement learning from groups of answers to the same problem."""

    steps: int = 200  # rounds of drawing, acting and updating
    problems: int = 16  # P, groups that every step trains on
    members: int = 8  # G, answers to each problem
    epochs: int = 1  # passes over what a step collected
    minibatches: int = 1  # updates in one pass
    normalise: By = "token"  # what the loss is a mean over
    constant: float | None = None  # divisor of normalise=constant; None: an update's answers x the longest answer
    max_draws: int = 1  # groups drawn at most, as a multiple of `problems`, while some are not selected
    curriculum: str = "uniform"  # which problems come next; names: `etude list --parts`
    act: str = "sample"  # how answers are made (acting in `etude list --parts`)
    shaping: str = "none"  # how rewards are changed (reward in `etude list --parts`)
    selector: str = "all"  # which groups are trained on (`etude list --parts`)
    credit: str = "grpo"  # how rewards become advantages (`etude list --parts`)
    objective: str = "grpo"  # the loss (`etude list --parts`)
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4))

    def __post_init__(self) -> None:
        for name in ("steps", "problems", "members", "epochs", "minibatches", "max_draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.normalise not in get_args(By):
            raise UserError(f"normalise must be one of {', '.join(get_args(By))}, not {self.normalise!r}")
        if self.constant is not None and not (self.normalise == "constant" and self.constant > 0):
            raise UserError(
                f"constant, above 0, goes with normalise=constant, not {self.constant} with {self.normalise}"
            )

    def options(self) -> Mapping[tuple[Kind, str], Mapping[str, Any]]:
        """What plugs are built with, where it is not their defaults."""
        return {}


def compose(config: GroupRL, law_raw: bool, offered: Iterable[str] = ("world", "modes")) -> dict[Kind, Plug]:
    """The plugs a config names, checked against one another and against what a world offers (see `offers`; by default
    all that any does). Raises UserError in one line, also for an option of a plug that another has replaced."""
    named: dict[Kind, str] = {
        "curriculum": config.curriculum,
        "acting": config.act,
        "reward": config.shaping,
        "selector": config.selector,
        "credit": config.credit,
        "objective": config.objective,
    }
    plugs = {kind: plug(kind, named[kind]) for kind in SLOTS}
    check(list(plugs.values()), law_raw=law_raw, present=offered)
    usual = type(config)().options()
    for (kind, name), given in config.options().items():
        changed = [option for option, value in given.items() if value != usual[kind, name][option]]
        if changed and named[kind] != name:
            raise UserError(f"{changed[0]} is an option of {kind} {name!r}, which {named[kind]!r} has replaced")
    return plugs


def offers(world: World) -> set[str]:
    """What acting strategies may need of a world: `world` itself, and `modes`, if what an answer begins with says
    whether a trace follows."""
    return {"world", "modes"} if "modes" in world.problem("train", 0).meta else {"world"}


def group_rl(s: Setting, config: GroupRL) -> None:
    """Runs it."""
    plugs = compose(config, s.law.raw, offers(s.world))
    if s.ahead is not None and "logp_old" not in plugs["objective"].needs:
        raise UserError(
            f"objective {config.objective!r} takes no ratio to the policy that acted, so it cannot learn from one that "
            "is behind: use ray.lag=0"
        )
    options = config.options()

    def build(kind: Kind, **more: Any) -> Any:
        p = plugs[kind]
        return p.build(**options.get((kind, p.name), {}), **more)

    objective = build("objective")
    constant = config.constant
    if config.normalise == "constant" and constant is None:
        constant = config.problems * config.members / config.minibatches * s.limits.max_tokens
    acting = build("acting", **({"world": s.world} if "world" in plugs["acting"].needs else {}))
    listener = getattr(acting, "listener", None)  # what acting must hear of every step before it acts in the next
    on_policy(
        s.run,
        Seat(s.policy, config.optim, config.steps * config.epochs * config.minibatches),
        s.roles(),
        steps=config.steps,
        curriculum=build("curriculum", world=s.world),
        act=s.acting(acting, late=listener is None),
        score=s.score,
        shape=build("reward", limits=s.limits),
        select=build("selector"),
        credit=build("credit"),
        objective=objective,
        problems=config.problems,
        members=config.members,
        max_draws=config.max_draws,
        by=config.normalise,
        constant=constant,
        epochs=config.epochs,
        minibatches=config.minibatches,
        reference=s.reference() if getattr(objective, "kl_coef", 0.0) else None,
        watch=s.watch,
        ahead=s.ahead,
        listeners={"acting": listener} if listener is not None else {},
    )


@register("reward", "none")
def unshaped(limits: Limits) -> None:
    """The world's outcome as it is."""
