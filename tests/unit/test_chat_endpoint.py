"""The client of a chat endpoint: tries, waiting, refusals, what an error says, against a stand-in over real HTTP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from steerlm_megatron.errors import TryLater, UserError
from steerlm_megatron.serve.chat_endpoint import ChatEndpoint, ChatLimits, Reply, base_url, is_local
from tests.helpers.judge_endpoint import Fault, JudgeStandIn, judging

SAYS_HI = {"says": lambda messages: f"hi {messages[-1]['content']}"}
SECRET = "sk-only-for-this-test"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerlm_megatron.serve.chat_endpoint._BACKOFF_SEC", 0.02)


@pytest.fixture
def stand_in() -> Iterator[tuple[JudgeStandIn, str]]:
    how = JudgeStandIn(**SAYS_HI)
    with judging(how) as url:
        yield how, url


def endpoint(url: str, model: str | None = "judge-1", **changes: Any) -> ChatEndpoint:
    limits = ChatLimits(
        **{name: changes.pop(name) for name in ("concurrency", "timeout_sec", "max_tries") if name in changes}
    )
    return ChatEndpoint(url, model, "evaluate.llm_judge", limits=limits, **changes)


def replies(of: ChatEndpoint, count: int) -> list[Reply]:
    def job(number: int) -> Any:
        async def asked(ask: Any) -> Reply:
            return await ask([{"role": "user", "content": f"{number}"}])

        return asked

    return of.run([job(number) for number in range(count)])


def test_answers_come_in_order_and_no_more_are_under_way_than_allowed(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    together = threading.Barrier(3)  # an answer comes when three requests are under way

    def says(messages: list[dict[str, str]]) -> str:
        together.wait(60)
        return f"hi {messages[-1]['content']}"

    how.says = says
    found = replies(endpoint(url, concurrency=3), 12)
    assert [reply.text for reply in found] == [f"hi {number}" for number in range(12)]
    assert how.most_at_once == 3 and (found[0].prompt_tokens, found[0].completion_tokens) == (100, 10)
    assert all(body["temperature"] == 0 and body["max_tokens"] == 1024 for body in how.asked)
    how.says = SAYS_HI["says"]
    assert "temperature" not in _asked_with(how, endpoint(url, temperature=None))


def _asked_with(how: JudgeStandIn, of: ChatEndpoint) -> dict[str, Any]:
    replies(of, 1)
    return how.asked[-1]


BUSY = (429, {"Retry-After": "0.3"}, {"error": {"message": "slow down"}})


@pytest.mark.parametrize(
    "fault",
    [
        BUSY,
        (429, {}, {"error": {"message": "slow down"}}),
        (500, {}, {"error": {"message": "oops"}}),
        (503, {"Retry-After": "0.05"}, "<html>busy</html>"),
        (200, {}, "<html>a proxy's page</html>"),
        (200, {}, {"choices": []}),
        "cut",
        "late",
    ],
)
def test_a_fault_is_tried_again(stand_in: tuple[JudgeStandIn, str], fault: Fault) -> None:
    how, url = stand_in
    how.faults = [fault, None, fault]
    found = replies(endpoint(url, timeout_sec=0.3, concurrency=2), 4)
    assert [reply.text for reply in found] == [f"hi {number}" for number in range(4)]
    assert len(how.asked) == 6


def test_retry_after_holds_back_every_request(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    how.faults = [None, BUSY]
    replies(endpoint(url, concurrency=1), 3)
    gaps = [later - earlier for earlier, later in zip(how.times, how.times[1:], strict=False)]
    assert gaps[1] >= 0.3 and max(gaps[0], gaps[2]) < 0.2


def test_busy_answers_do_not_use_up_tries_while_others_get_through(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    calls = {"0": 0}

    def fault_of(body: dict[str, Any]) -> Fault | None:
        calls["0"] += body["messages"][0]["content"] == "0"
        busy = body["messages"][0]["content"] == "0" and calls["0"] <= 6
        return (429, {"Retry-After": "0.02"}, {"error": "busy"}) if busy else None

    how.fault_of, how.seconds = fault_of, 0.02
    assert replies(endpoint(url, concurrency=2, max_tries=5), 40)[0].text == "hi 0" and calls["0"] == 7
    how.fault_of = lambda body: (429, {"Retry-After": "0.02"}, {"error": "busy"})
    with pytest.raises(TryLater, match=r"in 3 tries of a request; the last: HTTP 429: busy"):
        replies(endpoint(url, max_tries=3), 2)


def test_a_dead_endpoint_is_one_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TryLater, match=rf"evaluate\.llm_judge\.url={url}/v1 gives no answer.*ConnectError"):
            replies(endpoint(url, max_tries=3), 5)
        with pytest.raises(UserError, match=rf"evaluate\.llm_judge\.url={url}/v1 does not answer \(ConnectError\)"):
            endpoint(url).check()


def test_an_endpoint_that_is_late_every_time_says_so(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    how.fault_of = lambda body: "late"
    start = time.monotonic()
    with pytest.raises(TryLater, match=r"no answer within 0.1 s"):
        replies(endpoint(url, timeout_sec=0.1, max_tries=2), 1)
    assert time.monotonic() - start < 2


def test_the_key_is_sent_and_in_no_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", f"{SECRET}\n")
    with judging(JudgeStandIn(key=SECRET, **SAYS_HI)) as url:
        right = endpoint(url, api_key_env="MY_KEY")
        assert right.check() == "judge-1" and replies(right, 1)[0].text == "hi 0"
        monkeypatch.setenv("MY_KEY", wrong := "sk-another")
        for ask in (lambda of: of.check(), lambda of: replies(of, 1)):
            with pytest.raises(UserError, match=r"refuses the API key in \$MY_KEY \(HTTP 401: .*…\)") as raised:
                ask(endpoint(url, api_key_env="MY_KEY"))
            assert wrong not in str(raised.value)
        with pytest.raises(UserError, match=r"a request without an API key .* into OTHER \(evaluate"):
            endpoint(url, api_key_env="OTHER").check()
    assert SECRET not in caplog.text and "sk-another" not in caplog.text
    monkeypatch.setenv("MY_KEY", "schlüssel")
    with pytest.raises(UserError, match=r"\$MY_KEY holds characters that no API key has"):
        endpoint(url, api_key_env="MY_KEY")


def test_the_key_goes_nowhere_unasked(monkeypatch: pytest.MonkeyPatch, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    replies(endpoint(url), 1)
    assert all("Authorization" not in headers for headers in how.headers)


def test_the_model_is_the_first_that_is_listed_or_the_named_one(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    how.models = ("first", "second")
    assert endpoint(url, None).check() == "first"
    assert endpoint(url, "an-alias").check() == "an-alias", "a service may take more names than it lists"
    how.lists = False
    assert endpoint(url, "judge-1").check() == "judge-1"
    with pytest.raises(UserError, match=r"does not list its models; set evaluate\.llm_judge\.model"):
        endpoint(url, None).check()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ((404, {}, {"error": {"message": "The model x does not exist"}}), "no such page or no model judge-1 .*not ex"),
        ((429, {}, {"error": {"message": "pay", "code": "insufficient_quota"}}), "no credit left .*pay"),
        ((402, {}, {"error": {"message": "pay"}}), "no credit left"),
        ((400, {}, {"error": {"message": "'temperature' does not support 0.0"}}), "set evaluate.*temperature=null"),
        ((400, {}, {"error": {"message": "nothing is right"}}), r"refuses every request \(HTTP 400\): nothing is"),
    ],
)  # fmt: skip
def test_what_no_try_can_change_ends_at_once(stand_in: tuple[JudgeStandIn, str], fault: Fault, told: str) -> None:
    how, url = stand_in
    how.fault_of = lambda body: fault
    with pytest.raises(UserError, match=told) as raised:
        replies(endpoint(url), 30)
    assert not isinstance(raised.value, TryLater) and len(how.asked) <= 16


def test_a_request_that_is_refused_leaves_the_others(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    too_long = (400, {}, {"error": {"message": "maximum context length"}})
    how.fault_of = lambda body: too_long if body["messages"][0]["content"] == "1" else None
    found = replies(endpoint(url), 3)
    assert [reply.refused for reply in found] == [None, "maximum context length", None]


def test_a_model_that_wants_max_completion_tokens_gets_them(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    told = (400, {}, {"error": {"message": "'max_tokens' is not supported, use 'max_completion_tokens'"}})
    how.fault_of = lambda body: told if "max_tokens" in body else None
    for concurrency in (1, 4):
        how.asked.clear()
        found = replies(endpoint(url, concurrency=concurrency), 4)
        assert [reply.text for reply in found] == ["hi 0", "hi 1", "hi 2", "hi 3"]
        assert len(how.asked) <= 4 + concurrency and how.asked[-1]["max_completion_tokens"] == 1024


def test_thoughts_before_an_answer_are_no_part_of_it(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    how.says = lambda messages: "<think>[[A]]? No.\n</think>\n\nSo [[B]]"
    assert replies(endpoint(url), 1)[0].text.strip() == "So [[B]]"
    how.says = lambda messages: "<think>[[A]]? Or"
    assert replies(endpoint(url), 1)[0].text == "", "thoughts that were cut off are no verdict"
    how.usage = False
    assert replies(endpoint(url), 1)[0].prompt_tokens is None


def test_half_a_utf16_pair_is_sent_as_json_has_it(stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in

    async def asked(ask: Any) -> Reply:
        return await ask([{"role": "user", "content": "half \ud83d"}])

    endpoint(url).run([asked])
    assert how.asked[0]["messages"][0]["content"] == "half \ud83d"


def test_addresses() -> None:
    assert base_url("http://h:1", "k") == base_url("http://h:1/", "k") == "http://h:1/v1"
    assert base_url("https://h/v1beta/openai/", "k") == "https://h/v1beta/openai"
    assert base_url("https://h/v1/chat/completions", "k") == "https://h/v1"
    for wrong, told in (
        ("h:1", "must begin with http"),
        ("ftp://h", "must begin"),
        ("http://u:p@h", "user or password"),
    ):
        with pytest.raises(UserError, match=told):
            base_url(wrong, "k")
    assert is_local("http://127.0.0.1:1/v1") and is_local("http://localhost") and not is_local("http://10.0.0.1")
