"""Scaf-GRPO: scaffolded group relative policy optimization (arXiv 2510.19807, section 3; the authors' released code).

Problem: on a question that is far too hard every answer of a group is wrong, so every advantage of GRPO is 0 and the
question is never learnt: the learning cliff. Giving the model the beginning of a teacher's solution to go on from makes
the data off-policy. Idea: give help in the prompt, as little as will do, and only where the policy has stopped learning
by itself. For question q with hints in classes from abstract to concrete (knowledge, planning, solution), level j of a
class is h = its first j pieces; a class begins without the pieces of the class before. A step then is

    1. sample G answers o_i ~ pi_old(. | q) and let the verifier judge them, r_i in {0, 1};
    2. once the exemption is over: where all r_i = 0, sample for q + h, level by level, until an answer is right, o*;
    3. put o* in the place of one o_i drawn at random; where no level helps, leave the group as it is;
    4. A_i = (r_i - mean r) / (std r + 1e-6) over the G answers of the final group (no unit), and GRPO's loss, the mean
       over tokens t of -min(s A, clip(s, 1 - e, 1 + e) A) with the ratio s = pi(o_t | x, o_<t) / pi_old(o_t | x, o_<t),
       where x = q + h for o* and x = q for the others.

With one right answer of G = 8 the advantages are 2.47 and seven times -0.35 (sample std), in place of 0: the gain goes
to the plain prompt through the shared weights and through the seven plain failures. Tests are made without hints.

The exemption is the first 15% of the run, in which failures of format and the like cure themselves; or, as the paper
reasons, it lasts until the share of failing groups has levelled off (exempt = None, see `Levelled`). With exempt = 1
this is GRPO, with the mean over the tokens of all answers as the released code takes it.

Why a selected answer may feed a ratio here: o* is an exact draw of pi_old(. | q + h), and its log-probabilities are
those of that very context, which its call holds; so s = 1 before the first update and the clip bounds each step as for
any answer, where best-of-n would claim its pick as a draw from the prompt it answers. What selection does bend is the
estimate: o* is kept because it is right, so the step is not the gradient of the expected reward under either prompt
but, like rejection sampling, leans towards what was right under a hint. That lean is the method.

This file adds the acting strategy; it combines with any curriculum, credit and objective. "All wrong" reads the
verifier's word, never the sum of rewards, in which a reward for format would hide the failure. Departures: the released
code tries all levels in one batch and replaces the first failure (search = batch, replace = first; the levels found are
the same, at more tokens), and leaves the planning class out. Hints come from the world's oracle, in which each level is
a class of its own, or from a column of the data; a level in which the answer can be read is left out, so that copying
it is never rewarded. Rewards other than 0 and 1, steps and the learning rate are GRPO's here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from etude.acting.hints import Climb, Ladder, Levels, climb
from etude.acting.sample import GIVES, sample
from etude.curricula.levelled import Levelled
from etude.curricula.schedules import Threshold
from etude.experience.claims import Arm, BaseRecipe, Claim, Endpoint, Metric
from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.plugs import Kind, register
from etude.experience.protocols import Clock, Listener, Roles, Schedule, Score, World
from etude.experience.types import Group, Problem
from etude.learning.group_rl import GroupRL, group_rl
from etude.learning.hinting import Whose, ladder_of
from etude.learning.learner import Optim
from etude.methods.method import Method

Search = Literal["sequential", "batch", "largest"]
Replace = Literal["random", "first"]


@dataclass(frozen=True)
class Scaffold:
    """`n` answers to each problem, of which, once `ready` is above 0, a group that failed gets the answer of the lowest
    level of its ladder at which one is right.

    Groups then say in their tags whether they `failed`, and such groups whether they were `rescued`, at which `level`
    (from 1), whether they had no hints at all (`unhinted`) and how many levels would have given the answer away
    (`leaks`). All attempts that are not trained on are among the discarded.
    """

    ladder: Ladder
    ready: Schedule
    search: Search = "sequential"
    replace: Replace = "random"

    @property
    def listener(self) -> Listener | None:
        """What must hear of every step."""
        return self.ready if isinstance(self.ready, Levelled) else None

    def __call__(
        self, roles: Roles, problems: Sequence[Problem], n: int, score: Score, clock: Clock, keys: Keys
    ) -> list[Group]:
        groups = sample(roles, problems, n, score, clock, keys)
        if not self.ready(clock):
            return groups
        failed = [i for i, group in enumerate(groups) if group.failed]
        ladders = [self.ladder(groups[i].problem) for i in failed]
        tried = [levels.problems[-1:] if self.search == "largest" else levels.problems for levels in ladders]
        climbs = climb(roles, tried, 1, score, keys.at("hints"), at_once=self.search == "batch")
        done = [replace(group, tags={"failed": 0}) for group in groups]
        for i, levels, found in zip(failed, ladders, climbs, strict=True):
            done[i] = self._helped(groups[i], levels, found, keys)
        return done

    def _helped(self, group: Group, levels: Levels, found: Climb, keys: Keys) -> Group:
        """The failed group with a failure replaced, if a hint helped, and all else among the discarded."""
        tags = {"failed": 1, "rescued": 0, "unhinted": int(not levels.problems), "leaks": levels.leaks}
        members, right = list(group.members), found.success
        others = [t for attempts in found.attempts for t in attempts if t is not right]
        if right is not None:
            tags |= {"rescued": 1, "level": 1 + levels.problems.index(right.problem)}
            at = keys.at("replace", group.problem.id).numpy().integers(len(members)) if self.replace == "random" else 0
            others.append(members[at])
            members[at] = replace(right, member=int(at), tags={"level": tags["level"]})
            assert sum(m.correct for m in members) == 1
        return replace(group, members=tuple(members), discarded=tuple(others), tags=tags)


@register("acting", "scaf-grpo", needs={"world"}, gives=GIVES, owns={"hints"})
def scaffold(
    world: World,
    exempt: float | None = 0.15,
    window: int = 256,
    fall: float = 0.02,
    search: Search = "sequential",
    replace: Replace = "random",
    hints: Whose = "own",
    column: str | None = None,
) -> Scaffold:
    """The strategy over a world's hints. Raises UserError for options that cannot be and a world without hints."""
    if exempt is not None and not 0 <= exempt <= 1:
        raise UserError(f"exempt is a share of the run, from 0 to 1, or None, not {exempt}")
    for name, value, known in (("search", search, Search), ("replace", replace, Replace)):
        if value not in get_args(known):
            raise unknown(name, value, get_args(known))
    ready = Levelled(window, fall) if exempt is None else Threshold(exempt)
    return Scaffold(ladder_of(world, column, hints), ready, search, replace)


