import errno
import json
import os
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import Examples, completion
from etude.curricula.curriculum import Uniform
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.store import Store
from etude.feedback.advantage import Advantage
from etude.learning import checkpoint
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit, on_policy
from etude.learning.run import KEEP, Run, open_run
from etude.learning.weights import Weights
from etude.objectives.clipped_pg import ClippedPG
from etude.objectives.nll import NLL
from small import LIMITS, Echo, small_lm, weights_of

CONFIG = {"seed": 5, "checkpoint_every": 2}


class Counter:
    """State that is one number."""

    def __init__(self, n=0):
        self.n = n

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


class Cut(Exception):
    """Ends a run between two steps, as a kill would."""


def begin(folder, **kwargs):
    return Run(folder, CONFIG, checkpoint_every=2, **kwargs)


def count(run, steps, cut=None):
    """Adds 1 in each step and logs it; dies in step `cut`."""
    counter = run.track("counter", Counter())
    for clock in run.steps(steps):
        if clock.step == cut:
            raise Cut
        counter.n += 1
        run.log({"n": counter.n})
    return counter.n


# --- stages and resuming -------------------------------------------------------------------------


def test_a_resumed_run_skips_finished_stages_and_has_their_results(tmp_path):
    calls = []

    def program(run, cut):
        def first():
            calls.append("first")
            run.log({"seen": 1.0})
            return {"rows": [np.arange(3), None], 4: "x"}

        def nothing():
            calls.append("nothing")

        a = run.stage("first", first)
        b = run.stage("nothing", nothing)
        c = run.stage("loop", lambda: count(run, 5, cut))
        return a, b, c

    run = begin(tmp_path / "r")
    with pytest.raises(Cut):
        program(run, cut=3)
    run.close()
    run = open_run(tmp_path / "r")
    a, b, c = program(run, cut=None)
    run.close()
    assert calls == ["first", "nothing"]
    assert a["rows"][0].tolist() == [0, 1, 2]
    assert a[4] == "x"
    assert b is None
    assert c == 5  # the counter went on from its checkpoint, not from 0
    with Store(tmp_path / "r", read_only=True) as store:
        assert store.metrics("n")["n"].value.tolist() == [1, 2, 3, 4, 5]
        assert store.metrics("n")["n"].stage.tolist() == ["loop"] * 5
        assert [(s["stage"], s["step"]) for s in store.steps()] == [("first", 0), *(("loop", i) for i in range(5))]


def test_steps_after_the_last_checkpoint_are_done_again_and_logged_once(tmp_path):
    run = begin(tmp_path / "r")
    with pytest.raises(Cut):
        run.stage("loop", lambda: count(run, 9, cut=3))  # checkpoint after step 1; step 2 is lost
    run.close()
    run = open_run(tmp_path / "r")
    seen = []

    def body():
        counter = run.track("counter", Counter())
        for clock in run.steps(9):
            seen.append((clock.step, counter.n))
            counter.n += 1
            run.log({"n": counter.n})

    run.stage("loop", body)
    assert seen == [(i, i) for i in range(2, 9)]
    assert run.store.metrics("n")["n"].value.tolist() == list(range(1, 10))
    run.close()


def test_resuming_a_finished_run_does_nothing(tmp_path):
    run = begin(tmp_path / "r")
    run.stage("loop", lambda: count(run, 3))
    run.close()
    with Store(tmp_path / "r", read_only=True) as store:
        before = store.steps()
    checkpoints = sorted((tmp_path / "r" / "checkpoints").iterdir())
    run = open_run(tmp_path / "r")
    assert run.stage("loop", lambda: pytest.fail("it ran again")) == 3
    assert run.store.steps() == before
    assert run.meter.read() == before[-1]["meter"]
    run.close()
    assert sorted((tmp_path / "r" / "checkpoints").iterdir()) == checkpoints


def test_things_tracked_outside_and_in_nested_stages_keep_apart(tmp_path):
    def program(run, cut):
        outer = run.track("counter", Counter(100))

        def inner():
            counter = run.track("counter", Counter())  # the same name, in another stage
            for clock in run.steps(4):
                if clock.step == cut:
                    raise Cut
                counter.n += 1
                outer.n += 1
            return counter.n

        found = run.stage("a", lambda: run.stage("b", inner))
        return found, outer.n

    run = begin(tmp_path / "r")
    with pytest.raises(Cut):
        program(run, 3)
    run.close()
    run = open_run(tmp_path / "r")
    assert program(run, None) == (4, 104)
    assert run.done == ["a/b", "a"]
    run.close()


