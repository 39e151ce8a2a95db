"""Comparisons: equal budgets, paired seeds, nothing run twice, the same numbers in every file."""

import csv
import json
from dataclasses import replace

import pytest

from app_cli import refused, runner
from etude.experience.claims import BaseRecipe
from etude.experience.errors import UserError
from etude.lab.compare import AXES, ENDLESS, compare, job
from etude.lab.report import html, plain_report, write_report
from etude.learning.setting import Common

COMMON = Common(
    world="lock", world_options=("rungs=2",), policy="table:order=2,rows=16,actions=3", base=False, max_tokens=1,
    eval_every=2, eval_problems=12, budget=("tokens=900", "updates=50"),
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    return home, compare(["grpo", "dapo"], COMMON, (0, 1), workers=2, home=home)


def test_runs_end_within_a_step_of_the_budget(compared):
    _, found = compared
    for side in found.sides:
        for r in side.readings:
            step = 16 * 8 * 2 * 3  # problems, members, turns, draws: the most that a step can sample
            assert 900 <= r.cost["sampled"] < 900 + step


def test_nothing_is_run_twice(compared):
    home, found = compared
    stamps = {p: p.stat().st_mtime_ns for p in home.iterdir()}
    again = compare(["grpo", "dapo"], COMMON, (0, 1), home=home)
    assert {p: p.stat().st_mtime_ns for p in home.iterdir()} == stamps
    assert plain_report(again) == plain_report(found)
    compare(["grpo", "dapo"], COMMON, (0, 1, 2), home=home, workers=2)
    assert len(list(home.iterdir())) == len(stamps) + 2


def test_the_difference_is_paired_with_the_first(compared):
    _, found = compared
    first, second = found.sides
    assert first.difference is None
    values = [b.values["accuracy"] - a.values["accuracy"] for a, b in zip(first.readings, second.readings, strict=True)]
    assert second.difference.estimate == pytest.approx(sum(values) / 2)
    assert found.categories == ("1", "2")


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
        assert f"{100 * m['final']['estimate']:.1f}%" in page


def test_what_others_wrote_cannot_run_in_the_report(compared):
    _, found = compared
    hostile = "<script>alert(1)</script>"
    reading = found.sides[0].readings[0]
    values = {**reading.values, f"accuracy/{hostile}": 0.5}
    side = replace(found.sides[0], readings=(replace(reading, values=values),))
    page = html(replace(found, categories=(hostile,), common=replace(COMMON, world=hostile), sides=(side,)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_budget_ends_what_steps_would_not():
    assert job("grpo", COMMON, 0, None).options["steps"] == ENDLESS
    assert "steps" not in job("rft", COMMON, 0, None).options  # its steps are a round's
    assert "steps" not in job("grpo", replace(COMMON, budget=()), 0, None).options
    assert job("grpo", COMMON, 0, 7).options["steps"] == 7


def test_every_method_starts_where_it_would_alone():
    taught = replace(COMMON, policy="tiny:depth=1", base=True, world="chain_sum", world_options=())
    recipe = job("grpo", taught, 0, None).policy
    assert isinstance(recipe, BaseRecipe)
    assert (recipe.policy, recipe.shape, recipe.world) == ("tiny", {"depth": 1}, "chain_sum")
    assert job("sft", taught, 0, None).policy == "tiny:depth=1"  # from random weights


@pytest.mark.parametrize("slugs", [[], ["grpo"], ["grpo", "grpo"]])
def test_fewer_than_two_methods_are_refused(slugs, tmp_path):
    with pytest.raises(UserError, match="compare takes two or more methods, each once"):
        compare(slugs, COMMON, (0,), home=tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("compare grpo", "compare takes two or more methods"),
        ("compare grpo gppo", "unknown method 'gppo': did you mean "),
        ("compare grpo calm", "planned, not written yet"),
        ("compare grpo dapo --seeds 0,0", "seed 0 is named twice"),
        ("compare grpo dapo --seeds 0", "seeds and jobs must be at least 1"),
        ("compare grpo dapo --budget words=1", "unknown kind of budget 'words'"),
        ("compare grpo dapo --world countdwn --policy table --jobs 1", "unknown world 'countdwn'"),
        ("compare grpo dapo --out taken", "taken holds something else than a comparison"),
    ],
)
def test_misuse_is_a_line(words, line, capfd, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("dear")
    said = refused(runner(capfd)(*words.split()))
    assert line in said


def test_the_command_prints_tables_and_writes_the_report(capfd, tmp_path):
    said = runner(capfd)(
        "compare", "grpo", "nft", "--world", "lock", "--world-options", "rungs=2", "--policy", COMMON.policy,
        "--no-base", "--seeds", "1", "--steps", "2", "--max-tokens", "1", "--eval-problems", "8", "--jobs", "2",
        "--out", "cmp",
    )  # fmt: skip
    assert said.code == 0, said
    assert "final accuracy by category" in said.out
    assert (tmp_path / "cmp" / "report.html").is_file()
