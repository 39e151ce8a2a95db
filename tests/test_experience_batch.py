"""Packing, selecting and splitting lose nothing, and weights are set before the batch is split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations import same_array
from etude.experience.batch import Batch, Link, normalise, pack, split
from etude.experience.rows import example, rows
from etude.experience.types import RAW, Law, Problem, Trajectory, given_call

BY = ("token", "sequence", "group", "row", "constant")


@st.composite
def batches(draw) -> Batch:
    """Random rows (some without any weight), groups and overlapping links."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 8))
    made = []
    for i in range(count):
        out = rng.integers(0, 9, rng.integers(1, 6))
        weight = rng.random(len(out)) * (rng.random(len(out)) < 0.7) * (rng.random() < 0.8)
        context = rng.integers(0, 9, rng.integers(1, 4))
        made.append(example(context, out, weight, group=float(rng.integers(0, 3)) * 1e9, item=i, source=f"s{i}"))
    links = draw(st.lists(st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True), max_size=3))
    batch = pack(made, [Link("block", tuple(link)) for link in links])
    return batch.with_actions(x=torch.from_numpy(rng.normal(size=(len(batch.at), 3))))


def plainly(batch: Batch, by: str, constant: float) -> list[float]:
    """The weights by the definitions, written as loops."""
    w = batch.actions["weight"].tolist()
    row, group = batch.row_of.tolist(), [float(g) for g in batch.row["group"]]
    if by == "constant":
        return [x / constant for x in w]
    if by == "row":
        return [x / batch.size for x in w]
    unit = {"token": [0] * len(w), "sequence": row, "group": [group[r] for r in row]}[by]
    totals: dict[float, float] = {}
    for u, x in zip(unit, w, strict=True):
        totals[u] = totals.get(u, 0.0) + x
    present = sum(v > 0 for v in totals.values())
    return [x / totals[u] / present if x else 0.0 for u, x in zip(unit, w, strict=True)]


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(BY), st.floats(0.5, 50))
def test_normalise_writes_the_weights_it_says(batch, by, constant):
    found = normalise(batch, by, constant).actions["weight"]
    assert found.tolist() == pytest.approx(plainly(batch, by, constant), rel=1e-6)


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(BY), st.integers(1, 60))
def test_every_split_gives_the_gradient_of_the_whole(batch, by, budget):
    theta = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(micro: Batch) -> torch.Tensor:
        p = theta.clone().requires_grad_()
        loss = (micro.actions["weight"].double() * torch.sin(micro.actions["x"] @ p) ** 2).sum()
        return torch.autograd.grad(loss, p)[0]

    whole = normalise(batch, by, 7.0)
    parts = sum(gradient(micro) for micro in split(whole, budget))
    assert torch.allclose(parts, gradient(whole), rtol=1e-12, atol=1e-15)
    assert torch.isfinite(parts).all()


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 60))
def test_split_keeps_every_row_once_and_links_whole(batch, budget):
    micros = list(split(batch, budget))
    items = [[int(i) for i in micro.row["item"]] for micro in micros]
    assert sorted(i for part in items for i in part) == list(range(batch.size))
    kept = [tuple(part[r] for r in link.rows) for part, m in zip(items, micros, strict=True) for link in m.links]
    assert sorted(kept) == sorted(link.rows for link in batch.links)
    for micro, part in zip(micros, items, strict=True):
        if len(micro.inputs) > budget:
            reached = {0}
            for _ in part:
                reached |= {r for link in micro.links if reached & set(link.rows) for r in link.rows}
            assert len(reached) == len(part), "only one set of linked rows may exceed the budget"


@settings(max_examples=100, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_select_takes_rows_whole_and_in_order(batch, random):
    keep = random.sample(range(batch.size), random.randint(1, batch.size))
    part = batch.select(keep)
    assert part.row["item"].tolist() == keep
    assert part.row["source"] == tuple(f"s{i}" for i in keep)
    for new, old in enumerate(keep):
        for name, value in part.actions.items():
            if name != "row":
                mine, theirs = value[part.row_of == new], batch.actions[name][batch.row_of == old]
                assert same_array(mine.numpy(), theirs.numpy())
        a, b = int(part.starts[new]), int(batch.starts[old])
        n = int(batch.lengths[old])
        assert part.inputs[a : a + n].tolist() == batch.inputs[b : b + n].tolist()
        assert (part.at[part.row_of == new] - a).tolist() == (batch.at[batch.row_of == old] - b).tolist()
    assert list(part.links) == [
        Link(link.kind, tuple(keep.index(r) for r in link.rows)) for link in batch.links if set(link.rows) <= set(keep)
    ]


def test_pack_shares_laws_and_fills_in_plain_positions():
    warm = Law(temperature=0.5)
    made = [given_call("a", [1], [2, 3]), given_call("a", [1], [2], law=warm, pos=np.array([4, 4], np.int32))]
    batch = pack([r for c in made for r in rows(Trajectory(Problem("p", "?"), (c,)))])
    assert batch.laws == (RAW, warm)
    assert batch.actions["law"].tolist() == [0, 0, 1]
    assert batch.positions is not None
    assert batch.positions.tolist() == [0, 1, 2, 4, 4]
    assert batch.branch is None


def test_per_row_sums_by_row():
    batch = pack([example([1], [2, 3]), example([1], [4])])
    assert batch.per_row(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("by", BY)
def test_no_weight_at_all_gives_zero_and_never_nan(by):
    batch = normalise(pack([example([1], [2, 3], [0, 0], group=0)]), by, 5.0)
    assert batch.actions["weight"].tolist() == [0.0, 0.0]


def test_bad_batches_are_refused():
    row = example([1], [2, 3])
    batch = pack([row, row])
    for message, call in (
        ("at least one row", lambda: pack([])),
        (r"link to rows \(0, 5\) in a batch of 2", lambda: pack([row, row], [Link("pair", (0, 5))])),
        (r"link to rows \(\)", lambda: pack([row], [Link("pair", ())])),
        ("differ in their info", lambda: pack([row, example([1], [2], reward=1.0)])),
        ("3 values for 4 actions", lambda: batch.with_actions(advantage=torch.zeros(3))),
        ("same row twice", lambda: batch.select([0, 0])),
        ("at least 1 token", lambda: list(split(batch, 0))),
        ("known: token", lambda: normalise(batch, "mean")),
        ("constant above 0", lambda: normalise(batch, "constant")),
        ("row column 'group'", lambda: normalise(batch, "group")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
