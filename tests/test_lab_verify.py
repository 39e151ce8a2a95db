"""Claims that are run: nothing twice, interrupted ones go on, arms stay paired, learning rates are chosen apart."""

import json
import pickle
import sqlite3
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest

from etude.app.verify import chosen
from etude.experience.claims import Arm, BaseRecipe, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.experience.store import Store
from etude.lab.code import _bare, code_digest
from etude.lab.jobs import Job, run_jobs
from etude.lab.readings import read_run
from etude.lab.record import record
from etude.lab.verify import Bench, quick
from etude.methods.api import claims, method
from etude.methods.catalog import CATALOG, load
from etude.methods.method import Method

SMALL = {"steps": 4, "problems": 4, "members": 4, "max_tokens": 1, "eval_every": 2, "eval_problems": 12}
CLAIM = Claim(
    says="More answers a problem help.",
    world="lock",
    world_options={"rungs": 2},
    policy="table:order=2,rows=16,actions=3",
    options=SMALL,
    arms=(Arm("many", "grpo", {"members": 8}), Arm("few", "grpo", role="baseline")),
    metrics={
        "success": Metric("evaluation", "accuracy", unit="%"),
        "tokens": Metric("cost", "sampled", better="lower"),
    },
    endpoints=(Endpoint("success", "effect", "success", ("many", "few"), 0.05),),
    tune="success",
    grid=(0.01, 0.1),
    seeds=(0, 1),
    tuning_seeds=(100,),
)


def heard_of(jobs, home, workers=1, **more):
    """Runs jobs; returns those that took any time."""
    ran = set()
    failed = run_jobs(jobs, home, workers, lambda job, share: share < 1 and ran.add(job.folder(home).name), **more)
    return ran, failed


def dump(folder):
    """Everything a store holds but when it was made and how long that took."""
    db = sqlite3.connect(folder / "store.sqlite")
    tables = ("metrics", "problems", "trajectories", "evaluations", "items")
    rows = [db.execute(f"SELECT * FROM {t}").fetchall() for t in tables]
    db.close()
    return repr(rows), [p.read_bytes() for p in sorted((folder / "shards").iterdir())]


def weights(folder):
    return b"".join(p.read_bytes() for p in sorted((folder / "policy").glob("*.safetensors")))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    said = []
    made = Bench(CLAIM, 2, home, lambda phase, over, of: said.append((phase, over, of)))
    return made, made.run("made-up", CLAIM.seeds), said


def test_every_arm_chooses_its_learning_rate_on_the_tuning_seeds(bench):
    _, result, _ = bench
    for arm in result.arms:
        scores = {lr: np.mean(values) for lr, values in arm.tuning}
        assert list(scores) == [0.01, 0.1]
        assert scores[arm.lr] == max(scores.values())
        assert [r.seed for r in arm.readings] == [0, 1]


def test_progress_ends_with_every_run_over(bench):
    _, _, said = bench
    assert [s for s in said if s[0] == "tuning"][-1] == ("tuning", 4.0, 4)
    assert said[-1] == ("seeds", 4.0, 4)


def test_nothing_is_run_twice(bench):
    made, result, _ = bench
    folders = {p: p.stat().st_mtime_ns for p in made.home.iterdir()}
    assert len(folders) == 8
    again = Bench(CLAIM, 1, made.home).run("made-up", CLAIM.seeds)
    assert {p: p.stat().st_mtime_ns for p in made.home.iterdir()} == folders
    assert [a.readings for a in again.arms] == [a.readings for a in result.arms]


def test_another_seed_adds_only_its_own_runs(bench):
    made, _, _ = bench
    before = set(made.home.iterdir())
    Bench(CLAIM, 1, made.home).run("made-up", (0, 1, 2))
    assert len(set(made.home.iterdir()) - before) == 2


def test_the_number_of_runs_at_once_changes_no_result(bench, tmp_path):
    made, _, _ = bench
    job = made.job(CLAIM.arms[0], 0)
    run_jobs([job], tmp_path, 1, lambda *_: None)
    assert dump(job.folder(tmp_path)) == dump(job.folder(made.home))
    assert weights(job.folder(tmp_path)) == weights(job.folder(made.home))


