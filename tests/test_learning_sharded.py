"""The learner under torchrun: two processes learn what one learns, and a run goes from one count to the other."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

import etude
import sharded
from etude.experience.batch import Link, normalise, pack, split
from etude.experience.endpoint import Server
from etude.experience.errors import UserError
from etude.experience.rows import example
from etude.experience.store import Store
from etude.learning.actors import Ray
from etude.learning.ranks import SOLO, Ranks
from etude.learning.setting import Common, Lora, setting
from etude.learning.shares import micro_batches, shares
from sharded import TINY, alone, metrics

pytestmark = pytest.mark.timeout(240)
CLOSE = 1e-4
STEPS = 6
REWARD = """
import os, pathlib, time
def vowels(completions, **columns):
    hold = os.environ.get("HOLD")  # a checkpoint, from which on nothing goes on
    while hold and pathlib.Path(hold).exists():
        time.sleep(0.1)
    return [sum(ord(c) % 3 for c in text) / 10 for text in completions]
"""
OPTIONS = {
    "world": "chain_sum", "policy": TINY, "base": False, "steps": STEPS, "problems": 3, "members": 4, "epochs": 2,
    "minibatches": 2, "kl_coef": 0.1, "max_tokens": 8, "eval_problems": 6, "eval_every": 3, "checkpoint_every": 4,
    "optim": {"lr": 3e-3, "clip": 0.5, "schedule": "cosine"},
}  # fmt: skip


def torchrun(*words: object, module: bool = True, **env: str) -> subprocess.Popen[str]:
    """Two processes on ports of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, *(["-m", "etude"] if module else []), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def done(started: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err[-3000:]
    return out, err


def flags(reward: str) -> list[str]:
    out = ["--no-base", "--reward", reward]
    for name, value in OPTIONS.items():
        nested = value if isinstance(value, dict) else {"": value}
        for inner, v in nested.items():
            if name != "base":
                out += [f"--{name}{'.' if inner else ''}{inner}".replace("_", "-"), str(v)]
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "vowels.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def reward(home) -> str:
    return f"{home / 'vowels.py'}:vowels"


@pytest.fixture(scope="module")
def one(home, reward) -> Path:
    return etude.train("grpo", out=home / "one", reward=[reward], **OPTIONS).folder


@pytest.fixture(scope="module")
def two(home, reward) -> Path:
    out, _ = done(torchrun("train", "grpo", *flags(reward), "--out", home / "two"))
    assert out.count("grpo: ") == 1  # one process reports
    return home / "two"


def cut(folder: Path, to: Path) -> Path:
    """A copy of a finished run, as it was at its checkpoint after step 4."""
    shutil.copytree(folder, to)
    for name in ("policy", "stages", "checkpoints/000002"):
        shutil.rmtree(to / name)
    assert [p.name for p in (to / "checkpoints").iterdir()] == ["000001"]
    return to


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "policy" / "model.safetensors")


def meter(folder: Path) -> dict[str, float]:
    with Store(folder, read_only=True) as store:
        return {k: v for k, v in store.steps()[-1]["meter"].items() if k != "seconds"}


def texts(folder: Path) -> list[tuple]:
    with Store(folder, read_only=True) as store:
        return [(t["step"], t["grp"], t["member"], t["problem_id"], t["text"]) for t in store.trajectories()]


def assert_alike(a: Path, b: Path) -> None:
    """Same answers, same costs, and curves and weights that differ by rounding."""
    assert texts(a) == texts(b)
    assert meter(a) == meter(b)
    found, other = metrics(a), metrics(b)
    assert found.keys() == other.keys()
    for name in found:
        if name != "ratio_max":  # a mean over micro-batches, of which several processes make more
            assert found[name] == pytest.approx(other[name], abs=CLOSE), name
    mine, theirs = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    assert max(np.abs(mine[n] - theirs[n]).max() for n in mine) < CLOSE


def assert_identical(a: Path, b: Path) -> None:
    assert texts(a) == texts(b)
    assert metrics(a) == metrics(b)
    assert meter(a) == meter(b)
    mine, theirs = weights(a), weights(b)
    assert all(np.array_equal(mine[n], theirs[n]) for n in mine)


def test_two_processes_learn_what_one_learns(one, two):
    curve = metrics(one)
    assert len(curve["loss"]) == STEPS
    assert max(map(abs, curve["loss"])) > 100 * CLOSE  # there is something to agree on
    assert max(curve["kl_ref"]) > 0
    assert_alike(one, two)
    with Store(one, read_only=True) as a, Store(two, read_only=True) as b:
        assert [e["value"] for e in a.evaluations("length")] == [e["value"] for e in b.evaluations("length")]


