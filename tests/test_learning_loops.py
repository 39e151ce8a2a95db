import re
from collections import Counter

import numpy as np
import pytest
import torch

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.audits.estimators import accuracy
from etude.curation.examples import Examples, completion
from etude.curricula.curriculum import Uniform
from etude.experience.batch import normalise, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock
from etude.feedback.advantage import Advantage
from etude.learning.learner import Optim, Seat, Term
from etude.learning.loops import collect, describe, examples, fit, on_policy, rounds
from etude.learning.run import Run, open_run
from etude.learning.select import Mixed
from etude.learning.weights import Weights
from etude.objectives.clipped_pg import ClippedPG
from etude.objectives.nll import NLL
from etude.objectives.terms import Pure
from etude.policies.table import TablePolicy
from etude.policies.tokenizers import CharTokenizer
from small import LIMITS, Echo, small_lm, weights_of

CLOCK = Clock(0, 1)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "r", {"seed": 3}, checkpoint_every=2)
    yield run
    run.close()


def demonstrations(policy, n=6):
    return Examples([completion(policy.tokenizer, f"{i}=", str(i), policy.limit) for i in range(n)])


def go(run, policy, steps=3, seat=None, world=None, **more):
    world = world or Echo(slack=2)
    kwargs = {
        "curriculum": Uniform(world), "act": sample, "score": world.score, "credit": Advantage(),
        "objective": ClippedPG(), "problems": 3, "members": 4, **more,
    }  # fmt: skip
    roles = {"actor": PolicyAgent(policy, limits=LIMITS, meter=run.meter)}
    on_policy(run, seat or Seat(policy, Optim(lr=1e-3), 100), roles, steps=steps, **kwargs)


# --- collecting ----------------------------------------------------------------------------------


def what_groups_did(keys, policy=None, select=None, max_draws=1, problems=4, curriculum=None, act=sample):
    """Every drawn group's tokens by problem and by how often that problem came."""
    world, policy = Echo(), policy or small_lm()
    found = collect(
        {"actor": PolicyAgent(policy, limits=LIMITS)}, act, world.score, curriculum or Uniform(world), CLOCK, keys,
        problems=problems, members=3, select=select, max_draws=max_draws,
    )  # fmt: skip
    seen = Counter()
    did = {}
    for group in found.groups:
        did[group.problem.id, seen[group.problem.id]] = [m.calls[0].out.tolist() for m in group.members]
        seen[group.problem.id] += 1
    return did, found


def test_refills_do_not_change_what_any_group_does():
    keys = Keys(0)
    all_at_once, _ = what_groups_did(keys, problems=12)
    split = []

    def every_other(group):
        split.append(group.problem.id)
        return len(split) % 2 == 0

    in_parts, found = what_groups_did(keys, select=every_other, max_draws=3, problems=4)
    assert sum(found.kept) == 4
    assert len(found.groups) > 4
    assert {k: v for k, v in all_at_once.items() if k in in_parts} == in_parts
    one_by_one, _ = what_groups_did(keys, select=lambda g: False, max_draws=12, problems=1)
    assert one_by_one == all_at_once


class Repeats:
    """Draws few problems again and again."""

    def __init__(self, world, order):
        self.world, self.order, self.at = world, order, 0

    def draw(self, n, clock, keys):
        drawn = [self.world.problem("train", i) for i in self.order[self.at : self.at + n]]
        self.at += n
        return drawn


def test_a_problem_drawn_again_is_answered_anew_the_same_way_in_any_split():
    keys, order = Keys(0), [0, 1, 0, 0, 1, 2]
    whole, _ = what_groups_did(keys, curriculum=Repeats(Echo(), order), problems=6)
    parts, _ = what_groups_did(
        keys, curriculum=Repeats(Echo(), order), problems=2, max_draws=3, select=lambda group: False
    )
    assert whole == parts
    assert len(whole) == 6
    first = Echo().problem("train", 0).id
    assert whole[first, 0] != whole[first, 1] != whole[first, 2]


