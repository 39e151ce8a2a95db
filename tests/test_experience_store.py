"""The store: exact round trips, all or nothing, one writer, and errors in one line."""

import errno
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversations import groups, same_array
from etude.experience import shards as shards_module
from etude.experience.errors import UserError
from etude.experience.store import Measured, Store
from etude.experience.types import Group, Outcome, Problem, Trajectory, given_call

ARRAYS = ("context", "out", "author", "logp_raw", "logp_sampled", "weight", "pos", "branch")


def assert_same(a: Trajectory, b: Trajectory) -> None:
    assert (a.problem.prompt, a.problem, a.steps, a.member, a.text, dict(a.tags)) == (
        b.problem.prompt, b.problem, b.steps, b.member, b.text, dict(b.tags),
    )  # fmt: skip
    assert (a.outcome is None) == (b.outcome is None)
    if a.outcome is not None and b.outcome is not None:
        assert a.outcome.reward == pytest.approx(b.outcome.reward, rel=0, abs=0, nan_ok=True)
        assert replace(a.outcome, reward=0) == replace(b.outcome, reward=0)
    assert len(a.calls) == len(b.calls)
    for x, y in zip(a.calls, b.calls, strict=True):
        assert (x.agent, x.law, x.stop, dict(x.tags)) == (y.agent, y.law, y.stop, dict(y.tags))
        for name in ARRAYS:
            assert same_array(getattr(x, name), getattr(y, name)), name
    assert (a.parent is None) == (b.parent is None)
    if a.parent is not None and b.parent is not None:
        assert a.parent[1:] == b.parent[1:]
        assert_same(a.parent[0], b.parent[0])


def group(n: int = 2, reward: float = 1.0, category: str = "short", size: int = 4) -> Group:
    problem = Problem(f"{category}/0", "1+1=", "2", category)
    context = np.arange(size, 2 * size, dtype=np.int32)
    members = tuple(
        Trajectory(problem, (given_call("actor", context, [i, 9]),), outcome=Outcome(reward * i, i == 1), member=i,
                   text=f"answer {i}")
        for i in range(n)
    )  # fmt: skip
    return Group(problem, members)


def write(store: Store, first: int, last: int) -> None:
    for step in range(first, last):
        store.commit(
            "main",
            step,
            seconds=1.0,
            meter={"sampled": 10.0 * step},
            metrics={"loss": 1 / (1 + step), "nan": math.nan},
            groups=[(group(3, step), True), (group(2, step, "long"), False)],
        )


def dump(folder: Path) -> tuple[list[str], dict[str, bytes]]:
    """Everything that is kept, but for times."""
    db = sqlite3.connect(folder / "store.sqlite")
    db.execute("PRAGMA query_only = 1")
    lines = [line for line in db.iterdump() if not line.startswith('INSERT INTO "events"')]
    db.close()
    return lines, {p.name: p.read_bytes() for p in sorted((folder / "shards").iterdir())}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(groups(), st.booleans()), min_size=1, max_size=3))
def test_trajectories_come_back_bit_for_bit(written):
    with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
        store.commit("main", 0, groups=written)
        rows = store.trajectories(limit=None)
        trajectories = [(t, "member", kept) for g, kept in written for t in g.members]
        trajectories += [(t, "discarded", False) for g, _ in written for t in g.discarded]
        found = [r for r in rows if r["role"] != "parent"]
        assert len(found) == len(trajectories)
        for g, (one, kept) in enumerate(written):
            ours = [r for r in found if r["grp"] == g]
            expected = [*((t, "member", kept) for t in one.members), *((t, "discarded", False) for t in one.discarded)]
            for row, (t, role, is_kept) in zip(ours, expected, strict=True):
                assert (row["role"], row["kept"]) == (role, is_kept)
                assert (row["text"], row["tokens"], row["category"]) == (t.text, t.tokens(), t.problem.category)
                assert_same(store.load(row["id"]), t)


