"""DNO: direct Nash optimisation, and its practical form DNO-Prct (arXiv 2404.03715, sections 3 and 4).

Problem: a reward, one number an answer, cannot say that a beats b, b beats c and c beats a; and a policy that maximises
one loses to whoever knows which answer it settled on. Idea: aim at the Nash equilibrium of the game whose payoff is the
preference P(y > y' | x) itself. In every round the reward is the win rate against the policy as it is, and the policy's
own log-ratio to itself is regressed onto that reward, in pairs, where the partition function cancels.

Let pi_t be the policy at round t (frozen while pi_t+1 is learnt), log pi(y|x) a sum over the answer's tokens and eta > 0
(no unit; it multiplies a log-ratio, so a large one makes small steps). Exact form (algorithm 1), for t = 1..T:

    r_t(x, y) = E_{y' ~ pi_t} P(y > y' | x)                                                     in [0, 1]
    D*  = r_t(x, y1) - r_t(x, y2),     D = eta log[pi(y1)/pi_t(y1)] - eta log[pi(y2)/pi_t(y2)],     y1, y2 ~ pi_t
    pi_t+1 = argmin_pi  mean of  - sigma(D*) log sigma(D) - sigma(-D*) log sigma(-D)

whose optimum is pi_t exp(r_t / eta), normalised. The last policy may go round for ever; the uniform mixture of
pi_1..pi_T approaches the equilibrium, and is returned. r_t is estimated in groups of K answers: each one's mean verdict
against the others, itself left out, equal answers sharing theirs.

Practical form (algorithm 2): a round asks new problems and ranks K answers and one of a teacher by win rate. Pairs have
a positive of high rank and a wide margin, whoever wrote which side; a part of them is of earlier rounds, 30% of the last,
15% of the one before. The loss is the hard limit of the one above, - log sigma(D): DPO with pi_t as its reference. What
did best in validation is returned. Teacher > student only is DNO-Restrictive; teacher > student without asking a judge is
SPIN.

This file adds the two ways of making a round's pairs. Departures: ranks are win rates in [0, 1] in place of a judge's
score of 0 to 6 (a floor of 5 and margins of 2 and 1 become 0.6, 0.4 and 0.2); an answer counts as repetitive, hence
negative, where over half of its 4-grams came before (the paper gives no numbers); updates a round are counted, in place
of one epoch over 20k pairs; sampling is at temperature 1 (paper: 0.7, top-p 0.95). The paper names a coefficient alpha =
0.005 without saying of what; taken as the weight of an NLL term on positives, it is `nll`, off.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.audits.exploitability import mean_exploitability, strategies
from etude.curation.examples import Examples, completion, only_row
from etude.curation.examples import pairs as linked
from etude.curation.pairing import PairStore, pairs, same_tokens, with_info
from etude.experience.batch import pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Game, Interactive, Judge, Policy
from etude.experience.rows import Row
from etude.experience.types import RAW, Group, Problem
from etude.feedback.judge import Judging, text_of
from etude.feedback.winrate import bradley_terry, compared, pooled, win_rates
from etude.learning.best import Best, held_back, validation
from etude.learning.judging import judge_for, preference_for
from etude.learning.learner import Optim, Seat
from etude.learning.loops import Collected, describe, examples, fit, rounds
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.pairs import PairLoss
from etude.objectives.reference import reference_of
from etude.policies.mixture import Mixture
from etude.policies.zoo import load_policy, save_policy
from etude.worlds.oracles import load_oracle

GRAM = 4  # tokens


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
    teacher: str | None = "oracle"  # practical form: oracle, a policy's name or folder, or None: no teacher's answers
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


Floats = NDArray[np.float64]
Teach = Callable[[Sequence[Problem], Keys], list[str]]  # an answer to each problem
Rewards = Mapping[str, Mapping[str, float]]  # of each answer to each question


@dataclass(frozen=True)
class Answered:
    """The answers to one problem, and the row that teaches each. The first is the teacher's, where there is one."""

    problem: Problem
    texts: list[str]
    rows: list[Row]