def test_a_name_can_be_tracked_once_and_again_only_after_its_stage(tmp_path):
    run = begin(tmp_path / "r")
    run.track("x", Counter())
    with pytest.raises(ValueError, match="two things are tracked as 'x'"):
        run.track("x", Counter())
    run.stage("s", lambda: run.track("x", Counter()) and None)
    with run.branch("b"):
        run.track("x", Counter())
    with run.branch("b"):
        run.track("x", Counter())
    run.close()


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(tmp_path, steps):
    run = begin(tmp_path / "r")
    with pytest.raises(UserError, match="steps must be at least 1"):
        list(run.steps(steps))
    run.close()
    with pytest.raises(UserError, match="checkpoint_every must be at least 1"):
        Run(tmp_path / "q", {}, checkpoint_every=steps)


def test_each_step_is_committed_when_it_is_over(tmp_path):
    run = begin(tmp_path / "r")
    for clock in run.steps(3):
        run.log({"a": clock.step})
        run.log({"b": 1.0})
        with Store(tmp_path / "r", read_only=True) as store:
            assert len(store.steps()) == clock.step
    with Store(tmp_path / "r", read_only=True) as store:
        assert store.metrics("a")["a"].value.tolist() == [0, 1, 2]
        assert store.metrics("b")["b"].step.tolist() == [0, 1, 2]
    run.close()


def test_only_the_newest_checkpoints_are_kept_and_leftovers_are_cleared(tmp_path):
    run = begin(tmp_path / "r")
    run.stage("loop", lambda: count(run, 11))
    run.close()
    home = tmp_path / "r" / "checkpoints"
    names = sorted(p.name for p in home.iterdir())
    assert len(names) == KEEP
    assert names[-1] == "000006"  # five in the loop, one when the stage ended
    for left in (".000007.partial", ".000001.old"):
        (home / left).mkdir()
    open_run(tmp_path / "r").close()
    assert sorted(p.name for p in home.iterdir()) == names


def test_torch_draws_the_same_in_a_step_whatever_was_drawn_before(tmp_path):
    def draws(folder, waste):
        run = begin(folder)
        out = []
        for clock in run.steps(3):
            out.append(torch.rand(2))
            torch.rand(waste * clock.step + 1)
        run.close()
        return torch.stack(out)

    assert torch.equal(draws(tmp_path / "a", 0), draws(tmp_path / "b", 7))


def test_seconds_of_a_loop_in_a_branch_are_counted_once(tmp_path):
    import time

    run = begin(tmp_path / "r")
    began = time.perf_counter()
    for _ in run.steps(1):
        with run.branch("b"):
            for _ in run.steps(2):
                time.sleep(0.05)
    assert 0.1 <= run.meter["seconds"] <= time.perf_counter() - began
    run.close()


# --- branches ------------------------------------------------------------------------------------


def everything(run, policy, seat, curriculum):
    """All that a branch must not change."""
    return deepcopy(
        {
            "weights": weights_of(policy),
            "seat": seat.state_dict(),
            "curriculum": curriculum.state_dict(),
            "torch": torch.get_rng_state(),
            "store": run.store.mark(),
            "steps": run.store.steps(),
            "done": run.done,
            "tracked": sorted(run._tracked),
            "stage": run.stage_name,
            "pending": run._pending.metrics,
        }
    )


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b


class Lab:
    """A run in the middle of an `on_policy` stage, with all the state there can be."""

    def __init__(self, folder):
        self.run = begin(folder)
        self.policy = small_lm()
        self.run.track("policy", Weights(self.policy))
        self.roles = {"actor": PolicyAgent(self.policy, limits=LIMITS, meter=self.run.meter)}
        self.seat = Seat(self.policy, Optim(lr=1e-2), 20)
        self.curriculum = Uniform(Echo(slack=2))

    def train(self, steps=2, seat=None, curriculum=None, watch=None):
        on_policy(
            self.run, seat or self.seat, self.roles, steps=steps, curriculum=curriculum or self.curriculum,
            act=sample, score=Echo(slack=2).score, credit=Advantage(), objective=ClippedPG(),
            problems=2, members=4, watch=watch,
        )  # fmt: skip

    def other(self):
        """A few updates of another kind on the same policy."""
        rows = [completion(self.policy.tokenizer, f"{i}=", str(9 - i), self.policy.limit) for i in range(9)]
        fit(self.run, Seat(self.policy, Optim(lr=3e-2), 2), examples(Examples(rows), 4, self.run), NLL(), 2)
        torch.rand(3)

    def state(self):
        return everything(self.run, self.policy, self.seat, self.curriculum)