def test_the_record_is_json_that_says_everything(bench):
    _, result, _ = bench
    kept = json.loads(json.dumps(record(result, "")))
    assert kept["verdict"] == "undecided"  # two seeds are no five
    assert kept["claim"] == json.loads(json.dumps(CLAIM.plain()))
    assert [a["name"] for a in kept["arms"]] == ["many", "few"]
    run = kept["arms"][0]["runs"][0]
    assert set(run["values"]) == {"success", "tokens"}
    assert len(run["items"]["success"]) == 12
    assert len(kept["items"]["success"]) == 12
    assert np.mean(run["items"]["success"]) == pytest.approx(run["values"]["success"])
    assert run["cost"]["sampled"] == run["values"]["tokens"] > 0
    assert kept["arms"][0]["curves"]["success"]["x"] == [0, 2, 4]
    assert "does not hold" in kept["note"] or "holds" in kept["note"]
    assert record(result, "Why.")["note"] == "Why."


def test_budgets_end_the_runs_of_every_arm(tmp_path):
    claim = replace(CLAIM, equal={"sampled": 120, "updates": 3}, grid=())
    result = Bench(claim, 1, tmp_path).run("made-up", (0,))
    many, few = (a.readings[0].cost for a in result.arms)
    assert 120 <= many["sampled"] < 120 + 4 * 8 * 2  # at most a step beyond its cap
    assert many["updates"] <= 3
    assert few["updates"] == 3
    assert few["sampled"] < 120


def test_a_shared_stage_is_run_once_a_seed(tmp_path):
    warm = Arm("warm", "grpo", {"steps": 2}, role="stage")
    arms = (warm, *(replace(a, after="warm") for a in CLAIM.arms))
    claim = replace(CLAIM, arms=arms, grid=())
    result = Bench(claim, 2, tmp_path).run("made-up", (0, 1))
    assert [a.arm.name for a in result.arms] == ["many", "few"]
    assert len(list(tmp_path.iterdir())) == 2 + 4
    starts = [json.loads((p / "config.json").read_text())["common"]["policy"] for p in tmp_path.glob("*-0-*")]
    assert len({s for s in starts if s != CLAIM.policy}) == 1


def test_an_arm_takes_the_policies_of_others(tmp_path):
    """Options named in `uses` hold the folder of that arm's policy at the same seed, and decide the run's name."""
    first, second = (
        Arm(n, "grpo", {"steps": 2, "optim": {"lr": lr}}, role="stage") for n, lr in (("p", 0.1), ("q", 0.2))
    )
    arms = (first, second, Arm("many", "grpo", after="q", uses={"name_of_file": "p"}), CLAIM.arms[1])
    bench = Bench(replace(CLAIM, arms=arms), 1, tmp_path)
    job = bench.job(arms[2], 0)
    assert job.uses["name_of_file"].digest == bench.job(first, 0).digest
    assert job.digest != replace(job, uses={"name_of_file": bench.job(second, 0)}).digest
    assert job.digest != bench.job(replace(arms[2], uses={}), 0).digest
    # The option does not exist, so the run that got it says so, after both stages were run.
    with pytest.raises(UserError, match="arm 'many', seed 0: unknown option 'name_of_file'"):
        run_jobs([job], tmp_path, 1, lambda *_: None)
    assert sorted(json.loads((p / "config.json").read_text())["name"] for p in tmp_path.iterdir()) == ["p", "q"]


def test_a_stage_that_names_its_learning_rate_keeps_it(tmp_path):
    warm = Arm("warm", "grpo", {"steps": 2, "optim": {"lr": 0.03}}, role="stage")
    arms = (warm, *(replace(a, after="warm") for a in CLAIM.arms))
    bench = Bench(replace(CLAIM, arms=arms), 1, tmp_path)
    assert sorted(bench.tune()) == ["few", "many"]
    assert bench.job(arms[1], 0).after.options["optim"] == {"lr": 0.03}


