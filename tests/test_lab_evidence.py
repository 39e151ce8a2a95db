"""Evidence files: written whole, read with suspicion, shown as pages that are never stale."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import etude
from app_cli import refused, runner
from etude.app.evidence import pages, read_all
from etude.experience.errors import UserError
from etude.lab.evidence import current, evidence_folder, plain, read_evidence, write_evidence
from etude.lab.judge import judge, verdict
from etude.lab.pages import evidence_page, plots
from etude.lab.readings import MeanCurve, Reading
from etude.lab.record import record
from etude.lab.verify import ArmResult, Result
from etude.methods.api import claims, method
from etude.methods.catalog import CATALOG

CHECKOUT = Path(etude.__file__).parents[2]


def made_up(slug="sec", better=0.3):
    """The record of a claim whose first arm is `better` than the others, without a run."""
    claim = replace(method(slug).claim, seeds=(0, 1, 2, 3, 4))
    arms = []
    for i, arm in enumerate(claim.arms):
        rows = []
        for seed in claim.seeds:
            base = 0.5 + better * (i == 0) + 0.001 * seed
            rows.append(
                Reading(seed, dict.fromkeys(claim.metrics, base), cost={"sampled": 100.0 + seed, "seconds": 60.0})
            )
        x = np.array([0.0, 5.0, 10.0])
        curve = MeanCurve(x, x / 20, x / 20 - 0.1, x / 20 + 0.1)
        arms.append(ArmResult(arm, 0.1, ((0.1, (0.5,)), (0.2, (math.nan,))), tuple(rows), {"success": curve}))
    readings = {a.arm.name: a.readings for a in arms}
    judged = tuple(judge(e, readings, claim.metrics) for e in claim.endpoints)
    return record(Result(slug, claim, claim.seeds, tuple(arms), judged, verdict(judged, 5), {"sec": "ab"}), "")


@pytest.fixture(scope="module")
def kept():
    return plain(made_up())


def test_what_is_written_is_read_back(kept, tmp_path):
    path = write_evidence(made_up(), tmp_path / "evidence")
    assert path == tmp_path / "evidence" / "sec.json"
    assert read_evidence("sec", tmp_path / "evidence") == kept
    assert read_evidence("nft", tmp_path / "evidence") is None
    assert list(path.parent.iterdir()) == [path]
    assert kept["minutes"] == 5 * len(kept["arms"])  # one a run
    assert kept["arms"][0]["tuning"][1] == [0.2, [None]]  # nan


LEAVES = st.none() | st.booleans() | st.floats() | st.integers(-9, 9) | st.text(max_size=5)


def _nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)


@given(st.recursive(LEAVES, _nested))
def test_plain_values_are_what_json_gives_back(value):
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)


def test_a_file_cut_off_anywhere_is_said_in_a_line(tmp_path):
    path = write_evidence(made_up(), tmp_path)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 2, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"sec.json is cut off or no JSON: run `etude verify sec` again$"):
            read_evidence("sec", tmp_path)


def _without(name):
    return lambda r: r.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(format=2), "has the format 2, not 1: it was written by a newer etude: upgrade etude"),
        (lambda r: r.update(format=0), "has the format 0, not 1: it was written by another etude"),
        (_without("format"), "has the format None"),
        (_without("endpoints"), "lacks 'endpoints'"),
        (lambda r: r.update(arms="none"), "holds 'arms' as str"),
        (lambda r: r.update(slug="nft"), "is of the method 'nft'"),
        (lambda r: r.update(verdict="great"), "has the verdict 'great', which is none"),
        (lambda r: r.update(seeds=[0, 1, 1, 2, 3]), "names a seed twice"),
        (lambda r: r["arms"][0].update(name="other"), "names the arm 'other', which its claim does not have"),
        (lambda r: r["endpoints"][0].update(arms=["sec", "other:m"]), "names the arm 'other', which its claim"),
        (lambda r: r["endpoints"][0].pop("why"), "lacks 'why' in one of its endpoints"),
        (lambda r: r["arms"][1]["runs"].pop(), "has other seeds for the arm 'uniform'"),
    ],
)
def test_a_file_at_odds_with_itself_is_said_in_a_line(kept, tmp_path, change, said):
    broken = deepcopy(kept)
    change(broken)
    (tmp_path / "sec.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=said) as raised:
        read_evidence("sec", tmp_path)
    assert "\n" not in str(raised.value)
    if broken.get("format") == 1 and broken["slug"] == "sec":
        with pytest.raises(ValueError, match="no record of a claim"):
            write_evidence(broken, tmp_path)


def test_a_list_is_no_evidence(tmp_path):
    (tmp_path / "sec.json").write_text("[]")
    with pytest.raises(UserError, match="should hold a JSON object"):
        read_evidence("sec", tmp_path)


def test_evidence_of_another_claim_is_not_current(kept):
    claim = replace(method("sec").claim, seeds=(0, 1, 2, 3, 4))
    assert current(kept, claim)
    assert not current(kept, replace(claim, world="chain"))
    assert not current(kept, None)


def test_where_evidence_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evidence_folder() == CHECKOUT / "evidence"
    Path("evidence").mkdir()
    assert evidence_folder() == Path("evidence")
    assert evidence_folder("other") == Path("other")


def test_the_page_says_what_the_record_says(kept):
    page = evidence_page({"sec": kept})
    assert page.count("\n| ") > 95
    assert f"| 02 | sec | {kept['verdict']} | success over uniform draws | 30 points (30 to 30) |" in page
    assert kept["note"] in page
    for e in kept["endpoints"]:
        assert e["why"] in page
    assert page == evidence_page({"sec": kept})
    assert all(text.startswith("<svg") for text in plots(kept).values())


def test_the_command_prints_every_method_and_its_verdict(kept, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    etude_ = runner(capfd)
    write_evidence(kept, "evidence")
    said = etude_("evidence")
    assert said.code == 0
    assert all(f" {slug} " in said.out for slug in CATALOG)
    assert said.out.strip().endswith(f"1 {kept['verdict']}")
    assert len(json.loads(etude_("evidence", "--json").out)) == len(CATALOG)
    assert "there is no docs/ here" in refused(etude_("evidence", "--write"))
    Path("docs").mkdir()
    assert etude_("evidence", "--write").code == 0
    assert Path("docs/EVIDENCE.md").read_text() == evidence_page({"sec": kept})
    drawn = sorted(Path("docs/evidence").glob("*.svg"))
    Path("docs/evidence/gone.svg").write_text("<svg/>")
    assert "removed docs/evidence/gone.svg" in etude_("evidence", "--write").out
    assert sorted(Path("docs/evidence").glob("*.svg")) == drawn
    assert "evidnce is not a folder of evidence files" in refused(etude_("evidence", "--folder", "evidnce"))
    Path("evidence/sec.json").write_text("{")
    assert "sec.json is cut off" in refused(etude_("evidence"))


def test_the_pages_of_the_checkout_are_not_stale(monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    records = read_all(None)
    for path, text in pages(records).items():
        stale = not path.is_file() or path.read_text() != text
        assert not stale, f"{path} is stale: run `etude evidence --write`"
    assert {p for p in pages(records) if p.suffix == ".svg"} == set(Path("docs/evidence").glob("*.svg"))


def test_the_evidence_of_the_checkout_is_of_the_claims_as_they_stand():
    for name, found in read_all(str(CHECKOUT / "evidence")).items():
        assert current(found, claims(name)[name]), f"the claim {name} has changed: run `etude verify {name}` again"
