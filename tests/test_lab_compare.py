"""Comparisons: equal budgets, paired seeds, nothing run twice, the same numbers in every file."""

import csv
import json
from dataclasses import replace

import pytest

from app_cli import refused, runner
from etude.experience.claims import BaseRecipe, Metric
from etude.experience.errors import UserError
from etude.lab.compare import AXES, ENDLESS, compare, job, plan
from etude.lab.readings import read_run
from etude.lab.report import html, plain_report, write_report
from etude.learning.group_rl import GroupRL
from etude.learning.setting import Common
from etude.methods.api import method
from etude.methods.catalog import CATALOG

COMMON = Common(
    world="lock", world_options=("rungs=2",), policy="table:order=2,rows=16,actions=3", base=False, max_tokens=1,
    eval_every=2, eval_problems=12, budget=("tokens=900", "updates=50"),
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    return home, compare(plan(["grpo", "dapo"], COMMON, (0, 1)), workers=2, home=home)


def test_runs_end_within_a_step_of_the_budget(compared):
    _, found = compared
    for side in found.sides:
        for r in side.readings:
            step = 16 * 8 * 2 * 3  # problems, members, turns, draws: the most that a step can sample
            assert 900 <= r.cost["sampled"] < 900 + step


def test_nothing_is_run_twice(compared):
    home, found = compared
    stamps = {p: p.stat().st_mtime_ns for p in home.iterdir()}
    again = compare(plan(["grpo", "dapo"], COMMON, (0, 1)), home=home)
    assert {p: p.stat().st_mtime_ns for p in home.iterdir()} == stamps
    assert plain_report(again) == plain_report(found)
    compare(plan(["grpo", "dapo"], COMMON, (0, 1, 2)), home=home)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert len(list(home.iterdir())) == len(stamps) + 2


def test_an_interrupted_comparison_goes_on_and_ends_as_if_it_had_not_been(compared, tmp_path):
    _, whole = compared
    planned = plan(["grpo", "dapo"], COMMON, (0, 1))

    def interrupt(phase, over, of):
        if over > 1:  # one run is over, another has begun
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(planned, home=tmp_path, told=interrupt)
    first, second, third, last = (planned.jobs[m][s] for s in (0, 1) for m in ("grpo", "dapo"))  # seed by seed
    assert first.finished(tmp_path)
    assert not third.folder(tmp_path).exists()
    assert not last.folder(tmp_path).exists()
    stamp = (first.folder(tmp_path) / "policy").stat().st_mtime_ns
    begun = second.folder(tmp_path) / "config.json"
    before = begun.stat().st_mtime_ns
    resumed = compare(planned, home=tmp_path)
    assert (first.folder(tmp_path) / "policy").stat().st_mtime_ns == stamp
    assert begun.stat().st_mtime_ns == before  # it went on and was not begun anew
    for a, b in zip(resumed.sides, whole.sides, strict=True):
        for one, other in zip(a.readings, b.readings, strict=True):
            assert one.values == other.values
            assert {**one.cost, "seconds": 0} == {**other.cost, "seconds": 0}


def test_the_difference_is_paired_with_the_first(compared):
    _, found = compared
    first, second = found.sides
    assert first.difference is None
    values = [b.values["accuracy"] - a.values["accuracy"] for a, b in zip(first.readings, second.readings, strict=True)]
    assert second.difference.estimate == pytest.approx(sum(values) / 2)
    assert found.categories == ("1", "2")


@pytest.mark.parametrize(
    ("budget", "axis"), [({"sampled": 900.0, "updates": 50.0}, "sampled"), ({"seconds": 9.0}, "seconds"), ({}, "step")]
)
def test_the_area_is_taken_over_what_is_equal(compared, monkeypatch, budget, axis):
    home, found = compared
    asked = set()

    def read(folder, metrics, seed):
        asked.add(metrics["area"])
        return read_run(folder, metrics, seed)

    monkeypatch.setattr("etude.lab.compare.read_run", read)
    compare(replace(found.plan, budget=budget), home=home)  # runs that are finished, whatever ended them
    assert asked == {Metric("evaluation", "accuracy", "area", over=axis, unit="%")}


def test_every_file_says_the_same(compared, tmp_path):
    _, found = compared
    write_report(found, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.csv", "finals.csv", "report.html", "report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    finals = list(csv.DictReader((tmp_path / "finals.csv").open()))
    assert len(finals) == 4
    for row, run in zip(finals, (r for m in report["methods"] for r in m["runs"]), strict=True):
        assert int(row["seed"]) == run["seed"]
        assert float(row["accuracy"]) == pytest.approx(run["values"]["accuracy"], rel=1e-5)
        assert float(row["area"]) == pytest.approx(run["values"]["area"], rel=1e-5)
        assert float(row["sampled"]) == run["cost"]["sampled"]
    curves = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert {r["axis"] for r in curves} == set(AXES)
    for m in report["methods"]:
        for axis, c in m["curves"].items():
            rows = [r for r in curves if (r["method"], r["axis"]) == (m["method"], axis)]
            assert [float(r["mean"]) for r in rows] == pytest.approx(c["mean"], rel=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == len(AXES)
    for m in report["methods"]:
        for of in (m["final"], m["area"]):
            assert f"{100 * of['estimate']:.1f}% ({100 * of['low']:.1f} to {100 * of['high']:.1f})" in page


def test_what_others_wrote_cannot_run_in_the_report(compared):
    _, found = compared
    hostile = "<script>alert(1)</script>"
    reading = found.sides[0].readings[0]
    values = {**reading.values, f"accuracy/{hostile}": 0.5}
    side = replace(found.sides[0], method=hostile, readings=(replace(reading, values=values),))
    planned = replace(found.plan, common=replace(COMMON, world=hostile, policy=hostile))
    page = html(replace(found, plan=planned, categories=(hostile,), sides=(side,)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_world_without_categories_has_no_table_of_them(compared):
    _, found = compared
    assert "<h2>By category</h2>" in html(found)
    assert "<h2>By category</h2>" not in html(replace(found, categories=()))


def test_a_budget_ends_what_steps_would_not():
    assert job("grpo", COMMON, 0, None).options["steps"] == ENDLESS
    assert "steps" not in job("rft", COMMON, 0, None).options  # its steps are a round's
    assert "steps" not in job("grpo", replace(COMMON, budget=()), 0, None).options
    assert job("grpo", COMMON, 0, 7).options["steps"] == 7


@pytest.mark.parametrize("slug", [e.slug for e in CATALOG.values() if e.works])
def test_no_learning_rate_is_timed_by_steps_that_are_raised(slug):
    config = method(slug).config
    if issubclass(config, GroupRL):  # a warm-up over a share of ENDLESS steps would never end
        assert (config().optim.schedule, config().optim.warmup) == ("constant", 0.0)


def test_every_method_starts_where_it_would_alone():
    taught = replace(COMMON, policy="tiny:depth=1", base=True, world="chain_sum", world_options=())
    recipe = job("grpo", taught, 0, None).policy
    assert isinstance(recipe, BaseRecipe)
    assert (recipe.policy, recipe.shape, recipe.world) == ("tiny", {"depth": 1}, "chain_sum")
    assert job("sft", taught, 0, None).policy == "tiny:depth=1"  # from random weights


@pytest.mark.parametrize("slugs", [[], ["grpo"], ["grpo", "grpo"]])
def test_fewer_than_two_methods_are_refused(slugs):
    with pytest.raises(UserError, match="compare takes two or more methods, each once"):
        plan(slugs, COMMON, (0,))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("compare grpo", "compare takes two or more methods"),
        ("compare grpo gppo", "unknown method 'gppo': did you mean "),
        ("compare grpo calm", "planned, not written yet"),
        ("compare grpo dapo --seeds 0,0", "seed 0 is named twice"),
        ("compare grpo dapo --seeds 0", "seeds and jobs must be at least 1"),
        ("compare grpo dapo --budget words=1", "unknown kind of budget 'words'"),
        ("compare grpo dapo --world countdwn --policy table", "unknown world 'countdwn'"),
        ("compare grpo dapo --world lock --world-options rngs=2 --policy table", "did you mean rungs"),
        ("compare grpo dapo --policy tble", "unknown policy 'tble'"),
        ("compare grpo dapo --steps 0", "steps must be at least 1, not 0"),
        ("compare grpo dapo --max-tokens 0", "max_tokens must be at least 1"),
        ("compare grpo dapo --jobs 0", "seeds and jobs must be at least 1"),
        ("compare grpo dapo --world lock", "method 'grpo' cannot be run in world 'lock', which has no oracle"),
        ("compare grpo dapo --out taken", "taken holds something else than a comparison"),
        ("compare grpo dapo --out taken/letter", "cannot make the folder taken/letter: File exists"),
        ("compare grpo dapo --out taken/letter/new", "cannot make the folder taken/letter/new: Not a directory"),
    ],
)
def test_misuse_is_a_line_and_nothing_is_written(words, line, capfd, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("dear")
    assert line in refused(runner(capfd)(*words.split()))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["taken", "taken/letter"]


COMPARED = (
    "compare", "grpo", "nft", "--world", "lock", "--world-options", "rungs=2", "--policy", COMMON.policy, "--no-base",
    "--seeds", "1", "--steps", "2", "--max-tokens", "1", "--eval-problems", "8", "--jobs", "1",
)  # fmt: skip


def test_the_command_prints_tables_and_writes_the_report(capfd, tmp_path):
    said = runner(capfd)(*COMPARED)
    folder = tmp_path / "runs" / "compare-grpo-nft-lock"
    assert said.code == 0, said
    assert "final accuracy by category" in said.out
    assert all(cell in said.out for cell in ("less grpo", "area over step"))
    assert (folder / "report.html").is_file()
    stamp = (folder / "report.json").read_text()
    again = runner(capfd)(*COMPARED, "--json")  # over the report that is there
    report = json.loads(again.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report == json.loads(stamp)
    assert report["methods"][0]["final"]["low"] is None  # one seed has no interval


def test_a_world_that_is_a_path_names_a_folder_here(capfd, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("etude.app.compare._make", made.append)
    monkeypatch.setattr("etude.lab.compare.plan", lambda *_: None)
    monkeypatch.setattr("etude.lab.compare.compare", lambda *_, **__: (_ for _ in ()).throw(UserError("stop")))
    for world in ("../data/sums.jsonl", "retry:countdown"):
        refused(runner(capfd)("compare", "grpo", "dapo", "--world", world))
    assert [p.as_posix() for p in made] == [
        "runs/compare-grpo-dapo-data-sums.jsonl", "runs/compare-grpo-dapo-retry-countdown",
    ]  # fmt: skip