def train(s: Setting, config: DNO) -> None:
    """Rounds of answers, verdicts, pairs and a fit; then the mixture of iterates, or the best round."""
    exact = config.form == "exact"
    if isinstance(s.world, Interactive) or s.run.ranks.size > 1:
        raise UserError("dno compares whole answers, in one process: use a world of one turn, without torchrun")
    if exact and not s.law.raw:
        raise UserError("form=exact estimates win rates against the policy itself: sample with temperature 1")
    judge = s.run.track("judge", judge_for(s, config.judge))
    iterates, older = s.run.track("iterates", Iterates(s)), s.run.track("older", PairStore())
    best, measure = s.run.track("best", Best(s.policy)), validation_of(s, config)
    first = s.reference() if config.reference == "first" or not config.online else None
    teacher = teacher_of(s, config)
    total = config.rounds * config.steps
    rewards: Rewards | None = None
    add_probes(s, iterates, teacher)

    def look(r: int) -> None:
        if measure is not None:
            score = measure()
            best.hear(score, r)
            s.run.log({"validation": score})

    def before() -> None:
        s.watch(Clock(0, total))
        look(0)

    def collect(r: int) -> Examples | None:
        if s.run.spent >= 1:
            return None
        iterates.add(keep=exact)
        groups = answers(s, config, r, None if config.online else first)
        found = answered(s, groups, teacher, s.run.keys.at("teacher", r))
        unparsed = judge.unparsed
        values = valued(config, judge, found, rewards, r)
        new, counts = paired(config, found, values, s.run.keys.at("pairs", r))
        s.run.keep(groups, [True] * len(groups))
        s.run.log(describe(Collected(groups, [True] * len(groups))))
        s.run.log({**counts, "unparsed": float(judge.unparsed - unparsed)})
        if teacher is not None and config.admit != "spin":
            s.run.log({"beats_teacher": 1 - float(np.mean([v[0] for v in values]))})
        if new is None:
            return None
        data = new if exact else older.mixed(new, config.older, s.run.keys.at("older", r))
        return with_info(data, {"logp_ref": reference_of(data.rows, first or s.policy, meter=s.run.meter)})

    def learn(r: int, data: Examples) -> None:
        def watch(clock: Clock) -> None:
            now = r * config.steps + clock.step
            if clock.step and now < total:  # a round begins with what the last one was seen to end with
                s.watch(Clock(now, total))

        objective = PairLoss("soft" if exact else "logistic", config.eta, nll_coef=config.nll)
        source = examples(data, config.batch, s.run)
        if config.batch >= len(data.links):
            whole = pack(data.rows, data.links)
            source = lambda clock, keys: whole
        fit(s.run, Seat(s.policy, config.optim, config.steps), source, objective, config.steps, by=None, watch=watch)
        look(r + 1)

    def returned() -> None:
        if exact:
            s.policy = iterates.mixture()
        elif measure is not None:
            best.restore()
        s.watch(Clock(total, total))

    s.run.stage("before", before)
    if config.feedback == "bradley-terry":
        rewards = s.run.stage("rewards", lambda: fitted_rewards(s, config, judge))
    rounds(s.run, config.rounds, collect, learn)
    s.run.stage("returned", returned)
    if exact:
        iterates.save(s.run.folder / "policy")


def answers(s: Setting, config: DNO, r: int, other: Policy | None = None) -> list[Group]:
    """K answers to each problem of round r, of the policy or of another one."""
    asked = [s.world.problem("train", r * config.problems + i) for i in range(config.problems)]
    clock, keys = Clock(r, config.rounds), s.run.keys.at("answers", r)
    if other is None:
        return s.acting(sample)(s.roles(), asked, config.members, s.score, clock, keys)
    roles = {"actor": PolicyAgent(other, "actor", s.law, s.limits, s.run.meter)}
    return sample(roles, asked, config.members, s.score, clock, keys)


