"""Exports appear whole or not at all, and hold what other tools read."""

import builtins
import json
import math
import os

import pytest

from etude.experience.errors import UserError
from etude.experience.export import export_run
from etude.experience.store import Store
from etude.experience.types import Group, Outcome, Problem, Trajectory
from test_experience_store import _Evaluation, group, write

CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1 = ½+?"})


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "run") as store:
        write(store, 0, 3)
        yield store


def test_json_lines_hold_prompts_completions_and_verdicts(store, tmp_path):
    path = tmp_path / "out.jsonl"
    assert export_run(store, path) == 15
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 15
    assert lines[3] == {
        "id": 4, "stage": "main", "step": 0, "grp": 1, "member": 0, "role": "member", "kept": False,
        "problem_id": "long/0", "category": "long", "difficulty": None, "reward": 0.0, "correct": False,
        "parsed": None, "tokens": 2, "parts": {}, "prompt": "1+1=", "answer": "2", "completion": "answer 0",
    }  # fmt: skip
    assert list(tmp_path.glob(".*")) == []


def test_numbers_that_json_does_not_have_become_null(store, tmp_path):
    path = tmp_path / "out.jsonl"
    assert export_run(store, path, "metrics") == 6
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert {"stage": "main", "step": 2, "name": "nan", "value": None} in lines
    assert {"stage": "main", "step": 1, "name": "loss", "value": 0.5} in lines


def test_parquet_holds_the_same_rows(store, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    problem = Problem("chat", CHAT, "½")
    outcome = Outcome(math.nan, None, "½", {"format": 0.5, "length": -1.0})
    store.commit("main", 9, groups=[(Group(problem, (Trajectory(problem, (), outcome=outcome, text="½"),)), True)],
                 evaluations=[_Evaluation()])  # fmt: skip
    for table in ("trajectories", "metrics", "evaluations", "steps"):
        n = export_run(store, tmp_path / "out.parquet", table)
        rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
        export_run(store, tmp_path / "out.jsonl", table)
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert n == len(rows) == len(lines)
        for row, line in zip(rows, lines, strict=True):
            for name in {"parts", "meter"} & set(row):
                row[name] = dict(row[name])
            if isinstance(line.get("prompt"), list):
                line["prompt"] = json.dumps(line["prompt"], ensure_ascii=False)
            assert row == line


def test_parquet_prompts_are_messages_where_the_first_one_is(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    problem = Problem("chat", CHAT)
    with Store(tmp_path / "run") as store:
        chat = Group(problem, (Trajectory(problem, (), text="½"),))
        store.commit("main", 0, groups=[(chat, True), (group(1), True)])
        export_run(store, tmp_path / "out.parquet")
    first, second = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert first["prompt"] == list(CHAT)
    assert (first["reward"], first["correct"]) == (None, None)
    assert second["prompt"] == [{"role": "user", "content": "1+1="}]


def test_many_rows_are_paged(tmp_path, monkeypatch):
    monkeypatch.setattr("etude.experience.export.CHUNK", 4)
    with Store(tmp_path / "run") as store:
        write(store, 0, 5)
        assert export_run(store, tmp_path / "out.jsonl") == 25
    ids = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ids == list(range(1, 26))


def test_what_cannot_be_exported_is_said_in_one_line(store, tmp_path):
    (tmp_path / "file").write_text("x")
    for path, table, message in (
        ("out.csv", "trajectories", r"the name must end in .jsonl or .parquet"),
        ("out.jsonl", "tracks", "unknown table 'tracks': one of trajectories, metrics"),
        ("out.jsonl", "evaluations", "has no evaluations to export"),
        ("file/out.jsonl", "metrics", "cannot write .*: Not a directory"),
        ("none/out.parquet", "metrics", "cannot write .*"),
    ):
        with pytest.raises(UserError, match=message) as error:
            export_run(store, tmp_path / path, table)
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def test_a_failed_export_leaves_the_old_file(store, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device"):
        export_run(store, path)
    assert path.read_text() == "old\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "run"]


def test_parquet_without_pyarrow_says_what_to_install(store, tmp_path, monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"export to Parquet needs the package pyarrow: pip install 'etude\[data\]'"):
        export_run(store, tmp_path / "out.parquet")