def test_a_branch_leaves_no_trace_but_its_cost(tmp_path):
    lab = Lab(tmp_path / "r")
    looked = []

    def watch(clock):
        if clock.step != 1:
            return
        lab.run.log({"before": 1.0})
        before, cost = lab.state(), lab.run.meter.read()
        with lab.run.branch("try"):
            assert lab.run.stage_name == "loop/branch:try"
            lab.run.stage("inner", lab.other)
            assert lab.run.stage("again", lambda: 7) == 7
            assert lab.run.stage("again", lambda: pytest.fail("it ran twice")) == 7
            lab.train(3, Seat(lab.policy, Optim(lr=3e-2), 3), Uniform(Echo(slack=2)))
            lab.seat.optimizer.step()
            torch.rand(5)
            assert not equal(lab.state()["weights"], before["weights"])
        assert equal(lab.state(), before)
        spent = lab.run.meter.since(cost)
        assert spent["updates"] > 0
        assert spent["sampled"] > 0
        looked.append(clock.step)

    lab.run.stage("loop", lambda: lab.train(3, watch=watch))
    assert looked == [1]
    lab.run.close()


def test_a_run_with_a_branch_learns_what_it_learns_without_one(tmp_path):
    def final(name, branch):
        lab = Lab(tmp_path / name)

        def watch(clock):
            if branch and clock.step < clock.total:
                with lab.run.branch("try"):
                    lab.other()

        lab.run.stage("loop", lambda: lab.train(3, watch=watch))
        logged = {n: m.value.tolist() for n, m in lab.run.store.metrics().items()}
        lab.run.close()
        return weights_of(lab.policy), logged

    assert equal(final("with", True), final("without", False))


def test_branches_nest(tmp_path):
    lab = Lab(tmp_path / "r")

    def body():
        lab.train()
        outside = lab.state()
        with lab.run.branch("a"):
            lab.other()
            inside = lab.state()
            with lab.run.branch("b"):
                lab.other()
                assert not equal(lab.state()["weights"], inside["weights"])
            assert equal(lab.state(), inside)
            assert not equal(inside["weights"], outside["weights"])
        assert equal(lab.state(), outside)

    lab.run.stage("loop", body)
    lab.run.close()


def test_an_error_in_a_branch_is_raised_and_leaves_no_trace(tmp_path):
    lab = Lab(tmp_path / "r")

    def go_wrong():
        with lab.run.branch("a"):
            for clock in lab.run.steps(3):
                with torch.no_grad():
                    for p in lab.policy.parameters():
                        p.zero_()
                lab.run.log({"junk": 1.0})
                if clock.step == 1:
                    raise Cut

    def body():
        lab.train()
        before = lab.state()
        with pytest.raises(Cut):
            go_wrong()
        assert equal(lab.state(), before)

    lab.run.stage("loop", body)
    assert "junk" not in lab.run.store.metrics()
    lab.run.close()


# --- folders, faults -----------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        begin(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("config", [None, "{half", "\xff", "[1]"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(UserError) as error:
        open_run(tmp_path)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        open_run(tmp_path / "nowhere")