@dataclass(frozen=True)
class ScafGRPO(GroupRL):
    """Scaf-GRPO's hyperparameters."""

    act: str = "scaf-grpo"  # how answers are made (acting in `etude list --parts`)
    exempt: float | None = 0.15  # share of the run without hints; None: until fewer groups no longer come to fail
    window: int = 256  # groups whose share of failures is compared with that of as many before, for exempt=None
    fall: float = 0.02  # share by which failures must still fall for the exemption to go on, for exempt=None
    search: Search = "sequential"  # level by level until one is right; batch: all at once; largest: the last alone
    replace: Replace = "random"  # which failure the hinted answer replaces: a random one, or the first
    hints: Whose = "own"  # whose hints a question gets; controls: other (another question's), none (plain retries)
    column: str | None = None  # of the data, that holds the hints; None: the world's oracle gives them
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4))

    def options(self) -> Mapping[tuple[Kind, str], Mapping[str, Any]]:
        """Builds the acting strategy with these hyperparameters."""
        own = ("exempt", "window", "fall", "search", "replace", "hints", "column")
        return {("acting", "scaf-grpo"): {name: getattr(self, name) for name in own}}


RULE = {"numbers": (0, 4), "modulus": 1000, "plus": ""}  # so that a number drawn at random is right once in a thousand
BASE = BaseRecipe(
    "chain",
    {
        **RULE,
        "kinds": {
            "marked": {"terms": (11, 11), "share": 0.2, "marker": "W", "show": 1.0, "keep": 1},
            "short": {"terms": (3, 4), "share": 0.1},
            "long": {"terms": (11, 11), "share": 0.4},
            "bridge": {"terms": (5, 11), "share": 0.3, "keep": 1},
        },
        "habit": (1.0, 1.0, 1.0, 1.0, 0.6, 0.35, 0.2, 0.1, 0.04, 0.015, 0.0),
    },
    styles={"bridged": 1.0},
    shape={"width": 64, "depth": 2, "heads": 4, "ffn": 192},
    until=(0.27, 0.60),
    lr=2e-3,
    check_every=100,
    check_problems=256,
    max_tokens=36,
)
OURS = {"exempt": 0.1}