def test_draws_stop_at_the_budget_or_where_the_curriculum_ends():
    _, found = what_groups_did(Keys(0), select=lambda g: False, max_draws=3, problems=4)
    assert len(found.groups) == 12
    assert found.chosen == []
    _, found = what_groups_did(Keys(0), select=lambda g: True, max_draws=3, problems=4)
    assert len(found.groups) == 4
    _, found = what_groups_did(Keys(0), curriculum=Repeats(Echo(), [0, 1]), problems=5, max_draws=2)
    assert len(found.groups) == 2


def test_a_step_is_described_in_numbers_counted_by_hand():
    _, found = what_groups_did(Keys(0), problems=4, select=Mixed())
    said = describe(found)
    members = [m for g in found.groups for m in g.members]
    assert said["accuracy"] == np.mean([m.correct for m in members])
    assert said["reward"] == np.mean([m.reward for m in members])
    assert said["length"] == np.mean([len(m.calls[0].out) for m in members])
    assert said["truncated"] == np.mean([m.calls[0].stop == "length" for m in members])
    assert said["groups_drawn"] == 4
    assert said["groups_kept"] == sum(0 < g.solved < 1 for g in found.groups)
    assert said["live"] == np.mean([len(set(g.rewards)) > 1 for g in found.groups])


# --- on_policy -----------------------------------------------------------------------------------


class Recorder(Uniform):
    """A curriculum that writes down what it hears."""

    def __init__(self, world, log):
        super().__init__(world)
        self.log = log
        self.reports = []

    def draw(self, n, clock, keys):
        self.log.append(("draw", clock.step, n))
        return super().draw(n, clock, keys)

    def observe(self, report):
        self.log.append(("observe", report.clock.step))
        self.reports.append(report)


def test_a_step_draws_acts_selects_refills_credits_updates_and_reports(run):
    log = []
    policy, world = small_lm(), Echo(slack=2)
    curriculum = Recorder(world, log)

    def act(*args):
        log.append(("act", len(args[1])))
        return sample(*args)

    def shape(groups, clock):
        log.append(("shape", len(groups)))
        return groups

    def score(problem, text):
        return world.score(problem, text)

    def credit(groups, batch):
        log.append(("credit", len(groups)))
        assert all(0 < g.solved < 1 for g in groups)
        return Advantage()(groups, batch)

    class Spy(ClippedPG):
        def prepare(self, policy, batch, keys):
            log.append(("update", batch.size))
            return batch

    go(
        run, policy, steps=4, curriculum=curriculum, act=act, score=score, shape=shape, select=Mixed(), max_draws=3,
        credit=credit, objective=Spy(), watch=lambda clock: log.append(("watch", clock.step)),
    )  # fmt: skip
    steps = curriculum.reports
    assert [r.clock.step for r in steps] == [0, 1, 2, 3]
    order = [name for name, *_ in log]
    text = "".join(name[0] for name in order)  # w d a s ... c u o
    assert order[-1] == "watch"
    assert log[-1] == ("watch", 4)
    assert re.fullmatch(r"(w(das)+(cu)?o){4}w", text)
    assert text.count("das") > 4  # some step refilled
    for report in steps:
        assert len(report.groups) == len(report.kept) == len(report.gain)
        assert [0 < g.solved < 1 for g in report.groups] == list(report.kept)
        for group, kept, gain in zip(report.groups, report.kept, report.gain, strict=True):
            if not kept:
                assert gain == 0.0
                continue
            rewards = group.rewards
            advantage = np.abs(rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            assert gain == pytest.approx(advantage.mean(), rel=1e-5)  # of members, whatever their lengths
    assert any(not kept for report in steps for kept in report.kept)
    stored = run.store.count()
    assert stored == 4 * sum(len(r.groups) for r in steps)  # dropped groups are stored too
    assert run.store.count(kept=True) == 4 * sum(sum(r.kept) for r in steps)


def test_a_step_in_which_nothing_is_selected_is_counted_and_changes_nothing(run):
    policy = small_lm()
    before = weights_of(policy)
    curriculum = Recorder(Echo(), [])
    go(run, policy, steps=2, curriculum=curriculum, select=lambda group: False)
    assert run.store.metrics("empty_step")["empty_step"].value.tolist() == [1.0, 1.0]
    assert run.meter["updates"] == 0
    assert all((before[n] == w).all() for n, w in weights_of(policy).items())
    assert [list(r.gain) for r in curriculum.reports] == [[0.0] * 3] * 2


def test_a_curriculum_that_has_nothing_to_ask_makes_an_empty_step(run):
    class Done(Uniform):
        def draw(self, n, clock, keys):
            return []

    go(run, small_lm(), steps=1, curriculum=Done(Echo()))
    assert {n: m.value.tolist() for n, m in run.store.metrics().items()} == {"empty_step": [1.0]}


class Sizes(Pure):
    """Counts the rows of each update."""

    needs = frozenset({"logp"})

    def __init__(self):
        self.rows = []
        self.weights = []

    def prepare(self, policy, batch, keys):
        self.rows.append(batch.size)
        self.weights.append(float(batch.actions["weight"].sum()))
        return batch

    def loss(self, out, batch):
        return NLL().loss(out, batch)


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (2, 5), (1, 99)])
def test_epochs_and_minibatches_make_so_many_updates_over_all_rows(run, epochs, minibatches):
    objective = Sizes()
    go(run, small_lm(), steps=2, objective=objective, epochs=epochs, minibatches=minibatches)
    parts = min(minibatches, 12)  # no more than rows: 3 problems x 4 members
    assert len(objective.rows) == 2 * epochs * parts
    assert run.meter["updates"] == 2 * epochs * parts
    assert sum(objective.rows) == 2 * epochs * 12
    assert objective.weights == pytest.approx([1.0] * len(objective.weights))  # each update is a mean of its own