def test_a_checkpoint_of_two_goes_on_in_one(one, two, tmp_path):
    assert_alike(one, etude.resume(cut(two, tmp_path / "run")).folder)


def test_a_checkpoint_of_one_goes_on_in_two(one, tmp_path):
    folder = cut(one, tmp_path / "run")
    done(torchrun("resume", folder))
    assert_alike(one, folder)


def test_a_run_of_which_a_process_is_killed_is_sound_and_goes_on(two, reward, tmp_path):
    folder = tmp_path / "run"
    first = folder / "checkpoints" / "000001"
    started = torchrun("train", "grpo", *flags(reward), "--out", folder, HOLD=str(first))
    while not first.exists():
        assert started.poll() is None, started.communicate()[1][-3000:]
        time.sleep(0.1)
    ranks = [p for p in psutil.Process(started.pid).children() if p.environ().get("RANK") == "1"]
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGKILL)
    _, err = started.communicate(timeout=90)
    assert started.returncode != 0
    assert "Signal 9" in err
    with Store(folder, read_only=True) as store:
        assert len(store.steps()) == 4
    done(torchrun("resume", folder))
    assert_identical(two, folder)


@pytest.mark.parametrize("words", [["--out", "{two}"], ["--policy", "no/such/folder"], ["--device", "cuda:3"]])
def test_bad_input_ends_all_processes_and_is_said_once(words, two, reward, tmp_path):
    out = tmp_path / "run"
    given = [w.format(two=two) for w in words]
    before = metrics(two)
    flagged = [*flags(reward), *([] if "--out" in words else ["--out", out]), *given]
    started = torchrun("train", "grpo", *flagged)
    _, err = started.communicate(timeout=90)
    assert started.returncode != 0
    assert err.count("etude: ") == 1, err
    assert "exitcode  : 2" in err
    assert not out.exists()
    assert metrics(two) == before


def test_an_interrupted_job_says_once_how_to_go_on(reward, tmp_path):
    folder = tmp_path / "run"
    first = folder / "checkpoints" / "000001"
    started = torchrun("train", "grpo", *flags(reward), "--out", folder, HOLD=str(first))
    while not first.exists():
        assert started.poll() is None, started.communicate()[1][-3000:]
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    _, err = started.communicate(timeout=90)
    assert err.count(f"etude: interrupted: go on with `etude resume {folder}`") == 1, err
    assert err.count("etude: interrupted") == 1


@pytest.fixture(scope="module")
def both(home) -> tuple[dict, list[dict]]:
    """What tests/sharded.py finds in one process, and in each of two."""
    (home / "parts-two").mkdir()
    started = torchrun(sharded.__file__, home / "parts-two", module=False, PYTHONPATH=_path())
    single = alone(home / "parts-one")
    done(started)
    return single, json.loads((home / "parts-two" / "found.json").read_text())


def _path() -> str:
    return os.pathsep.join(p for p in sys.path if p)


CASES = ["tied", "untied", "micro-batches", "fewer rows than processes", "entropy", "transformers", "chunks"]


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_one_process(both, case):
    single, processes = both[0]["updates"][case], [found["updates"][case] for found in both[1]]
    assert processes[0] == processes[1]
    found = processes[0]
    assert found["same"]  # gathered weights are the shares put together
    assert found["meter"] == single["meter"]
    for a, b in zip(single["metrics"], found["metrics"], strict=True):
        assert {k: v for k, v in a.items() if k != "ratio_max"} == pytest.approx(
            {k: v for k, v in b.items() if k != "ratio_max"}, abs=CLOSE
        )
    assert found["weights"] == pytest.approx(single["weights"], abs=CLOSE)
    assert found["logp"] == pytest.approx(single["logp"], abs=10 * CLOSE)


def test_a_gradient_that_is_not_finite_in_one_process_is_applied_in_none(both):
    for found in (both[0], *both[1]):
        case = found["updates"]["not finite"]
        assert [m["skipped_update"] for m in case["metrics"]] == [1.0] * 3
        assert all(math.isfinite(w) for w in case["weights"])


def test_a_process_holds_its_share_of_weights_and_optimiser_state(both):
    whole, parts = both[0]["shares"], [found["shares"] for found in both[1]]
    for kind in ("parameters", "optimiser"):
        assert sum(p[kind] for p in parts) == whole[kind]
        assert max(p[kind] for p in parts) < 0.55 * whole[kind]