def test_an_arm_that_draws_ten_times_more_shifts_no_other(tmp_path, monkeypatch):
    """Problems, base model, shared stage and every draw of the other arm, bit for bit."""
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache"))
    recipe = BaseRecipe(
        "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, policy="tiny",
        shape={"width": 32, "depth": 1, "heads": 2, "ffn": 64, "limit": 64}, until=(0.07, 0.10), batch=32, lr=5e-3,
        max_steps=150, check_every=10, check_problems=64, max_tokens=8,
    )  # fmt: skip
    options = {"steps": 2, "problems": 4, "max_tokens": 8, "eval_every": 0, "eval_problems": 4,
               "world": recipe.world, "world_options": dict(recipe.options)}  # fmt: skip

    def jobs(members):
        warm = Job("warm", 3, "sft", recipe, {**options, "batch": 8} | {"problems": 16})
        warm = replace(warm, options={k: v for k, v in warm.options.items() if k != "problems"})
        return [Job(f"of {m}", 3, "grpo", recipe, {**options, "members": m}, warm) for m in members]

    alone, beside = tmp_path / "alone", tmp_path / "beside"
    (quiet,) = jobs([4])
    run_jobs([quiet], alone, 1, lambda *_: None)
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache2"))  # the base is taught anew
    loud, quiet = jobs([40, 4])
    run_jobs([loud, quiet], beside, 2, lambda *_: None)
    for job in (quiet.after, quiet):
        assert dump(job.folder(alone)) == dump(job.folder(beside))
        assert weights(job.folder(alone)) == weights(job.folder(beside))
    bases = [sorted((tmp_path / c / "base").glob("*/model.safetensors")) for c in ("cache", "cache2")]
    assert [len(b) for b in bases] == [1, 1]
    assert bases[0][0].read_bytes() == bases[1][0].read_bytes()

    def asked(job, home):
        with Store(job.folder(home), read_only=True) as store:
            return [(r["step"], r["grp"], r["problem_id"]) for r in store.trajectories(member=0, limit=None)]

    assert asked(loud, beside) == asked(quiet, beside)


def test_an_interrupted_claim_goes_on(tmp_path):
    """Killed with a run half done: its worker ends too, and the next call does the rest, to the same end."""
    script = tmp_path / "long.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom etude.lab.jobs import Job, run_jobs\n"
        f"options = { ({**SMALL, 'world': 'lock', 'steps': 60, 'checkpoint_every': 2})!r}\n"
        "jobs = [Job('a', s, 'grpo', 'table:order=2,rows=16,actions=3', options) for s in (0, 1)]\n"
        "if __name__ == '__main__':\n"
        "    run_jobs(jobs, Path(sys.argv[1]), 1, lambda job, share: print(share, flush=True))\n"
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([sys.executable, script, whole], check=True, capture_output=True, timeout=120)
    process = subprocess.Popen([sys.executable, script, cut], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if float(line) > 0.2:
            break
    worker = next(p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline()))
    process.kill()
    process.wait()
    worker.wait(timeout=10)
    assert not all((p / "policy").is_dir() for p in cut.iterdir())
    subprocess.run([sys.executable, script, cut], check=True, capture_output=True, timeout=120)
    for folder in whole.iterdir():
        assert dump(folder) == dump(cut / folder.name)
        assert weights(folder) == weights(cut / folder.name)


def test_a_run_that_fails_says_which_arm_and_seed(tmp_path):
    bad = Job("broken", 5, "grpo", "table", {**SMALL, "world": "no such world"})
    with pytest.raises(UserError, match="arm 'broken', seed 5: unknown world 'no such world'"):
        run_jobs([bad], tmp_path, 1, lambda *_: None)
    _, failed = heard_of([bad], tmp_path, failing=True)
    assert "unknown world" in failed[bad.digest]


def test_a_run_in_use_by_another_process_is_said_in_a_line(tmp_path):
    job = Job("a", 0, "grpo", "table:order=2,rows=16,actions=3", {**SMALL, "world": "lock"})
    run_jobs([job], tmp_path, 1, lambda *_: None)
    (job.folder(tmp_path) / "policy").rename(tmp_path / "gone")  # as if it had not ended
    with Store(job.folder(tmp_path)), pytest.raises(UserError, match=r"arm 'a', seed 0: .* is in use by process"):
        run_jobs([job], tmp_path, 1, lambda *_: None)


def test_a_job_is_known_by_all_that_decides_its_run():
    job = Job("a", 0, "grpo", "tiny", {"x": 1})
    same = replace(job, arm="another name")
    others = [
        replace(job, seed=1), replace(job, method="dapo"), replace(job, policy="small"), replace(job, options={"x": 2}),
        replace(job, after=job), replace(job, policy=BaseRecipe("chain")),
    ]  # fmt: skip
    assert same.digest == job.digest
    assert len({job.digest, *(o.digest for o in others)}) == 7


