from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.curation.examples import pack_groups
from etude.experience.errors import UserError
from etude.experience.types import Author, Group, Outcome, Problem, Trajectory
from etude.feedback.place import per_call, place, redistributed, terminal
from fake_policy import FakePolicy, call, group

POLICY = FakePolicy()


def trajectory(calls, reward=1.0, rewards=None, name="p"):
    return Trajectory(Problem(name, "?"), tuple(calls), outcome=Outcome(reward, per_call=rewards))


def authored(out, authors, agent="actor"):
    c = call(POLICY, [1, 2], out, agent)
    return type(c)(agent, c.context, c.out, np.array(authors, np.int8), c.logp_raw, c.logp_sampled)


def test_terminal_is_on_the_last_own_token():
    t = trajectory([authored([3, 4], [0, 0]), authored([5, 6, 7], [Author.SELF, Author.SELF, Author.INJECTED])], 2.5)
    assert terminal(t, t.outcome).tolist() == [0, 0, 0, 2.5, 0]
    two = trajectory([authored([3, 4], [0, 0]), authored([5], [0], "critic")], 2.0)
    assert terminal(two, two.outcome, "actor").tolist() == [0, 2, 0]
    assert terminal(two, two.outcome).tolist() == [0, 0, 2]
    assert terminal(two, two.outcome, "nobody").tolist() == [0, 0, 0]


def test_per_call_and_who_cannot_carry_a_reward():
    t = trajectory([authored([3], [0], "user"), authored([4, 5], [0, 0]), authored([6], [0], "user")], 0.0, (1, 2, 4))
    assert per_call(t, t.outcome).tolist() == [1, 0, 2, 4]
    assert per_call(t, t.outcome, "actor").tolist() == [0, 1, 6, 0]  # the first waits, the last looks back
    with pytest.raises(UserError, match="3 calls need as many rewards"):
        per_call(t, Outcome(1.0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(-5, 5), st.data())
def test_redistribution_keeps_the_return_and_differences(lengths, reward, data):
    shares = data.draw(st.lists(st.floats(-3, 3), min_size=len(lengths), max_size=len(lengths)))
    t = trajectory([call(POLICY, [1], [2] * n) for n in lengths], reward)
    placed = redistributed(lambda _: shares)(t, t.outcome)
    ends = np.cumsum(lengths) - 1
    assert placed.sum() == pytest.approx(reward, abs=1e-4)
    assert np.count_nonzero(np.delete(placed, ends)) == 0
    np.testing.assert_allclose(np.diff(placed[ends]), np.diff(shares), atol=1e-4)


def test_places_add_up_and_reach_the_right_actions():
    sliding = [call(POLICY, [1, 2], [3, 4]), call(POLICY, [9], [5, 6, 7])]
    growing = [call(POLICY, [1], [2, 3]), call(POLICY, [1, 2, 3, 4], [5])]
    members = (trajectory(sliding, 1.0, (0.25, 0.5)), trajectory(growing, 3.0, (-1.0, 0.0)))
    groups = [Group(members[0].problem, members)]
    batch = place(groups, pack_groups(groups), terminal, per_call)
    assert batch.size == 3  # the first fills two rows
    assert batch.actions["reward"].tolist() == [0, 0.25, 0, 0, 1.5, 0, -1, 3]
    shuffled = place(groups, pack_groups(groups).select([2, 0, 1]), partial(terminal, agent="actor"))
    assert shuffled.actions["reward"].tolist() == [0, 0, 3, 0, 0, 0, 0, 1]


def test_a_place_of_another_length_is_refused():
    g = group([1.0])
    with pytest.raises(ValueError, match="rewards for"):
        place([g], pack_groups([g]), lambda t, o: torch.zeros(7))
    bare = Group(g.problem, (Trajectory(g.problem, g.members[0].calls),))
    with pytest.raises(ValueError, match="no outcome"):
        place([bare], pack_groups([g]), terminal)
