"""Learning from what a server samples: each step's rollouts come from that step's adapter, or the run is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app_cli import refused, runner, sums
from etude.experience import endpoint as wire
from etude.experience.errors import UserError
from etude.experience.store import Store
from etude.experience.types import Law
from etude.feedback.score import score
from etude.methods.api import resume, train
from etude.policies.zoo import save_policy
from runs import Cut, Cutter
from served_model import ServedModel, serving
from small import small_lm

pytestmark = pytest.mark.timeout(180)
KEY = "sk-secret-42"
SMALL = {"steps": 3, "problems": 4, "members": 6, "max_tokens": 4, "eval_problems": 4, "checkpoint_every": 1}
LOUD = {"lora": {"rank": 4}, "optim": {"lr": 0.1}}  # every step changes what is said


class Recording(ServedModel):
    """Keeps every version that was ever loaded."""

    def __init__(self, policy, **more):
        super().__init__(policy, **more)
        self.versions = {}

    async def load(self, request):
        answer = await super().load(request)
        self.versions.update({n: p for n, p in self.policies.items() if n != "base"})
        return answer


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("ETUDE_API_KEY", raising=False)
    monkeypatch.setattr(wire, "BACKOFF", 0.01)
    model = Recording(small_lm())
    with serving(model) as url:
        model.url = url
        yield model


@pytest.fixture
def common(served, tmp_path):
    """A Llama folder, what it is to learn, and the server that acts for it."""
    save_policy(small_lm(), tmp_path / "m")
    (tmp_path / "mine.py").write_text(
        "def mixed(completions, **columns):\n    return [sum(map(ord, c)) % 2 for c in completions]\n"
    )
    return {
        "policy": str(tmp_path / "m"),
        "world": str(sums(tmp_path / "sums.jsonl")),
        "reward": (f"{tmp_path}/mine.py:mixed",),
        "server": {"url": served.url},
    }


def calls_by_step(folder):
    with Store(folder, read_only=True) as store:
        rows = store.trajectories(limit=None)
        return {
            step: [c for row in rows if row["step"] == step for c in store.load(row["id"]).calls]
            for step in sorted({row["step"] for row in rows})
        }


def test_each_step_acts_with_the_adapter_it_has_come_to(served, common, tmp_path):
    run = train("grpo", out=tmp_path / "r", **common, **SMALL, **LOUD)
    with Store(run.folder, read_only=True) as store:
        gaps = store.metrics("server_gap")["server_gap"]
        assert [e["step"] for e in store.evaluations("accuracy")] == [0, 3]
    assert gaps.step.tolist() == [0, 1, 2, 3]  # the last is of the evaluation after it
    assert 0 < gaps.value.max() < 1e-3
    assert len(served.loads) == len(set(served.loads)) == 4
    assert all(served.used[name] for name in served.loads)
    assert not served.used["base"]
    versions = [served.versions[name] for name in served.loads]
    steps = calls_by_step(run.folder)
    assert list(steps) == [0, 1, 2]
    for step, calls in steps.items():
        assert len(calls) == 24
        told = np.concatenate([c.logp_raw for c in calls])
        by = [
            np.abs(np.concatenate(score(v, [c.context for c in calls], [c.out for c in calls])) - told).max()
            for v in versions
        ]
        assert by[step] < 1e-4
        assert all(gap > 1e-2 for s, gap in enumerate(by) if s != step), by
    assert run.meter["sampled"] == sum(len(c.out) for calls in steps.values() for c in calls)
    # Only the last is left, here and there, and it is what was learnt.
    assert set(served.policies) == {"base", served.loads[-1]}
    assert [f.name for f in (run.folder / "server").iterdir()] == served.loads[-1:]
    last = load_file(run.folder / "server" / served.loads[-1] / "adapter_model.safetensors")
    ended = load_file(run.folder / "policy" / "adapter" / "adapter_model.safetensors")
    assert last.keys() == ended.keys()
    assert all(torch.equal(last[n], ended[n]) for n in ended)


def test_a_cut_run_goes_on_as_if_it_had_not_been(served, common, tmp_path):
    whole = train("grpo", out=tmp_path / "w", **common, **SMALL, **LOUD)
    with pytest.raises(Cut):
        train("grpo", out=tmp_path / "c", reporter=Cutter(2), **common, **SMALL, **LOUD)
    left = served.loads[-1]
    assert (tmp_path / "c" / "server" / left).is_dir()
    resumed = resume(tmp_path / "c")
    assert left not in served.policies
    assert len(list((tmp_path / "c" / "server").iterdir())) == 1
    file = "policy/adapter/adapter_model.safetensors"
    a, b = load_file(whole.folder / file), load_file(resumed.folder / file)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert {s: [c.out.tolist() for c in calls] for s, calls in calls_by_step(whole.folder).items()} == {
        s: [c.out.tolist() for c in calls] for s, calls in calls_by_step(resumed.folder).items()
    }


def test_an_adapter_that_the_server_ignores_is_noticed(served, common, tmp_path):
    served.fault = "stale adapter"
    with pytest.raises(
        UserError, match=r"acts as the policy does without its adapter \(0\.000 nats apart, with it 0\."
    ):
        train("grpo", out=tmp_path / "r", **common, **SMALL, lora={"rank": 4}, optim={"lr": 0.1})


def test_another_checkpoint_is_refused_before_anything_is_learnt(served, common, tmp_path):
    other = small_lm(1)
    with torch.no_grad():
        other.model.embed_tokens.weight *= 3.0
    save_policy(other, tmp_path / "other")
    with pytest.raises(UserError, match="is its model 'base' of the same checkpoint as --policy"):
        train("grpo", out=tmp_path / "r", **{**common, "policy": str(tmp_path / "other")}, **SMALL, **LOUD)
    assert not (tmp_path / "r").exists()


def test_what_a_server_cannot_learn_is_said_first(served, common, tmp_path):
    with pytest.raises(UserError, match=r"cannot be changed over its protocol.*--lora\.rank 16"):
        train("grpo", out=tmp_path / "r", **common, **SMALL)
    served.lora = False
    with pytest.raises(UserError) as error:
        train("grpo", out=tmp_path / "r", **common, **SMALL, **LOUD)
    assert "did not load the adapter in" in str(error.value)
    assert "(404: Not Found)" in str(error.value)
    assert "--enable-lora" in str(error.value)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in str(error.value)
    assert "\n" not in str(error.value)
    assert not served.seen
    assert not (tmp_path / "r").exists()


def test_under_another_law_the_evaluations_compare(served, common, tmp_path):
    run = train("grpo", out=tmp_path / "r", objective="nll", credit="none", temperature=0.7, **common, **SMALL, **LOUD)
    with Store(run.folder, read_only=True) as store:
        assert store.metrics("server_gap")["server_gap"].value.max() < 1e-3
    bodies = {body["temperature"] for body in served.seen}
    assert bodies == {0.7, 1.0}
    assert all(np.isnan(c.logp_raw).all() for calls in calls_by_step(run.folder).values() for c in calls
               if c.law == Law(temperature=0.7))  # fmt: skip


def test_the_key_is_in_no_file_of_the_run(served, common, tmp_path, monkeypatch):
    served.key = KEY
    monkeypatch.setenv("ETUDE_API_KEY", KEY)
    run = train("grpo", out=tmp_path / "r", **common, **SMALL, **LOUD)
    assert {h["authorization"] for h in served.headers} == {f"Bearer {KEY}"}
    files = [f for f in run.folder.rglob("*") if f.is_file()]
    assert len(files) > 5
    assert not [f for f in files if KEY.encode() in f.read_bytes()]


def test_the_command_trains_and_refuses_in_a_line(served, common, tmp_path, capfd):
    etude = runner(capfd)
    words = ["train", "grpo", "--policy", common["policy"], "--world", common["world"], "--steps", 1, "--problems", 2,
             "--members", 2, "--max-tokens", 2, "--eval-problems", 2, "--server.url", served.url]  # fmt: skip
    assert "train one (--lora.rank 16)" in refused(etude(*words))
    assert "concurrency must be at least 1" in refused(etude(*words, "--server.concurrency", 0))
    assert "has no model 'x': it serves base" in refused(etude(*words, "--lora.rank", 2, "--server.model", "x"))
    assert not (tmp_path / "runs").exists()
    assert etude(*words, "--lora.rank", 2, "--server.model", "base", "--out", "r").code == 0
    assert (tmp_path / "r" / "policy" / "adapter").is_dir()