def test_who_acts_does_not_matter(both):
    for found in both[1]:
        shared, alone_ = found["acted"]["answers"]
        assert [name for name, _ in shared] == [name for name, _ in alone_]
        for (_, mine), (_, theirs) in zip(shared, alone_, strict=True):
            assert [m[:2] for m in mine] == [m[:2] for m in theirs]
            assert all(a[2] == pytest.approx(b[2], abs=1e-5) for a, b in zip(mine, theirs, strict=True))
        assert found["acted"]["meters"][0] == found["acted"]["meters"][1]
        assert found["acted"]["meters"][0]["sampled"] > 0


def test_what_is_wrong_in_one_process_is_heard_in_all_and_what_cannot_be_shared_is_refused(both):
    fault = "the first process is at fault"
    assert both[0]["refusals"] == [fault, "", "", "", ""]
    for found in both[1]:
        assert found["refusals"] == [
            fault,
            "processes of this job have drawn different problems",
            "penalties and masks on parameters need whole ones: run this method in one process",
            "this method needs 'add_head' of the policy, which one that is sharded has not: use one process",
            "this policy is sharded: gather it first, `with whole(policy)`",
        ]


def test_a_branch_leaves_no_trace(both):
    assert all(found["branched"] for found in (both[0], *both[1]))


@pytest.mark.parametrize("method", ["dpo", "sft", "table", "base"])
def test_methods_run_alike(both, home, method):
    a, b = home / "parts-one" / method, home / "parts-two" / method
    assert texts(a) == texts(b)
    assert meter(a) == meter(b)
    assert metrics(a)["loss"] == pytest.approx(metrics(b)["loss"], abs=CLOSE)
    assert metrics(a)["grad_norm"] == pytest.approx(metrics(b)["grad_norm"], abs=CLOSE)
    assert sorted(p.name for p in (a / "policy").rglob("*")) == sorted(p.name for p in (b / "policy").rglob("*"))
    adapter = a / "policy" / "adapter" / "adapter_model.safetensors"
    assert adapter.exists() == (method == "sft")
    if adapter.exists():
        mine, theirs = load_file(adapter), load_file(b / adapter.relative_to(a))
        assert max(np.abs(mine[n] - theirs[n]).max() for n in mine) < CLOSE
        assert any(np.abs(v).max() > 0 for n, v in mine.items() if "lora_B" in n)


# --- without processes -----------------------------------------------------------------------------


def rows(lengths, links=()):
    given = [example(np.arange(1, 3), np.full(n - 1, 5)) for n in lengths]
    return normalise(pack(given, links), "token")


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("tokens", [7, 1000])
def test_processes_share_every_row_once_and_pass_equally_often(size, tokens):
    data = rows([3, 9, 4, 4, 12, 3, 3, 5, 8, 4, 6])
    parts = [list(micro_batches(data, tokens, Ranks(r, size))) for r in range(size)]
    assert len({len(p) for p in parts}) == 1
    counted = [m for part in parts for m, factor in part if factor]
    assert sorted(n for m in counted for n in m.lengths.tolist()) == sorted(data.lengths.tolist())
    assert sum(float(m.actions["weight"].sum()) for m in counted) == pytest.approx(1.0)
    assert {factor for part in parts for _, factor in part} <= {0.0, float(size)}
    most, least = (f(int(sum(len(m.inputs) for m, k in p if k)) for p in parts) for f in (max, min))
    assert most - least <= 2 * int(data.lengths.max())


def test_one_process_takes_the_batch_as_it_is():
    data = rows([3, 9, 4, 4])
    (only,) = micro_batches(data, 1000, SOLO)
    assert only[0] is data
    assert only[1] == 1.0
    assert [len(m.inputs) for m, _ in micro_batches(data, 9, SOLO)] == [len(m.inputs) for m in split(data, 9)]


def test_linked_rows_stay_in_one_process():
    links = [Link("pair", (0, 5), ("chosen", "rejected")), Link("pair", (1, 4), ("chosen", "rejected"))]
    data = rows([3, 9, 4, 4, 12, 3], links)
    parts = shares(data, 3)
    assert sum(len(p.links) for p in parts if p is not None) == 2
    assert sum(p.size for p in parts if p is not None) == 6


def test_a_process_without_rows_repeats_the_smallest_micro_batch_for_nothing():
    data = rows([4, 9])
    parts = [list(micro_batches(data, 1000, Ranks(r, 4))) for r in range(4)]
    assert [[(len(m.inputs), k) for m, k in p] for p in parts].count([(5, 0.0)]) == 2


@pytest.mark.parametrize("elsewhere", [{"ray": Ray(actors=1)}, {"server": Server("http://h:1"), "lora": Lora(1)}])
def test_rollouts_elsewhere_are_refused_before_anything_is_built(elsewhere):
    run = SimpleNamespace(ranks=SimpleNamespace(size=2))
    with pytest.raises(UserError, match="under torchrun every process acts for itself"):
        setting(run, Common(**elsewhere))
