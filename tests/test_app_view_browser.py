"""`etude view` in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'etude[dev]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'etude[view]'")

from app_cli import spawn  # noqa: E402
from etude.experience.store import Store  # noqa: E402
from view_pages import CONTRAST  # noqa: E402
from view_stores import ALL, config, forked, hostile, plain, step  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip
VIEWS = ("/", "/run/one", "/run/hostile", "/run/one/trajectories", "/run/hostile/trajectories", "/run/one/trajectory/2",
         "/run/hostile/trajectory/1", "/run/tree/trajectory/1?colour=entropy", "/compare?run=one&run=hostile",
         "/catalogue", "/catalogue/sec", "/run/none")  # fmt: skip
pytestmark = pytest.mark.skipif(not shutil.which(CHROMIUM), reason=f"needs {CHROMIUM}: apt-get install chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    plain(made / "one")
    plain(made / "two", steps=4)
    hostile(made / "hostile")
    forked(made / "tree")
    return made


@pytest.fixture(scope="module")
def url(folder):
    server = spawn("view", folder, "--port", "0")
    found = re.match(r"(http://\S+)/ ", server.stdout.readline())[1]
    yield found
    server.terminate()
    server.wait(10)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, url):
    """Opens pages, and holds that none of them had a dialog or a complaint on its console."""
    contexts, complaints = [], []

    def open_(path: str, **options: object):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if "status of 404" not in m.text else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("dialog", lambda d: (complaints.append(d.message), d.dismiss()))
        page.goto(url + path)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def test_from_the_runs_to_a_trajectory_and_back(open_page, url):
    page = open_page("/")
    page.get_by_role("link", name="one", exact=True).click()
    assert page.url == f"{url}/run/one"
    page.click("text=Trajectories")
    page.click("role=link[name='3']")
    assert page.url == f"{url}/run/one/trajectory/3"
    page.click("role=link[name='Trajectory 4']")
    assert page.text_content("h1") == "Trajectory 4"
    page.go_back()
    page.click("text=Catalogue")
    page.click("role=link[name='grpo']")
    assert page.text_content("h1") == "GRPO"


def test_a_filter_is_set_kept_and_bookmarked(open_page, url):
    page = open_page("/run/one/trajectories")
    page.get_by_label("Correct").select_option("yes")
    page.get_by_label("Step").fill("2")
    page.click("role=button[name='Filter']")
    assert "correct=yes" in page.url
    assert page.locator("tbody th a").all_text_contents() == ["10", "12"]
    again = open_page(page.url.removeprefix(url))
    assert again.locator("tbody th a").all_text_contents() == ["10", "12"]
    assert again.get_by_label("Step").input_value() == "2"


def test_choosing_a_colour_shows_it_at_once(open_page):
    page = open_page("/run/one/trajectory/2")
    with page.expect_navigation():
        page.get_by_label("Colour by").select_option("advantage")
    assert "colour=advantage" in page.url
    assert page.locator(".tokens .up2").count() == 1


def test_ticked_runs_are_compared(open_page):
    page = open_page("/")
    page.get_by_label("Compare one").check()
    page.get_by_label("Compare two").check()
    page.click("text=Compare the ticked runs")
    assert page.locator("figure svg").count() == 3
    assert page.locator("tbody tr").count() == 2


def test_a_chart_is_read_under_the_pointer(open_page):
    page = open_page("/run/one")
    dot = page.locator("figure").first.locator("circle").nth(1)
    dot.hover(force=True)
    assert page.locator(".readout").text_content() == "sums (test) at 2: 0.4 [0.35, 0.45]"
    page.mouse.move(5, 5)
    assert page.locator(".readout").count() == 0


def test_a_live_run_is_followed_without_losing_focus_or_place(folder, open_page):
    config(folder / "live")
    go, end = threading.Event(), threading.Event()

    def write() -> None:
        with Store(folder / "live") as store:
            step(store, 0, 0.25)
            begun.set()
            go.wait(60)
            for at in range(1, 4):
                step(store, at, 0.5)
            end.wait(60)

    begun = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    try:
        begun.wait(30)
        page = open_page("/run/live")
        assert page.text_content("#now .state") == "live"
        first = page.locator("figure").first
        assert first.locator("circle").count() == 1
        page.locator("#categories a").first.focus()
        page.evaluate("window.scrollTo(0, 300)")
        page.evaluate("window.same = true")
        go.set()
        sync_api.expect(page.locator("#now")).to_contain_text("4 of 10", timeout=20_000)
        assert first.locator("circle").count() == 4
        assert page.evaluate("window.same")  # the page was not loaded anew
        assert page.evaluate("window.scrollY") == 300
        assert page.evaluate("document.activeElement.textContent") == "easy"
        end.set()
        sync_api.expect(page.locator("#now .state")).to_have_text("interrupted", timeout=20_000)
        asked: list[str] = []
        page.on("request", lambda r: asked.append(r.url))
        page.wait_for_timeout(2500)
        assert asked == []  # a run that has ended is not asked for again
    finally:
        go.set()
        end.set()
        writer.join()


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_text_does_not_run_and_nothing_is_fetched_from_elsewhere(open_page, url, view):
    page = open_page("/catalogue")
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(url + view)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    for link in page.locator("main a").all()[:5]:
        link.focus()
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 1
    assert page.locator("img, iframe, object, embed, [onerror], [onload], [onfocus]").count() == 0
    assert all(found.startswith(url) for found in asked)


def test_the_policy_stops_what_a_page_would_run(browser, url):
    page = browser.new_page()
    page.goto(f"{url}/")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
    page.evaluate("const s = document.createElement('script'); s.text = 'window.hacked = 1'; document.body.append(s)")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    page.close()


def test_hostile_text_is_filtered_by_and_shown_as_it_is(open_page):
    page = open_page("/run/hostile/trajectories")
    page.get_by_label("Answer contains").fill("<script>")
    page.click("role=button[name='Filter']")
    assert page.get_by_label("Answer contains").input_value() == "<script>"
    assert "1 found" in page.text_content("caption")
    page.click("role=link[name='1']")
    assert page.locator("pre").first.text_content().startswith(ALL[:40])


def test_everything_is_reached_by_keyboard(open_page, url):
    page = open_page("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the page"
    box = page.locator(".skip").bounding_box()
    assert box["x"] >= 0  # it is seen while it has the focus
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "checkbox"
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    style = "getComputedStyle(document.activeElement)"
    assert page.evaluate(f"{style}.outlineStyle") == "solid"
    assert float(page.evaluate(f"{style}.outlineWidth").removesuffix("px")) >= 2
    page.keyboard.press("Enter")
    page.wait_for_url(f"{url}/run/*")
    page = open_page("/run/one/trajectories")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "contains":
            break
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    page.wait_for_url("**contains=3**")


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_needs_no_scrolling_sideways(open_page, view):
    page = open_page(view, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["/", "/run/one", "/run/one/trajectories", "/run/one/trajectory/2?colour=advantage",
                                  "/run/tree/trajectory/1?colour=entropy", "/run/hostile/trajectory/1",
                                  "/compare?run=one", "/catalogue", "/catalogue/sec", "/run/none"])  # fmt: skip
def test_text_is_legible_in_light_and_dark(open_page, scheme, view):
    page = open_page(view, color_scheme=scheme)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate(CONTRAST) == []


def test_pages_work_without_scripts(browser, url):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(f"{url}/run/one/trajectory/2")
    page.get_by_label("Colour by").select_option("advantage")
    page.click("role=button[name='Show']")
    assert "colour=advantage" in page.url
    page.goto(f"{url}/run/one")
    assert page.locator("figure svg").count() > 5
    page.context.close()
