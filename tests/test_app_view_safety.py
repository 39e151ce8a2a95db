"""`etude view` without a browser: hostile text, foreign hosts, headers, paths and damage."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest

from etude.app.view.server import POLICY
from etude.experience.store import Store
from view_pages import NAME, Page, client, got, harmless, runs_in, said
from view_stores import ALL, HOSTILE, plain


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs_in(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def web(made):
    return client(made)


@pytest.mark.parametrize(
    "view", ["", "?part=live", "/trajectories", "/trajectories?contains=%3Cscript%3E", "/trajectory/1",
             "/trajectory/1?colour=advantage"],
)  # fmt: skip
def test_hostile_text_stays_text_in_every_view(web, view):
    page = got(web, f"/run/{quote(NAME)}{view}")
    harmless(page)
    if not view.startswith("?"):
        assert NAME in page.text
    if "part" not in view and "contains" not in view:
        assert HOSTILE[0] in page.text


def test_hostile_names_in_lists_comparisons_and_errors(web):
    for url in (
        "/", f"/compare?run={quote(NAME)}", f"/compare?run={quote(NAME)}&metric={quote(ALL)}",
    ):  # fmt: skip
        page = got(web, url)
        harmless(page)
        assert NAME in page.text
    for url in (f"/run/{quote(ALL)}", f"/catalogue/{quote(HOSTILE[0], safe='')}", f"/{quote(ALL)}",
                f"/run/one/trajectories?low={quote(ALL)}", f"/run/one/trajectory/1?colour={quote(ALL)}"):  # fmt: skip
        answer = web.get(url)
        assert answer.status_code in (400, 404)
        harmless(Page(answer.text))


@pytest.mark.parametrize("url", ["/", "/run/one", "/static/view.js", "/static/none", "/nowhere", "/run/none"])
def test_every_answer_carries_the_policy(web, url):
    headers = web.get(url).headers
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none'; script-src 'self'; style-src 'self'")


def test_pages_hold_no_inline_script_or_style(web):
    for url in ("/", "/run/one", "/run/one/trajectory/1", "/catalogue", "/compare?run=one"):
        text = web.get(url).text
        assert re.findall(r"<script[^>]*>[^<]", text) == []
        assert "<style" not in text
        assert " style=" not in text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7878", "127.0.0.1.evil.example", "", "[::1]"])
def test_other_hosts_are_refused(web, host):
    answer = web.get("/", headers={"host": host})
    assert answer.status_code == 400
    assert "Runs" not in answer.text
    assert answer.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80"])
def test_this_machine_is_answered(web, host):
    assert web.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_questions_are_answered(web, method):
    assert web.request(method, "/").status_code == 405
    assert web.head("/").status_code == 200


@pytest.mark.parametrize("path", [
    "/run/%2e%2e/%2e%2e/etc", "/run/..%2f..", "/run//etc", "/run/.", "/run/",
    "/run/one/trajectory/", "/run/one/trajectory/99999", "/run/one/trajectory/-1", "/run/one/trajectory/%C2%B2",
    f"/run/one/trajectory/{10**20}", "/static/%2e%2e/server.py", "/static/..%2fserver.py",
    "/run/one/config.json", "/run/none/trajectories", "/run/one%00", "/catalogue/..%2f..%2fapi",
])  # fmt: skip
def test_nothing_outside_is_shown(web, path):
    answer = web.get(path)
    assert answer.status_code in (404, 405), answer.text
    assert "Traceback" not in answer.text


def test_a_damaged_store_is_a_line_and_leaves_the_others(tmp_path):
    plain(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "store.sqlite").write_bytes(b"no database" * 100)
    plain(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text("{")
    plain(tmp_path / "listed")
    (tmp_path / "listed" / "config.json").write_text("[1]")
    plain(tmp_path / "cut")
    (tmp_path / "cut" / "shards" / "000001.bin").write_bytes(b"")
    web = client(tmp_path)
    text = said(got(web, "/"))
    assert "its store.sqlite is no database" in text
    assert text.count("damaged") >= 3
    assert "60.0%" in text
    for url, line in (
        ("/run/bad", "its store.sqlite is no database"),
        ("/run/bad/trajectories", "its store.sqlite is no database"),
        ("/run/odd", "config.json cannot be read"),
        ("/run/listed", "should hold a JSON object"),
        ("/run/cut/trajectory/1", "is damaged: it has 0 bytes"),
        ("/compare?run=bad", "its store.sqlite is no database"),
    ):
        answer = web.get(url)
        assert answer.status_code == 500
        assert line in answer.text
    assert web.get("/run/good").status_code == 200


def test_a_run_without_steps_or_config_is_shown(tmp_path):
    with Store(tmp_path / "empty"):
        pass
    web = client(tmp_path)
    assert "No step has been logged yet" in got(web, "/run/empty").text
    assert "0 found" in got(web, "/run/empty/trajectories").text
    assert got(web, "/compare?run=empty").text
    assert got(web, "/").text


def test_a_lone_run_is_shown_by_its_name(made):
    web = client(made / "one")
    assert "/run/one" in {a["href"] for a in got(web, "/").all("a")}
    assert web.get("/run/one").status_code == 200
    assert web.get("/run/tree").status_code == 404


def test_an_empty_folder_says_how_to_fill_it(tmp_path):
    assert "There are no runs below" in got(client(tmp_path), "/").text
