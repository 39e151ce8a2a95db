"""Rollouts on real Ray actors: what comes back is what this process would have made, whatever dies on the way."""

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from app_cli import refused, runner, spawn
from etude.acting.sample import sample
from etude.experience.errors import UserError
from etude.experience.protocols import Clock
from etude.experience.store import Store
from etude.learning.actors import Ray
from etude.learning.run import Run
from etude.learning.setting import Common, Lora, setting
from etude.methods.api import resume, train
from etude.policies.zoo import load_policy

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported: the loopback interface alone
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(300)

TINY = {"world": "chain_sum", "policy": "tiny:depth=1,width=32", "base": False, "max_tokens": 6, "eval_every": 0,
        "eval_problems": 2}  # fmt: skip
RUN = {**TINY, "steps": 3, "problems": 6, "members": 4, "optim": {"lr": 0.01}}
LETTERS = "def letters(completions, **columns):\n    return [len(set(c)) / 8 for c in completions]\n"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One local Ray for the module, which runs use as they find it."""
    with tempfile.TemporaryDirectory(prefix="etude-ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=scratch)
        yield
        ray.shutdown()


@pytest.fixture
def reward(tmp_path):
    """Writes a reward function; its file, as an option names it."""

    def write(text, name="letters"):
        (tmp_path / f"{name}.py").write_text(text)
        return (f"{tmp_path}/{name}.py:{name}",)

    return write


@pytest.fixture
def settings(tmp_path):
    """Builds settings whose actors end with the test."""
    made = []

    def build(actors=2, **common):
        run = Run(tmp_path / f"run{len(made)}", {"seed": 0})
        made.append(run)
        return setting(run, Common(**{**TINY, **common}, ray=Ray(actors=actors)), "random")

    yield build
    for run in made:
        run.close()


def said(folder):
    """All that must not differ between two runs: costs, metrics, every token and its log-probability, weights."""
    with Store(folder, read_only=True) as store:
        steps = [{k: v for k, v in s["meter"].items() if k != "seconds"} for s in store.steps()]
        metrics = {n: m.value.tolist() for n, m in store.metrics().items()}
        texts = []
        for t in store.trajectories():
            calls = store.load(t["id"]).calls
            texts.append((t["step"], t["problem_id"], t["member"], t["text"], t["reward"],
                          [(c.context.tolist(), c.out.tolist(), c.logp_raw.tobytes()) for c in calls]))  # fmt: skip
    weights = {n: p.detach().numpy().tobytes() for n, p in load_policy(str(folder / "policy")).named_parameters()}
    return {"steps": steps, "metrics": metrics, "texts": texts, "weights": weights}


def groups(s, count=8, members=2, act=sample):
    """What acting gives for the first problems."""
    problems = [s.world.problem("train", i) for i in range(count)]
    return s.acting(act)(s.roles(), problems, members, s.score, Clock(0, 1), s.run.keys.at("act"))


def texts(found):
    return [(g.problem.id, m.member, m.text, m.reward, m.calls[0].logp_raw.tobytes()) for g in found for m in g.members]


# --- the same as in this process -----------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lora": {"rank": 2}},
        {"policy": "table:limit=64", "world": "lock", "world_options": ["rungs=3"]},  # of many turns
    ],
    ids=["tiny", "lora", "many turns"],
)
def test_a_run_with_one_actor_is_the_run_in_this_process_bit_for_bit(tmp_path, reward, more):
    if more.get("lora"):
        pytest.importorskip("peft")
    options = {**RUN, **more, "reward": reward(LETTERS)}
    train("grpo", out=tmp_path / "here", **options)
    train("grpo", out=tmp_path / "there", ray={"actors": 1}, **options)
    here, there = said(tmp_path / "here"), said(tmp_path / "there")
    assert here["steps"][-1]["sampled"] > 0
    assert here["metrics"]["grad_norm"][-1] > 0 or "rungs=3" in more.get("world_options", ())
    for what in here:
        assert here[what] == there[what], what


def test_two_actors_act_with_the_new_weights_on_the_same_problems_in_the_same_order(tmp_path, reward):
    options = {**RUN, "policy": "table", "reward": reward(LETTERS), "selector": "mixed", "max_draws": 2, "steps": 4}
    options["optim"] = {"lr": 3.0}
    train("group-rl", out=tmp_path / "here", **options)
    train("group-rl", out=tmp_path / "there", ray={"actors": 2}, **options)
    here, there = said(tmp_path / "here"), said(tmp_path / "there")
    assert here == there  # a table's arithmetic does not depend on how wide a batch is


def test_methods_that_collect_first_run_on_actors_too(tmp_path):
    options = {**TINY, "policy": "table:actions=6", "world": "lock", "world_options": ["rungs=1"], "rounds": 2,
               "problems": 8, "members": 4, "steps": 2}  # fmt: skip
    train("rft", out=tmp_path / "here", **options)
    train("rft", out=tmp_path / "there", ray={"actors": 2}, **options)
    here, there = said(tmp_path / "here"), said(tmp_path / "there")
    assert there["metrics"]["examples"][0] > 0
    for steps in (here["steps"], there["steps"]):
        for meter in steps:
            del meter["prefilled"]  # a context that two chunks share is read twice
    assert here == there


def test_frozen_weights_that_an_actor_cannot_load_reach_it(settings, monkeypatch):
    pytest.importorskip("peft")
    here, there, apart = (settings(n, lora=Lora(2)) for n in (0, 1, 1))
    for s in (here, there, apart):
        for p in s.policy.parameters():
            p.data.mul_(1.5)
    monkeypatch.setattr("etude.learning.setting.base_recipe", lambda common: "some recipe")
    there.start = "base"  # as if it had been taught on this machine
    assert texts(groups(there)) == texts(groups(here))
    assert texts(groups(apart)) != texts(groups(here))


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("actors", [1, 2])
def test_an_actor_that_is_killed_in_mid_rollout_is_replaced_and_nothing_is_lost(settings, reward, tmp_path, actors):
    mark = tmp_path / "killed"
    deadly = reward(
        f"import os, signal\nfrom pathlib import Path\nmark, calls = Path({str(mark)!r}), []\n"
        "def once(completions, **columns):\n    calls.append(1)\n"
        "    if len(calls) == 4 and not mark.exists():\n"
        "        mark.touch()\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [len(c) / 8 for c in completions]\n",
        "once",
    )  # fmt: skip
    s, unharmed = settings(actors, reward=deadly), settings(actors, reward=deadly)
    found = groups(s)
    assert mark.exists()
    costs = s.run.meter.read()
    assert texts(groups(s)) == texts(found)  # the new actor goes on
    s._rollouts.close()
    assert texts(groups(unharmed)) == texts(found)
    assert unharmed.run.meter.read() == costs  # what the dead had done is not charged


def test_problems_on_which_actors_die_every_time_are_named_in_a_line(settings, reward):
    deadly = reward("import os\ndef die(prompts, **columns):\n    os.kill(os.getpid(), 9)\n", "die")
    s = settings(2, reward=deadly)
    with pytest.raises(UserError, match=r"^3 Ray actors died on problem \S+.*; the last: .+") as error:
        groups(s)
    assert "\n" not in str(error.value)


def test_a_slow_verifier_does_not_stop_the_others(settings, reward, tmp_path):
    slowest = settings(0).world.problem("train", 0).prompt
    (tmp_path / "log").touch()
    s = settings(2, reward=reward(
        "import os, time\n"
        "def slow(prompts, **columns):\n"
        "    began = time.time()\n"
        f"    time.sleep(1.5 if prompts[0] == {slowest!r} else 0.05)\n"
        f"    with open({str(tmp_path / 'log')!r}, 'a') as log:\n"
        "        log.write(f'{os.getpid()} {began} {time.time()} {prompts[0]}\\n')\n"
        "    return [0.0]\n", "slow",
    ))  # fmt: skip
    s.acting(sample)  # starts the actors
    ray.get([*s._rollouts._starting])
    began = time.time()
    groups(s, count=16)
    took = time.time() - began
    lines = [line.split(" ", 3) for line in (tmp_path / "log").read_text().splitlines()]
    busy = next(pid for pid, _, _, prompt in lines if prompt == slowest)
    over = max(float(end) for _, _, end, prompt in lines if prompt == slowest)
    others = [float(end) for pid, _, end, _ in lines if pid != busy]
    assert len(lines) == 32
    assert len(others) == 2 * 14  # all but the two problems of the slow one's chunk
    assert max(others) < over
    assert 3.0 < took < 3.0 + 0.05 * 2 + 1.0  # the slow chunk, not the sum


def broken(roles, problems, n, score, clock, keys):
    raise UserError("this cannot be acted on: use another")


def buggy(roles, problems, n, score, clock, keys):
    raise ZeroDivisionError("a bug")


def test_what_is_raised_in_an_actor_arrives_as_what_it_was(settings):
    s = settings(2)
    with pytest.raises(UserError) as error:
        groups(s, act=broken)
    assert type(error.value) is UserError
    assert str(error.value) == "this cannot be acted on: use another"
    with pytest.raises(ZeroDivisionError, match="a bug"):
        groups(s, act=buggy)
    assert len(groups(s)) == 8  # the actors are still there


def test_warnings_of_an_actor_are_heard_once(settings, reward, caplog):
    faulty = reward("def faulty(completions, **columns):\n    raise ValueError('no such column')\n", "faulty")
    groups(settings(2, reward=faulty))
    heard = [r.message for r in caplog.records]
    assert len(heard) == 1
    assert "reward faulty is at fault (ValueError: no such column)" in heard[0]


# --- ahead of the learner ------------------------------------------------------------------------


def test_a_policy_learns_from_experience_that_is_late(tmp_path):
    options = {**TINY, "policy": "table:actions=6", "world": "lock", "world_options": ["rungs=1"], "steps": 25,
               "problems": 4, "members": 4, "optim": {"lr": 0.3}, "max_tokens": 2, "eval_problems": 50}  # fmt: skip
    run = train("grpo", out=tmp_path / "run", ray={"actors": 2, "lag": 2}, **options)
    with Store(run.folder, read_only=True) as store:
        lag, ratio = store.metrics("lag")["lag"].value, store.metrics("ratio")["ratio"].value
        reward = store.metrics("reward")["reward"].value
        sampled = [s["meter"]["sampled"] for s in store.steps()]
    assert lag[0] == 0
    assert lag.max() in (1, 2)
    assert lag[1:].min() >= 0
    assert len(lag) == 25
    assert np.isfinite(ratio).all()
    assert (ratio[lag > 0] != 1).any()
    assert np.allclose(ratio[lag == 0], 1)
    assert reward[:3].mean() < 0.5
    assert reward[-5:].mean() > 0.9
    assert np.diff(sampled[:25]).tolist() == [sampled[0]] * 24  # charged with the step that learns from it


def test_no_step_is_collected_more_than_the_lag_ahead(tmp_path):
    """A learner that is slow falls behind by the lag and no further; the costs are those of its steps."""
    from etude.experience.meter import Meter
    from etude.learning.ahead import Ahead

    class Pool:
        weights, newest = -1, 0
        options = Ray(1, lag=2)

        def __init__(self):
            from concurrent.futures import ThreadPoolExecutor

            self.thread = ThreadPoolExecutor(1)

        def snapshot(self):
            self.newest += 1
            return self.newest

    run, pool, costs, did = Run(tmp_path / "r", {}), Pool(), Meter(), []

    def gather(clock):
        did.append((clock.step, pool.weights))
        costs.charge("sampled", clock.step)
        return clock.step

    ahead = Ahead(gather, pool, costs, run)
    for step in range(5):
        assert ahead(Clock(step, 5)) == step
        wait_for(lambda step=step: len(did) == min(step + 3, 5), 10)
        assert run.meter["sampled"] == sum(range(step + 1))
    assert did == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 3)]
    run.close()


# --- from the command line -----------------------------------------------------------------------


@pytest.fixture
def etude(capfd):
    return runner(capfd)


FLAGS = ("--world", "chain_sum", "--policy", "table", "--no-base", "--problems", 2, "--members", 2, "--max-tokens", 4,
         "--eval-problems", 2, "--eval-every", 0)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["grpo", "--ray.lag", 1], "ray.lag needs actors to act"),
        (["grpo", "--ray.address", "auto"], "ray.address needs actors to act"),
        (["grpo", "--ray.actors", -1], "must be at least 0"),
        (["rft", "--ray.actors", 1, "--ray.lag", 1], "ray.lag is for methods that act and learn by turns"),
        (["grpo", "--ray.actors", 1, "--lora.rank", 1, "--server.url", "http://h:1"], "leave out --ray.actors or"),
        (["group-rl", "--ray.actors", 1, "--ray.lag", 1, "--objective", "nll", "--credit", "none"], "takes no ratio"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(etude, words, line, tmp_path):
    assert line in refused(etude("train", *words, *FLAGS[:5], "--out", "run"))
    assert not (tmp_path / "run").exists()


def test_ray_that_is_not_installed_is_said_in_a_line(etude, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused(etude("train", "grpo", *FLAGS, "--ray.actors", 1, "--out", "run"))
    assert line.endswith("acting on Ray actors needs the package ray: pip install 'etude[ray]'")


def test_a_cluster_that_does_not_answer_is_said_in_a_line(tmp_path):
    process = spawn("train", "grpo", *FLAGS, "--ray.actors", 1, "--ray.address", "127.0.0.1:1", "--out", "run")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("etude: the Ray cluster 127.0.0.1:1 cannot be reached: ")
    assert not (tmp_path / "run").exists()


def wait_for(what, seconds):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "lag"), [(signal.SIGKILL, 0), (signal.SIGINT, 0), (signal.SIGINT, 1)], ids=["killed", "interrupted", "lag"]
)
def test_a_run_that_is_cut_leaves_no_process_and_resumes_to_the_same_end(tmp_path, how, lag):
    flags = ("--world", "chain_sum", "--policy", RUN["policy"], "--no-base", "--max-tokens", 6, "--eval-every", 0,
             "--eval-problems", 2, "--steps", 40, "--problems", 6, "--members", 4, "--optim.lr", 0.01,
             "--checkpoint-every", 5, "--ray.actors", 1, "--ray.lag", lag, "--out", "cut")  # fmt: skip
    process = spawn("train", "grpo", *flags, start_new_session=True)
    wait_for((tmp_path / "cut" / "checkpoints" / "000001").exists, 90)
    children = psutil.Process(process.pid).children(recursive=True)
    ours = [c for c in children if "agent" not in " ".join(c.cmdline()).lower()]  # Ray's agents look up once a minute
    assert any("ray::Actor" in " ".join(c.cmdline()) for c in ours)
    scratch = re.search(r"/tmp/etude-ray-\w+", " ".join(ours[0].cmdline()))[0]
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.kill()
    out, err = process.communicate(timeout=60)
    wait_for(lambda: not any(alive(c) for c in ours), 60)
    assert Path(scratch).exists() == (how == signal.SIGKILL)  # nobody is left to remove Ray's logs
    shutil.rmtree(scratch, ignore_errors=True)
    if how == signal.SIGINT:
        assert (process.returncode, out) == (130, "")
        assert err == "etude: interrupted: go on with `etude resume cut`\n"
    resume("cut")
    if lag:  # alike in distribution alone: nothing is missing, and nothing is there twice
        with Store("cut", read_only=True) as store:
            assert store.metrics("lag")["lag"].step.tolist() == list(range(40))
            assert store.count() == 40 * 6 * 4
            assert store.steps()[-1]["meter"]["episodes"] == store.count()
        return
    train("grpo", out="whole", **{**RUN, "steps": 40, "checkpoint_every": 5})
    assert said(tmp_path / "cut") == said(tmp_path / "whole")


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
