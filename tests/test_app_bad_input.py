"""Bad input ends in one clear line, exit code 2 and nothing half-written; a reward at fault does not end a run."""

import errno
import json
import os
import shutil
import signal
import time
from importlib import import_module
from pathlib import Path

import pytest

from app_cli import QUICK, Said, refused, runner, spawn, sums
from etude.experience.shards import Shards
from etude.experience.store import Store


@pytest.fixture
def etude(capfd):
    return runner(capfd)


@pytest.fixture
def data(tmp_path):
    return sums(tmp_path / "sums.jsonl")


def left(folder):
    return sorted(p.name for p in folder.iterdir())


# --- names and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train grop", "unknown method 'grop': did you mean grpo"),
        ("train calm", "planned, not written yet"),
        ("train grpo --world countdwn", "unknown world 'countdwn': did you mean countdown"),
        ("train grpo --policy smolm2", "unknown policy 'smolm2': did you mean smollm2"),
        ("train grpo --policy no/such/folder", "no policy at no/such/folder"),
        ("train grpo --curriculum unifrm", "unknown curriculum 'unifrm': did you mean uniform"),
        ("train grpo --objective grop", "unknown objective 'grop': did you mean grpo"),
        ("train grpo --optim.schedule cosin", "did you mean cosine"),
        ("train grpo --device cud", "unknown device 'cud': did you mean cuda"),
        ("train grpo --steps 0", "steps must be at least 1, not 0"),
        ("train grpo --members -1", "members must be at least 1, not -1"),
        ("train grpo --optim.lr -0.1", "lr must be a number above 0, not -0.1"),
        ("train grpo --optim.lr nan", "lr must be a number above 0, not nan"),
        ("train sft --optim.lr 0", "lr must be a number above 0"),
        ("train grpo --max-tokens 0", "max_tokens must be at least 1"),
        ("train grpo --temperature -1", "temperature must be at least 0"),
        ("train grpo --reward-seconds 0", "reward_seconds must be above 0"),
        ("train grpo --lora.rank -1", "rank"),
        ("train grpo --name ../up", "should be a plain word"),
        ("train grpo --reward nothing", "names no function"),
        ("train grpo --reward no_such_module:f", "cannot be imported"),
        ("train grpo --world-options test", "name=value, not 'test'"),
        ("train grpo --world-options tst=0.5", "did you mean test"),
        ("train grpo --act best-of-n", "selects or bends its samples"),
        ("train sft --data absent.jsonl", "absent.jsonl"),
        ("train grpo --budget words=3", "unknown kind of budget 'words'"),
        ("train grpo --budget tokens=-1", "a budget is a number above 0, as in sampled=1e6, not '-1'"),
        ("train grpo --policy table:order=x", "sizes are given as in table:order=2, not 'order=x'"),
        ("verify grpo", "method 'grpo' has no claim to verify"),
        ("verify calm", "planned, not written yet"),
        ("verify sec --seeds 0,1,0", "seed 0 is named twice in 0,1,0"),
        ("verify sec --seeds one", "seeds are whole numbers parted by commas, as in 0,1,2, not 'one'"),
        ("verify sec --seeds 1000,1", "seed 1000 is one that learning rates are tuned on"),
        ("verify sec --jobs 0", "jobs must be at least 1, not 0"),
        ("eval nowhere", "unknown policy 'nowhere'"),
        ("eval table --problems 0", "problems must be at least 1"),
        ("eval table --temperature -1", "temperature"),
        ("chat nowhere", "unknown policy 'nowhere'"),
        ("resume nowhere", "not a run directory"),
        ("export nowhere log.jsonl", "holds no run"),
        ("export nowhere folder", "unknown policy 'nowhere'"),
        ("export table folder", "is a table"),
    ],
)
def test_names_and_numbers(etude, data, tmp_path, words, line):
    command, first, *rest = words.split()
    more: tuple[object, ...] = ()
    if command == "train":
        given = {w for w in rest if w.startswith("--")}
        base = ["--policy", "table", "--no-base", "--world", str(data), "--out", "run"]
        flags = [base[0:2], base[2:3], base[3:5], base[5:7]]
        more = tuple(w for flag in flags if flag[0] not in given for w in flag)
    said = etude(command, first, *more, *rest)
    assert line in refused(said)
    assert left(tmp_path) == ["sums.jsonl"]


# --- data ----------------------------------------------------------------------------------------


GOOD = b'{"prompt": "a", "answer": "b", "completion": "b"}\n'
LONG = b"".join(GOOD.replace(b': "a"', b': "' + str(i).encode() * 1100 + b'"') for i in range(10, 30))