def answered(s: Setting, groups: Sequence[Group], teacher: Teach | None, keys: Keys) -> list[Answered]:
    """The groups' answers, after the teacher's. Charges `teacher`, one an answer."""
    found = [Answered(g.problem, [m.text for m in g.members], [only_row(m) for m in g.members]) for g in groups]
    if teacher is None:
        return found
    given = teacher([a.problem for a in found], keys)
    s.run.meter.charge("teacher", len(given))
    rows = [
        completion(s.policy.tokenizer, a.problem.prompt, t, s.policy.limit) for a, t in zip(found, given, strict=True)
    ]
    return [Answered(a.problem, [t, *a.texts], [row, *a.rows]) for a, t, row in zip(found, given, rows, strict=True)]


def valued(config: DNO, judge: Judge, found: Sequence[Answered], rewards: Rewards | None, r: int) -> list[Floats]:
    """f64[G] a problem: each answer's win rate in its group (of a repetitive one 0), or what stands in its place."""
    if config.admit == "spin":
        return [np.eye(1, len(a.texts))[0] for a in found]  # the teacher's is the best, whatever it is
    if rewards is not None:
        known = [rewards[text_of(a.problem.prompt)] for a in found]
        return [np.array([k.get(t, min(k.values())) for t in a.texts]) for k, a in zip(known, found, strict=True)]
    exact = config.form == "exact"
    asking = f"round{r}" if exact and config.judge.who == "oracle" else ""  # whose verdicts are drawn
    wins = compared(judge, [a.problem for a in found], [a.texts for a in found], asking)
    if exact:
        return [pooled(win_rates(w), a.texts) for w, a in zip(wins, found, strict=True)]
    return [np.where([repetitive(row) for row in a.rows], 0.0, win_rates(w)) for w, a in zip(wins, found, strict=True)]


def repetitive(row: Row) -> bool:
    """Whether more than half of the 4-grams of an answer of at least 16 tokens came before in it."""
    out = row.columns["target"].tolist()
    grams = [tuple(out[i : i + GRAM]) for i in range(len(out) - GRAM + 1)]
    return len(out) >= 4 * GRAM and len(set(grams)) < len(grams) / 2


def paired(
    config: DNO, found: Sequence[Answered], values: Sequence[Floats], keys: Keys
) -> tuple[Examples | None, dict[str, float]]:
    """The pairs of a round, with each row's `value`, and how many there were of which kind; None where no problem has an
    admissible one."""
    count: Counter[str] = Counter(pairs=0, identical=0, skipped=0)
    chosen: list[Row] = []
    rejected: list[Row] = []
    for a, value in zip(found, values, strict=True):
        kept, identical = of_group(config, a, value, keys.at(a.problem.id))
        count += Counter(pairs=len(kept), identical=identical, skipped=not kept)
        for i, j in kept:
            chosen.append(replace(a.rows[i], info={"value": float(value[i])}))
            rejected.append(replace(a.rows[j], info={"value": float(value[j])}))
            count["by_student"] += i > 0 or config.teacher is None
    log = {name: float(count[name]) for name in ("pairs", "identical", "skipped", "by_student")}
    return (linked(chosen, rejected) if chosen else None), log


def of_group(config: DNO, a: Answered, value: Floats, keys: Keys) -> tuple[list[tuple[int, int]], int]:
    """One problem's pairs, as indices, and how many more had identical sides: of the exact form y1, y2 ~ pi_t, of the
    practical one those of the widest margins that are admitted."""
    if config.form == "exact":
        distinct = list({text: i for i, text in enumerate(a.texts)}.values())
        every = list(combinations(distinct, 2))
        drawn = [every[i] for i in keys.numpy().permutation(len(every))[: config.pairs_each]]
        return drawn, len(a.texts) - len(distinct)

    def margin(i: int, j: int) -> float:
        if i == 0 and config.teacher is not None:
            return config.margin
        return config.student_margin if config.admit == "all" else np.inf

    return pairs(a.rows, value.tolist(), margin, config.floor, same_tokens, config.pairs_each)