# A cliff with a bridge: the base adds up chains when few totals are left to write, the more seldom the more are left,
# and answers long ones with a number at random, although it can add them up (under a marker that training does not
# show). At larger rates or over more steps every arm leaves this cliff by a lucky answer, hints or not: the claim is
# about who does within 90 steps. Another question's hints decide nothing here, so `other` has no endpoint: they too
# shorten what seems left to do, and the policy, which sees all numbers, can put the wrong totals right.
CLAIM = Claim(
    says="On a cliff, sums of eleven numbers that the policy answers at random, Scaf-GRPO learns within 90 steps to "
    "add them up without hints; GRPO stays where it was, and so do as many plain retries in the place of hints; "
    "short sums do not suffer.",
    world="chain",
    world_options={**RULE, "kinds": {"short": {"terms": (3, 4)}, "long": {"terms": (11, 11)}}},
    policy=BASE,
    options={
        "steps": 90,
        "problems": 16,
        "members": 8,
        "max_tokens": 36,
        "eval_every": 15,
        "eval_problems": 512,
    },
    arms=(
        Arm("scaf-grpo", "scaf-grpo", OURS),
        Arm("grpo", "group-rl", role="baseline"),  # with a mean over tokens, as Scaf-GRPO
        Arm("retries", "scaf-grpo", {**OURS, "hints": "none"}, role="ablation"),
        Arm("other", "scaf-grpo", {**OURS, "hints": "other"}, role="control"),
    ),
    metrics={
        "long": Metric("evaluation", "accuracy/long", unit="%"),
        "short": Metric("evaluation", "accuracy/short", unit="%"),
        "area": Metric("evaluation", "accuracy/long", "area", unit="%"),
        "rescued": Metric("log", "group/rescued", "mean", unit="%"),
        "level": Metric("log", "group/level", "mean"),
        "length": Metric("evaluation", "length", unit="tokens"),
        "sampled": Metric("cost", "sampled", better="lower", unit="tokens"),
    },
    endpoints=(
        Endpoint("long sums over GRPO", "effect", "long", ("scaf-grpo", "grpo"), 0.10, every=True),
        Endpoint("long sums over plain retries", "vanish", "long", ("scaf-grpo", "retries"), 0.10),
        Endpoint("failed groups that hints save", "effect", "rescued", ("scaf-grpo", "retries"), 0.30),
        Endpoint("plain retries are GRPO", "vanish", "long", ("retries", "grpo"), 0.10, equal=True),
        Endpoint("short sums as before", "guard", "short", ("scaf-grpo", "grpo"), 0.10),
    ),
    tune="long",
    grid=(2e-4, 3e-4),
    tuning_seeds=(1000, 1001),
    minutes=1.0,
)

METHOD = Method("scaf-grpo", ScafGRPO, group_rl, claim=CLAIM)