def test_contexts_of_a_group_are_stored_once_and_conversations_in_linear_room(tmp_path):
    with Store(tmp_path) as store:
        store.commit("main", 0, groups=[(group(8, size=1000), True)])
        assert (tmp_path / "shards/000001.bin").stat().st_size < 4 * 1000 + 8 * 64
        calls, context = [], np.arange(10, dtype=np.int32)
        for _ in range(50):
            calls.append(given_call("actor", context, np.arange(100)))
            context = np.concatenate([context, calls[-1].out])
        long = Trajectory(Problem("p", "?"), tuple(calls))
        before = (tmp_path / "shards/000001.bin").stat().st_size
        store.commit("main", 1, groups=[(Group(long.problem, (long,)), True)])
        assert (tmp_path / "shards/000001.bin").stat().st_size - before < 50 * 100 * 13 + 50 * 16
        assert_same(store.load(store.trajectories(step=1)[0]["id"]), long)


def test_a_view_of_the_shard_is_read_only(tmp_path):
    with Store(tmp_path) as store:
        store.commit("main", 0, groups=[(group(), True)])
        with pytest.raises(ValueError, match="read-only"):
            store.load(1).calls[0].out[0] = 3


def test_queries(tmp_path):
    with Store(tmp_path) as store:
        write(store, 0, 4)
        store.put("seed", {"a": [1, 2]})
        loss = store.metrics("loss")["loss"]
        assert loss.step.tolist() == [0, 1, 2, 3]
        assert loss.value.tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
        assert loss.stage.tolist() == ["main"] * 4
        assert set(store.metrics()) == {"loss", "nan"}
        assert np.isnan(store.metrics("nan")["nan"].value).all()
        assert store.metrics(stage="other") == {}
        assert [s["meter"]["sampled"] for s in store.steps()] == [0, 10, 20, 30]
        assert store.get("seed") == {"a": [1, 2]}
        assert store.get("none", 5) == 5
        assert store.count() == 20
        assert store.count(category="long", kept=False) == 8
        assert [r["step"] for r in store.trajectories(member=1, category="long", limit=2, offset=1)] == [1, 2]
        assert {r["reward"] for r in store.trajectories(reward=(3, 9))} == {3.0, 4.0, 6.0}
        assert all("2" in r["text"] for r in store.trajectories(contains="2"))
        assert store.count(contains="answer 2") == 4
        assert [r["id"] for r in store.trajectories(after=18)] == [19, 20]
        row = store.trajectories(correct=True)[0]
        assert (row["prompt"], row["answer"], row["parts"], row["correct"]) == ("1+1=", "2", {}, True)
        with pytest.raises(UserError, match="unknown column 'categori': did you mean category"):
            store.trajectories(categori="long")
        with pytest.raises(KeyError, match="no trajectory 99"):
            store.load(99)


class _Evaluation:
    world, split, items = "w", "test", {"p1": 1.0, "p0": 0.25}

    def rows(self):
        yield Measured("w", "test", "accuracy", 0.5, 0.4, 0.6, 100)
        yield Measured("w", "test", "entropy", math.nan, math.nan, math.nan, 0)


def test_evaluations_and_events(tmp_path):
    with Store(tmp_path) as store:
        store.commit("main", 3, evaluations=[_Evaluation()])
        store.event("started", "etude 0.1")
        found = store.evaluations("accuracy")
        assert found == [
            {"stage": "main", "step": 3, "world": "w", "split": "test", "metric": "accuracy", "value": 0.5,
             "low": 0.4, "high": 0.6, "n": 100},
        ]  # fmt: skip
        assert math.isnan(store.evaluations("entropy")[0]["value"])
        assert [(e["kind"], e["text"]) for e in store.events()] == [("started", "etude 0.1")]


# --- all or nothing --------------------------------------------------------------------------------


def test_a_step_is_written_once(tmp_path):
    with Store(tmp_path) as store:
        write(store, 0, 1)
        with pytest.raises(ValueError, match="stage 'main' already has a step 0"):
            write(store, 0, 1)
        store.commit("other", 0)


