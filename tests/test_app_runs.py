"""Training, going on, evaluating, talking and exporting, from the command line and from Python."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import etude as library
from app_cli import ETUDE, QUICK, on_terminal, runner, sums
from etude.experience.store import Store


@pytest.fixture
def etude(capfd):
    return runner(capfd)


@pytest.fixture
def data(tmp_path):
    return sums(tmp_path / "sums.jsonl")


def test_train_reports_and_json_parses(etude, data):
    said = etude("train", "grpo", *QUICK, "--world", data, "--name", "mine", "--out", "run")
    assert (said.code, said.err) == (0, "")  # quiet where nobody watches
    assert said.out.splitlines()[-1].startswith("mine: held-out accuracy 0.0% -> 0.0% in ")
    assert said.out.splitlines()[-1].endswith(" s (run: run)")
    found = json.loads(etude("resume", "run", "--json").out)  # there is nothing left to do
    assert found["run"] == "run"
    assert found["cost"]["updates"] == 2
    assert found["after"] == {"value": 0.0, "low": 0.0, "high": found["after"]["high"], "n": 1}


def test_runs_have_folders_of_their_own(etude, data, tmp_path):
    said = [etude("train", "grpo", *QUICK, "--world", data, "--json") for _ in range(2)]
    folders = {json.loads(s.out)["run"] for s in said}
    assert len(folders) == 2
    assert all((tmp_path / f / "policy").is_dir() and f.startswith("runs/grpo-0-") for f in folders)


def test_export_eval_and_chat_of_a_run(etude, data, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    tiny = ("train", "grpo", "--policy", "tiny", *QUICK[2:], "--world", data)
    assert etude(*tiny, "--lora.rank", 2, "--optim.lr", 0.1, "--out", "run").code == 0
    assert etude("export", "run", "new/folder").out == "wrote new/folder\n"
    theirs = transformers.AutoModelForCausalLM.from_pretrained("new/folder").float()
    ours = library.load_policy("run/policy")
    tokens = ours.tokenizer.prompt("1+1=")
    logits = ours.decoder().prefill([tokens], 1)
    plain = library.load_policy("tiny").decoder().prefill([tokens], 1)
    assert (logits - plain).abs().max() > 1e-3  # the adapter learnt something, and is in the export
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.asarray(tokens, np.int64))[None]).logits[0, -1]
    assert torch.allclose(logits[0], expected, atol=1e-4)

    assert etude("export", "run", "log.jsonl").code == 0
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2
    assert {"prompt", "completion", "reward"} <= rows[0].keys()
    pq = pytest.importorskip("pyarrow.parquet")
    assert etude("export", "run", "log.parquet").code == 0
    assert pq.read_table("log.parquet")["completion"].to_pylist() == [r["completion"] for r in rows]

    for policy in ("run", "new/folder"):
        found = json.loads(etude("eval", policy, "--world", data, "--max-tokens", 4, "--samples", 2, "--json").out)
        assert 0 <= found["metrics"]["pass@2"]["value"] <= 1
    assert "accuracy" in etude("eval", "run", "--world", data, "--max-tokens", 4).out

    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=\n2+2=\n\nnever read\n"))
    said = etude("chat", "run", "--temperature", 0, "--max-tokens", 4)
    assert said.code == 0
    assert said.out.count("\n") == 2
    assert all(len(answer) <= 4 for answer in said.out.splitlines())


def test_progress_on_a_terminal(data):
    words = ["train", "grpo", *QUICK, "--world", str(data), "--steps", "40", "--eval-every", "0"]
    shown = on_terminal([*ETUDE, *words])
    assert "40/40" in shown
    assert "/s" in shown
    assert "0:00:0" in shown  # what remains
    assert "reward" in shown
    assert "accuracy" in shown
    assert "grpo: held-out accuracy" in shown


def test_progress_of_an_evaluation_changes_nothing_else(etude, data):
    words = ["eval", "table", "--world", str(data), "--world-options", "test=1", "--max-tokens", "4"]
    shown = on_terminal([*ETUDE, *words])
    assert "20/20" in shown
    assert all(line in shown for line in etude(*words).out.splitlines())


def test_the_same_from_python(etude, data):
    options = {"policy": "table", "base": False, "steps": 2, "problems": 2, "members": 2, "max_tokens": 4}
    run = library.train("grpo", world=str(data), seed=0, eval_problems=2, out="python", **options)
    assert run.folder.name == "python"
    assert etude("train", "grpo", *QUICK, "--world", data, "--out", "shell").code == 0
    texts = []
    for folder in ("python", "shell"):
        with Store(folder, read_only=True) as store:
            texts.append([t["text"] for t in store.trajectories()])
    assert texts[0] == texts[1]
    assert library.resume("python").meter.read()["updates"] == 2
    with pytest.raises(library.UserError, match="did you mean steps"):
        library.train("grpo", stps=3)
    with pytest.raises(library.UserError, match="option steps takes a whole number, not 'x'"):
        library.train("grpo", steps="x")


def test_importing_the_library_is_light():
    code = (
        "import sys, time; began = time.perf_counter(); import etude; seconds = time.perf_counter() - began\n"
        "assert not {'torch', 'numpy', 'transformers', 'reasoning_gym'} & sys.modules.keys()\n"
        "assert set(etude.__all__) <= set(dir(etude))\n"
        "assert etude.__version__ and issubclass(etude.UserError, Exception)\n"
        "print(seconds)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(done.stdout) for done in runs) < 0.05
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = library.trian
    assert all(getattr(library, name) for name in library.__all__)


@pytest.mark.smollm2
def test_smollm2_knows_the_capital_of_france(etude, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n"))
    said = etude("chat", "smollm2", "--temperature", 0, "--max-tokens", 16)
    assert "Paris" in said.out
