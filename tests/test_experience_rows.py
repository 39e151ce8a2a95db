"""Action-exact: what was chosen, where, by whom, under which law survives from sampling to the loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations import calls, trajectories
from etude.experience.batch import Batch, pack, split
from etude.experience.rows import example, rows
from etude.experience.types import Author, Call, Problem, Trajectory, given_call

PROBLEM = Problem("p", "?")


@st.composite
def families(draw) -> list[Trajectory]:
    """Trajectories of which some are forks of earlier ones."""
    made: list[Trajectory] = []
    for i in range(draw(st.integers(1, 4))):
        made.append(draw(trajectories(PROBLEM, draw(st.sampled_from([None, *made])), i)))
    return made


def expected(family: list[Trajectory], agent: str | None) -> set[tuple[int, int, int]]:
    return {
        (t, k, j)
        for t, trajectory in enumerate(family)
        for k, call in enumerate(trajectory.calls)
        if agent in (None, call.agent)
        for j in range(len(call.out))
        if call.author[j] == Author.SELF or call.weights[j] > 0
    }


def check(micro: Batch, family: list[Trajectory]) -> list[tuple[int, int, int]]:
    """Checks every action of a micro-batch against the call it came from; returns their identities."""
    seen = []
    starts, lengths = micro.starts.tolist(), micro.lengths.tolist()
    which = [int(v) for v in micro.row["trajectory"]]
    a = {name: column.numpy() for name, column in micro.actions.items()}
    for i, at in enumerate(micro.at.tolist()):
        row = int(a["row"][i])
        start = starts[row]
        k, j = int(a["call"][i]), int(a["token"][i])
        history = family[which[row]].calls
        call: Call = history[k]
        assert start <= at < start + lengths[row]
        end = at + 1  # the action is decided after the input at `at`
        context = np.concatenate([call.context, call.out[:j]])
        assert micro.inputs[start:end].tolist() == context.tolist()
        position = np.arange(len(context)) if call.pos is None else call.pos[: len(context)]
        branch = np.zeros(len(context)) if call.branch is None else call.branch[: len(context)]
        found = np.arange(len(context)) if micro.positions is None else micro.positions[start:end].numpy()
        assert found.tolist() == position.tolist()
        found = np.zeros(len(context)) if micro.branch is None else micro.branch[start:end].numpy()
        assert found.tolist() == branch.tolist()
        assert a["target"][i] == call.out[j]
        assert a["author"][i] == call.author[j]
        assert a["logp_raw"][i].tobytes() == call.logp_raw[j].tobytes()
        assert a["logp_sampled"][i].tobytes() == call.logp_sampled[j].tobytes()
        assert a["weight"][i] == call.weights[j]
        assert micro.laws[a["law"][i]] == call.law
        assert a["turn"][i] == sum(c.agent == call.agent for c in history[:k])
        seen.append((which[row], k, j))
    return seen


@settings(max_examples=90, deadline=None)
@given(families(), st.sampled_from((None, "actor", "critic")), st.integers(1, 80))
def test_every_action_keeps_its_identity_context_law_and_log_probabilities(family, agent, budget):
    packed = [r for i, t in enumerate(family) for r in rows(t, agent, trajectory=i)]
    actions = expected(family, agent)
    if not actions:
        assert packed == []
        return
    seen = [identity for micro in split(pack(packed), budget) for identity in check(micro, family)]
    assert len(seen) == len(actions), "an action is lost or held twice"
    assert set(seen) == actions


@settings(max_examples=100, deadline=None)
@given(calls())
def test_a_conversation_that_only_grows_is_one_row(made):
    """Where each context is the last context and output, all calls merge, whoever speaks."""
    grown, before = [], np.array([1], np.int32)
    for call in made:
        grown.append(Call(call.agent, before, call.out, call.author, call.logp_raw, call.logp_sampled, call.law))
        before = np.concatenate([before, call.out])
    found = rows(Trajectory(PROBLEM, tuple(grown)))
    if any((c.author == Author.SELF).any() for c in grown):
        (row,) = found
        assert row.ids.tolist() == before.tolist()
    else:
        assert found == []


def test_a_moved_window_begins_a_new_row():
    first = given_call("actor", [1, 2, 3], [4, 5])
    slid = given_call("actor", [2, 3, 4, 5, 6], [7])
    found = rows(Trajectory(PROBLEM, (first, slid)))
    assert [r.ids.tolist() for r in found] == [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7]]
    assert [r.columns["turn"].tolist() for r in found] == [[0, 0], [1]]


def test_calls_at_other_positions_do_not_merge():
    """The text goes on, but the second call saw it at other positions: merging would move the first."""
    first = given_call("actor", [1], [2])
    moved = given_call("actor", [1, 2], [3], pos=np.array([0, 7, 8], np.int32))
    assert len(rows(Trajectory(PROBLEM, (first, moved)))) == 2
    plain = given_call("actor", [1, 2], [3], pos=np.arange(3, dtype=np.int32))
    assert len(rows(Trajectory(PROBLEM, (first, plain)))) == 1


def test_an_action_needs_a_token_before_it():
    with pytest.raises(ValueError, match="empty context"):
        rows(Trajectory(PROBLEM, (given_call("actor", [], [1, 2]),)))


def test_call_refuses_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match="differ in length"):
        given_call("actor", [1], [2, 3], weight=np.ones(1, np.float32))
    with pytest.raises(ValueError, match="2 positions or branches for context and output of 3"):
        given_call("actor", [1], [2, 3], pos=np.zeros(2, np.int32))


def test_example_learns_all_of_out():
    row = example([1, 2], [3, 4], [1.0, 0.5], reward=2.0)
    assert row.ids[row.at + 1].tolist() == row.columns["target"].tolist() == [3, 4]
    assert row.columns["weight"].tolist() == [1.0, 0.5]
    assert row.info == {"reward": 2.0}
    without = example([], [3, 4, 5])
    assert without.columns["target"].tolist() == [4, 5]
    assert without.columns["token"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="at least one token"):
        example([], [3])
    with pytest.raises(ValueError, match="1 weights for 2 tokens"):
        example([1], [2, 3], [1.0])
