"""Base models: policies with random weights, taught from demonstrations until they are mediocre.

A base model is data (a `BaseRecipe` and a seed). It is trained on first use, in a run of its own that
can be killed and goes on, and cached under the recipe's hash.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from etude.worlds.oracles import load_oracle
from etude.worlds.registry import load_world

PROBES = 1 << 20  # training problems from this index on are kept for pass@1 while a base is taught


def base(recipe: BaseRecipe, seed: int, reporter: Reporter | None = None) -> Path:
    """The folder of the base model, trained now if nobody has. Raises UserError where it cannot be
    brought into the recipe's range of pass@1."""
    home = cache_folder() / "base"
    home.mkdir(parents=True, exist_ok=True)
    folder = home / recipe.digest(seed)
    with _lock(home / f".{folder.name}.lock"):
        if not folder.exists():
            _teach(recipe, seed, folder, reporter)
    return folder


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


def _teach(recipe: BaseRecipe, seed: int, folder: Path, reporter: Reporter | None) -> None:
    scratch = folder.with_name(f"{folder.name}.run")
    policy = load_policy(recipe.policy, Keys(seed).at("init"), **recipe.shape)
    world = load_world(recipe.world, **{"notation": policy.tokenizer.notation, **recipe.options})
    oracle = load_oracle(world, rate=recipe.noise, kinds=recipe.faults)
    config = {"seed": seed, "recipe": recipe.plain()}
    resume = (scratch / "config.json").exists()
    if not resume:
        shutil.rmtree(scratch, ignore_errors=True)
    run = Run(scratch, config, resume=resume, checkpoint_every=recipe.check_every, reporter=reporter)
    try:
        run.track("policy", Weights(policy))
        run.stage("base", lambda: _until(recipe, run, world, oracle, policy))
    finally:
        run.close()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_policy(policy, partial)
    partial.rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)


class _Search:
    """Looks at pass@1 every `every` steps. Where one look is below the range and the next above it,
    goes back to the weights of the first and looks twice as often."""

    def __init__(self, recipe: BaseRecipe, weights: Weights, seat: Seat) -> None:
        self.low, self.high = recipe.until
        self.every = recipe.check_every
        self.next = recipe.check_every
        self.weights, self.seat = weights, seat
        self.before = self._snapshot()

    def _snapshot(self) -> dict[str, object]:
        from copy import deepcopy

        return deepcopy({"weights": self.weights.state_dict(), "seat": self.seat.state_dict()})

    def hear(self, accuracy: float, step: int) -> bool:
        """Whether the base is done; decides when to look next."""
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

    def state_dict(self) -> dict[str, object]:
        return {"every": self.every, "next": self.next, "before": self.before}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.every, self.next, self.before = state["every"], state["next"], state["before"]  # type: ignore[assignment]


def _until(recipe: BaseRecipe, run: Run, world: World, oracle: Oracle, policy: Policy) -> dict[str, float]:
    seat = run.track("seat", Seat(policy, Optim(lr=recipe.lr, warmup=20), recipe.max_steps))
    search = run.track("search", _Search(recipe, Weights(policy), seat))
    accuracy = 0.0
    for clock in run.steps(recipe.max_steps):
        keys = run.stream(clock)
        if clock.step >= search.next:
            limits = Limits(max_tokens=recipe.max_tokens)
            accuracy = pass_at_1(world, policy, recipe.check_problems, run.keys.at("probe"), limits)
            run.log({"pass@1": accuracy})
            if search.hear(accuracy, clock.step):
                return {"steps": clock.step, "pass@1": accuracy}
        batch = normalise(demonstrations(world, oracle, recipe, policy, clock, keys), "token")
        run.log(update(seat, [Term(batch, NLL())], keys, run.meter))
    raise UserError(
        f"base model for {recipe.world}: pass@1 is {accuracy:.2f} after {recipe.max_steps} steps, "
        f"not in {recipe.until[0]} to {recipe.until[1]}: an easier world or a larger policy may help"
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time teaches a base; the others wait for it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
