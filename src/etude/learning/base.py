"""Base models: policies with random weights, taught from demonstrations until they are mediocre.

A base model is data (a `BaseRecipe` and a seed). It is trained on first use, in a run of its own that
can be killed and goes on, and cached under the recipe's hash.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import completion
from etude.experience.batch import Batch, normalise, pack
from etude.experience.cache import cache_folder
from etude.experience.claims import BaseRecipe
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Limits, Oracle, Policy, World
from etude.experience.types import RAW
from etude.learning.learner import Optim, Seat, Term, update
from etude.learning.run import Reporter, Run
from etude.learning.weights import Weights
from etude.objectives.nll import NLL
from etude.policies.zoo import load_policy, save_policy
from etude.worlds.oracles import find_oracle, load_oracle
from etude.worlds.registry import load_world

PROBES = 1 << 20  # training problems from this index on are kept for pass@1 while a base is taught


def base(recipe: BaseRecipe, seed: int, reporter: Reporter | None = None) -> Path:
    """The folder of the base model, trained now if nobody has. Raises UserError where it cannot be
    brought into the recipe's range of pass@1."""
    lesson = _lesson(recipe, seed)
    home = cache_folder() / "base"
    folder = home / lesson.digest()
    with _lock(home / f".{folder.name}.lock"):
        if not folder.exists():
            _teach(lesson, folder, reporter)
    return folder


@dataclass(frozen=True)
class _Lesson:
    """A recipe with what it names, loaded."""

    recipe: BaseRecipe
    seed: int
    policy: Policy
    world: World
    oracle: Oracle

    def digest(self) -> str:
        """The recipe's hash with that of the first batch it makes: a world or an oracle whose defaults have
        changed makes another base model."""
        first = self.demonstrations(Clock(0, self.recipe.max_steps), Keys(self.seed))
        digest = blake2b(self.recipe.digest(self.seed).encode(), digest_size=10)
        digest.update(first.inputs.numpy().tobytes())
        digest.update(repr([p.shape for p in self.policy.parameters()]).encode())
        return digest.hexdigest()

    def demonstrations(self, clock: Clock, keys: Keys) -> Batch:
        """The batch of one step."""
        return demonstrations(self.world, self.oracle, self.recipe, self.policy, clock, keys)


def _lesson(recipe: BaseRecipe, seed: int) -> _Lesson:
    shape: dict[str, Any] = dict(recipe.shape)
    policy = load_policy(recipe.policy, Keys(seed).at("init"), **shape)
    world = load_world(recipe.world, **{"notation": policy.tokenizer.notation, **recipe.options})
    if find_oracle(world) is None:
        raise UserError(
            f"world {world.name!r} has no oracle to teach a base model: start from a trained policy, or with base=false"
        )
    return _Lesson(recipe, seed, policy, world, load_oracle(world, rate=recipe.noise, kinds=recipe.faults))


def demonstrations(world: World, oracle: Oracle, recipe: BaseRecipe, policy: Policy, clock: Clock, keys: Keys) -> Batch:
    """The batch of one step: fresh problems, each demonstrated in a style drawn from the recipe's
    mixture."""
    styles = sorted(recipe.styles)
    shares = np.array([recipe.styles[s] for s in styles], float)
    rows = []
    for i in range(recipe.batch):
        problem = world.problem("train", clock.step * recipe.batch + i)
        key = keys.at("demonstrate", i)
        style = styles[int(key.at("style").numpy().choice(len(styles), p=shares / shares.sum()))]
        text = oracle.demonstrate(problem, style, key)
        rows.append(completion(policy.tokenizer, problem.prompt, text, policy.limit))
    return pack(rows)


def pass_at_1(world: World, policy: Policy, problems: int, keys: Keys, limits: Limits) -> float:
    """Sampled accuracy at temperature 1 on training problems that teaching never uses."""
    asked = [world.problem("train", PROBES + i) for i in range(problems)]
    roles = {"actor": PolicyAgent(policy, "actor", RAW, limits)}
    groups = sample(roles, asked, 1, world.score, Clock(0, 1), keys)
    return float(np.mean([g.solved for g in groups]))


def _teach(lesson: _Lesson, folder: Path, reporter: Reporter | None) -> None:
    recipe, policy = lesson.recipe, lesson.policy
    scratch = folder.with_name(f"{folder.name}.run")
    config = {"seed": lesson.seed, "recipe": recipe.plain()}
    resume = (scratch / "config.json").exists()
    if not resume:
        shutil.rmtree(scratch, ignore_errors=True)
    run = Run(scratch, config, resume=resume, checkpoint_every=recipe.check_every, reporter=reporter)
    try:
        run.track("policy", Weights(policy))
        run.stage("base", lambda: _until(lesson, run))
    finally:
        run.close()
    save_policy(policy, folder)
    shutil.rmtree(scratch, ignore_errors=True)


class _Search:
    """Looks at pass@1 every `every` steps. Where one look is below the range and the next above it,
    goes back to the weights of the first and looks twice as often."""

    def __init__(self, recipe: BaseRecipe, weights: Weights, seat: Seat) -> None:
        self.low, self.high = recipe.until
        self.every = recipe.check_every
        self.next = recipe.check_every
        self.weights, self.seat = weights, seat
        self.accuracy = 0.0  # at the last look
        self.before = self._snapshot()

    def _snapshot(self) -> dict[str, Any]:
        return deepcopy({"weights": self.weights.state_dict(), "seat": self.seat.state_dict()})

    def hear(self, accuracy: float, step: int) -> bool:
        """Whether the base is done; decides when to look next."""
        self.accuracy = accuracy
        if self.low <= accuracy <= self.high:
            return True
        if accuracy < self.low:
            self.before = self._snapshot()
        else:
            if self.every == 1:
                raise UserError(
                    f"one update takes pass@1 from below {self.low} to {accuracy:.2f}: lower the recipe's lr"
                )
            self.every = max(1, self.every // 2)
            self.weights.load_state_dict(self.before["weights"])
            self.seat.load_state_dict(self.before["seat"])
        self.next = step + self.every
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"every": self.every, "next": self.next, "accuracy": self.accuracy, "before": self.before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.every, self.next, self.accuracy, self.before = (
            state[name] for name in ("every", "next", "accuracy", "before")
        )


def _until(lesson: _Lesson, run: Run) -> dict[str, float]:
    recipe, policy = lesson.recipe, lesson.policy
    limits = Limits(max_tokens=recipe.max_tokens)
    seat = run.track("seat", Seat(policy, Optim(lr=recipe.lr, warmup=0.005), recipe.max_steps))
    search = run.track("search", _Search(recipe, Weights(policy), seat))
    for clock in run.steps(recipe.max_steps):
        keys = run.stream(clock)
        if clock.step >= search.next:
            accuracy = pass_at_1(lesson.world, policy, recipe.check_problems, run.keys.at("probe"), limits)
            run.log({"pass@1": accuracy})
            if search.hear(accuracy, clock.step):
                return {"steps": clock.step, "pass@1": accuracy}
        batch = normalise(lesson.demonstrations(clock, keys), "token")
        run.log(update(seat, [Term(batch, NLL())], keys, run.meter))
    raise UserError(
        f"base model for {recipe.world}: pass@1 is {search.accuracy:.2f} after {recipe.max_steps} steps, "
        f"not in {recipe.until[0]} to {recipe.until[1]}: an easier world or a larger policy may help"
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time teaches a base; the others wait for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"cannot write to the cache: {error} (ETUDE_CACHE names another folder)") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
