"""The page stands alone, and nothing of the data leaves its place as text."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report.page_data import EVIL, make_data
from vila2.report.page import embedded, page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def test_data_cannot_leave_its_element() -> None:
    text = embedded({"a": EVIL})
    assert json.loads(text) == {"a": EVIL}
    assert not set("<>&\u2028\u2029") & set(text)


def test_nothing_is_fetched_and_nothing_is_read_as_html() -> None:
    html = page(make_data(3))
    before, _, after = html.partition(embedded(make_data(3)))
    template = before + after
    assert after
    assert re.findall(r"https?://[^\s\"']+", template) == ["http://www.w3.org/2000/svg"]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|<link|@import|<script src", template
    )
    assert "default-src 'none'" in template
    assert html.count("</script>") == 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def test_in_a_browser_it_filters_searches_sorts_and_stays_quiet(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page(make_data(10_000)))
    shown = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    requests: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda request: requests.append(request.url))
    shown.goto(file.as_uri())
    count, rows = shown.locator("#count"), shown.locator("#gallery .row")
    assert count.inner_text() == "10000 of 10000"
    assert rows.count() < 20  # only those in sight
    shown.select_option("#filter", "wrong")
    assert count.inner_text() == "2500 of 10000"
    shown.select_option("#filter", "bad")
    assert count.inner_text() == "2500 of 10000"
    shown.select_option("#filter", "")
    shown.fill("#search", "k00042 dog")
    assert count.inner_text() == "1 of 10000"
    assert EVIL.split("\u2028")[0].strip() in rows.first.inner_text()
    shown.fill("#search", "")
    shown.select_option("#order", "wrong")
    assert "a cow" in rows.first.inner_text()
    shown.evaluate("document.getElementById('gallery').scrollTop = 1e6")
    shown.wait_for_function("document.querySelector('#gallery .row').offsetTop > 900000")
    assert rows.count() < 20
    theme = "document.documentElement.dataset.theme"
    before = shown.evaluate(theme)
    shown.click("#theme")
    assert {before, shown.evaluate(theme)} == {"light", "dark"}
    shown.select_option("#split", "dev")
    assert shown.locator("#chart circle").count() == 3
    assert shown.locator("#many svg").count() == 1  # the metrics with a name of their own
    shown.locator("#many button").click()
    assert shown.locator("#chart").inner_text().startswith("Objects named, F1")
    assert shown.locator("#lead").inner_text().startswith("Objects named, F1 began at 30.0 on the test split")
    assert shown.locator("#gains .gain.good").count() == 1
    first = shown.locator("#gains td").first
    assert first.inner_text().startswith("round-1 over </script>")
    assert "One encode for all." in shown.locator("#encodes-said").inner_text()
    assert shown.locator("#encodes td").all_inner_texts()[2:] == ["4", "8"]
    column = shown.locator("#metrics td:first-child")
    before = column.all_text_contents()
    shown.locator("summary", has_text="All metrics").click()
    shown.locator("#metrics th").first.click()  # from Z to A
    assert column.all_text_contents() == sorted(before, reverse=True)
    shown.locator("#metrics th").first.press("Enter")  # and back, by the keyboard
    assert column.all_text_contents() == sorted(before)
    assert shown.evaluate("window.broken") is None
    assert said == []
    assert requests == [file.as_uri()]
    shown.close()


SCROLL = """() => { const box = document.getElementById("gallery");
  for (let i = 1; i <= 100; i++) { box.scrollTop = i * 20003; paint(); box.getBoundingClientRect(); } }"""
SEARCH = """() => { for (const text of ["k", "k0", "k00", "dog", "dog k009", "no such thing", "cow", "a", "an", ""]) {
  document.getElementById("search").value = text; choose(); document.body.getBoundingClientRect(); } }"""


def test_ten_thousand_rows_are_fluid(browser: Any, tmp_path: Path) -> None:
    """A jump to other rows fits a frame, a key stroke in the search is not felt; in CPU time, since the machine may
    be busy."""
    file = tmp_path / "page.html"
    file.write_text(page(make_data(10_000)))
    shown = browser.new_page(viewport={"width": 1200, "height": 900})
    shown.goto(file.as_uri())
    session = shown.context.new_cdp_session(shown)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def cpu_ms(script: str) -> float:
        def spent() -> float:
            found = session.send("Performance.getMetrics")["metrics"]
            return next(float(m["value"]) for m in found if m["name"] == "TaskDuration")

        before = spent()
        shown.evaluate(script)
        return (spent() - before) * 1000

    assert cpu_ms(SCROLL) / 100 < 16
    assert cpu_ms(SEARCH) / 10 < 100
    shown.close()


def test_it_is_light_or_dark_as_the_reader_is(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page(make_data(5)))
    grounds = []
    for scheme in ("light", "dark"):
        shown = browser.new_page(color_scheme=scheme)
        shown.goto(file.as_uri())
        assert shown.evaluate("document.documentElement.dataset.theme") == scheme
        grounds.append(shown.evaluate("getComputedStyle(document.body).backgroundColor"))
        shown.close()
    assert len(set(grounds)) == 2
