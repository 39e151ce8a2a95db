"""Scaf-GRPO: the numeric checks of its method, its reductions to GRPO, what it refuses, and that it runs."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.acting.agent import PolicyAgent
from etude.acting.hints import Ladder
from etude.acting.sample import answers, sample
from etude.curation.examples import pack_groups
from etude.curricula.levelled import Levelled
from etude.curricula.schedules import Constant
from etude.experience.batch import normalise
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.plugs import Plug, check, plug
from etude.experience.protocols import Clock, Limits
from etude.experience.store import Store
from etude.experience.types import RAW, Outcome, Problem
from etude.feedback.advantage import grpo as grpo_credit
from etude.learning.group_rl import GroupRL, compose
from etude.learning.hinting import ladder_of
from etude.methods.api import resume, train
from etude.methods.reward.scaf_grpo import METHOD, Scaffold, ScafGRPO, scaffold
from etude.objectives.clipped_pg import ClippedPG
from etude.policies.zoo import save_policy
from etude.worlds.chain import hint
from etude.worlds.registry import load_world
from runs import Cut, Cutter, same, weights
from small import small_lm

G = 8
CHAIN = {"numbers": [0, 4], "modulus": 10, "scale": 3, "shift": 1, "plus": ""}
KINDS = {"short": {"terms": [3, 4]}, "long": {"terms": [7, 7]}}
WORLD = load_world("chain", notation="compact", **CHAIN, kinds=KINDS)
PROBLEMS = [WORLD.problem("train", i, "long") for i in range(3)]
CLOCK, KEYS = Clock(5, 10), Keys(2).at("main", 5)
NUMBERED = Ladder(lambda p: [["K1", "K2"], ["P1", "P2"]], hint, " ")  # four levels
HINTS = ["K1", "K1 K2", "P1", "P1 P2"]


def roles(meter=None, policy=None):
    return {"actor": PolicyAgent(policy or small_lm(), limits=Limits(6), meter=meter)}


def right_with(*hints, also=()):
    """Right where the prompt holds one of these hints, or at these plain problems."""

    def score(problem, text):
        right = problem.meta.get("hint") in hints or problem.id in also
        return Outcome(float(right), right)

    return score


def act(score, clock=CLOCK, ladder=NUMBERED, **options):
    strategy = Scaffold(ladder, options.pop("ready", Constant(1.0)), **options)
    return strategy(roles(), PROBLEMS, G, score, clock, KEYS)


def calls(trajectories):
    return [(t.member, t.text, t.calls[0].context.tolist(), t.calls[0].logp_raw.tobytes()) for t in trajectories]


def said(trajectories):
    """As `calls`, without the log-probabilities, whose last bits depend on what shares their batch."""
    return [call[:3] for call in calls(trajectories)]


def plain(score=None):
    return sample(roles(), PROBLEMS, G, score or right_with(), CLOCK, KEYS)


def advantages(groups, **options):
    batch = grpo_credit(**options)(groups, pack_groups(groups))
    first = torch.diff(batch.row["trajectory"][batch.row_of], prepend=torch.tensor([-1.0])) > 0
    return batch.actions["advantage"][first].view(len(groups), G)


# --- the group -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ddof", "up", "down"), [(1, 2.474874, -0.353553), (0, 2.645751, -0.377964)])
def test_one_hinted_success_brings_the_group_to_life(ddof, up, down):
    groups = act(right_with("P1"), replace="first")
    for group in groups:
        assert group.rewards.tolist() == [1] + [0] * 7
    found = advantages(groups, ddof=ddof)
    assert found.numpy() == pytest.approx(np.array([[up] + [down] * 7] * 3), abs=2e-5)
    assert found.sum(1).numpy() == pytest.approx(0, abs=1e-5)


def test_where_no_hint_helps_the_group_stays_and_teaches_nothing():
    groups = act(right_with())
    for group, before in zip(groups, plain(), strict=True):
        assert calls(group.members) == calls(before.members)
        assert len(group.discarded) == 4
        assert group.tags == {"failed": 1, "rescued": 0, "unhinted": 0, "leaks": 0}
    policy = small_lm()
    batch = normalise(grpo_credit()(groups, pack_groups(groups)), "token")
    ClippedPG().loss(policy.forward(batch, frozenset({"logp"})), batch).total.backward()
    assert all(not p.grad.any() for p in policy.parameters())


def test_a_group_with_a_right_answer_is_not_touched():
    score = right_with("K1", also=[PROBLEMS[1].id])
    groups = act(score)
    assert calls(groups[1].members) == calls(plain(score)[1].members)
    assert (groups[1].discarded, groups[1].tags) == ((), {"failed": 0})
    assert groups[0].tags["rescued"] == groups[2].tags["rescued"] == 1


def test_before_the_exemption_ends_nothing_is_touched():
    strategy = scaffold(WORLD, exempt=0.15)
    score = right_with(*(";".join(map(str, p.meta["totals"][:1])) for p in PROBLEMS))
    for step, touched in ((0, False), (14, False), (15, True), (99, True)):
        groups = strategy(roles(), PROBLEMS, G, score, Clock(step, 100), KEYS)
        assert any(g.tags for g in groups) is touched
        assert any(g.solved for g in groups) is touched


def test_a_failure_by_the_verifiers_word_is_one_whatever_it_was_paid():
    def score(problem, text):
        right = problem.meta.get("hint") == "K1"
        return Outcome(right + 0.5 * ("1" in text), right)  # with a reward for form

    groups = act(score)
    assert all(g.tags["rescued"] for g in groups)
    assert {sum(m.correct for m in g.members) for g in groups} == {1}
    assert not any(g.tags["failed"] for g in act(lambda p, text: Outcome(0.0, None)))  # the verifier has no word


@pytest.mark.parametrize("search", ["sequential", "batch"])
@pytest.mark.parametrize(("helpful", "level"), [(HINTS[1:], 2), (HINTS[2:], 3), (HINTS[3:], 4), (HINTS, 1)])
def test_the_least_informative_hint_that_helps(search, helpful, level):
    for group in act(right_with(*helpful), search=search):
        (helped,) = [m for m in group.members if m.correct]
        assert helped.problem.meta["hint"] == HINTS[level - 1]
        assert group.tags["level"] == level
        # the replaced failure, and the attempts at the other levels
        assert len(group.discarded) == 1 + (level - 1 if search == "sequential" else 3)


def test_the_largest_hint_at_once():
    for group in act(right_with(*HINTS), search="largest"):
        (helped,) = [m for m in group.members if m.correct]
        assert (helped.problem.meta["hint"], group.tags["level"], len(group.discarded)) == ("P1 P2", 4, 1)


@pytest.mark.parametrize("which", ["first", "random"])
def test_one_failure_is_replaced_and_kept_among_the_discarded(which):
    score, slots = right_with("K1"), set()
    for seed in range(6):
        keys = Keys(seed)
        strategy = Scaffold(NUMBERED, Constant(1.0), replace=which)
        groups = strategy(roles(), PROBLEMS, G, score, CLOCK, keys)
        for group, before in zip(groups, sample(roles(), PROBLEMS, G, score, CLOCK, keys), strict=True):
            assert [m.member for m in group.members] == list(range(G))
            (slot,) = [i for i, m in enumerate(group.members) if m.correct]
            assert calls(m for m in group.members if not m.correct) == [
                c for c in calls(before.members) if c[0] != slot
            ]
            assert calls(group.discarded) == [calls(before.members)[slot]]
            slots.add(slot)
    assert slots == {0} if which == "first" else len(slots) > 4


def test_every_token_is_charged_and_every_attempt_is_kept():
    meter = Meter()
    strategy = Scaffold(NUMBERED, Constant(1.0), search="batch")
    groups = strategy(roles(meter), PROBLEMS, G, right_with("P1"), CLOCK, KEYS)
    every = [t for g in groups for t in (*g.members, *g.discarded)]
    assert len(every) == 3 * (G + 4)
    assert meter["sampled"] == sum(t.tokens() for t in every)


# --- on-policy under its own prompt --------------------------------------------------------------


def test_right_after_sampling_every_ratio_is_one_under_the_prompt_that_was_seen():
    policy = small_lm()
    groups = Scaffold(NUMBERED, Constant(1.0), replace="first")(
        roles(policy=policy), PROBLEMS, G, right_with("P1"), CLOCK, KEYS
    )
    batch = pack_groups(groups)
    assert batch.laws == (RAW,)  # it may feed a ratio
    ratio = (policy.logp(batch) - batch.actions["logp_raw"]).exp()
    assert ratio.numpy() == pytest.approx(1, abs=1e-5)
    helped = groups[0].members[0]
    assert helped.calls[0].context.tolist() == policy.tokenizer.prompt(helped.problem.prompt).tolist()
    assert helped.problem.prompt == hint(PROBLEMS[0], "P1").prompt
    bare = replace(helped.calls[0], context=policy.tokenizer.prompt(PROBLEMS[0].prompt))
    unhinted = pack_groups([replace(groups[0], members=(replace(helped, calls=(bare,)),))])
    assert np.abs(policy.logp(unhinted).numpy() - helped.calls[0].logp_raw).max() > 1e-2


# --- reductions ----------------------------------------------------------------------------------


def test_with_empty_hints_it_is_one_plain_retry_a_level():
    """Each failed group is tried again as often as it has levels; its first right retry replaces a failure."""
    wanted = 0

    def score(problem, text):
        right = text[:1].isalpha()  # as about a third of what it says
        return Outcome(float(right), right)

    groups = Scaffold(ladder_of(WORLD, whose="none"), Constant(1.0), replace="first")(
        roles(), PROBLEMS, 2, score, CLOCK, KEYS
    )
    for group, before in zip(groups, sample(roles(), PROBLEMS, 2, score, CLOCK, KEYS), strict=True):
        members, left = list(before.members), []
        levels = ladder_of(WORLD)(group.problem).problems if before.failed else ()
        for level in levels:
            again = replace(group.problem, id=level.id)  # the plain prompt, on a stream of its own
            ((retry,),) = answers(roles(), [again], 1, 1, score, KEYS.at("hints"))
            if retry.correct:
                left.append(members[0])
                members[0] = retry
                wanted += 1
                break
            left.append(retry)
        assert said(group.members) == said(members)
        assert sorted(said(group.discarded)) == sorted(said(left))
        assert {tuple(t.calls[0].context) for t in (*group.members, *group.discarded)} == {
            tuple(small_lm().tokenizer.prompt(group.problem.prompt))
        }
    assert wanted


def run(method, out, **options):
    shared = {"steps": 4, "problems": 4, "members": 4, "max_tokens": 1, "eval_every": 0, "eval_problems": 4}
    shared |= {"optim": {"lr": 1e-3}, "checkpoint_every": 1, "base": False, "policy": "tiny:width=32,depth=1,heads=2"}
    if "world" not in options:
        shared |= {"world": "chain", "world_options": {**CHAIN, "kinds": KINDS}}
    return train(method, out=out, **{**shared, **options})


def metrics(run):
    with Store(run.folder, read_only=True) as store:
        return {n: (m.step.tolist(), m.value.tolist()) for n, m in store.metrics().items()}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A policy that begins with a digit, so that one token is right about one time in ten."""
    folder = tmp_path_factory.mktemp("start")
    save_policy(small_lm(), folder / "random")
    world = {"world": "chain", "world_options": {**CHAIN, "kinds": KINDS}}
    learn = {"steps": 30, "base": False, "eval_every": 0, "eval_problems": 4, "optim": {"lr": 3e-2}}
    done = train("sft", out=folder / "run", policy=str(folder / "random"), **world, **learn)
    return str(Path(done.folder) / "policy")


