"""Where a method is run: a world, a policy that starts somewhere, a run, and how it is looked at.

`Common` holds the options every method shares; `setting` turns them into what a method's `train` takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from etude.acting.agent import PolicyAgent
from etude.acting.episodes import episodes
from etude.acting.sample import sample
from etude.audits.estimators import exact
from etude.audits.evaluate import evaluate
from etude.audits.report import Evaluation
from etude.experience.claims import BaseRecipe
from etude.experience.endpoint import Server
from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.meter import KINDS, Meter
from etude.experience.protocols import Acting, Agent, Clock, Interactive, Limits, Policy, Probe, Roles, Score, World
from etude.experience.types import RAW, Law
from etude.learning.actors import Ray
from etude.learning.ahead import Ahead, Gather
from etude.learning.base import base
from etude.learning.rollouts import OnActors, Rollouts
from etude.learning.run import Run
from etude.learning.served import ServedAdapter
from etude.learning.sharded import shard
from etude.learning.shared_acting import shared_acting
from etude.learning.weights import Weights
from etude.policies.zoo import load_policy, sized
from etude.worlds.registry import load_world
from etude.worlds.rewards import Rewards

Start = Literal["base", "random"]
FROM_SCRATCH = ("tiny", "small")  # zoo names that start from random weights


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (PEFT); rank 0 trains all weights."""

    rank: int = 0  # of the adapter; 0: all weights are trained
    alpha: float | None = None  # scale of the adapter, over its rank; None: twice the rank