def test_extra_terms_join_every_update(run):
    policy = small_lm()
    data = demonstrations(policy)
    asked = []

    def extra(clock, keys):
        asked.append((clock.step, keys))
        return [Term(normalise(data.draw(clock.step, 2, keys), "token"), NLL(), 0.5, "sft")]

    go(run, policy, steps=2, epochs=2, extra=extra)
    assert [step for step, _ in asked] == [0, 0, 1, 1]
    assert len({keys for _, keys in asked}) == 4  # every update has streams of its own
    assert (run.store.metrics("sft/nll")["sft/nll"].value > 0).all()
    assert "ratio" in run.store.metrics()


def test_a_reference_is_scored_for_the_kl_term(run):
    policy, reference = small_lm(), small_lm()
    go(run, policy, steps=3, reference=reference, objective=ClippedPG(kl_coef=0.1))
    kl = run.store.metrics("kl_ref")["kl_ref"].value
    assert kl[0] == pytest.approx(0.0, abs=1e-9)  # the policy is its own reference at first
    assert kl[2] > 0
    assert run.meter["scored"] > 0
    with pytest.raises(UserError, match="needs a reference"):
        run.stage("without", lambda: go(run, policy, steps=1, objective=ClippedPG(kl_coef=0.1)))


def measured(policy):
    world = Echo(slack=0)
    groups = sample(
        {"actor": PolicyAgent(policy, limits=LIMITS)}, [world.problem("test", i) for i in range(40)], 4, world.score,
        CLOCK, Keys(99),
    )  # fmt: skip
    return accuracy(groups).value


def test_grpo_learns_to_echo(run):
    """The whole loop, on a policy of one row of logits a context: exact, so that it must learn."""
    policy = TablePolicy(CharTokenizer(), order=4, rows=2048, limit=32)
    for digit in range(10):  # any digit, to begin with
        place = policy.place(policy.tokenizer.prompt(f"{digit}=").tolist())
        with torch.no_grad():
            policy.logits[place, policy.tokenizer.encode("0123456789").tolist()] = 6.0
    before = measured(policy)
    world = Echo(slack=0)
    go(run, policy, 40, Seat(policy, Optim(lr=0.3), 40), world, problems=8, members=8)
    after = measured(policy)
    assert before < 0.25
    assert after > 0.85


