"""DNO: direct Nash optimisation, and its practical form DNO-Prct (arXiv 2404.03715, sections 3 and 4).

Problem: a reward, one number an answer, cannot say that a beats b, b beats c and c beats a; and a policy that maximises
one loses to whoever knows on which answer it has settled. Idea: aim at the Nash equilibrium of the game whose payoff is
the preference P(y > y' | x) itself. In each round the reward is the win rate against the policy as it is, and the log-
ratio of the policy to itself is regressed onto that reward over pairs, in which the partition function cancels.

Let pi_t be the policy at round t (frozen while pi_t+1 is learnt), log pi(y|x) a sum over the tokens of an answer, and
eta > 0 (no unit; it multiplies log-ratios, so that a large one makes small steps). The exact form (algorithm 1):

    r_t(x, y) = E_{y' ~ pi_t} P(y > y' | x)                                                             in [0, 1]
    D* = r_t(x, y1) - r_t(x, y2),     D = eta log[pi(y1) / pi_t(y1)] - eta log[pi(y2) / pi_t(y2)]
    pi_t+1 = argmin_pi  mean of  - sigma(D*) log sigma(D) - sigma(-D*) log sigma(-D)

whose optimum is proportional to pi_t exp(r_t / eta). The last policy may circle for ever; the uniform mixture of pi_1
to pi_T approaches the equilibrium and is returned. r_t is estimated in a group of K answers of pi_t: the mean verdict
of each against the others, itself left out, equal answers sharing theirs. y1, y2 are the different answers of a group.

The practical form (algorithm 2): each round asks other problems, and ranks K answers and one of a teacher by win rate.
A pair has a positive of high rank and a wide margin, whoever wrote either side; some are of earlier rounds, 30% of the
last and 15% of the one before. The loss is the hard limit of the one above, - log sigma(D), that is DPO with the moving
reference pi_t; the round that did best in validation is returned. With admit=teacher (only teacher > student) it is
DNO-Restrictive, with admit=spin (the same, unjudged) SPIN, with online=false offline DPO.

This file adds the rounds and how a round's pairs are made. Departures: ranks are win rates in [0, 1] in place of a
judge's 0 to 6 points (a floor of 5 and margins of 2 and 1 become 0.6, 0.4 and 0.2); an answer is repetitive, hence
never a positive, where over half of its 4-grams came before (the paper has no numbers); the updates of a round are
counted, in place of one epoch over 20k pairs; sampling is at temperature 1 (paper: 0.7, top-p 0.95). The paper names a
coefficient alpha = 0.005 without saying of what: `nll` is our reading, off by default. feedback=bradley-terry is the
baseline that fits one reward to as many verdicts on pi_1's answers and maximises it with the same loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from etude.curation.examples import Examples
from etude.curation.pairing import PairStore, linked, pairs, repetitive, same_tokens, unlike, with_info
from etude.experience.batch import pack
from etude.experience.claims import Arm, BaseRecipe, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Interactive, Judge
from etude.experience.types import Group
from etude.feedback.judge import Judging
from etude.feedback.winrate import pooled, win_rates
from etude.learning.answering import Answered, Rewards, answered, fitted, own_answers, rewarded, verdicts
from etude.learning.best import held_back, keep_best
from etude.learning.iterates import Iterates
from etude.learning.judging import judge_for, win_rate_over
from etude.learning.learner import Optim, Seat
from etude.learning.loops import Collected, describe, examples, fit, rounds
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.pairs import PairLoss
from etude.objectives.reference import reference_of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DNO:
    """DNO's hyperparameters."""

    form: Literal["practical", "exact"] = "practical"  # hard pairs of wide margin, or regression onto win rates
    rounds: int = 3  # T, of answering, judging and fitting
    problems: int = 256  # asked in each round (paper: 20k), others every time
    members: int = 5  # K, answers to each problem
    pairs_each: int = 4  # pairs of one problem at most
    steps: int = 40  # updates in each round
    batch: int = 32  # pairs an update (paper: 64)
    eta: float = 0.1  # weight of the log-ratio to the reference; DPO's beta
    reference: Literal["moving", "first"] = "moving"  # pi_t, or pi_1 in every round (iterative DPO)
    feedback: Literal["win-rate", "bradley-terry"] = "win-rate"  # exact form: r_t, or one reward fitted to pi_1's pairs
    teacher: str | None = "oracle:plain"  # practical form: oracle:STYLE, a policy, a file of completions, or None
    admit: Literal["all", "teacher", "spin"] = "all"  # pairs: of any kind, judged teacher > student, or that unjudged
    online: bool = True  # false: answers are pi_1's in every round, and so is the reference (offline DPO)
    floor: float = 0.6  # least win rate of a positive
    margin: float = 0.4  # least gap of win rates where the positive is the teacher's
    student_margin: float = 0.2  # least gap where it is the student's
    older: float = 0.3  # largest share of a round's pairs that are of the last round; half that of the one before, ...
    nll: float = 0.0  # weight of the mean token NLL of positives (paper: perhaps 0.005)
    validation: int = 128  # practical form: held-back training problems that choose the round to keep; 0: the last
    judge: Judging = field(default_factory=Judging)
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-4))

    def __post_init__(self) -> None:
        for name in ("rounds", "problems", "pairs_each", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.members < 2 and not (self.members == 1 and self.teacher and self.form == "practical"):
            raise UserError(f"members must be at least 2, since answers are compared, not {self.members}")
        if self.admit != "all" and (self.form == "exact" or self.teacher is None):
            raise UserError(
                f"admit={self.admit} sets a teacher's answers before the student's: form=practical, teacher=..."
            )
        if self.feedback == "bradley-terry" and self.form != "exact":
            raise UserError("feedback=bradley-terry takes the place of the win rates of form=exact")
        if not 0 <= self.floor <= 1 or not min(self.margin, self.student_margin) >= 0:
            raise UserError("floor is a win rate in [0, 1], and margin and student_margin are at least 0")
        if not (self.eta > 0 and 0 <= self.older < 0.5 and self.nll >= 0 and self.validation >= 0):
            raise UserError("eta must be above 0, older in [0, 0.5), nll and validation at least 0")


def train(s: Setting, config: DNO) -> None:
    """Rounds of answers, verdicts, pairs and a fit; then the mixture of iterates, or the best round."""
    exact = config.form == "exact"
    if isinstance(s.world, Interactive) or s.run.ranks.size > 1:
        raise UserError("dno compares whole answers, in one process: use a world of one turn, without torchrun")
    if exact and not s.law.raw:
        raise UserError("form=exact estimates win rates against the policy itself: sample with temperature 1")
    judge, store = s.run.track("judge", judge_for(s, config.judge)), s.run.track("pairs", PairStore())
    iterates, rewards = s.run.track("iterates", Iterates(s, keep=exact)), None
    first = s.reference() if config.reference == "first" or not config.online else None
    teacher = None if exact else config.teacher
    if teacher is not None:
        s.probes["win_rate"] = win_rate_over(s, teacher)
    total = config.rounds * config.steps
    asked = [s.world.problem("train", i).prompt for i in range(config.rounds * config.problems)]
    held = 0 if exact else config.validation
    look, restore = keep_best(s, held_back(s, held, asked) if held else [])

    def before() -> None:
        s.watch(Clock(0, total))
        look(0)

    def answers(r: int) -> list[Group]:
        clock = Clock(r, config.rounds)
        return own_answers(s, clock, config.problems, config.members, None if config.online else first)

    def first_rewards() -> Rewards:
        """From as many verdicts as all rounds ask for (within the budget), all of them on answers of pi_1."""
        return fitted(judge, [answered(s, answers(r)) for r in range(config.rounds) if s.run.spent < 1])

    def collect(r: int) -> Examples | None:
        if s.run.spent >= 1:
            return None
        iterates.add()
        groups = answers(r)
        found = answered(s, groups, teacher)
        unparsed = judge.unparsed
        values = valued(config, judge, found, rewards, r)
        new, counts = paired(config, found, values, s.run.keys.at("pairs", r))
        s.run.keep(groups, [True] * len(groups))
        s.run.log(describe(Collected(groups, [True] * len(groups))))
        s.run.log({**counts, "unparsed": float(judge.unparsed - unparsed)})
        if new is None:
            return None
        data = new if exact else store.mixed(new, config.older, s.run.keys.at("older", r))
        return with_info(data, {"logp_ref": reference_of(data.rows, first or s.policy, meter=s.run.meter)})

    def learn(r: int, data: Examples) -> None:
        def watch(clock: Clock) -> None:
            now = r * config.steps + clock.step
            if clock.step and now < total:  # a round begins with what the last one was seen to end with
                s.watch(Clock(now, total))

        whole = pack(data.rows, data.links) if config.batch >= len(data.links) else None
        drawn = examples(data, config.batch, s.run)  # a round of fewer pairs takes all of them in every update
        fit(
            s.run, Seat(s.policy, config.optim, config.steps),
            lambda clock, keys: drawn(clock, keys) if whole is None else whole,
            PairLoss("soft" if exact else "logistic", config.eta, nll_coef=config.nll),
            config.steps, by=None, watch=watch,
        )  # fmt: skip
        look(r + 1)

    def returned() -> None:
        restore()
        if exact:
            s.policy = iterates.mixture()
        s.watch(Clock(total, total))

    s.run.stage("before", before)
    if config.feedback == "bradley-terry":
        rewards = s.run.stage("rewards", first_rewards)
    rounds(s.run, config.rounds, collect, learn)
    s.run.stage("returned", returned)
    if exact:
        iterates.save(s.run.folder / "policy")


def valued(config: DNO, judge: Judge, found: Sequence[Answered], rewards: Rewards | None, r: int) -> list[Floats]:
    """f64[G] a problem: each answer's win rate in its group (0 if repetitive), or what stands in its place."""
    if config.admit == "spin":
        return [a.taught * np.eye(1, len(a.texts))[0] for a in found]  # the teacher's is the best, whatever it is
    if rewards is not None:
        return [rewarded(rewards, a) for a in found]
    wins = verdicts(judge, found, f"round{r}")
    rates = [pooled(win_rates(w), a.texts) for a, w in zip(found, wins, strict=True)]
    if config.form == "exact":
        return rates
    return [np.where([repetitive(row) for row in a.rows], 0.0, rate) for a, rate in zip(found, rates, strict=True)]


def paired(
    config: DNO, found: Sequence[Answered], values: Sequence[Floats], keys: Keys
) -> tuple[Examples | None, dict[str, float]]:
    """The pairs of a round, and how many there are of what kind; see `linked`."""
    picked = [admitted(config, a, value, keys.at(a.problem.id)) for a, value in zip(found, values, strict=True)]
    new, counts = linked([a.rows for a in found], values, picked)
    by_student = sum(i > 0 or not a.taught for a, (kept, _) in zip(found, picked, strict=True) for i, _ in kept)
    return new, {**counts, "by_student": float(by_student)}


def admitted(config: DNO, a: Answered, value: Floats, keys: Keys) -> tuple[list[tuple[int, int]], int]:
    """One problem's pairs, as indices, and how many had identical sides. Exact form: all its different answers, in
    pairs. Practical form: those of the widest margins among the admitted."""
    if config.form == "exact":
        return unlike(a.texts, config.pairs_each, keys)

    def margin(i: int, j: int) -> float:
        if i == 0 and a.taught:
            return config.margin
        return config.student_margin if config.admit == "all" else np.inf

    return pairs(a.rows, value.tolist(), margin, config.floor, same_tokens, config.pairs_each)


# --- the claims ----------------------------------------------------------------------------------


def arm(name: str, role: Any, shared: Mapping[str, Any], **options: Any) -> Arm:
    """An arm that starts from the stage "start"."""
    return Arm(name, "dno", {**shared, **options}, role=role, after="start")


EXACT = {"form": "exact", "rounds": 60, "problems": 20, "members": 32, "pairs_each": 15, "steps": 20, "batch": 300,
         "eta": 1.0}  # fmt: skip
ITERATIVE = {"form": "practical", "reference": "first", "teacher": None, "floor": 0.5, "student_margin": 0.05,
             "older": 0.0, "validation": 0, "pairs_each": 4, "batch": 80}  # fmt: skip
RANKED = {"world_options": {"cycle": False}}

CLAIM = Claim(
    says="Where answers beat one another in a circle, the mixture of DNO's policies comes near the equilibrium. A "
    "Bradley-Terry reward fitted to as many verdicts settles on one answer of the circle, and so does iterative DPO: "
    "whoever knows it wins. Where there is a best answer, all find it.",
    world="choice",
    policy="table:order=8,rows=2048",
    options={"max_tokens": 2, "eval_every": 200, "eval_problems": 20},
    arms=(
        Arm("start", "sft", {"steps": 200, "demonstrations": 2000, "batch": 64, "optim": {"lr": 0.5}}, role="stage"),
        arm("dno", "method", EXACT),
        arm("reward", "baseline", EXACT, feedback="bradley-terry"),
        arm("iterative-dpo", "baseline", EXACT, **ITERATIVE),
        arm("dno-ranked", "control", EXACT, **RANKED),
        arm("reward-ranked", "control", EXACT, **RANKED, feedback="bradley-terry"),
    ),
    metrics={
        "start": Metric("evaluation", "exploitability", "first", better="lower"),
        "mixture": Metric("evaluation", "exploitability", better="lower"),
        "last": Metric("evaluation", "exploitability_last", better="lower"),
    },
    endpoints=(
        Endpoint("the mixture over that of a fitted reward", "effect", "mixture", ("dno", "reward"), 0.15, every=True),
        Endpoint("over that of iterative DPO", "effect", "mixture", ("dno", "iterative-dpo"), 0.1),
        Endpoint("over its start", "effect", "mixture", ("dno", "dno:start"), 0.14),
        Endpoint("over its last policy", "effect", "mixture", ("dno", "dno:last"), 0.05),
        Endpoint("a fitted reward ends worse than it starts", "effect", "mixture", ("reward:start", "reward")),
        Endpoint(
            "ranked: the mixtures are alike", "vanish", "mixture", ("dno-ranked", "reward-ranked"), 0.05, equal=True
        ),
        Endpoint("ranked: both find the best", "vanish", "last", ("dno-ranked", "reward-ranked"), 0.02, equal=True),
    ),
    tune="mixture",
    grid=(0.02, 0.05),
    minutes=1.0,
)

CHAINS = {"kinds": {"short": [2, 3], "mid": [4, 5], "long": [6, 7]}}
SHARED = {"problems": 1024, "steps": 100, "batch": 64, "eta": 1.0, "nll": 0.2, "validation": 256,
          "judge": {"noise": 0.1}, "optim": {"schedule": "linear"}}  # fmt: skip
TEACHER = {"teacher": "teacher"}
RIGHT = {**SHARED, "teacher": "oracle:plain"}  # never wrong

PRACTICAL = Claim(
    says="With a teacher that its student soon reaches, three rounds of DNO teach more than the same with only such "
    "pairs as the teacher wins by verdict, those more than pairs that it always wins (SPIN), and DNO more than offline "
    "DPO. With a teacher that is always right SPIN is not behind.",
    world="chain",
    world_options=CHAINS,
    policy=BaseRecipe(
        "chain",
        CHAINS,
        noise=0.6,
        shape={"width": 64, "depth": 3, "ffn": 192},
        until=(0.20, 0.30),
        lr=2e-3,
        check_problems=256,
        max_tokens=24,
    ),
    options={"max_tokens": 24, "eval_every": 100, "eval_problems": 512},
    arms=(
        Arm("teacher", "sft", {"steps": 8, "demonstrations": 256, "optim": {"lr": 1e-3}}, role="stage"),
        Arm("dno", "dno", SHARED, uses=TEACHER),
        Arm("restrictive", "dno", {**SHARED, "admit": "teacher"}, role="ablation", uses=TEACHER),
        Arm("spin", "dno", {**SHARED, "admit": "spin"}, role="baseline", uses=TEACHER),
        Arm("offline", "dno", {**SHARED, "online": False}, role="baseline", uses=TEACHER),
        Arm("dno-right", "dno", RIGHT, role="control"),
        Arm("spin-right", "dno", {**RIGHT, "admit": "spin"}, role="control"),
    ),
    metrics={
        "accuracy": Metric("evaluation", "accuracy", unit="%"),
        "win rate": Metric("evaluation", "win_rate", unit="%"),
        "length": Metric("evaluation", "length", unit="tokens"),
    },
    endpoints=(
        Endpoint("over Restrictive, and that over SPIN", "effect", "accuracy", ("dno", "restrictive", "spin")),
        Endpoint("over offline DPO", "effect", "accuracy", ("dno", "offline"), 0.03),
        Endpoint("over offline DPO against the teacher", "effect", "win rate", ("dno", "offline"), 0.02),
        Endpoint("SPIN is not behind a teacher that is right", "guard", "accuracy", ("spin-right", "dno-right"), 0.03),
    ),
    tune="accuracy",
    grid=(1.5e-4, 3e-4),
    minutes=2.5,
)

METHOD = Method("dno", DNO, train, claim=CLAIM, more={"practical": PRACTICAL})