@dataclass(frozen=True)
class Common:
    """What every method can be told."""

    world: str = "chain_sum"  # a world's name, or a data file; see `etude list --worlds`
    world_options: tuple[str, ...] = ()  # name=value, e.g. min_terms=2
    policy: str = "tiny"  # table, tiny, small, smollm2, or the path of a checkpoint
    base: bool = True  # whether a policy with random weights is first taught from demonstrations until mediocre
    base_noise: float = 0.6  # share of those demonstrations that hold a fault
    base_low: float = 0.20  # the base is done when its pass@1 is at least this ...
    base_high: float = 0.40  # ... and at most this
    seed: int = 0  # of every random stream
    lora: Lora = field(default_factory=Lora)
    server: Server = field(default_factory=Server)
    max_tokens: int = 64  # longest answer
    temperature: float = 1.0  # of sampling while learning
    reward: tuple[str, ...] = ()  # reward functions, module:function or file.py:function
    reward_seconds: float = 30.0  # longest a reward function may take over an answer
    eval_every: int = 25  # steps between evaluations; 0: only before and after
    eval_problems: int = 256  # held-out problems in an evaluation
    eval_samples: int = 1  # answers a problem
    eval_temperature: float = 1.0  # of answers in an evaluation; 0: the likeliest token each time
    eval_tokens: int | None = None  # longest answer in an evaluation; None: as while learning
    device: str = "cpu"  # cpu or cuda
    checkpoint_every: int = 20  # steps between checkpoints
    ray: Ray = field(default_factory=Ray)
    budget: tuple[str, ...] = ()  # kind=amount of the meter, e.g. tokens=1e6; the run ends once one is spent

    def __post_init__(self) -> None:
        for name in ("temperature", "eval_temperature"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.eval_tokens is not None and self.eval_tokens < 1:
            raise UserError(f"eval_tokens must be at least 1, not {self.eval_tokens}")
        if not self.reward_seconds > 0:
            raise UserError(f"reward_seconds must be above 0, not {self.reward_seconds}")
        if self.eval_every < 0:
            raise UserError(f"eval_every must be at least 0, not {self.eval_every}")
        if not 0 <= self.base_low < self.base_high <= 1:
            raise UserError(f"base_low must be a share below base_high, not {self.base_low} and {self.base_high}")
        if self.server.url is not None and not self.lora.rank:
            raise UserError(
                "a server's weights cannot be changed over its protocol, only its adapter: "
                "train one (--lora.rank 16), or leave out --server.url"
            )
        if self.server.url is not None and self.ray.actors:
            raise UserError("answers come from Ray actors or from a server: leave out --ray.actors or --server.url")
        for name in ("max_tokens", "eval_problems", "eval_samples", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass
class Setting:
    """What a method's `train` is given.

    How it is looked at, a method may change before its loop begins: `act` is how a held-out evaluation acts,
    `views` are further ways, whose metrics begin with NAME/, and `probes` are further metrics of the policy.
    """

    run: Run
    common: Common
    world: World
    policy: Policy
    score: Score
    start: Start
    served: ServedAdapter | None = None  # where a server acts in the policy's place
    act: Acting = sample
    views: dict[str, Acting] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)

    @property
    def law(self) -> Law:
        """The law of sampling while learning."""
        return Law(temperature=self.common.temperature) if self.common.temperature != 1 else RAW

    @property
    def limits(self) -> Limits:
        """When an answer ends."""
        return Limits(max_tokens=self.common.max_tokens)

    def acting(self, act: Acting, late: bool = False) -> Acting:
        """How this world is acted in: by `act`, or in episodes where it has many turns; on Ray actors where the run
        has some. `late`: what was collected `ahead` can be learnt from. Raises UserError for a strategy of one
        answer in a world of many turns, and for a lag where experience may not be late."""
        if act is not sample and isinstance(self.world, Interactive):
            raise UserError(f"world {self.world.name!r} has many turns, which only act=sample plays")
        if self.common.ray.lag and not late:
            raise UserError("ray.lag is for methods that act and learn by turns, step by step: with this one use 0")
        if self.common.ray.actors:
            meter = self._costs if self.common.ray.lag else self.run.meter
            return OnActors(self._rollouts, act, meter, follow=not self.common.ray.lag)
        played = acting_for(self.world, act, self.run.meter, self.common.max_tokens)
        return shared_acting(played, self.policy, self.run.ranks, self.run.meter)

    @property
    def ahead(self) -> Callable[[Gather], Gather] | None:
        """What collects ahead of the learner; None where the run is strictly on-policy."""
        if not self.common.ray.lag:
            return None
        return lambda gather: Ahead(gather, self._rollouts, self._costs, self.run)

    @cached_property
    def _costs(self) -> Meter:
        """Of what was collected ahead, until its step comes."""
        return Meter()

    @cached_property
    def _rollouts(self) -> Rollouts:
        """The Ray actors, which end with the run."""
        taught = self.start == "base" and base_recipe(self.common) is not None  # not to be found on other machines
        found = Rollouts(self, Weights(self.policy).frozen() if taught else {})
        self.run.on_close.callback(found.close)
        return found

    def roles(self) -> Roles:
        """The policy as the actor."""
        return {"actor": self._actor(self.law, self.limits, self.run.meter)}

    def _actor(self, law: Law, limits: Limits, meter: Meter | None = None) -> Agent:
        if self.served is not None:
            return self.served.actor(law, limits, meter)
        return PolicyAgent(self.policy, "actor", law, limits, meter)

    def reference(self) -> Policy:
        """The policy as the run began, frozen: loaded anew, so that a resumed run has the same one."""
        policy = starting_policy(self.run, self.common, self.start)
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        return shard(policy, self.run.ranks)

    def evaluate(self) -> Evaluation:
        """What the policy does on held-out problems now, as it acts and in every view, and what the probes find. The
        same problems and the same streams every time; nothing is charged to the run."""
        found = self._evaluated(self.act)
        metrics = dict(found.metrics)
        for name, act in self.views.items():
            seen = self._evaluated(act)
            metrics |= {f"{name}/{metric}": e for metric, e in seen.named.items()}
        keys = self.run.keys.at("evaluate", "probe")
        for name, probe in self.probes.items():
            metrics[name] = exact(probe(self.policy, keys.at(name)))
        return replace(found, metrics=metrics)

    def _evaluated(self, act: Acting) -> Evaluation:
        common = self.common
        room = common.eval_tokens or common.max_tokens
        law = Law(temperature=common.eval_temperature) if common.eval_temperature != 1 else RAW
        return evaluate(
            {"actor": self._actor(law, Limits(max_tokens=room))},
            self.world, "test", common.eval_problems, common.eval_samples,
            shared_acting(acting_for(self.world, act, room=room), self.policy, self.run.ranks),
            self.run.keys.at("evaluate"),
        )  # fmt: skip

    def watch(self, clock: Clock) -> None:
        """Evaluates where an evaluation is due."""
        if self.due(clock):
            self.run.evaluated(self.evaluate())

    def due(self, clock: Clock) -> bool:
        """Whether to evaluate now: before the first step, every `eval_every` steps, and after the last."""
        every = self.common.eval_every
        return clock.step in (0, clock.total) or (every > 0 and clock.step % every == 0)


def setting(run: Run, common: Common, start: Start = "base") -> Setting:
    """Builds what `common` names. `start` says what a policy with random weights is first made into:
    "base" (taught until mediocre, see `BaseRecipe`) or "random"."""
    if run.ranks.size > 1 and (common.ray.actors or common.server.url):
        raise UserError("under torchrun every process acts for itself: leave out --ray.actors and --server.url")
    policy: Any = starting_policy(run, common, start)  # adapters fit some of the policies and refuse the others
    policy, world, score = equipped(policy, common, run.keys)
    policy = shard(policy, run.ranks)
    run.track("policy", Weights(policy))
    served = ServedAdapter(common.server, policy, run) if common.server.url is not None else None
    return Setting(run, common, world, policy, score, start, served)


def equipped(policy: Any, common: Common, keys: Keys) -> tuple[Any, World, Score]:
    """The policy with the adapter, the world and the score that `common` names; `keys` are the run's."""
    world = world_for(policy, common)
    if common.lora.rank:
        from etude.policies.adapters import add_lora

        policy = add_lora(policy, common.lora.rank, common.lora.alpha, keys=keys.at("lora"))
    score: Score = world.score
    if common.reward:
        score = Rewards(common.reward, verifier=world.score, seconds=common.reward_seconds)
    return policy, world, score


def starting_policy(run: Run, common: Common, start: Start) -> Policy:
    """The policy that a run begins with, before any adapter."""
    recipe = base_recipe(common) if start == "base" else None
    name = common.policy
    if recipe is not None:
        name = run.ranks.first(lambda: str(base(recipe, run.seed, run.reporter)))
    return load_policy(name, run.keys.at("init"), device=run.ranks.device(common.device))


def world_for(policy: Policy, common: Common) -> World:
    """The world, in the notation that the policy reads where it has several and none is asked for."""
    return load_world(common.world, **{"notation": policy.tokenizer.notation, **parse_options(common.world_options)})


def base_recipe(common: Common) -> BaseRecipe | None:
    """What makes the base model of a policy that starts from random weights; None for any other policy."""
    bare, shape = sized(common.policy)
    if not common.base or bare not in FROM_SCRATCH:
        return None
    return BaseRecipe(
        common.world,
        parse_options(common.world_options),
        noise=common.base_noise,
        policy=bare,
        shape=shape,
        until=(common.base_low, common.base_high),
        max_tokens=common.max_tokens,
    )


def acting_for(world: World, act: Acting, meter: Meter | None = None, room: int = 64) -> Acting:
    """`act` in a world of one answer; whole episodes, whose turns may take `room` tokens, in a world of
    many turns."""
    return episodes(world.env, meter, room=room) if isinstance(world, Interactive) else act


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`name=value` words as options; values are JSON where they parse as such, else text."""
    out: dict[str, Any] = {}
    for name, value in named(words, "world option").items():
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out


def parse_budget(words: Sequence[str]) -> dict[str, float]:
    """`kind=amount` words as caps on kinds of the meter; "tokens" are sampled ones. Raises UserError for
    another kind, or an amount that is not a number above 0.

    >>> parse_budget(["tokens=2e6", "updates=100"])
    {'sampled': 2000000.0, 'updates': 100.0}
    """
    caps = {}
    for kind, amount in named(words, "budget").items():
        kind = "sampled" if kind == "tokens" else kind
        if kind not in KINDS:
            raise unknown("kind of budget", kind, (*KINDS, "tokens"))
        try:
            caps[kind] = float(amount)
        except ValueError:
            caps[kind] = 0.0
        if not 0 < caps[kind] < float("inf"):
            raise UserError(f"a budget is a number above 0, as in {kind}=1e6, not {amount!r}")
    return caps


def named(words: Sequence[str], what: str) -> dict[str, str]:
    """`name=value` words as a mapping. Raises UserError for a word that is not one."""
    for word in words:
        if not word.partition("=")[0] or "=" not in word:
            raise UserError(f"a {what} is given as name=value, not {word!r}")
    return dict(word.split("=", 1) for word in words)
