"""Every pair of parts: most run, the others are refused in a line before anything runs, none crashes."""

import json
from collections import Counter

import pytest

from app_cli import refused, runner
from etude.experience.plugs import names
from etude.lab.matrix import attempt, matrix, refusal
from etude.learning.group_rl import SLOTS

DEFAULTS = {"curriculum": "uniform", "acting": "sample", "reward": "none", "selector": "all", "credit": "grpo",
            "objective": "grpo"}  # fmt: skip


def composed(**named):
    return tuple({**DEFAULTS, **named}.items())


@pytest.fixture(scope="module")
def cells():
    return {frozenset(c.pair): c for c in matrix()}


def test_every_pair_of_two_slots_is_there_once(cells):
    sizes = [len(names(kind)) for kind in SLOTS]
    assert len(cells) == sum(a * b for i, a in enumerate(sizes) for b in sizes[i + 1 :])
    assert all(len({kind for kind, _ in pair}) == 2 for pair in cells)


def test_nothing_crashes_and_no_refusal_comes_too_late(cells):
    assert Counter(c.status for c in cells.values()).keys() == {"runs", "refused"}


def test_every_refusal_is_a_line_that_names_a_part(cells):
    for cell in cells.values():
        assert (cell.why == "") == (cell.status == "runs")
        assert "\n" not in cell.why
        if cell.why:
            assert any(f"{kind} {name!r}" in cell.why for kind, name in cell.pair), cell


@pytest.mark.parametrize(
    ("a", "b", "status", "why"),
    [
        (("curriculum", "sec"), ("objective", "dapo"), "runs", ""),
        (("curriculum", "sec"), ("credit", "rloo"), "runs", ""),
        (("credit", "none"), ("objective", "nft"), "runs", ""),
        (("acting", "best-of-n"), ("objective", "nll"), "runs", ""),
        (("credit", "rloo"), ("objective", "nft"), "refused", "it weighs right and wrong answers itself"),
        (("curriculum", "sec"), ("objective", "nft"), "refused", "advantage"),
        (("acting", "best-of-n"), ("objective", "grpo"), "refused", "selects or bends its samples"),
        (("selector", "all"), ("objective", "nft"), "refused", "only groups that hold both"),
    ],
)
def test_known_pairs(cells, a, b, status, why):
    cell = cells[frozenset((a, b))]
    assert cell.status == status
    assert why in cell.why


def test_a_part_that_raises_is_a_crash_and_not_the_end(monkeypatch):
    monkeypatch.setattr("etude.lab.matrix.train", lambda *_, **__: 1 / 0)
    assert attempt(composed(), 1) == ("crashed", "ZeroDivisionError: division by zero")


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
    some = matrix.__globals__["Cell"]((("credit", "rloo"), ("objective", "nft")), "refused", "no")
    monkeypatch.setattr("etude.lab.matrix.matrix", lambda steps, told: [some])
    said = runner(capfd)("matrix", "--json", "m.json")
    assert said.out.endswith("1 pairs: 0 run, 1 refused, 0 refused while running, 0 crashed\n")
    assert json.loads((tmp_path / "m.json").read_text())[0]["status"] == "refused"
    assert "steps must be at least 1" in refused(runner(capfd)("matrix", "--steps", "0"))
