"""The page of a report in a headless Chromium: its browser of responses, its policy, narrow windows, dark and print."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from steerlm_megatron.report.write import write_report
from tests.helpers.browser import chromium, until, watched_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.integration
HOSTILE = """</script><img src=x onerror="document.title='run'"><script>document.title='run'</script>"""
AXE = os.environ.get("AXE")  # the path of axe.min.js, where somebody has it
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def responses() -> list[dict[str, Any]]:
    """Return answers of two models to 12 prompts: both at their best levels, one at three levels of humor."""
    lines = []
    for number in range(12):
        for model, humor in (("sft", None), ("acsft", 0), ("acsft", 2), ("acsft", 4)):
            measured = {"quality": 4.0, "humor": float(humor or 0) if number else 0.0}
            other = {"quality": 4.0 - (number == 5) * 3, "length": 9.0}
            lines.append({
                "model": model, "prompt": f"p{number}", "best": humor in (None, 0),
                "asked": None if humor is None else {"quality": 4, "humor": humor},
                "text": f"{HOSTILE} answer {number} {'funny' if humor == 4 else 'plain'}", "measured": measured,
                "judges": {"demo": measured, "ap": other},
            })  # fmt: skip
    return lines


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    prompts = {f"p{number}": f"{HOSTILE} question {number}" for number in range(12)}
    wide = {"title": "Wide", "columns": [f"column {i}" for i in range(20)], "rows": [["word", *range(19)]]}
    results = {
        "title": HOSTILE, "responses": responses(), "prompt_texts": prompts, "responses_file": "x/responses.jsonl",
        "measures": {"own": {"title": "Own", "tables": [wide]}}, "config": "key: value\n" * 90,
        "quality_detail": {"sft": {"mean": 1.0, "sem": 0.1, "n": 9}, "acsft": {"mean": 2.0, "sem": 0.1, "n": 9}},
    }  # fmt: skip
    html, _ = write_report(tmp_path_factory.mktemp("report"), results)
    return html.as_uri()


def status(page: Page) -> str:
    return page.locator("#samples-status").inner_text()


def test_search_filters_and_sorting_count_what_matches(browser: Browser, address: str) -> None:
    with watched_page(browser, address) as page:
        assert status(page) == "36 of 36 match, with 48 responses; 1 to 10 are shown."
        assert page.locator(".sample").count() == 10 and page.get_by_role("status").count() == 1
        page.get_by_label("Words").fill("FUNNY answer 7")
        until(page, "document.getElementById('samples-status').textContent.startsWith('1 of 36')")
        assert page.locator(".sample h3").inner_text() == "Prompt 8, humor 4"
        assert "measured by ap" in page.locator(".sample").inner_text()
        page.get_by_label("Words").fill("nowhere")
        until(page, "document.getElementById('samples-status').textContent.startsWith('Nothing matches')")
        page.get_by_role("button", name="Clear").click()
        until(page, "document.getElementById('samples-status').textContent.startsWith('36 of 36')")
        page.get_by_label("Model").select_option(label="plain SFT")
        assert status(page).startswith("12 of 36 match, with 12 responses")
        page.get_by_label("Model").select_option(label="all")
        page.get_by_label("Attribute asked").select_option("humor")
        page.get_by_label("Level asked").select_option("4")
        assert status(page).startswith("12 of 36 match, with 12 responses; 1 to 10")
        page.get_by_label("Disagreement").select_option("asked")
        assert status(page).startswith("1 of 36 match, with 1 response;"), "prompt 0 is measured at humor 0"
        page.get_by_role("button", name="Clear").click()
        until(page, "document.getElementById('samples-status').textContent.startsWith('36 of 36')")
        page.get_by_label("Disagreement").select_option("judges")
        page.get_by_label("of at least").fill("2.5")
        page.get_by_label("of at least").press("Tab")
        assert status(page).startswith("3 of 36 match, with 4 responses"), "the judges of prompt 5 are 3 levels apart"
        page.get_by_label("Disagreement").select_option("")
        page.get_by_label("Sorted by").select_option("asked")
        assert page.locator(".sample h3").first.inner_text() == "Prompt 1, humor 4"


def test_no_response_runs_and_the_keyboard_is_enough(browser: Browser, address: str) -> None:
    """``watched_page`` fails on any request, warning and violation of the policy."""
    with watched_page(browser, address) as page:
        assert page.title() == " ".join(HOSTILE.split()) and page.locator("img[src=x]").count() == 0
        assert HOSTILE in page.locator(".sample .prompt").first.inner_text()
        assert "connect-src" not in page.content() and "default-src 'none'" in page.content()
        page.get_by_label("Sorted by").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Clear"
        page.locator("#samples-next").focus()
        page.keyboard.press("Enter")
        assert status(page).endswith("11 to 20 are shown.")
        assert page.evaluate("document.activeElement.id") == "samples-list", "reading goes on at the first one"
        for _ in range(2):
            page.locator("#samples-next").press("Enter")
        assert status(page).endswith("31 to 36 are shown.") and page.locator("#samples-next").is_disabled()
        page.locator("#samples-back").press("Enter")
        assert status(page).endswith("21 to 30 are shown.")


def test_without_a_script_and_on_paper_there_is_a_first_part(browser: Browser, address: str) -> None:
    with watched_page(browser, address, java_script_enabled=False) as page:
        assert page.locator(".sample").count() == 6 and not page.locator("#samples-controls").is_visible()
        assert "The first 6 of 36" in status(page)
    with watched_page(browser, address) as page:
        page.emulate_media(media="print")
        visible = page.evaluate("[...document.querySelectorAll('.sample')].filter((one) => one.offsetHeight).length")
        assert visible == 6 and not page.locator("#samples-controls").is_visible()
        assert page.locator(".printed").is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window_and_dark_is_dark(browser: Browser, address: str, width: int) -> None:
    with watched_page(browser, address, width=width, color_scheme="dark", is_mobile=width < 800) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
        assert page.locator("#samples-words").bounding_box()


@pytest.mark.skipif(AXE is None, reason="needs axe-core: AXE=/path/to/axe.min.js")
def test_axe_finds_no_violation(browser: Browser, address: str) -> None:
    for scheme in ("light", "dark"):
        # axe-core is a script that the page's policy forbids.
        with watched_page(browser, address, color_scheme=scheme, bypass_csp=True) as page:
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            page.evaluate(Path(str(AXE)).read_text(encoding="utf-8"))
            found = page.evaluate("(rules) => axe.run(document, { runOnly: rules })", RULES)
            assert not found["violations"], [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]]
