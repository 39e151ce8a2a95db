import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.learning import checkpoint
from etude.learning.checkpoint import load_state, save_state

REMEDY = "do this"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool)


@st.composite
def tensors(draw):
    shape = draw(st.sampled_from([(), (0,), (3,), (2, 3), (0, 2)]))
    values = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape) * 3
    made = torch.tensor(values).to(draw(st.sampled_from(DTYPES)))
    return made.T if made.ndim == 2 and draw(st.booleans()) else made  # not contiguous


@st.composite
def arrays(draw):
    shape = draw(st.sampled_from([(), (0,), (4,), (2, 3)]))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.int16, np.int32, np.int8, np.uint8, np.bool_]))
    made = np.array(np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape) * 3, dtype)
    return np.asfortranarray(made) if draw(st.booleans()) else made


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    tensors(),
    arrays(),
)
keys = st.one_of(st.integers(-5, 5), st.text(max_size=3), st.tuples(st.integers(0, 3), st.text(max_size=2)))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=8,
)


def raw(t):
    return t.flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@settings(max_examples=40, deadline=None)
@given(trees)
def test_any_state_comes_back_bit_for_bit(tree):
    with tempfile.TemporaryDirectory() as home:
        save_state(Path(home) / "s", tree)
        assert same(load_state(Path(home) / "s", REMEDY), tree)


def test_tensors_that_share_storage_come_back_apart_and_equal(tmp_path):
    whole = torch.arange(6.0)
    save_state(tmp_path / "s", {"a": whole, "b": whole, "view": whole[2:4]})
    back = load_state(tmp_path / "s", REMEDY)
    assert torch.equal(back["a"], whole)
    assert torch.equal(back["view"], whole[2:4])
    back["a"][0] = 9.0
    assert back["b"][0] == 0.0


def test_what_is_not_contiguous_comes_back_equal(tmp_path):
    columns, whole = np.asfortranarray(np.arange(6.0).reshape(2, 3)), torch.arange(6.0).reshape(2, 3)
    save_state(tmp_path / "s", [columns, whole.T, whole[:, ::2]])
    back = load_state(tmp_path / "s", REMEDY)
    assert back[0].tolist() == columns.tolist()
    assert torch.equal(back[1], whole.T)
    assert torch.equal(back[2], whole[:, ::2])


def test_a_saved_state_does_not_follow_what_it_was_made_of(tmp_path):
    weights = torch.zeros(3, requires_grad=True)
    save_state(tmp_path / "s", [weights])
    with torch.no_grad():
        weights += 1
    assert load_state(tmp_path / "s", REMEDY)[0].tolist() == [0.0, 0.0, 0.0]


STATE = {"w": torch.arange(40.0), 3: [np.ones(5, np.int16), "text"], "none": None}


def refused(folder):
    with pytest.raises(UserError) as error:
        load_state(folder, REMEDY)
    said = str(error.value)
    assert "\n" not in said
    assert str(folder) in said
    assert said.endswith(f"; {REMEDY}")


@pytest.mark.parametrize("name", [checkpoint.TREE, checkpoint.TENSORS, checkpoint.MANIFEST])
def test_a_flipped_bit_or_a_cut_in_any_file_is_refused(tmp_path, name):
    folder = tmp_path / "s"
    save_state(folder, STATE)
    file = folder / name
    whole = file.read_bytes()
    dice = np.random.default_rng(0)
    for at in {0, len(whole) - 1, *dice.integers(len(whole), size=60).tolist()}:
        broken = bytearray(whole)
        broken[at] ^= 1 << int(dice.integers(8))
        file.write_bytes(bytes(broken))
        refused(folder)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(folder)
    file.unlink()
    refused(folder)
    file.write_bytes(whole)
    assert same(load_state(folder, REMEDY), STATE)


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nothing")


def test_what_cannot_be_held_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_state(tmp_path / "s", {"a": [{1, 2}]})
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    """Stands for the death of the process: nothing may catch it."""


@pytest.mark.parametrize("moment", ["save_file", "_hash", "_sync"])
def test_a_kill_while_writing_leaves_the_old_state(tmp_path, monkeypatch, moment):
    folder = tmp_path / "s"
    save_state(folder, "old")

    def die(*_):
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(checkpoint, moment, die)
        with pytest.raises(Killed):
            save_state(folder, "new")
    assert load_state(folder, REMEDY) == "old"
    assert (tmp_path / ".s.partial").exists()  # what the kill left ...
    save_state(folder, "newer")
    assert load_state(folder, REMEDY) == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["s"]  # ... does no harm and is cleared away


def test_a_full_disk_is_one_line_and_leaves_the_old_state(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    save_state(folder, "old")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target, name in ((checkpoint, "save_file"), (Path, "write_text"), (os, "fsync")):
        with monkeypatch.context() as m:
            m.setattr(target, name, full)
            with pytest.raises(UserError, match=r"cannot write .*No space left"):
                save_state(folder, "new")
        assert load_state(folder, REMEDY) == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        save_state(tmp_path / "file" / "s", 1)
    home = tmp_path / "locked"
    home.mkdir()
    home.chmod(0o500)
    try:
        if not os.access(home, os.W_OK):  # root may write anywhere
            with pytest.raises(UserError, match="cannot write"):
                save_state(home / "s", 1)
    finally:
        home.chmod(0o700)


def test_nothing_is_pickled(tmp_path):
    save_state(tmp_path / "s", STATE)
    json.loads((tmp_path / "s" / checkpoint.TREE).read_text())
    assert {p.name for p in (tmp_path / "s").iterdir()} == {
        checkpoint.TREE,
        checkpoint.TENSORS,
        checkpoint.MANIFEST,
    }
    for file in (tmp_path / "s").iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))  # pickle, and torch's zip of pickles
    shutil.rmtree(tmp_path / "s")