# --- fit -----------------------------------------------------------------------------------------


def test_fit_learns_its_examples_and_watches_at_both_ends(run):
    policy = small_lm()
    watched = []
    seat = Seat(policy, Optim(lr=1e-2), 30)
    fit(run, seat, examples(demonstrations(policy), 6, run), NLL(), 30, watch=lambda c: watched.append(c.step))
    nll = run.store.metrics("nll")["nll"].value
    assert watched == list(range(31))
    assert nll[-1] < 0.5 * nll[0]


def test_fit_normalises_only_where_asked(run):
    policy = small_lm()
    batch = pack(demonstrations(policy).rows)
    totals = {}
    for by, constant in (("token", None), ("row", None), ("constant", 5.0), (None, None)):
        objective = Sizes()
        run.stage(
            f"by-{by}",
            lambda by=by, constant=constant, objective=objective: fit(
                run, Seat(policy, Optim(), 1), lambda clock, keys: batch, objective, 1, by=by, constant=constant
            ),
        )
        totals[by] = objective.weights[0]
    actions = len(batch.at)
    assert totals == pytest.approx({"token": 1.0, "row": actions / 6, "constant": actions / 5, None: actions})


def test_fit_passes_penalties_and_masks_on(run):
    policy = small_lm()
    before = weights_of(policy)

    def nothing(params):
        for p in params:
            p.grad = None

    pulls = []

    def pull(policy):
        pulls.append(1)
        return policy.model.norm.weight.sum()

    seat = Seat(policy, Optim(), 2)
    fit(run, seat, examples(demonstrations(policy), 2, run), NLL(), 2, penalties=[pull], mask=nothing)
    assert pulls == [1, 1]
    assert all((before[n] == w).all() for n, w in weights_of(policy).items())


# --- rounds --------------------------------------------------------------------------------------


class Cut(Exception):
    """Ends a run, as a kill would."""


@pytest.mark.parametrize("again", [False, True])
def test_rounds_resume_with_the_data_they_collected(tmp_path, again):
    """`again`: each fit begins from the base weights, which a resumed fit must not do a second time."""
    collected = []

    def program(folder, cut):
        config = {"seed": 1, "checkpoint_every": 2}
        run = open_run(folder) if folder.exists() else Run(folder, config, checkpoint_every=2)
        policy, base = small_lm(), Weights(small_lm()).state_dict()
        run.track("policy", Weights(policy))

        def gather(r):
            collected.append((folder.name, r))
            digits = Keys(len(collected)).numpy().integers(10, size=5)  # another answer whenever it is asked
            return Examples([completion(policy.tokenizer, f"{d}=", str(r), policy.limit) for d in digits])

        def learn(r, data):
            if cut == (r, "begin"):
                raise Cut

            def watch(clock):
                if cut == (r, clock.step):
                    raise Cut

            fit(run, Seat(policy, Optim(lr=1e-2), 5), examples(data, 3, run), NLL(), 5, watch=watch)
            fitted.append(sorted(tuple(row.ids.tolist()) for row in data.rows))

        fitted = []
        try:
            rounds(run, 2, gather, learn, (lambda: Weights(policy).load_state_dict(base)) if again else None)
        finally:
            run.close()
        return weights_of(policy), fitted

    cuts = [(0, "begin"), (0, 3), (1, "begin"), (1, 3)]
    folder = tmp_path / "cut"
    for cut in cuts:
        with pytest.raises(Cut):
            program(folder, cut)
    weights, fitted = program(folder, None)
    assert [r for name, r in collected if name == "cut"] == [0, 1]
    assert len(fitted) == 1  # only what was still to do was fitted in the last resume
    collected.clear()  # so that the whole run collects the same
    expected, _ = program(tmp_path / "whole", None)
    assert all((expected[n] == w).all() for n, w in weights.items())


def test_no_rounds_are_refused(run):
    with pytest.raises(UserError, match="rounds must be at least 1, not 0"):
        rounds(run, 0, lambda r: pytest.fail("asked"), lambda r, data: None)