class _Fails:
    def rows(self):
        yield Measured("w", "test", "accuracy", 0.5, 0.4, 0.6, 100)
        raise RuntimeError("in the middle")


def test_a_step_that_fails_midway_leaves_nothing(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        write(store, 0, 2)
        before = dump(tmp_path)
        with pytest.raises(RuntimeError, match="in the middle"):
            store.commit("main", 2, metrics={"loss": 1}, groups=[(group(), True)], evaluations=[_Fails()])
        assert dump(tmp_path) == before
        # The disk fills up while the arrays are written ...
        whole = os.pwrite

        def partly(fd, data, offset):
            if len(data) > 8:
                return whole(fd, data[:8], offset)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", partly)
        with pytest.raises(UserError, match="the disk is full: free some space, then resume") as error:
            write(store, 2, 3)
        assert "\n" not in str(error.value)
        monkeypatch.undo()
        assert dump(tmp_path) == before
        # ... and while the database is.
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(UserError, match="the disk is full"):
            store.commit("main", 2, metrics={f"m{i}": i for i in range(2000)}, groups=[(group(), True)])
        assert dump(tmp_path) == before
        store._db.execute("PRAGMA max_page_count = 1000000")
        write(store, 2, 4)
    with Store(tmp_path / "whole") as store:
        write(store, 0, 4)
    assert dump(tmp_path / "whole")[1] == dump(tmp_path)[1]
    assert dump(tmp_path / "whole")[0] == dump(tmp_path)[0]


@pytest.mark.parametrize("limit", [shards_module.SHARD_BYTES, 200])
@pytest.mark.parametrize("marked", [0, 3, 5])
def test_a_resumed_store_equals_the_uninterrupted_one(tmp_path, monkeypatch, limit, marked):
    monkeypatch.setattr(shards_module, "SHARD_BYTES", limit)
    with Store(tmp_path / "whole") as store:
        write(store, 0, 7)
    with Store(tmp_path / "cut") as store:
        write(store, 0, marked)
        mark = store.mark() if marked else None
        store.put("note", "kept")
        write(store, marked, 6)
        store.event("warning", "taken back")
    if limit == 200:
        assert len(list((tmp_path / "cut/shards").iterdir())) >= 3
    with Store(tmp_path / "cut") as store:
        store.rewind(mark)
        assert len(store.steps()) == marked
        assert store.events() == []
        assert store.get("note") == "kept"
        store._db.execute("DELETE FROM meta WHERE key = 'user.note'")
        write(store, marked, 7)
    assert dump(tmp_path / "cut") == dump(tmp_path / "whole")


def test_bytes_of_a_step_that_was_not_committed_are_cut_off(tmp_path):
    with Store(tmp_path) as store:
        write(store, 0, 2)
    before = dump(tmp_path)
    with open(tmp_path / "shards/000001.bin", "ab") as file:
        file.write(b"x" * 100)
    (tmp_path / "shards/000002.bin").write_bytes(b"y" * 100)
    Store(tmp_path).close()
    assert dump(tmp_path) == before


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_experience_store import write
from etude.experience.store import Store
store = Store({folder!r})
print("open", flush=True)
step = 0
while True:
    write(store, step, step + 1)
    step += 1
"""


def test_killed_at_any_moment_it_opens_whole_and_its_lock_is_free(tmp_path):
    for i in range(4):
        folder = tmp_path / str(i)
        code = WRITER.format(tests=str(Path(__file__).parent), folder=str(folder))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"is in use by process {process.pid}: wait until it ends") as error:
            Store(folder)
        assert "\n" not in str(error.value)
        time.sleep(0.03 * (i + 1))
        with Store(folder, read_only=True) as reader:  # while it is written
            steps = len(reader.steps())
            assert reader.count() % 5 == 0
            for row in reader.trajectories(limit=5):
                reader.load(row["id"])
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Store(folder) as store:
            done = len(store.steps())
            assert done >= steps
            assert store.count() == 5 * done
            assert store.metrics("loss")["loss"].step.tolist() == list(range(done))
            for row in store.trajectories(limit=None):
                assert store.load(row["id"]).calls[0].out.tolist() == [row["member"], 9]
            write(store, done, done + 1)


def test_a_reader_survives_a_rewind(tmp_path):
    with Store(tmp_path) as store:
        write(store, 0, 1)
        mark = store.mark()
        for step in range(1, 40):
            store.commit("main", step, groups=[(group(4, size=2000), True)])
        with Store(tmp_path, read_only=True) as reader:
            last = reader.load(reader.count())
            store.rewind(mark)
            assert last.calls[0].context.tolist() == list(range(2000, 4000)), "what it holds stays readable"
            assert reader.count() == 5
            store.commit("main", 1, groups=[(group(2, size=7), True)])
            assert reader.load(7).calls[0].context.tolist() == list(range(7, 14)), "it sees the new file"


# --- folders that cannot be used -------------------------------------------------------------------


def refused(match: str, folder: Path, **kwargs) -> None:
    with pytest.raises(UserError, match=match) as error:
        Store(folder, **kwargs)
    assert "\n" not in str(error.value)


def test_unusable_folders_are_refused_in_one_line(tmp_path):
    refused("holds no run", tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("x")
    refused("Not a directory|File exists", tmp_path / "file" / "run")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "store.sqlite").write_bytes(b"no database at all" * 100)
    refused("is no database", damaged)
    refused("is no database", damaged, read_only=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    db = sqlite3.connect(foreign / "store.sqlite")
    db.execute("CREATE TABLE mail(text)")
    db.close()
    untouched = (foreign / "store.sqlite").read_bytes()
    refused("another program's database", foreign)
    assert (foreign / "store.sqlite").read_bytes() == untouched
    newer = tmp_path / "newer"
    Store(newer).close()
    db = sqlite3.connect(newer / "store.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    refused("written by a newer etude .its tables are version 99.: upgrade etude", newer)
    db = sqlite3.connect(newer / "store.sqlite")
    db.execute("PRAGMA user_version = 1")
    db.close()
    refused("written by an older etude .its tables are version 1.: run it anew", newer)


def test_damage_is_said_where_it_is_met(tmp_path):
    with Store(tmp_path) as store:
        write(store, 0, 3)
        mark = store.mark()
        os.truncate(tmp_path / "shards/000001.bin", 20)
        with pytest.raises(UserError, match=r"000001.bin is damaged: it has 20 bytes"):
            store.load(store.count())
        with pytest.raises(UserError, match=r"000001.bin is damaged"):
            write(store, 3, 4)
        with pytest.raises(UserError, match=r"000001.bin is damaged"):
            store.rewind(mark)
        later = {**mark, "rows": {**mark["rows"], "steps": 9}}
        with pytest.raises(UserError, match=r"the store ends before its checkpoint \(steps\)"):
            store.rewind(later)


def as_another_user(work) -> str:
    """What `work` returns in a process that may not write where we may (root may write anywhere)."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(into, work().encode())
        except BaseException as error:
            os.write(into, repr(error).encode())
        os._exit(0)
    os.close(into)
    os.waitpid(child, 0)
    with open(out) as said:
        return said.read()


def test_a_read_only_folder_can_be_read_and_is_refused_for_writing():
    with tempfile.TemporaryDirectory(dir="/tmp") as outer:
        folder = Path(outer) / "run"
        with Store(folder) as store:
            write(store, 0, 1)
        os.chmod(outer, 0o755)
        places = (folder, folder / "shards")
        for path in places:
            os.chmod(path, 0o555)

        def read() -> str:
            with Store(folder, read_only=True) as store:
                return f"{store.count()} {store.load(1).calls[0].out.tolist()}"

        def open_to_write() -> str:
            try:
                Store(folder)
            except UserError as error:
                return str(error)
            return "opened"

        assert as_another_user(read) == "5 [0, 9]"
        assert as_another_user(open_to_write) == f"{folder}: Permission denied"
        for path in places:
            os.chmod(path, 0o755)
