import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.curation.examples import Examples, completion, demonstration, pack_groups, pairs
from etude.experience.batch import Link
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.rows import Row, example
from etude.experience.types import RAW, Author, Call, Group, Law, Outcome, Problem, Trajectory, given_call
from etude.learning.checkpoint import load_state, save_state
from etude.policies.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer()


def row(i, length=3):
    return example([1], list(range(2, 2 + length)), mark=float(i))


def marks(batch):
    return [int(m) for m in batch.row["mark"]]


# --- drawing -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    alone=st.integers(0, 5), linked=st.lists(st.integers(2, 3), max_size=4), size=st.integers(1, 7), seed=st.integers()
)
def test_every_unit_comes_once_an_epoch_with_its_rows_together(alone, linked, size, seed):
    links, at = [], 0
    for n in linked:
        links.append(Link("block", tuple(range(at, at + n)), tuple("abc"[:n])))
        at += n
    if at + alone == 0:
        return
    data = Examples([row(i) for i in range(at + alone)], links)
    units = data.units
    assert sorted(r for unit in units for r in unit) == list(range(at + alone))
    drawn = []
    for step in range(3 * len(units)):  # so many steps of `size` are 3 x size epochs
        batch = data.draw(step, size, Keys(seed))
        rows, in_links = marks(batch), {}
        for link in batch.links:
            for r, role in zip(link.rows, link.roles, strict=True):
                in_links[r] = (link, role)
        at_row = 0
        while at_row < len(rows):
            unit = next(u for u in units if u[0] == rows[at_row])
            here = range(at_row, at_row + len(unit))
            assert tuple(rows[at_row : at_row + len(unit)]) == unit
            if len(unit) > 1:
                assert [in_links[r] for r in here] == [(in_links[at_row][0], "abc"[k]) for k in range(len(unit))]
                assert in_links[at_row][0].rows == tuple(here)
            else:
                assert at_row not in in_links
            drawn.append(unit)
            at_row += len(unit)
    for epoch in range(3 * size):
        assert sorted(drawn[epoch * len(units) : (epoch + 1) * len(units)]) == sorted(units)


def test_a_draw_is_a_function_of_seed_and_step_alone():
    data = Examples([row(i) for i in range(10)])
    later = marks(data.draw(7, 3, Keys(0)))
    for step in range(7):
        data.draw(step, 3, Keys(0))
    assert marks(data.draw(7, 3, Keys(0))) == later
    assert any(marks(data.draw(s, 3, Keys(1))) != marks(data.draw(s, 3, Keys(0))) for s in range(3))
    orders = [marks(data.draw(s, 10, Keys(0))) for s in range(3)]
    assert orders[0] != orders[1] != orders[2]  # every epoch has an order of its own


def test_no_examples_are_refused():
    with pytest.raises(UserError, match="nothing to train on"):
        Examples([])


# --- states --------------------------------------------------------------------------------------


def full_row():
    """A row with everything a row can have."""
    law = Law(0.7, 5, 0.9, 0.01, ("best-of-4", "x"))
    columns = {
        "target": np.array([4, 5], np.int64), "weight": np.array([0.5, 0.0], np.float32),
        "logp_raw": np.array([-1.5, np.nan], np.float32), "logp_sampled": np.array([-1.25, np.nan], np.float32),
        "author": np.array([0, 3], np.int8), "law": np.array([1, 0], np.int16), "call": np.array([0, 1], np.int32),
        "token": np.array([3, 2], np.int32), "turn": np.array([0, 1], np.int32),
    }  # fmt: skip
    ids, at = np.array([1, 2, 4, 5], np.int32), np.array([1, 2], np.int32)
    info = {"reward": 1 / 3, "source": "here"}
    return Row(ids, at, columns, (RAW, law), info, np.array([0, 1, 1, 2], np.int32), np.array([0, 0, 1, 1], np.int32))


def assert_same(a, b):
    assert a.laws == b.laws
    assert dict(a.info) == dict(b.info)
    assert a.columns.keys() == b.columns.keys()
    arrays = [(a.ids, b.ids), (a.at, b.at), (a.pos, b.pos), (a.branch, b.branch)]
    arrays += [(a.columns[n], b.columns[n]) for n in a.columns]
    for x, y in arrays:
        if x is None:
            assert y is None
        else:
            assert x.dtype == y.dtype
            assert x.tobytes() == y.tobytes()