def test_exempt_for_the_whole_run_it_is_grpo(tmp_path, start):
    grpo = run("group-rl", tmp_path / "grpo", policy=start)
    exempt = run("scaf-grpo", tmp_path / "exempt", policy=start, exempt=1.0)
    assert same(weights(grpo), weights(exempt))
    assert metrics(grpo) == metrics(exempt)
    assert {**grpo.meter.read(), "seconds": 0} == {**exempt.meter.read(), "seconds": 0}
    helped = run("scaf-grpo", tmp_path / "helped", policy=start, exempt=0.0)
    assert max(metrics(helped)["group/rescued"][1]) > 0
    assert not same(weights(grpo), weights(helped))


# --- it runs, and composes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{"curriculum": "sec"}, {"credit": "dr-grpo", "selector": "mixed", "max_draws": 2}, {"objective": "dapo"}]
)
def test_named_as_a_part_it_runs_with_the_parts_of_others(more, tmp_path, start):
    done = run("group-rl", tmp_path / "run", policy=start, act="scaf-grpo", steps=3, **more)
    said = metrics(done)
    assert said["group/failed"][0] == [1, 2]  # exempt for 15% of 3 steps: the first
    with Store(done.folder, read_only=True) as store:
        found = [store.load(t["id"]) for t in store.trajectories(limit=None)]
    hinted = [t for t in found if "hint" in t.problem.meta]
    assert hinted
    for t in hinted:
        assert f"H{t.problem.meta['hint']}=" in t.problem.prompt