def test_one_process_at_a_time(tmp_path):
    run = begin(tmp_path / "r")
    with pytest.raises(UserError, match="in use by process"):
        open_run(tmp_path / "r")
    script = (
        "import sys; from etude.learning.run import open_run; from etude.experience.errors import UserError\n"
        "try: open_run(sys.argv[1])\nexcept UserError as e: print(e); sys.exit(2)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "r")], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"in use by process {os.getpid()}" in done.stdout
    run.close()
    open_run(tmp_path / "r").close()


def damage(folder):
    file = folder / checkpoint.TREE
    file.write_text(file.read_text().replace("0", "1", 1))


def test_a_damaged_checkpoint_names_its_remedy_which_works(tmp_path):
    run = begin(tmp_path / "r")
    with pytest.raises(Cut):
        run.stage("loop", lambda: count(run, 9, cut=5))  # checkpoints after steps 1 and 3
    run.close()
    newest = sorted((tmp_path / "r" / "checkpoints").iterdir())[-1]
    damage(newest)
    with pytest.raises(UserError) as error:
        open_run(tmp_path / "r")
    said = str(error.value)
    assert f"delete {newest} to go on from the checkpoint before it" in said
    assert "\n" not in said
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    run = open_run(tmp_path / "r")
    assert run.stage("loop", lambda: count(run, 9)) == 9
    assert run.store.metrics("n")["n"].value.tolist() == list(range(1, 10))
    run.close()


def test_a_damaged_or_missing_result_of_a_stage_is_refused(tmp_path):
    run = begin(tmp_path / "r")
    run.stage("collect", lambda: {"rows": 10})
    run.close()
    result = tmp_path / "r" / "stages" / "collect"
    damage(result)
    for _ in range(2):
        run = open_run(tmp_path / "r")
        with pytest.raises(UserError, match=r"stages/collect is damaged: .*begin the run anew"):
            run.stage("collect", lambda: None)
        run.close()
        for file in result.iterdir():
            file.unlink()


@pytest.mark.parametrize("where", ["checkpoint", "shards"])
def test_a_full_disk_is_one_line_and_what_was_saved_goes_on(tmp_path, monkeypatch, where):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def program(run, fill):
        policy = small_lm()
        run.track("policy", Weights(policy))
        roles = {"actor": PolicyAgent(policy, limits=LIMITS)}

        def watch(clock):
            if fill and clock.step == 3:
                if where == "checkpoint":
                    monkeypatch.setattr(checkpoint, "save_file", full)
                else:
                    monkeypatch.setattr(os, "fsync", full)
                    monkeypatch.setattr("etude.experience.store.Shards.flush", full)

        run.stage(
            "loop",
            lambda: on_policy(
                run, Seat(policy, Optim(), 5), roles, steps=5, curriculum=Uniform(Echo()), act=sample,
                score=Echo().score, credit=Advantage(), objective=ClippedPG(), problems=2, members=2, watch=watch,
            ),
        )  # fmt: skip
        logged = {n: m.value.tolist() for n, m in run.store.metrics().items()}
        texts = [t["text"] for t in run.store.trajectories()]
        run.close()
        return weights_of(policy), logged, texts

    run = begin(tmp_path / "r")
    with pytest.raises(UserError) as error:
        program(run, fill=True)
    assert "\n" not in str(error.value)
    run.close()
    monkeypatch.undo()
    resumed = program(open_run(tmp_path / "r"), fill=False)
    assert equal(resumed, program(begin(tmp_path / "whole"), fill=False))


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr("pathlib.Path.write_text", full)
        with pytest.raises(UserError, match="disk is full"):
            begin(tmp_path / "r")
    assert not (tmp_path / "r").exists()
    begin(tmp_path / "r").close()


def test_discard_removes_only_a_run_in_which_nothing_was_done(tmp_path):
    run = begin(tmp_path / "r")
    run.discard()
    assert not (tmp_path / "r").exists()
    run = begin(tmp_path / "r")
    list(run.steps(1))
    run.discard()
    assert (tmp_path / "r" / "config.json").exists()
    run.close()


def test_the_config_is_kept_and_the_seed_is_its_key(tmp_path):
    run = begin(tmp_path / "r")
    assert run.keys == Keys(5)
    run.close()
    assert json.loads((tmp_path / "r" / "config.json").read_text()) == CONFIG
    run = open_run(tmp_path / "r")
    assert run.config == CONFIG
    assert run.checkpoint_every == 2
    run.close()


# --- the whole, cut anywhere ---------------------------------------------------------------------


@pytest.mark.parametrize("cut", [("warm", 3), ("warm", 6), ("rl", 0), ("rl", 3)])
def test_a_cut_run_ends_as_if_it_had_not_been(tmp_path, cut):
    def program(run, cut):
        policy, world = small_lm(1), Echo(slack=2)
        run.track("policy", Weights(policy))
        roles = {"actor": PolicyAgent(policy, limits=LIMITS, meter=run.meter)}
        rows = [completion(policy.tokenizer, f"{i}=", str(i), policy.limit) for i in range(9)]

        def watch(clock):
            if (clock.stage, clock.step) == cut:
                raise Cut

        run.stage(
            "warm",
            lambda: fit(
                run, Seat(policy, Optim(schedule="cosine"), 6), examples(Examples(rows), 4, run), NLL(), 6, watch=watch
            ),
        )
        run.stage(
            "rl",
            lambda: on_policy(
                run, Seat(policy, Optim(), 5), roles, steps=5, curriculum=Uniform(world), act=sample,
                score=world.score, credit=Advantage(), objective=ClippedPG(), problems=2, members=3, watch=watch,
            ),
        )  # fmt: skip
        steps = [(s["stage"], s["step"], {**s["meter"], "seconds": 0}) for s in run.store.steps()]
        logged = {n: m.value.tolist() for n, m in run.store.metrics().items()}
        run.close()
        return weights_of(policy), logged, steps

    run = begin(tmp_path / "cut")
    with pytest.raises(Cut):
        program(run, cut)
    run.close()
    assert equal(program(open_run(tmp_path / "cut"), None), program(begin(tmp_path / "whole"), None))