@pytest.mark.parametrize("how", ["world", "data"])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b'{"prompt": "a"}\n', "line 1: no column"),
        (GOOD + b'{"prompt": oops}\n', "line 2: not JSON: Expecting value at column 12"),
        (GOOD + b"\xff\n", "line 2: not UTF-8"),
        (LONG, " tokens"),
    ],
)
def test_data_files(etude, tmp_path, how, content, line):
    (tmp_path / "bad.jsonl").write_bytes(content)
    if how == "world":
        said = etude("train", "grpo", "--world", "bad.jsonl", "--world-options", "test=0.5", *QUICK, "--out", "run")
    else:
        world = sums(tmp_path / "sums.jsonl")
        said = etude("train", "sft", "--data", "bad.jsonl", "--world", world, "--policy", "tiny", "--out", "run")
    assert line in refused(said)
    assert not (tmp_path / "run").exists()


def test_columns_are_mapped_or_missed(etude, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"question": "1+1=", "reply": "2"}\n')
    sums(tmp_path / "sums.jsonl")
    words = ("train", "sft", "--data", "other.jsonl", "--world", "sums.jsonl", "--policy", "table", "--steps", "1",
             "--optim.warmup", "0", "--eval-problems", "2", "--out", "run")  # fmt: skip
    assert "it has: question, reply" in refused(etude(*words))
    assert etude(*words, "--columns", "prompt=question", "completion=reply").code == 0


# --- rewards -------------------------------------------------------------------------------------

REWARDS = """
import time
def fine(completions, **_): return [1.0 for _ in completions]
def raises(completions, **_): raise RuntimeError("boom")
def hangs(completions, **_): time.sleep(60)
def nan(completions, **_): return [float("nan") for _ in completions]
def count(completions, **_): return [1.0, 1.0, 1.0]
def words(completions, **_): return ["good" for _ in completions]
"""


@pytest.mark.parametrize("name", ["raises", "hangs", "nan", "count", "words"])
def test_a_reward_at_fault_scores_0_is_counted_and_the_run_goes_on(etude, data, tmp_path, caplog, name):
    (tmp_path / "rewards.py").write_text(REWARDS)
    said = etude(
        "train", "grpo", *QUICK, "--world", data, "--reward", f"rewards.py:{name}", "rewards.py:fine",
        "--reward-seconds", 0.05, "--out", "run", "--json",
    )  # fmt: skip
    assert said.code == 0
    assert json.loads(said.out)["run"] == "run"
    assert caplog.text.count(f"reward {name} is at fault") == 1  # a person sees it on stderr
    with Store("run", read_only=True) as store:
        assert store.metrics("part/fault")["part/fault"].value.tolist() == [1.0, 1.0]
        assert store.metrics("reward")["reward"].value.tolist() == [0.0, 0.0]
        assert all(t["reward"] == 0 and t["parts"]["fault"] == 1 for t in store.trajectories())


# --- run directories -----------------------------------------------------------------------------


def test_a_run_directory_that_cannot_be_made(etude, data):
    assert "Not a directory" in refused(etude("train", "grpo", *QUICK, "--world", data, "--out", data / "run"))
    assert "cannot make" in refused(etude("train", "grpo", *QUICK, "--world", data, "--out", "/proc/run"))


def test_a_run_directory_that_cannot_be_written(etude, data, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("etude.experience.store.lock", refuse)
    assert "Permission denied" in refused(etude("train", "grpo", *QUICK, "--world", data, "--out", "run"))
    assert left(tmp_path) == ["sums.jsonl"]


def test_a_run_directory_that_holds_something(etude, data, tmp_path):
    said = etude("train", "grpo", *QUICK, "--world", data, "--out", tmp_path)
    assert "is not empty" in refused(said)
    assert left(tmp_path) == ["sums.jsonl"]


def full(monkeypatch, target, name, after=0):
    """The disk takes `after` more calls, then is full."""
    real, calls = getattr(target, name), iter(range(after))

    def write(*args, **more):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **more)

    monkeypatch.setattr(target, name, write)


