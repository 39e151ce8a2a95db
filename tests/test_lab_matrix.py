"""Every pair of parts: most run, the others are refused in a line before anything runs, none crashes."""

import json
import re
from collections import Counter

import pytest

import etude.lab.matrix
from app_cli import refused, runner
from etude.app.matrix import counts
from etude.experience.errors import UserError
from etude.experience.plugs import names
from etude.lab.matrix import Cell, attempt, matrix, refusal
from etude.learning.group_rl import SLOTS

SMALL_STEP = 2  # updates: of two steps with two minibatches each, one step may have drawn nothing to learn from
DEFAULTS = {"curriculum": "uniform", "acting": "sample", "reward": "none", "selector": "all", "credit": "grpo",
            "objective": "grpo"}  # fmt: skip


def composed(**named):
    return tuple({**DEFAULTS, **named}.items())


@pytest.fixture(scope="module")
def ran():
    """Every pair's cell, and how many updates each composition made that was run."""
    updates, train = [], etude.lab.matrix.train

    def counted(*args, **options):
        run = train(*args, **options)
        if options["shaping"] != "truncation":  # cuts every answer of a policy that has no token to end one with
            updates.append(run.meter["updates"])
        return run

    with pytest.MonkeyPatch.context() as m:
        m.setattr("etude.lab.matrix.train", counted)
        return {frozenset(c.pair): c for c in matrix()}, updates


@pytest.fixture
def cells(ran):
    return ran[0]


def test_every_pair_of_two_slots_is_there_once(cells):
    sizes = [len(names(kind)) for kind in SLOTS]
    assert len(cells) == sum(a * b for i, a in enumerate(sizes) for b in sizes[i + 1 :])
    assert all(len({kind for kind, _ in pair}) == 2 for pair in cells)


def test_nothing_crashes_and_no_refusal_comes_too_late(cells):
    assert Counter(c.status for c in cells.values()).keys() == {"runs", "refused"}


def test_what_runs_learns(ran):
    cells, updates = ran
    assert len(updates) < len(cells) / 5  # one composition covers many pairs
    assert min(updates) >= SMALL_STEP


def test_every_refusal_is_a_line_about_its_own_pair(cells):
    for cell in cells.values():
        assert (cell.why == "") == (cell.status == "runs")
        assert "\n" not in cell.why
        if cell.why:
            named = [f"{kind} {name!r}" in cell.why for kind, name in cell.pair]
            # or about one of them, where the other admits no third part that would do
            third = r" needs [a-z_]+, which nothing here gives| selects or bends its samples"
            assert all(named) or (any(named) and re.search(third, cell.why)), cell


@pytest.mark.parametrize(
    ("a", "b", "status", "why"),
    [
        (("curriculum", "sec"), ("objective", "dapo"), "runs", ""),
        (("curriculum", "sec"), ("credit", "rloo"), "runs", ""),
        (("credit", "none"), ("objective", "nft"), "runs", ""),
        (("acting", "best-of-n"), ("objective", "nll"), "runs", ""),
        (("credit", "rloo"), ("objective", "nll"), "refused",
         "advantage, which credit 'rloo' gives: it imitates every answer alike"),
        (("credit", "rloo"), ("objective", "nft"), "refused",
         "advantage, which credit 'rloo' gives: it weighs right and wrong answers itself"),
        (("curriculum", "sec"), ("objective", "nft"), "refused", "advantage, which curriculum 'sec' needs"),
        (("acting", "best-of-n"), ("objective", "grpo"), "refused", "selects or bends its samples"),
        (("acting", "best-of-n"), ("objective", "nft"), "refused", "selects or bends its samples"),
        (("selector", "all"), ("objective", "nft"), "refused", "tied, which selector 'all' gives"),
        (("credit", "none"), ("objective", "dapo"), "refused", "'dapo' needs advantage, which nothing here gives"),
        (("curriculum", "uniform"), ("objective", "dpo"), "refused", "'dpo' needs pairs, which nothing here gives"),
    ],
)  # fmt: skip
def test_known_pairs(cells, a, b, status, why):
    cell = cells[frozenset((a, b))]
    assert cell.status == status
    assert why in cell.why


def test_a_part_that_raises_is_a_crash_and_not_the_end(monkeypatch):
    monkeypatch.setattr("etude.lab.matrix.train", lambda *_, **__: 1 / 0)
    assert attempt(composed(), 1) == ("crashed", "ZeroDivisionError: division by zero")


def test_a_failure_is_the_worst_that_came_of_its_pairs(monkeypatch):
    said = iter([UserError("too late"), None])  # then only crashes

    def train(*_, **__):
        if error := next(said, ZeroDivisionError("x")):
            raise error

    monkeypatch.setattr("etude.lab.matrix.train", train)
    found = matrix()
    n = Counter(c.status for c in found)
    assert 0 < n["refused while running"] < 15  # of the first composition's pairs, those that no other holds
    assert 0 < n["runs"] < 15  # likewise of the second's
    assert all(c.why == "ZeroDivisionError: x" for c in found if c.status == "crashed")
    assert counts(found).endswith(f", {n['refused while running']} refused while running, {n['crashed']} crashed")


def test_three_parts_may_not_fit_though_two_do():
    assert refusal(composed(curriculum="sec", objective="dapo", credit="rloo")) == ""
    assert "needs advantage" in refusal(composed(curriculum="sec", objective="nll", credit="none"))


def test_the_command_line_runs_what_fits_and_refuses_the_rest(capfd, tmp_path):
    etude = runner(capfd)
    shared = ("train", "group-rl", "--world", "lock", "--policy", "table:order=2,rows=16,actions=6",
              "--no-base", "--steps", "2", "--problems", "4", "--max-tokens", "1", "--eval-problems", "8",
              "--out", "run")  # fmt: skip
    said = refused(etude(*shared, "--objective", "nft", "--credit", "rloo", "--selector", "mixed"))
    assert said.startswith("etude: objective 'nft' cannot be used with advantage, which credit 'rloo' gives")
    assert not (tmp_path / "run").exists()
    parts = ("--curriculum", "sec", "--objective", "dapo", "--credit", "rloo", "--act", "sample")
    assert etude(*shared, *parts, "--json").code == 0


def test_the_command_prints_counts_and_writes_every_pair(capfd, tmp_path, monkeypatch):
    some = [Cell((("credit", "rloo"), ("objective", "nft")), "refused", "no"),
            Cell((("credit", "none"), ("objective", "nft")), "runs")]  # fmt: skip
    monkeypatch.setattr("etude.lab.matrix.matrix", lambda steps, told: some)
    said = runner(capfd)("matrix", "--json", "m.json")
    assert said.out.endswith("2 pairs: 1 run, 1 refused, 0 crashed\n")
    assert [c["status"] for c in json.loads((tmp_path / "m.json").read_text())] == ["refused", "runs"]
    assert "steps must be at least 1, not 0" in refused(runner(capfd)("matrix", "--steps", "0"))