def fitted_rewards(s: Setting, config: DNO, judge: Judge) -> dict[str, dict[str, float]]:
    """A Bradley-Terry reward for every answer to every question, fitted to as many verdicts as all rounds ask for, all
    of them on pairs of pi_1's answers."""
    wins: dict[str, Counter[tuple[str, str]]] = {}
    for r in range(config.rounds):
        found = answered(s, answers(s, config, r), None, s.run.keys)
        matrices = compared(judge, [a.problem for a in found], [a.texts for a in found], f"rewards{r}")
        for a, w in zip(found, matrices, strict=True):
            of = wins.setdefault(text_of(a.problem.prompt), Counter())
            for i, j in permutations(range(len(a.texts)), 2):
                of[a.texts[i], a.texts[j]] += w[i, j]
    rewards = {}
    for question, of in wins.items():
        known = sorted({one for one, _ in of})
        matrix = np.array([[of[a, b] * (a != b) for b in known] for a in known])
        rewards[question] = dict(zip(known, bradley_terry(matrix).tolist(), strict=True))
    return rewards


def teacher_of(s: Setting, config: DNO) -> Teach | None:
    """Who writes one answer to each problem: the world's oracle, or another policy."""
    if config.teacher is None or config.form == "exact":
        return None
    if config.teacher == "oracle":
        oracle = load_oracle(s.world)
        return lambda problems, keys: [oracle.demonstrate(p, "plain", keys.at(p.id)) for p in problems]
    roles = {"actor": PolicyAgent(load_policy(config.teacher, device=s.common.device), "teacher", RAW, s.limits)}
    return lambda problems, keys: [g.members[0].text for g in sample(roles, problems, 1, s.score, Clock(0, 1), keys)]


def validation_of(s: Setting, config: DNO) -> Callable[[], float] | None:
    """What measures a round of the practical form."""
    if not config.validation or config.form == "exact":
        return None
    seen = {s.world.problem("train", i).prompt for i in range(config.rounds * config.problems)}
    return validation(s, held_back(s, config.validation, seen))


class Iterates:
    """pi_1..pi_t, kept in the run's folder, and in a game the sum of their strategies. State for the run to track."""

    def __init__(self, s: Setting) -> None:
        self.policy, self.home = s.policy, s.run.folder / "iterates"
        self.game = s.world if isinstance(s.world, Game) else None
        self.problems = [s.world.problem("test", i) for i in range(s.common.eval_problems)] if self.game else []
        self.count, self.sum = 0, np.zeros(())

    def add(self, keep: bool) -> None:
        """The policy as it stands."""
        if keep:
            save_policy(self.policy, self.home / f"{self.count:04d}")
        if self.game is not None:
            self.sum = self.sum + strategies(self.policy, self.game, self.problems)
        self.count += 1

    def mixture(self) -> Mixture:
        """The uniform mixture of those that were kept."""
        return Mixture([load_policy(str(self.home / f"{i:04d}")) for i in range(self.count)])

    def save(self, folder: Path) -> None:
        """The mixture in a folder, in place of the iterates."""
        if not folder.exists():
            save_policy(self.mixture(), folder)
        shutil.rmtree(self.home, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sum": self.sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.sum = state["count"], state["sum"]


def add_probes(s: Setting, iterates: Iterates, teacher: Teach | None) -> None:
    """In a game, how exploitable the mixture of the iterates is, and the last one; with a teacher, how often a held-out
    answer is preferred to its."""
    game, learner, problems = iterates.game, s.policy, iterates.problems
    if game is not None:

        def last(policy: Policy, keys: Keys) -> float:
            return mean_exploitability(game, problems, strategies(learner, game, problems))

        def average(policy: Policy, keys: Keys) -> float:
            if not iterates.count:
                return last(policy, keys)
            return mean_exploitability(game, problems, iterates.sum / iterates.count)

        s.probes |= {"exploitability": average, "exploitability_last": last}
    if teacher is not None:
        asked = [s.world.problem("test", i) for i in range(s.common.eval_problems)]
        prefer = preference_for(s)
        given: list[str] = []

        def win_rate(policy: Policy, keys: Keys) -> float:
            if not given:
                given.extend(teacher(asked, keys.at("teacher")))
            roles = {"actor": PolicyAgent(policy, "actor", RAW, s.limits)}
            groups = sample(roles, asked, 1, s.score, Clock(1, 1), keys.at("student"))
            return float(np.mean([prefer(g.problem, g.members[0].text, t) for g, t in zip(groups, given, strict=True)]))

        s.probes["win_rate"] = win_rate


METHOD = Method("dno", DNO, train)
