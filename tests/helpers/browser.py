"""A headless Chromium of the system, driven by Playwright, and pages that note what must not happen on them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_MS = 30_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a running Chromium. The test is skipped, with the reason, where there is none, or no Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package: pip install -e '.[dev]'")
    named = os.environ.get("CHROMIUM")
    program = named or next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium, or CHROMIUM=/path/to/it")
    # Root's Chromium has no sandbox, and containers have little shared memory.
    arguments = ["--disable-dev-shm-usage", "--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@contextmanager
def watched_page(
    browser: Browser, url: str, width: int = 1280, height: int = 800, told: tuple[str, ...] = (), **context: Any
) -> Iterator[Page]:
    """Yield the page at ``url`` in a window of its own. At its end, nothing may have been asked of another server, and
    the console may have no warning, error or violation of the policy, but for those that contain a string of ``told``.
    """
    window = browser.new_context(viewport={"width": width, "height": height}, **context)
    window.set_default_timeout(WAIT_MS)
    page = window.new_page()
    noted: list[str] = []
    page.on("console", lambda m: noted.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: noted.append(f"exception: {error}"))
    page.on("request", lambda r: None if same_origin(r.url, url) else noted.append(f"request to {r.url}"))
    page.goto(url)
    yield page
    window.close()
    unexpected = [line for line in noted if not any(part in line for part in told)]
    assert not unexpected, unexpected


def until(page: Page, condition: str) -> None:
    """Wait until a JavaScript expression is true on the page. Playwright's own wait would have the page evaluate the
    expression, which its policy forbids.
    """
    end = time.monotonic() + WAIT_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"timed out: {condition}"
        page.wait_for_timeout(30)


def same_origin(one: str, other: str) -> bool:
    """Return whether two addresses are of one server."""
    return urlsplit(one)[:2] == urlsplit(other)[:2]


def answer_stream(route: Route, *pieces: str, finish: str | None = "stop", whole: bool = True) -> None:
    """Answer a request with these pieces of a response, as the server would; without its end if not ``whole``."""
    choices = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    events: list[Any] = [{"choices": [choice]} for choice in choices]
    if whole:
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        events.append(
            {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(pieces), "total_tokens": 9}}
        )
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if whole else "")
    route.fulfill(status=200, headers={"Content-Type": "text/event-stream"}, body=body)


def answer_error(route: Route, status: int, message: str, code: str | None = None, **headers: str) -> None:
    """Answer a request with an error of the API."""
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}})
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    route.fulfill(status=status, headers={"Content-Type": "application/json", **named}, body=body)
