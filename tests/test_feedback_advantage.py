import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.curation.examples import pack_groups
from etude.experience.errors import UserError
from etude.experience.plugs import check, plug
from etude.feedback.advantage import Advantage, degenerate
from fake_policy import FakePolicy, call, group

rewards_st = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=8)


def values(credit, *rewards):
    """The advantage of each member, one list a group."""
    groups = [group(r, name=str(i)) for i, r in enumerate(rewards)]
    batch = credit(groups, pack_groups(groups))
    per_member = [batch.actions["advantage"][batch.row_of == b] for b in range(batch.size)]
    assert all((v == v[0]).all() for v in per_member)
    flat = iter(float(v[0]) for v in per_member)
    return [[next(flat) for _ in r] for r in rewards]


def near(got, want, tolerance=1e-6):
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("credit", "rewards", "want"),
    [
        (Advantage(ddof=1), [[1, *[0] * 7]], [[2.474874, *[-0.353553] * 7]]),  # Scaf-GRPO
        (Advantage(ddof=0), [[1, *[0] * 7]], [[2.645751, *[-0.377964] * 7]]),
        (Advantage(eps=1e-4), [[1.5, *[0.5] * 7]], [[2.474174, *[-0.353453] * 7]]),  # GHPO
        (Advantage(eps=1e-4), [[0.5] * 4 + [0.0] * 4], [[0.935064] * 4 + [-0.935064] * 4]),
        (Advantage(ddof=0, eps=0), [[1, 0.1, 0.1, 0.1]], [[1.732051, *[-0.577350] * 3]]),
        (Advantage(ddof=1), [[1, 0.1, 0.1, 0.1]], [[1.5, -0.5, -0.5, -0.5]]),
        (Advantage(ddof=0), [[1, 0, 0, 0], [1, 1, 0, 0]], [[1.732051, *[-0.577350] * 3], [1, 1, -1, -1]]),  # NFT
        (Advantage(scale=None), [[1, 0, 0, 0]], [[0.75, -0.25, -0.25, -0.25]]),
        (Advantage("loo", None), [[1, 1, 0, 0]], [[2 / 3, 2 / 3, -2 / 3, -2 / 3]]),  # Critique-RL
        (Advantage("loo", None), [[1.2, 0.2, -1, -1]], [[1.8, 0.466667, -1.133333, -1.133333]]),
        (Advantage(None, None), [[0.5, 2]], [[0.5, 2]]),
        (
            Advantage(scale="batch-row", ddof=0, eps=0),
            [[1, 0, 0, 0], [1, 1, 1, 0]],
            [[1.732051, *[-0.577350] * 3], [*[0.577350] * 3, -1.732051]],
        ),  # DLER
        (
            Advantage(scale="batch-row", ddof=0, eps=0),
            [[1, *[0] * 15], [1] * 8 + [0] * 8],
            [[2.386672, *[-0.159111] * 15], [1.272892] * 8 + [-1.272892] * 8],
        ),
    ],
)
def test_published_numbers(credit, rewards, want):
    near(values(credit, *rewards), want, 2e-5)


@pytest.mark.parametrize("k", range(9))
def test_mean_absolute_advantage_of_a_binary_group(k):
    a = values(Advantage(ddof=0, eps=0), [1] * k + [0] * (8 - k))
    assert np.mean(np.abs(a)) == pytest.approx(2 * np.sqrt(k / 8 * (1 - k / 8)), abs=1e-6)


@pytest.mark.parametrize("center", ["mean", "loo"])
@pytest.mark.parametrize("scale", ["std", "batch-row", "batch-token", None])
def test_degenerate_groups_are_exactly_zero_and_leave_the_statistics_alone(center, scale):
    credit = Advantage(center, scale)
    alone = values(credit, [1, 0, 0, 0])
    among = values(credit, [1, 1, 1], [1, 0, 0, 0], [0.3], [0.0] * 5)
    assert among[0] == [0.0] * 3
    assert among[2:] == [[0.0], [0.0] * 5]
    assert among[1] == alone[0]
    assert values(credit, [2, 2], [1]) == [[0.0, 0.0], [0.0]]
    assert [degenerate(group(r)) for r in ([1, 1], [1, 0], [3])] == [True, False, True]


@settings(max_examples=30, deadline=None)
@given(st.lists(rewards_st, min_size=1, max_size=4), st.floats(0.5, 20), st.integers(-5, 5))
def test_invariances(groups, scale, shift):
    sample = [g for g in groups if len(set(g)) > 1] or [[0.0, 1.0]]
    exact = {"eps": 0.0}
    for credit in (Advantage(**exact), Advantage(scale="batch-row", **exact), Advantage(scale="batch-token", **exact)):
        near(values(credit, *[[scale * r for r in g] for g in sample]), values(credit, *sample), 1e-4)
        near(values(credit, *[[r + shift * i for r in g] for i, g in enumerate(sample)]), values(credit, *sample), 1e-4)
    mean, loo = values(Advantage(scale=None), *sample), values(Advantage("loo", None), *sample)
    near(loo, [[a * len(g) / (len(g) - 1) for a in g] for g in mean], 1e-5)
    assert all(abs(sum(g)) < 1e-5 for g in mean)


def test_a_trajectory_of_several_rows_counts_once():
    policy = FakePolicy()
    windows = [call(policy, [1, 2], [3, 4]), call(policy, [9, 9], [5, 6, 7])]  # the context slid: two rows
    one = [call(policy, [1, 2], [3])]
    g = group([1, 0, 0], [windows, one, one])
    batch = Advantage(ddof=0, eps=0)([g], pack_groups([g]))
    assert batch.size == 4
    torch.testing.assert_close(batch.actions["advantage"], torch.tensor([2**0.5] * 5 + [-(0.5**0.5)] * 2))
    rowwise = Advantage(scale="batch-row", ddof=0, eps=0)([g], pack_groups([g]))
    torch.testing.assert_close(rowwise.actions["advantage"], batch.actions["advantage"])


def test_token_whitening_is_over_weighted_actions():
    policy = FakePolicy()
    masked = call(policy, [1], [2, 3, 4], weight=np.array([1, 0, 1], np.float32))
    g = group([1, 0], [[masked], [call(policy, [1], [5] * 6)]])
    batch = Advantage(scale="batch-token", eps=0)([g], pack_groups([g]))
    inside = batch.actions["advantage"][batch.actions["weight"] > 0].double()
    assert len(inside) == 8
    assert float(inside.mean()) == pytest.approx(0, abs=1e-6)
    assert float(inside.std()) == pytest.approx(1, abs=1e-6)


def test_bad_input():
    g = group([1, float("nan")])
    with pytest.raises(UserError, match="problem p: rewards must be finite"):
        Advantage()([g], pack_groups([g]))
    with pytest.raises(UserError, match="scale must be"):
        Advantage(scale="token")
    batch = pack_groups([group([1, 0])])
    del batch.row["trajectory"]
    with pytest.raises(ValueError, match="trajectory"):
        Advantage()([group([1, 0])], batch)


def test_two_owners_of_the_advantage_are_refused():
    with pytest.raises(UserError, match="both own the advantage"):
        check([plug("credit", "grpo"), plug("credit", "rloo")], present={"group"})
    with pytest.raises(UserError, match="needs group"):
        check([plug("credit", "grpo")])
    assert plug("credit", "batch-token").build().scale == "batch-token"