@pytest.mark.parametrize(
    "place", [{"policy": "x"}, {"world": "x"}, {"chosen": "x"}, {"reward": ("x:f",)}, {"judge": {"who": "x"}}]
)
def test_a_job_is_known_by_the_files_it_reads(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    if "policy" in place:  # a folder
        path.mkdir()
        path /= "weights"

    def digest():
        return Job("a", 0, "grpo", place.get("policy", "tiny"), {} if "policy" in place else place).digest

    path.write_text("1")
    before = digest()
    assert digest() == before
    path.write_text("2")
    assert digest() != before


def test_a_job_crosses_to_its_worker_with_all_its_defaults():
    job = Job("a", 0, "grpo", BaseRecipe("chain_sum"), after=Job("b", 0, "sft", "tiny"))
    assert pickle.loads(pickle.dumps(job)).digest == job.digest


def test_code_is_known_by_what_it_does():
    import ast

    def bare(text):
        return _bare(ast.parse(text))

    plain = bare("def f(x):\n    return x + 1\n")
    assert (
        bare('"""Doc."""\n# why\n\ndef f(x):\n    "Says."\n    return x+1\nCLAIM = Claim(3)\nMETHOD = Method(4)\n')
        == plain
    )
    assert bare("def f(x):\n    return x + 2\n") != plain
    assert code_digest("etude.methods.reward.grpo") != code_digest("etude.methods.reward.dapo")


CLAIMS = {name: c for e in CATALOG.values() if e.works for name, c in load(e.slug).METHOD.claims.items()}


@pytest.mark.parametrize("name", CLAIMS)
def test_the_claims_of_the_catalogue_are_sound_and_their_smoke_runs_small(name):
    claim = CLAIMS[name]
    assert len(claim.seeds) >= 5
    small = quick(claim)
    assert (len(small.seeds), small.grid, small.equal["updates"]) == (2, (), 4)
    roles = {e.role for e in claim.endpoints}
    assert "effect" in roles or "." in name  # a further claim may be a guard alone
    for arm in claim.arms:
        method(arm.method)


def test_claims_by_name():
    assert list(claims("sec")) == list(claims("sec.main")) == ["sec"]
    more = Method("sec", type(None), lambda s, c: None, claim=CLAIM, more={"other": CLAIM})
    assert list(more.claims) == ["sec", "sec.other"]
    assert Method("sec", type(None), lambda s, c: None).claims == {}
    with pytest.raises(UserError, match="method 'sft' has no claim"):
        claims("sft")
    with pytest.raises(UserError, match=r"unknown claim 'sec\.mergin'"):
        claims("sec.mergin")


def test_the_claims_that_are_asked_for():
    assert {"nft"} <= set(chosen((), "reward")) <= set(CLAIMS)
    assert list(chosen(("sec", "nft", "sec"), None)) == ["sec", "nft"]
    for names, family, said in (
        ((), None, "name a method or a --family"),
        ((), "rewrad", "unknown family 'rewrad'"),
        ((), "analysis", "no method of the family analysis makes one yet"),
    ):
        with pytest.raises(UserError, match=said):
            chosen(names, family)


ARMS = (Arm("a", "grpo"), Arm("b", "grpo"))


def made(**changes):
    endpoints = (Endpoint("e", "effect", "m", ("a", "b")),)
    given = {"says": "", "world": "lock", "policy": "table", "arms": ARMS, "metrics": {"m": Metric("log", "loss")},
             "endpoints": endpoints, "tune": "m", **changes}  # fmt: skip
    return Claim(**given)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: made(endpoints=(Endpoint("e", "effect", "m", ("a", "sft")),)), "unknown arm of endpoint 'e', 'sft'"),
        (lambda: made(endpoints=(Endpoint("e", "effect", "n", ("a", "b")),)), "unknown metric of endpoint 'e', 'n'"),
        (lambda: made(tune="n"), "unknown metric to tune on, 'n'"),
        (lambda: made(seeds=(0, 0)), "seeds must be different numbers"),
        (lambda: made(seeds=(0, 1000)), "tuning seeds must not be among"),
        (lambda: made(arms=(ARMS[0], ARMS[0])), "two arms of a claim are called alike"),
        (
            lambda: made(arms=(replace(ARMS[0], after="b"), ARMS[1])),
            "takes the policy of 'b', which must be an arm listed before",
        ),
        (lambda: Endpoint("e", "effect", "m", ("a",)), "contrasts two arms"),
        (lambda: Endpoint("e", "effect", "m", ("a", "b"), equal=True), "equal goes with role=vanish"),
        (lambda: Endpoint("e", "effect", "m", ("a", "b"), -1), "margin must be at least 0"),
        (lambda: Endpoint("e", "effect", "m", ("a", "b"), 0.5, ratio=True), "margin must be at least 1"),
        (lambda: Metric("log", "m", "steps"), "a threshold goes with reduce=steps"),
        (lambda: Metric("log", "m", "median"), "unknown reduction 'median'"),
    ],
)
def test_claims_that_cannot_be_measured_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_reading_of_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path, CLAIM.metrics, 0)