def test_examples_come_back_exactly_through_a_checkpoint(tmp_path):
    data = Examples([full_row(), full_row(), row(1)], [Link("pair", (0, 1), ("chosen", "rejected"))])
    save_state(tmp_path / "s", data.state_dict())
    for state in (data.state_dict(), load_state(tmp_path / "s", "")):
        back = Examples.from_state(state)
        assert list(back.links) == list(data.links)
        for a, b in zip(data.rows, back.rows, strict=True):
            assert_same(a, b)


# --- completions, pairs, groups ------------------------------------------------------------------


def test_a_completion_teaches_the_answer_and_its_end_but_not_the_prompt():
    made = completion(TOKENIZER, "1+2=", "3", 32, source="x")
    prompt, answer = TOKENIZER.prompt("1+2="), TOKENIZER.completion("3")
    assert made.ids.tolist() == [*prompt, *answer]
    assert made.columns["target"].tolist() == answer.tolist()
    assert answer[-1] in TOKENIZER.stops
    assert made.at.tolist() == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
    assert made.columns["weight"].tolist() == [1.0] * len(answer)
    assert made.info == {"source": "x"}


def test_a_completion_that_does_not_fit_is_refused():
    length = len(completion(TOKENIZER, "1+2=", "3", 99))
    assert len(completion(TOKENIZER, "1+2=", "3", length)) == length
    with pytest.raises(UserError, match=f"{length} tokens is longer than the policy's context of {length - 1}: '1"):
        completion(TOKENIZER, "1+2=", "3", length - 1)


def test_pairs_link_each_chosen_row_to_its_rejected_one():
    data = pairs([row(0), row(2)], [row(1), row(3)])
    assert [r.info["mark"] for r in data.rows] == [0.0, 1.0, 2.0, 3.0]
    assert [link.rows for link in data.links] == [(0, 1), (2, 3)]
    assert all(link.kind == "pair" and link.roles == ("chosen", "rejected") for link in data.links)
    with pytest.raises(ValueError, match="zip"):
        pairs([row(0)], [])


def call(context, out, agent="actor"):
    n = len(out)
    logp = -np.arange(1, n + 1, dtype=np.float32)
    own = np.full(n, Author.SELF, np.int8)
    return Call(agent, np.array(context, np.int32), np.array(out, np.int32), own, logp, logp)


def member(index, reward, correct, *calls):
    return Trajectory(Problem("p", "?"), calls, outcome=Outcome(reward, correct), member=index)


def test_groups_are_packed_with_columns_that_name_group_and_trajectory():
    slid = member(1, 0.0, False, call([1, 2], [3]), call([2, 9], [4, 5]))  # a context that slid: two rows
    silent = member(2, 0.25, None, call([1], [6]), call([1, 6, 7], [8], "other"))
    groups = [
        Group(Problem("a", "?"), (member(0, 1.0, True, call([1, 2], [3, 4])), slid)),
        Group(Problem("b", "?"), (silent,)),
    ]
    batch = pack_groups(groups, "actor")
    assert batch.row["group"].tolist() == [0, 0, 0, 1]
    assert batch.row["trajectory"].tolist() == [0, 1, 1, 2]
    assert batch.row["member"].tolist() == [0, 1, 1, 2]
    assert batch.row["reward"].tolist() == [1.0, 0.0, 0.0, 0.25]
    assert batch.row["correct"].tolist()[:3] == [1.0, 0.0, 0.0]
    assert torch.isnan(batch.row["correct"][3])  # the verifier has no word
    assert batch.actions["target"].tolist() == [3, 4, 3, 4, 5, 6]  # not what the other agent said
    assert batch.actions["logp_raw"].tolist() == [-1, -2, -1, -1, -2, -1]
    assert len(pack_groups(groups).at) == 7
    with pytest.raises(ValueError, match="at least one row"):
        pack_groups(groups, "nobody")


def test_a_demonstration_is_what_the_agent_did():
    rows = demonstration(member(0, 0.5, True, call([1, 2], [3, 4])))
    assert len(rows) == 1
    assert rows[0].ids.tolist() == [1, 2, 3, 4]
    assert rows[0].info == {"reward": 0.5}
    given_ = Trajectory(Problem("p", "?"), (given_call("actor", [1], [2]),), outcome=Outcome(1.0))
    assert np.isnan(demonstration(given_)[0].columns["logp_raw"]).all()
