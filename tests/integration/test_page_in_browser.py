"""The page at ``/`` in a headless Chromium: sliders, streaming, comparing, links, keys, errors, narrow windows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.browser import answer_error, answer_stream, chromium, until, watched_page
from tests.helpers.server import SCHEMA, Server, running, wait_for
from tests.unit.test_more_routes import Scorer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request, Route

pytestmark = pytest.mark.integration
CHAT, SCORE = "**/v1/chat/completions", "**/v1/score"
SCROLLER = "document.getElementById('scroller')"
TO_END = f"{SCROLLER}.scrollHeight - {SCROLLER}.scrollTop - {SCROLLER}.clientHeight"
FAILED = ("Failed to load resource",)  # Chromium notes each answer that is no success


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def server(browser: Browser) -> Iterator[Server]:
    with running(scorer=Scorer()) as one:
        one.model.stop_bias = -1e9  # responses have sampling.max_tokens tokens
        yield one


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with watched_page(browser, server.url) as one:
        yield one


def slider(page: Page, name: str, side: str = "a") -> Locator:
    return page.locator(f"input[data-attribute={name}][data-side={side}]")


def say(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def asked(page: Page, what: Callable[[], Any], count: int = 1) -> list[dict[str, Any]]:
    """Return the bodies of the completions that ``what`` asks for, when ``count`` responses are whole and measured."""
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(json.loads(request.post_data or ""))

    page.on("request", note)
    what()
    until(page, f"document.querySelectorAll('.answer[data-side] .facts:not(:empty)').length >= {count}")
    until(page, "document.getElementById('stop').hidden && !document.body.innerText.includes('Measuring …')")
    page.remove_listener("request", note)
    return bodies


def test_sliders_are_what_is_asked_for_and_what_is_measured_stands_beside(page: Page, server: Server) -> None:
    assert slider(page, "quality").get_attribute("aria-valuetext") == "9 of 9, the server's own"
    assert slider(page, "humor").get_attribute("aria-valuetext") == "not asked for"
    slider(page, "humor").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    slider(page, "quality").fill("4")
    (body,) = asked(page, lambda: say(page, "hello"))
    assert body["attributes"] == {"quality": 4, "toxicity": 0, "humor": 3}
    assert body["messages"] == [{"role": "user", "content": "hello"}] and body["stream"] is True
    assert not {"temperature", "top_p", "top_k", "max_tokens"} & set(body)
    text = page.locator(".answer .text").inner_text()
    whole = server.post("chat/completions", **{**body, "stream": False, "stream_options": None}).json()["choices"][0]
    assert text.split() == whole["message"]["content"].split(), "all of the response is shown"
    length = len(whole["message"]["content"])
    measured = page.locator(".measured dd .unseen").all_inner_texts()
    assert measured == [f"asked 4, measured {length}.0", "asked 0, not measured", "asked 3, measured 1.0"]
    assert "12 tokens" in page.locator(".note").inner_text(), "a response that was cut says so"
    # The next message takes the first answer along, with the levels that it was asked for.
    slider(page, "humor").press("Delete")
    page.click("summary:has-text('Sampling')")
    page.fill("input[data-parameter=temperature]", "0.5")
    page.fill("input[data-parameter=seed]", "7")
    (second,) = asked(page, lambda: say(page, "more"), 2)
    assert second["attributes"] == {"quality": 4, "toxicity": 0}
    assert (second["temperature"], second["seed"]) == (0.5, 7)
    answer = {"role": "assistant", "content": whole["message"]["content"], "attributes": body["attributes"]}
    assert second["messages"] == [*body["messages"], answer, {"role": "user", "content": "more"}]


def test_a_response_comes_bit_by_bit_and_can_be_stopped(page: Page, server: Server) -> None:
    page.click("summary:has-text('Sampling')")
    page.fill("input[data-parameter=max_tokens]", "300")
    server.model.step_sec = 0.03
    try:
        say(page, "hello")
        answer = page.locator(".answer")
        lengths = []
        for _ in range(3):
            until(page, f"document.querySelector('.answer .text').innerText.length > {max(lengths, default=0)}")
            assert answer.get_attribute("aria-busy") == "true"
            lengths.append(len(answer.locator(".text").inner_text()))
        assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
        say(page, "too early")
        assert "still being written" in page.locator("#warning").inner_text()
        assert page.input_value("#message") == "too early", "what was written is kept"
        assert len(server.generator.scheduler.running) == 1
        # A reader at the end sees what comes; one who went up stays there.
        page.set_viewport_size({"width": 420, "height": 420})
        until(page, f"{SCROLLER}.scrollHeight > {SCROLLER}.clientHeight + 60 && {TO_END} < 4")
        page.evaluate(f"{SCROLLER}.scrollTop = 0")
        page.wait_for_selector("#latest:not([hidden])")
        before = page.evaluate(f"{SCROLLER}.scrollHeight")
        until(page, f"{SCROLLER}.scrollHeight > {before}")
        assert page.evaluate(f"{SCROLLER}.scrollTop") == 0
        page.click("#latest")
        until(page, f"{TO_END} < 4")
        page.keyboard.press("Escape")
        page.wait_for_selector(".answer[data-state=stopped] .measured")
        wait_for(lambda: not server.generator.scheduler.running)
        assert "Stopped" in answer.locator(".note").inner_text()
        kept = len(answer.locator(".text").inner_text())
        assert lengths[-1] <= kept and answer.get_attribute("aria-busy") == "false"
        # What is closed is ended as well.
        page.click(".answer >> text=Retry")
        wait_for(lambda: len(server.generator.scheduler.running) == 1)
        page.goto("about:blank")
        wait_for(lambda: not server.generator.scheduler.running)
    finally:
        server.model.step_sec = 0.0


def test_two_settings_are_compared_and_a_link_has_them(page: Page, browser: Browser, server: Server) -> None:
    slider(page, "humor").fill("9")
    page.click("#compare")
    slider(page, "humor", "b").fill("1")
    bodies = asked(page, lambda: say(page, "hello"), 2)
    assert [body["attributes"]["humor"] for body in bodies] == [9, 1]
    assert bodies[0]["seed"] == bodies[1]["seed"], "what differs is what was set"
    for side, level in (("a", 9), ("b", 1)):
        box = page.locator(f".answer[data-side={side}]")
        assert box.locator(".measured dd .unseen").all_inner_texts()[2] == f"asked {level}, measured 1.0"
    left, right = (page.locator(f".answer[data-side={side}]").bounding_box() for side in "ab")
    assert left and right and left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    # Each setting has its own conversation.
    again = asked(page, lambda: page.click(".answer[data-side=b] >> text=Retry"), 2)
    assert len(again) == 1 and again[0]["attributes"]["humor"] == 1 and again[0]["seed"] != bodies[0]["seed"]
    texts = page.evaluate("JSON.parse(sessionStorage.getItem('steerlm / turns'))[0].answers")
    further = asked(page, lambda: say(page, "more"), 4)
    assert [body["messages"][1]["content"] for body in further] == [texts["a"]["text"], texts["b"]["text"]]
    page.click("summary:has-text('System message')")
    page.fill("#system", "Be kind & brief; 100 % <b>")
    page.click("summary:has-text('Sampling')")
    page.fill("input[data-parameter=top_p][data-side=b]", "0.9")
    page.click("#share")
    link = page.input_value("#link")
    assert "a=humor:9" in link and "b=humor:1" in link and "hello" not in link
    assert page.url == link
    page.keyboard.press("Escape")
    with watched_page(browser, link) as other:
        other.wait_for_selector(".slider")
        assert [slider(other, "humor", side).input_value() for side in "ab"] == ["9", "1"]
        assert slider(other, "quality", "b").get_attribute("aria-valuetext") == "9 of 9, the server's own"
        assert other.input_value("#system") == "Be kind & brief; 100 % <b>"
        assert other.input_value("input[data-parameter=top_p][data-side=b]") == "0.9"
        assert other.get_attribute("#compare", "aria-pressed") == "true" and other.url == link
        other.click("#reset")
        other.click("#compare")
        until(other, "location.hash === ''")


def test_what_a_link_has_wrong_is_said_and_left_out(browser: Browser, server: Server) -> None:
    links = {
        "a=humour:3,humor:2": "humour: this model has no such attribute",
        "a=humor:3,quality:99,quality:1.5,toxicity:-1": "quality: levels go from 0 to 9",
        "a=humor:4&a.temperature=hot&a.top_p=0&b.seed=1e99": "Temperature is a number",
        "a=humor:5&%E0%A4%A&__proto__=1&a.__proto__=2&a.constructor=1&=&&a": "not a setting",
        "a=humor:6&<img src=x onerror=alert(1)>=1": "<img",
        "a=humor:7&system=x&compare=0": "",
    }
    with watched_page(browser, f"{server.url}/#{next(iter(links))}") as page:
        page.wait_for_selector(".slider")
        for level, (fragment, told) in enumerate(links.items(), 2):
            page.evaluate(f"location.hash = {json.dumps(fragment)}")
            until(page, f"document.querySelector('input[data-attribute=humor]').value === '{level}'")
            warning = page.locator("#warning").text_content() or ""
            assert told in warning and bool(told) == bool(warning)
        (body,) = asked(page, lambda: say(page, "hello"))
        assert body["attributes"] == {"quality": 9, "toxicity": 0, "humor": 7} and "temperature" not in body


def test_what_a_model_or_a_user_writes_is_never_run(page: Page) -> None:
    html = "<img src=x onerror='window.ran = 1'><script>window.ran = 1</script>\n```html\n<b onclick=x>\n```\nend"
    page.route(CHAT, lambda route: answer_stream(route, *html))
    page.route(
        SCORE, lambda route: route.fulfill(json={"data": [{"values": [{"message": 1, "attributes": {html: 1}}]}]})
    )
    say(page, f"{html} said")
    page.wait_for_selector(".measured")
    said, shown = page.locator(".said .text").inner_text(), page.locator(".answer .text > *").all_inner_texts()
    assert said == f"{html} said"
    assert shown == [html.split("\n")[0], "<b onclick=x>", "end"]
    assert (
        page.locator(".answer pre").count() == 1
        and page.locator("#turns img, #turns script, #turns b[onclick]").count() == 0
    )
    assert page.evaluate("window.ran") is None


def test_a_script_could_neither_make_markup_nor_reach_another_server(browser: Browser, server: Server) -> None:
    with watched_page(browser, server.url, told=("TrustedHTML", "other.example")) as page:
        refused = page.evaluate("""async () => {
            const refused = [];
            addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            try { document.body.innerHTML = "<b>x</b>" } catch (error) { refused.push(error.name) }
            new Image().src = "https://other.example/x.png";
            await fetch("https://other.example/").catch((error) => refused.push(error.name));
            await new Promise((done) => setTimeout(done, 50));
            return refused;
        }""")
        assert {"TypeError", "require-trusted-types-for", "img-src", "connect-src"} <= set(refused)


def test_a_key_is_asked_for_and_kept_in_this_tab_alone(browser: Browser) -> None:
    with (
        running(api_keys=["sesame"], scorer=Scorer()) as server,
        watched_page(browser, server.url, told=FAILED) as page,
    ):
        page.wait_for_selector("#key-dialog[open]")
        for key in ("wrong", "sesame"):
            page.fill("#key", key)
            page.press("#key", "Enter")
            if key == "wrong":
                page.wait_for_selector("#key-dialog[open] >> text=not one of this server's")
        page.wait_for_selector("#app:not([hidden])")
        asked(page, lambda: say(page, "hello"))
        page.wait_for_selector(".measured")
        page.reload()
        page.wait_for_selector(".measured")
        assert page.locator(".said .text").inner_text() == "hello", "the conversation outlives a reload"
        assert "sesame" not in page.url and page.evaluate("localStorage.length") == 0 and not page.context.cookies()
        assert page.locator("#key-button").is_visible()


def test_errors_are_told_in_words_and_the_message_can_be_sent_again(browser: Browser, server: Server) -> None:
    told = (*FAILED, "no answer", "the refusal has no JSON body", "not JSON")
    refusals: list[tuple[Callable[[Route], None], str]] = [
        (lambda r: answer_error(r, 429, "full", "queue_full", Retry_After="7"), "Too many requests.*Try again in 7 s"),
        (lambda r: answer_error(r, 503, "x", "shutting_down", Retry_After="5"), "shutting down.*Try again in 5 s"),
        (lambda r: answer_error(r, 400, "it has 900 tokens", "context_length_exceeded"), "too long.*It has 900 tokens"),
        (lambda r: answer_error(r, 413, "the body has 9 bytes"), "larger than the server accepts"),
        (lambda r: answer_error(r, 500, "this request failed: NaN"), "This request failed: NaN"),
        (lambda r: r.fulfill(status=502, body="<html>"), "proxy.*HTTP 502"),
        (lambda r: r.abort(), "cannot be reached"),
        (lambda r: r.fulfill(status=200, body="data: <html>\n\n"), "not a steerlm server"),
        (lambda r: answer_stream(r, "some ", "words", whole=False), "connection was lost.*What came is kept"),
    ]
    answers = iter([answer for answer, _ in refusals])
    with watched_page(browser, server.url, told=told) as page:
        page.route(CHAT, lambda route: next(answers, lambda r: r.fallback())(route))
        say(page, "hello")
        for i, (_, words) in enumerate(refusals):
            until(page, "document.getElementById('stop').hidden")
            note = page.locator(".answer[data-state=failed] .note").inner_text()
            assert re.search(words, note), (i, note)
            page.click(".answer >> text=Retry")
        page.wait_for_selector(".answer[data-state=done] .measured")
        page.route(SCORE, lambda route: answer_error(route, 429, "full", "queue_full"))
        say(page, "again")
        page.wait_for_selector("text=Not measured. Too many requests")
        page.unroute(SCORE)
        page.click("text=Measure again")
        until(page, "document.querySelectorAll('.measured').length === 2")


def test_messages_are_edited_answered_again_and_begun_anew(page: Page) -> None:
    page.evaluate("""() => {
        const field = document.getElementById("message");
        field.value = "にほんご";
        const enter = { key: "Enter", bubbles: true, cancelable: true };
        field.dispatchEvent(new KeyboardEvent("keydown", { ...enter, isComposing: true }));
        field.dispatchEvent(new KeyboardEvent("keydown", { ...enter, keyCode: 229 }));
    }""")
    assert page.locator(".turn").count() == 0, "Enter that ends the input of a character does not send"
    page.fill("#message", "")
    page.press("#message", "Enter")
    assert page.locator(".turn").count() == 0, "nothing is not sent"
    page.locator("#message").press_sequentially("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line")
    (first,) = asked(page, lambda: page.press("#message", "Enter"))
    assert first["messages"] == [{"role": "user", "content": "one\nline"}]
    (again,) = asked(page, lambda: page.click(".answer >> text=Retry"))
    assert again["messages"] == first["messages"] and again["seed"] != first["seed"]
    asked(page, lambda: say(page, "two"), 2)
    page.click(".turn:nth-child(1) >> text=Edit")
    page.keyboard.press("Escape")
    assert page.locator(".turn:nth-child(1) .said .text").inner_text() == "one\nline"
    page.click(".turn:nth-child(1) >> text=Edit")
    page.keyboard.type(", edited")
    (edited,) = asked(page, lambda: page.keyboard.press("Enter"))
    assert (
        edited["messages"] == [{"role": "user", "content": "one\nline, edited"}] and page.locator(".turn").count() == 1
    )
    page.click("summary:has-text('Sampling')")
    page.fill("input[data-parameter=top_p]", "3")
    say(page, "no")
    assert (
        "Top p is a number above 0 to 1" in page.locator("#warning").inner_text() and page.locator(".turn").count() == 1
    )
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: Browser, server: Server, width: int) -> None:
    def overflow() -> list[str]:
        return page.evaluate("""() => [...document.querySelectorAll("html, body, #scroller, #panel, #turns, header")]
            .filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.id || one.tagName)""")

    phone = width < 800
    long = "supercalifragilistic" * 30
    with watched_page(browser, server.url, width=width, has_touch=phone, is_mobile=phone, color_scheme="dark") as page:
        page.route(CHAT, lambda route: answer_stream(route, f"{long}\n```\n{long}\n```\n", *["line\n"] * 80))
        page.wait_for_selector("#app:not([hidden])")
        assert page.locator("#panel").is_visible() == (not phone)
        if phone:
            page.tap("#panel-button")
        assert page.locator("#panel").is_visible() and not overflow()
        page.click("#compare")
        assert slider(page, "humor", "b").is_visible() and not overflow()
        slider(page, "humor", "b").fill("5")
        if phone:
            page.tap("#panel-button")
            assert not page.locator("#panel").is_visible()
        say(page, long)
        page.wait_for_selector(".answer[data-side=b] .measured")
        assert not overflow()
        boxes = [page.locator(f".answer[data-side={side}]").bounding_box() for side in "ab"]
        assert boxes[0] and boxes[1] and (boxes[0]["y"] < boxes[1]["y"]) == phone, (
            "on a phone one stands above the other"
        )
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"


def test_the_page_works_below_the_path_of_a_proxy_and_without_attributes(browser: Browser) -> None:
    with running(None, root_path="/steerlm") as server, watched_page(browser, f"{server.url}/steerlm") as page:
        (body,) = asked(page, lambda: say(page, "hello"))
        assert "attributes" not in body and page.url == f"{server.url}/steerlm/"
        assert "without attributes" in page.locator("#schema-note").inner_text()
        assert "not measured" in page.locator("#measure-note").inner_text()
    assert SCHEMA.names, "the other tests have a model with attributes"
