"""`etude view` without a browser: runs, comparisons, the catalogue."""

from __future__ import annotations

from pathlib import Path

import pytest

from etude.app.view import methods, runs
from etude.experience.store import Store
from view_pages import client, got, harmless, runs_in, said
from view_stores import HOSTILE, config, plain, step


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs_in(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def web(made):
    return client(made)


def test_runs_are_listed_with_their_state_and_last_accuracy(web):
    page = got(web, "/")
    links = [a["href"] for a in page.all("a")]
    assert {"/run/one", "/run/deep/two", "/run/tree"} <= set(links)
    assert "finished grpo sums 3 6 of 10" in said(page)
    assert "interrupted grpo sums 3 4 of 10" in said(page)
    assert "60.0% [55.0%, 65.0%]" in said(page)
    assert {b["value"] for b in page.all("input")} >= {"one", "deep/two"}
    assert [s["aria-label"] for s in page.all("svg")][:1] == ["held-out accuracy so far"]


def test_a_run_is_shown_with_curves_cost_throughput_categories_and_events(web):
    page = got(web, "/run/one")
    charts = [s["aria-label"] for s in page.all("svg")]
    assert charts[:5] == [
        "held-out accuracy: accuracy against steps",
        *(f"{n}: {n} against steps" for n in ("reward", "loss", "length", "entropy")),
    ]
    assert "odd: nothing to draw yet" in charts
    dots = [(c["data-x"], c["data-y"]) for c in page.all("circle") if c["data-name"] == "sums (test)"]
    assert dots[:3] == [("0", "0.2"), ("2", "0.4"), ("4", "0.6")]
    assert "sampled 600 –" in said(page)
    assert "sampled 200 200" in said(page)  # 100 tokens in half a second
    assert "easy 60.0% [55.0%, 65.0%] 100" in said(page)
    assert "started by a test" in said(page)
    assert "options.credit grpo" in said(page)


def test_throughput_is_over_the_last_steps_and_budgets_are_shown(tmp_path):
    config(tmp_path / "run", budget={"sampled": 4000})
    with Store(tmp_path / "run") as store:
        for i in range(40):
            slow = i < 20
            store.commit("train", i, seconds=2.0 if slow else 1.0, meter={"sampled": 50.0 * (i + 1)}, metrics={"a": 1})
    page = said(got(client(tmp_path), "/run/run"))
    assert "sampled 50 33.33" in page
    assert "sampled 2k 4k (50%)" in page


def test_the_live_part_alone_is_what_a_page_swaps_in(web):
    text = web.get("/run/one?part=live").text
    assert text.startswith('<div id="live" data-state="finished" data-source="/run/one?part=live">')
    assert text.strip() in web.get("/run/one").text


def test_a_run_is_live_while_it_is_written_and_its_numbers_follow(tmp_path):
    config(tmp_path / "run")
    web = client(tmp_path)
    with Store(tmp_path / "run") as store:
        assert 'data-state="live"' in web.get("/run/run").text
        for at in range(3):
            step(store, at, 0.5)
            page = got(web, "/run/run?part=live")
            assert f"steps {at + 1} of 10" in said(page)
            assert f"trajectories {4 * (at + 1)}" in said(page)
        assert "live" in said(got(web, "/"))
    assert 'data-state="interrupted"' in web.get("/run/run?part=live").text


def test_looking_does_not_take_the_lock_of_a_run_that_nobody_writes(tmp_path, monkeypatch):
    plain(tmp_path / "run")
    (tmp_path / "run" / "lock").write_text("999999999")
    monkeypatch.setattr(runs.fcntl, "flock", lambda *_: pytest.fail("took the lock"))
    assert runs.state(tmp_path / "run") == "finished"


def test_runs_are_compared_on_three_axes(web):
    page = got(web, "/compare?run=one&run=deep/two&run=one")
    charts = [s["aria-label"] for s in page.all("svg")]
    assert charts == [f"held-out accuracy: accuracy against {axis}"
                      for axis in ("steps", "tokens sampled", "seconds of learning")]  # fmt: skip
    dots = [(c["data-name"], c["data-x"], c["data-y"]) for c in page.all("circle")]
    assert [d for d in dots if d[0] == "one"] == [
        ("one", x, y) for xs in (("0", "2", "4"), ("0", "200", "400"), ("0", "1", "2"))
        for x, y in zip(xs, ("0.2", "0.4", "0.6"), strict=True)
    ]  # fmt: skip
    assert "deep/two grpo interrupted 4 of 10 40.0% [35.0%, 45.0%]" in said(page)
    logged = got(web, "/compare?run=one&run=deep/two&metric=reward")
    assert {c["data-name"] for c in logged.all("circle")} == {"one", "deep/two"}
    assert web.get("/compare?run=one&metric=nothing").status_code == 400
    assert web.get("/compare?run=none").status_code == 404
    assert web.get("/compare?" + "&".join(f"run={i}" for i in range(13))).status_code == 400
    assert "No runs are chosen" in got(web, "/compare").text


def test_the_catalogue_has_every_method(web):
    from etude.methods.catalog import CATALOG

    page = got(web, "/catalogue")
    links = [a["href"] for a in page.all("a")]
    assert all(f"/catalogue/{slug}" in links for slug in CATALOG)
    assert said(page).count(" works ") == sum(e.works for e in CATALOG.values())
    planned = next(e.slug for e in CATALOG.values() if not e.works)
    assert "planned" in got(web, f"/catalogue/{planned}").text
    assert web.get("/catalogue/no-such-thing").status_code == 404


def test_a_method_is_shown_with_text_options_source_and_claim(web):
    page = got(web, "/catalogue/sec")
    assert "self-evolving curriculum (arXiv 2505.14970" in page.text
    assert "optim.lr" in page.text
    source = Path(methods.find_spec("etude.methods.scheduling.sec").origin).read_text()
    assert [s["id"] for s in page.all("span") if (s.get("id") or "").startswith("L")][-1] == f"L{source.count(chr(10))}"
    assert "What has to hold, in world lock" in said(page)
    assert "It makes no claim yet" in got(web, "/catalogue/sft").text


EVIDENCE = {
    "slug": "sec", "verdict": "confirmed", "note": HOSTILE[0], "seeds": [0, 1],
    "claim": {"metrics": {"success": {"unit": "%"}}},
    "arms": [
        {"name": name, "method": "sec", "role": role, "lr": 0.01, "runs": [{"seed": 0, "values": {}, "cost": 1}],
         "curves": {"success": {"over": "step", "x": [0, 1], "mean": [0, end], "low": [None, 0], "high": [None, 1]}}}
        for name, role, end in (("sec", "method", 0.75), (HOSTILE[1], "baseline", 0.5))
    ],
    "endpoints": [
        {"name": "gain", "role": "effect", "metric": "success", "arms": ["sec", "uniform"], "margin": 0.1,
         "estimate": 0.25, "low": 0.2, "high": 0.3, "holds": True, "why": HOSTILE[2], "ratio": False},
        {"name": "times", "role": "guard", "metric": "half", "arms": ["sec", "uniform"], "margin": 1.5,
         "estimate": 2.0, "low": None, "high": None, "holds": False, "why": "", "ratio": True},
    ],
}  # fmt: skip


def test_evidence_is_drawn(web, monkeypatch):
    monkeypatch.setattr(methods, "read_evidence", lambda slug: EVIDENCE if slug == "sec" else None)
    page = got(web, "/catalogue/sec")
    charts = [s["aria-label"] for s in page.all("svg")]
    assert charts == [
        "differences: estimates with their intervals", "ratios: estimates with their intervals",
        "success: success against steps",
    ]  # fmt: skip
    assert "25% [20%, 30%]" in page.text
    assert "gain effect success sec against uniform 0.1 0.25 0.2 to 0.3 ✓ yes" in said(page)
    assert [c["data-name"] for c in page.all("circle") if c.get("data-x") == "1"] == ["sec", HOSTILE[1]]
    harmless(page)
    monkeypatch.setattr(methods, "read_evidence", lambda slug: {"arms": 3})
    answer = web.get("/catalogue/sec")
    assert answer.status_code == 500
    assert "the evidence of &#39;sec&#39; is damaged" in answer.text