def test_a_disk_that_is_full_from_the_start(etude, data, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        full(m, Path, "write_text")
        assert "disk is full" in refused(etude("train", "grpo", *QUICK, "--world", data, "--out", "run"))
    with monkeypatch.context() as m:
        full(m, Shards, "flush")
        assert "disk is full" in refused(etude("train", "grpo", *QUICK, "--world", data, "--out", "run"))
    assert left(tmp_path) == ["sums.jsonl"]


def final(folder):
    with Store(folder, read_only=True) as store:
        return [s["step"] for s in store.steps()], store.metrics("loss")["loss"].value.tolist()


@pytest.mark.parametrize("where", ["log", "checkpoint", "policy"])
def test_a_disk_that_fills_up_later_leaves_a_run_to_resume(etude, data, tmp_path, monkeypatch, where):
    words = ("train", "grpo", *QUICK, "--world", data, "--steps", 3, "--checkpoint-every", 1)
    assert etude(*words, "--out", "whole").code == 0
    with monkeypatch.context() as m:
        if where == "log":
            full(m, Shards, "flush", after=2)
        elif where == "checkpoint":
            full(m, import_module("etude.learning.checkpoint"), "save_file", after=2)
        else:
            full(m, import_module("etude.policies.table"), "save_file")
        refused(etude(*words, "--out", "cut"))
    assert not (tmp_path / "cut" / "policy").exists()
    assert not list((tmp_path / "cut").rglob("*.partial"))
    assert etude("resume", "cut").code == 0
    assert final("cut") == final("whole")
    weights = [(tmp_path / run / "policy" / "table.safetensors").read_bytes() for run in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.fixture
def run(etude, data):
    assert etude("train", "grpo", *QUICK, "--world", data, "--checkpoint-every", 1, "--out", "run").code == 0
    shutil.rmtree("run/policy")
    return "run"


def test_a_corrupt_checkpoint(etude, run, tmp_path):
    newest = sorted((tmp_path / run / "checkpoints").iterdir())[-1]
    file = newest / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = {p: p.read_bytes() for p in (tmp_path / run / "checkpoints").rglob("*") if p.is_file()}
    line = refused(etude("resume", run))
    assert str(newest.relative_to(tmp_path)) in line
    assert "does not match its hash; delete" in line
    assert {p: p.read_bytes() for p in before} == before
    shutil.rmtree(newest)  # what the line advises
    assert etude("resume", run).code == 0


@pytest.mark.parametrize(
    "content", ["", "{", '{"seed": 0}', '{"method": "grpo", "common": {"wrld": 1}, "options": {}}']
)
def test_a_damaged_config(etude, run, tmp_path, content):
    (tmp_path / run / "config.json").write_text(content)
    refused(etude("resume", run))
    Store(run).close()  # let go


def test_a_damaged_store(etude, run, tmp_path):
    for file in (tmp_path / run).glob("store.sqlite*"):
        file.write_bytes(b"not a database, but long enough to be looked at" * 100)
    assert "store.sqlite" in refused(etude("resume", run))


def test_an_unfinished_run_is_no_policy(etude, run):
    for command in (("eval", run), ("chat", run), ("export", run, "out")):
        assert f"finish it with `etude resume {run}`" in refused(etude(*command))


def test_a_second_process_on_one_run_directory(etude, run, data):
    with Store(run):
        line = refused(etude("resume", run))
        assert f"in use by process {os.getpid()}" in line
    before = spawn("train", "grpo", *QUICK, "--world", data, "--out", "both")
    other = spawn("train", "grpo", *QUICK, "--world", data, "--out", "both")
    ends = [Said(p.wait(60), p.stdout.read(), p.stderr.read()) for p in (before, other)]
    assert sorted(said.code for said in ends) == [0, 2]
    line = refused(next(said for said in ends if said.code))
    assert "in use by" in line or "not empty" in line
    assert etude("resume", "both").code == 0  # the other's run is whole


def test_an_export_never_overwrites_a_folder_nor_leaves_half_a_file(etude, run, tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    assert etude("resume", run).code == 0
    assert "exists" in refused(etude("export", "tiny", "kept"))
    before = left(tmp_path)
    refused(etude("export", run, "absent/log.jsonl"))
    full(monkeypatch, os, "replace")
    assert "No space" in refused(etude("export", run, "log.jsonl"))
    assert left(tmp_path) == before


# --- interruption --------------------------------------------------------------------------------


def test_an_interrupted_run_says_how_to_go_on(etude, data, tmp_path):
    words = ("train", "grpo", *QUICK, "--world", data, "--steps", 40, "--eval-every", 0, "--checkpoint-every", 5)
    going = spawn(*words, "--out", "run")
    while not (tmp_path / "run" / "checkpoints" / "000002").exists():
        assert going.poll() is None
        time.sleep(0.01)
    going.send_signal(signal.SIGINT)
    out, err = going.communicate(timeout=30)
    assert (going.returncode, out) == (130, "")
    assert err == "etude: interrupted: go on with `etude resume run`\n"
    with Store("run", read_only=True) as store:
        assert 5 < len(store.steps()) < 40
    assert etude("resume", "run").code == 0
    assert etude(*words, "--out", "whole").code == 0
    assert final("run") == final("whole")