def test_it_runs_on_random_weights_and_on_a_transformers_checkpoint(tmp_path):
    done = run("scaf-grpo", tmp_path / "tiny", steps=2, exempt=0.0)
    assert done.meter["updates"] == 2
    transformers = pytest.importorskip("transformers")
    from etude.policies.foreign import ForeignLM
    from etude.policies.tokenizers import CharTokenizer

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=CharTokenizer().size, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    foreign = ForeignLM(transformers.AutoModelForCausalLM.from_config(config).eval(), CharTokenizer())
    save_policy(foreign, tmp_path / "theirs")
    done = run("scaf-grpo", tmp_path / "run", policy=str(tmp_path / "theirs"), steps=2, exempt=0.0)
    assert done.meter["updates"] == 2
    assert metrics(done)["group/failed"][0] == [0, 1]


def test_hints_from_a_column_of_the_data(tmp_path, start):
    file = tmp_path / "data.jsonl"
    steps = [None, *([["look"], [f"look at {d}"]] for d in range(1, 9))]
    rows = [{"prompt": f"{d}=", "answer": str(d), "steps": steps[d]} for d in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("scaf-grpo", tmp_path / "run", policy=start, world=str(file), column="steps", exempt=0.0, members=2)
    said = metrics(done)
    assert max(said["group/leaks"][1]) > 0  # the second class gives the answer away
    assert set(said["group/level"][1]) == {1.0}
    assert max(said["group/unhinted"][1]) > 0  # the row that has none


def test_a_cut_run_that_waits_for_failures_to_level_off_ends_as_if_it_had_not_been(tmp_path, start):
    options = {"policy": start, "steps": 6, "exempt": None, "window": 6, "fall": 0.9, "members": 2}
    whole = run("scaf-grpo", tmp_path / "whole", **options)
    said = metrics(whole)
    assert said["group/failed"][0] == [3, 4, 5]  # two windows of 6 groups are over after 3 steps of 4
    with pytest.raises(Cut):
        run("scaf-grpo", tmp_path / "cut", reporter=Cutter(2), **options)
    resumed = resume(tmp_path / "cut")
    assert metrics(resumed) == said
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("exempt", [0.1, None])
def test_it_travels_to_actors_with_all_it_needs(exempt):
    strategy = scaffold(WORLD, exempt=exempt, window=2)
    if exempt is None:
        strategy.listener.over = True
    sent = pickle.loads(pickle.dumps(strategy))
    here, there = (s(roles(), PROBLEMS, 2, WORLD.score, CLOCK, KEYS) for s in (strategy, sent))
    assert [calls(g.members) for g in here] == [calls(g.members) for g in there]
    assert [g.tags for g in here] == [g.tags for g in there]
    assert any("rescued" in g.tags for g in here)


# --- what is refused -----------------------------------------------------------------------------


def test_an_exact_draw_under_its_own_prompt_may_feed_a_ratio_and_a_pick_may_not():
    compose(ScafGRPO(), law_raw=True)
    with pytest.raises(UserError, match="temperature 1"):
        compose(ScafGRPO(), law_raw=False)
    with pytest.raises(UserError, match="'best-of-n' selects or bends"):
        compose(GroupRL(act="best-of-n"), law_raw=True)


def test_two_that_give_hints_are_refused_without_an_order():
    other = Plug("acting", "staged-hints", object, owns=frozenset({"hints"}))
    with pytest.raises(UserError, match="'scaf-grpo' and acting 'staged-hints' both own the hints of groups"):
        check([plug("acting", "scaf-grpo"), other], present={"world"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exempt": 1.5}, "exempt is a share of the run, from 0 to 1, or None, not 1.5"),
        ({"search": "upwards"}, "unknown search 'upwards'"),
        ({"replace": "last"}, "unknown replace 'last'"),
        ({"hints": "mine"}, "unknown hints 'mine'"),
        ({"exempt": None, "window": 0}, "window must be at least 1 group"),
        ({"column": "clues"}, "have no column 'clues' to give hints"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        scaffold(WORLD, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"world": "lock", "world_options": {}}, "world 'lock' has no oracle to give hints"),
        ({"act": "sample", "search": "batch"}, "search is an option of acting 'scaf-grpo', which 'sample' has rep"),
        ({"world": "textworld", "world_options": {}}, "has many turns, which only act=sample plays"),
    ],
)
def test_worlds_and_parts_it_does_not_fit_are_refused(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        run("scaf-grpo", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_waiting_by_what_is_heard_does_not_go_with_collecting_ahead(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"ray\.lag is for methods that act and learn by turns"):
        run("scaf-grpo", tmp_path / "run", exempt=None, ray={"actors": 1, "lag": 1})


def test_its_command_line_reaches_the_strategy():
    given = {"exempt": None, "window": 9, "fall": 0.5, "search": "batch", "replace": "first", "hints": "none"}
    made = ScafGRPO(**given).options()
    assert made == {("acting", "scaf-grpo"): {**given, "column": None}}
    built = plug("acting", "scaf-grpo").build(world=WORLD, **made["acting", "scaf-grpo"])
    assert isinstance(built.ready, Levelled)
    assert (built.ready.window, built.ready.fall, built.search, built.replace) == (9, 0.5, "batch", "first")
    assert built.ladder == ladder_of(WORLD, whose="none")
    assert METHOD.config is ScafGRPO
    assert Problem("p", "?") not in PROBLEMS
