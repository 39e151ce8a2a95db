"""Ladders of hints, where they come from, and the climb to the lowest level that helps; when hints may begin."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acting_fakes import Fake
from etude.acting.agent import PolicyAgent
from etude.acting.hints import ASKS, ColumnTiers, Ladder, TeacherTiers, climb
from etude.curricula.levelled import Levelled
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.parse import shows
from etude.experience.protocols import Clock, Limits, Report
from etude.experience.types import Group, Outcome, Problem, Trajectory
from etude.learning.hinting import ladder_of
from etude.learning.loops import Collected, describe
from etude.policies.tokenizers import CharTokenizer
from etude.worlds.chain import hint
from etude.worlds.data import DataWorld
from etude.worlds.lock import LockWorld
from etude.worlds.registry import load_world

KPS = {letter: [f"{letter}{i}" for i in range(1, 5)] for letter in "KPS"}
PROBLEM = Problem("p", "2+2=", "4", meta={"hints": KPS})
CHAIN = {"notation": "compact", "numbers": (0, 4), "modulus": 50, "scale": 7, "shift": 3, "plus": ""}


def chain(**kinds):
    return load_world("chain", **CHAIN, kinds=kinds or {"short": (3, 4), "long": (7, 7)})


def texts(ladder, problem=PROBLEM):
    return [p.meta["hint"] for p in ladder(problem).problems]


# --- ladders -------------------------------------------------------------------------------------


def test_levels_are_the_first_pieces_of_each_class_in_order():
    """Twelve levels, knowledge before planning before solution; a class begins without the one before."""
    found = texts(Ladder(ColumnTiers("hints"), hint, " "))
    assert found[:4] == ["K1", "K1 K2", "K1 K2 K3", "K1 K2 K3 K4"]
    assert found[4] == "P1"
    assert [t.split()[-1] for t in found] == [piece for pieces in KPS.values() for piece in pieces]
    assert len(found) == 12
    assert not any("K" in t for t in found[4:])


def test_a_level_is_the_same_problem_with_the_hint_in_its_prompt_and_streams_of_its_own():
    levels = Ladder(lambda p: [["6", "9"]], hint, ";")(PROBLEM).problems
    assert [p.prompt for p in levels] == ["2+2H6=", "2+2H6;9="]
    assert len({p.id for p in (PROBLEM, *levels)}) == 3
    assert {p.answer for p in levels} == {"4"}
    chat = Problem("c", ({"role": "user", "content": "two and two?"},), "4")
    (level,) = Ladder(lambda p: [["count"]], hint)(chat).problems
    assert level.prompt[-1]["content"] == "two and two?\n\nHint: count"


def test_empty_pieces_are_skipped_and_no_level_holds_the_answer():
    tiers = [["", " ", "a"], ["b", "so it is 4"], ["14 or -4 or 40"], []]
    levels = Ladder(lambda p: tiers, hint, "|")(PROBLEM)
    assert [p.meta["hint"] for p in levels.problems] == ["a", "b", "14 or -4 or 40"]
    assert levels.leaks == 1
    assert Ladder(lambda p: [["", " "]], hint)(PROBLEM) == ((), 0)
    assert Ladder(lambda p: [], hint)(PROBLEM) == ((), 0)


@given(st.lists(st.lists(st.sampled_from(["", "3", "4", "14", "x 4", "y"]), max_size=4), max_size=3))
def test_no_level_shows_the_answer_whatever_the_pieces(tiers):
    levels = Ladder(lambda p: tiers, hint)(PROBLEM)
    assert not any(shows(p.meta["hint"], "4") for p in levels.problems)
    assert len(levels.problems) + levels.leaks == sum(bool(piece.strip()) for tier in tiers for piece in tier)


@pytest.mark.parametrize(
    ("text", "seen"), [("4", True), ("=4.", True), ("14", False), ("-4", False), ("4x", False), ("", False)]
)
def test_an_answer_is_seen_as_a_word_of_its_own(text, seen):
    assert shows(text, "4") is seen
    assert not shows(text, "")


# --- where hints come from -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("one", (("one",),)),
        (["a", "b"], (("a", "b"),)),
        ([["a"], None, ["b", "c"]], (("a",), ("b", "c"))),
        ({"K": "a", "P": ["b"]}, (("a",), ("b",))),
        (None, ()),
        ([], ()),
    ],
)
def test_hints_from_a_column(value, wanted):
    assert ColumnTiers("h")(Problem("p", "?", meta={"h": value})) == wanted
    assert ColumnTiers("h")(Problem("p", "?", options={"h": value})) == wanted


@pytest.mark.parametrize("value", [3, [1, 2], [["a"], 3], {"K": {"x": "y"}}])
def test_a_column_of_something_else_is_refused(value):
    with pytest.raises(UserError, match="problem row/7: 'h' should hold hints"):
        ColumnTiers("h")(Problem("row/7", "?", meta={"h": value}))


def test_hints_from_a_teacher_come_in_a_reply_a_class():
    asked = []

    class Wise:
        def reply(self, messages, about=None):
            asked.append((messages[-1]["content"], about))
            return "" if "plan" in messages[-1]["content"] else "one\n\n two\nthree\nfour\nfive is 4\n"

    found = TeacherTiers(Wise(), pieces=3)(PROBLEM)
    assert found == (("one\ntwo", "three\nfour", "five is 4"), (), ("one\ntwo", "three\nfour", "five is 4"))
    assert [about for _, about in asked] == [PROBLEM] * 3
    assert all(said.startswith("2+2=") and ask in said for (said, _), ask in zip(asked, ASKS, strict=True))
    assert Ladder(TeacherTiers(Wise(), pieces=3), hint)(PROBLEM).leaks == 2  # its last piece gives the answer away


def test_the_oracles_totals_are_levels_of_the_chain_world():
    world = chain()
    problem = world.problem("train", 0, "long")
    totals = [str(t) for t in problem.meta["totals"]]
    levels = ladder_of(world)(problem).problems
    wanted = [";".join(totals[: j + 1]) for j in range(5) if totals[-1] not in totals[: j + 1]]
    assert [p.meta["hint"] for p in levels] == wanted
    assert levels[0].prompt == f"{problem.prompt[:-1]}H{totals[0]}="
    assert ladder_of(world)(chain(two=(2, 2)).problem("train", 0)).problems == ()  # one step: nothing to give


def test_controls_give_the_hints_of_another_problem_or_none():
    world = chain()
    problem = world.problem("train", 3, "long")
    own, other, none = (ladder_of(world, whose=w)(problem).problems for w in ("own", "other", "none"))
    assert len(other) >= 3
    assert other == ladder_of(world, whose="other")(problem).problems
    assert not {p.meta["hint"] for p in own} & {p.meta["hint"] for p in other}
    assert {p.prompt for p in none} == {problem.prompt}
    assert len({p.id for p in none}) == len(own)  # every try has a stream of its own


def test_one_problem_alone_has_no_other_to_take_hints_from():
    world = DataWorld([{"prompt": "1+1=", "answer": "2", "hints": ["add"]}], test=0.0)
    assert ladder_of(world, "hints", "other")(world.problem("train", 0)).problems == ()


def test_a_ladder_travels_to_other_processes():
    world = chain()
    problem = world.problem("train", 0, "long")
    for whose in ("own", "other", "none"):
        ladder = ladder_of(world, whose=whose)
        assert pickle.loads(pickle.dumps(ladder))(problem) == ladder(problem)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ladder_of(LockWorld()), "world 'lock' has no oracle to give hints: name the column"),
        (lambda: ladder_of(chain(), "clues"), "have no column 'clues' to give hints; they have: marker, show"),
        (lambda: ladder_of(chain(), whose="mine"), "unknown hints 'mine'"),
    ],
)
def test_a_world_without_hints_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


# --- the climb -----------------------------------------------------------------------------------

LEVELS = [Problem(f"p{i}", f"1+{i}=", "4", meta={"level": i}) for i in range(1, 13)]


def right_at(*levels):
    return lambda problem, text: Outcome(float(problem.meta["level"] in levels), problem.meta["level"] in levels)


def roles(meter=None, limit=200):
    return {"actor": PolicyAgent(Fake(CharTokenizer(), limit=limit), limits=Limits(4), meter=meter)}


@pytest.mark.parametrize("at_once", [False, True])
def test_the_lowest_level_that_helps(at_once):
    meter = Meter()
    (found,) = climb(roles(meter), [LEVELS], 1, right_at(3, 7, 9), Keys(0), at_once)
    assert found.level == 2  # counted from 0
    assert found.success.problem == LEVELS[2]
    assert len(found.attempts) == (12 if at_once else 3)
    assert meter["sampled"] == sum(t.tokens() for attempts in found.attempts for t in attempts)


def test_both_ways_find_the_same_answers():
    score, ladders = right_at(2, 5), [LEVELS[:3], LEVELS[3:8], [], LEVELS[8:10]]
    slow, fast = (climb(roles(), ladders, 2, score, Keys(1), way) for way in (False, True))
    assert [c.level for c in slow] == [c.level for c in fast] == [1, 1, None, None]
    assert [len(c.attempts) for c in slow] == [2, 2, 0, 2]
    for a, b in zip(slow[:2], fast[:2], strict=True):
        assert a.success.calls[0].out.tolist() == b.success.calls[0].out.tolist()
        assert len(a.attempts[0]) == 2


def test_no_level_helps_or_there_is_none():
    (failed, nothing) = climb(roles(), [LEVELS, []], 1, right_at(), Keys(0))
    assert (failed.level, failed.success, len(failed.attempts)) == (None, None, 12)
    assert (nothing.level, nothing.success, nothing.attempts) == (None, None, ())


def test_a_level_that_leaves_no_room_to_answer_is_left_out():
    levels = [Problem("long", "1" * 30, meta={"level": 1}), Problem("short", "1", meta={"level": 2})]
    (found,) = climb(roles(limit=20), [levels], 1, right_at(1, 2), Keys(0))
    assert found.success.problem == levels[1]


# --- failed groups, and when hints may begin -----------------------------------------------------


def group(*verdicts, rewards=None, **tags):
    outcomes = [Outcome(r, v) for r, v in zip(rewards or [0.0] * len(verdicts), verdicts, strict=True)]
    return Group(PROBLEM, tuple(Trajectory(PROBLEM, (), outcome=o) for o in outcomes), tags=tags)


def test_a_group_has_failed_by_the_verifiers_word_alone():
    assert group(False, False).failed
    assert group(False, False, rewards=[0.5, 0.2]).failed  # paid for its format
    assert not group(False, True, rewards=[0.0, 0.0]).failed
    assert not group(False, None).failed
    assert not group().failed


def report(share, count):
    failed = round(share * count)
    groups = [group(False, False)] * failed + [group(True, False)] * (count - failed)
    return Report(Clock(0, 1), groups, [True] * count, [0.0] * count)


def test_hints_wait_until_failures_no_longer_fall():
    heard, said = Levelled(window=10, fall=0.1), []
    for share in (0.9, 0.7, 0.5, 0.4, 0.9, 0.1):
        heard.observe(report(share, 10))
        said.append(heard(Clock(0, 1)))
    assert said == [0, 0, 0, 1, 1, 1]  # from 0.5 to 0.4 is a fall of 0.1, no more; then for good


def test_windows_fill_across_steps_and_a_rise_is_no_fall():
    heard = Levelled(window=8, fall=0.0)
    for _ in range(4):
        heard.observe(report(0.5, 3))
    assert not heard(Clock(0, 1))  # 12 groups: one window and a half
    heard.observe(report(1.0, 3))
    heard.observe(report(1.0, 1))
    assert heard(Clock(0, 1))


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_a_resumed_schedule_goes_on_where_it_was(failed, at):
    def hear(schedule, verdicts):
        for f in verdicts:
            schedule.observe(report(float(f), 1))
        return schedule

    whole = hear(Levelled(6, 0.1), failed)
    begun = hear(Levelled(6, 0.1), failed[:at])
    resumed = Levelled(6, 0.1)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert hear(resumed, failed[at:]).state_dict() == whole.state_dict()


def test_what_cannot_be_a_window_is_refused():
    for window, fall in ((0, 0.1), (5, -0.1), (5, 1.0), (5, np.nan)):
        with pytest.raises(UserError, match="window must be at least 1 group"):
            Levelled(window, fall)


def test_what_acting_noted_of_its_groups_is_logged_over_those_that_have_it():
    groups = [group(True, failed=0), group(False, failed=1, level=3), group(False, failed=1, level=4, note="x")]
    said = describe(Collected(groups, [True] * 3))
    assert said["group/failed"] == pytest.approx(2 / 3)
    assert said["group/level"] == 3.5
    assert "group/note" not in said
