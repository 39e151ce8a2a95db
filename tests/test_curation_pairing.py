"""Preference pairs: margins, floors, identical sides, and the decaying share of older pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.curation.examples import pairs as pair_rows
from etude.curation.pairing import (
    differing,
    linked,
    of_links,
    pairs,
    repetitive,
    same_tokens,
    unlike,
    with_info,
    with_older,
)
from etude.experience.batch import pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.rows import example

inf = float("inf")


def test_the_widest_pairs_come_first():
    assert pairs("abc", [0.9, 0.5, 0.1], 0.4) == ([(0, 2), (0, 1), (1, 2)], 0)
    assert pairs("abc", [0.9, 0.5, 0.1], 0.4, most=1) == ([(0, 2)], 0)
    assert pairs("abc", [0.9, 0.5, 0.1], 0.5) == ([(0, 2)], 0)
    assert pairs("abc", [0.9, 0.5, 0.1], 0.4, floor=0.6) == ([(0, 2), (0, 1)], 0)


def test_a_margin_may_depend_on_whose_answer_is_the_better():
    """A teacher's answer (index 0) must win by 2, a student's by 1; a margin without end admits nothing."""
    value = [6, 5, 4]
    assert pairs("tab", value, lambda i, j: 2 if i == 0 else 1) == ([(0, 2), (1, 2)], 0)
    assert pairs("tab", value, lambda i, j: 1 if i == 0 else inf) == ([(0, 2), (0, 1)], 0)
    assert pairs("tab", value, inf) == ([], 0)


def test_no_pair_is_forced():
    assert pairs("ab", [0.5, 0.5], 0.0) == ([], 0)  # equal values are no preference
    assert pairs("ab", [0.55, 0.1], 0.2, floor=0.6) == ([], 0)
    assert pairs("a", [1.0], 0.0) == ([], 0)
    assert pairs("", [], 0.0) == ([], 0)


def test_identical_sides_are_dropped_and_counted():
    assert pairs(["x", "x", "y"], [0.9, 0.5, 0.4], 0.1) == ([(0, 2), (1, 2)], 1)
    assert pairs(["x", "x"], [0.9, 0.1], 0.1) == ([], 1)
    assert pairs(["x", "X", "y"], [0.9, 0.5, 0.4], 0.1, same=lambda a, b: a.lower() == b.lower())[1] == 1
    assert differing([(1, 1), (1, 2), (2, 2), (3, 1)], lambda a, b: a == b, most=1) == ([(1, 2)], 2)


def test_rows_of_the_same_tokens_are_the_same():
    one, other = example([1, 2], [3, 4]), example([1, 2], [3, 5])
    assert same_tokens(one, example([1, 2], [3, 4]))
    assert not same_tokens(one, other)
    assert not same_tokens(one, example([1], [2, 3, 4]))  # as much text, more of it learnt


@pytest.mark.parametrize("value", [[0.1], [0.1, float("nan")]])
def test_values_that_cannot_be(value):
    with pytest.raises(ValueError, match="2 items need as many values"):
        pairs("ab", value, 0.1)


@given(st.lists(st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), max_size=7), st.sampled_from([0.2, 0.4, 0.6]))
def test_every_pair_that_keeps_its_margin_is_there_and_no_other(value, margin):
    items = [i % 3 for i in range(len(value))]
    found, identical = pairs(items, value, margin, floor=0.6)
    wanted = {
        (i, j)
        for i in range(len(value))
        for j in range(len(value))
        if value[i] > 0.59 and value[i] - value[j] > margin - 0.01
    }
    same = {(i, j) for i, j in wanted if items[i] == items[j]}
    assert set(found) == wanted - same
    assert identical == len(same)
    gaps = [round(value[i] - value[j], 9) for i, j in found]
    assert gaps == sorted(gaps, reverse=True)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.integers(1, 4), st.integers(0, 9))
def test_unlike_items_are_paired_once_each(items, most, seed):
    found, copies = unlike(items, most, Keys(seed))
    kinds = len(set(items))
    assert copies == len(items) - kinds
    assert len(found) == min(most, kinds * (kinds - 1) // 2)
    sides = {frozenset((items[i], items[j])) for i, j in found}
    assert len(sides) == len(found)
    assert all(len(s) == 2 for s in sides)


def test_picked_pairs_are_linked_with_their_values_and_counted():
    rows = [[example([1], [10 * p + i], reward=9.0) for i in range(3)] for p in range(3)]
    values = [np.array([0.9, 0.5, 0.1])] * 3
    data, counts = linked(rows, values, [([(0, 2), (0, 1)], 1), ([], 2), ([(1, 2)], 0)])
    assert counts == {"pairs": 3.0, "identical": 3.0, "skipped": 1.0}
    batch = pack(data.rows, data.links)
    assert batch.actions["target"].tolist() == [0, 2, 0, 1, 21, 22]
    assert batch.row["value"].tolist() == pytest.approx([0.9, 0.1, 0.9, 0.5, 0.5, 0.1])
    assert [link.roles for link in data.links] == [("chosen", "rejected")] * 3
    assert linked(rows, values, [([], 0)] * 3) == (None, {"pairs": 0.0, "identical": 0.0, "skipped": 3.0})


def test_an_answer_is_repetitive_where_most_of_its_4_grams_came_before():
    def said(text):
        return repetitive(example([1, 2], [ord(c) for c in text]))

    assert said("ab" * 8)
    assert not said("abcdefghijklmnop")
    assert not said("aaaa")  # short
    assert not said("a" * 15)
    assert said("a" * 16)
    assert not said("abcdefgh" * 2)  # 5 of 13 4-grams came before
    assert said("abcdefgh" * 3)  # 13 of 21


# --- replay --------------------------------------------------------------------------------------


def round_of(name, count):
    """`count` pairs whose tokens tell them and their round apart."""
    good = [example([1, name], [10 + i, 3], of=float(name)) for i in range(count)]
    return pair_rows(good, [example([1, name], [10 + i, 4], of=float(name)) for i in range(count)])


def test_older_pairs_have_30_and_15_percent_of_a_round():
    mixed = with_older(round_of(5, 55), [round_of(6, 100), round_of(7, 100)], 0.3, Keys(0))
    of = [mixed.rows[link.rows[0]].info["of"] for link in mixed.links]
    assert [of.count(n) for n in (5.0, 6.0, 7.0)] == [55, 30, 15]
    one = with_older(round_of(5, 70), [round_of(6, 100)], 0.3, Keys(0))
    assert len(one.links) == 100
    few = with_older(round_of(5, 70), [round_of(6, 4)], 0.3, Keys(0))
    assert len(few.links) == 74  # no older pair twice
    batch = pack(mixed.rows, mixed.links)
    assert all(link.roles == ("chosen", "rejected") for link in batch.links)
    tokens = batch.actions["target"].view(-1, 2)
    for link in batch.links:  # the two sides of a pair are still each other's
        assert tokens[link.rows[0], 0] == tokens[link.rows[1], 0]
        assert (tokens[link.rows[0], 1], tokens[link.rows[1], 1]) == (3, 4)
    assert len({tuple(tokens[link.rows[0]].tolist()) for link in mixed_of(mixed, 6.0).links}) == 30


def mixed_of(data, name):
    return of_links(data, [link for link in data.links if data.rows[link.rows[0]].info["of"] == name])


def test_replay_depends_on_the_keys_alone_and_may_be_off():
    new, old = round_of(5, 20), round_of(6, 20)
    drawn = [[r.ids.tolist() for r in with_older(new, [old], 0.3, Keys(k)).rows] for k in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(with_older(new, [old], 0.0, Keys(0)).rows) == len(with_older(new, [], 0.3, Keys(0)).rows) == 40
    for share in (0.5, -0.1):
        with pytest.raises(UserError, match="must lie in"):
            with_older(new, [old], share, Keys(0))


def test_columns_are_added_row_by_row():
    data = with_info(round_of(5, 2), {"value": [0.1, 0.2, 0.3, 0.4]})
    assert pack(data.rows, data.links).row["value"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert np.unique(pack(data.rows).row["of"].numpy()).tolist() == [5.0]
