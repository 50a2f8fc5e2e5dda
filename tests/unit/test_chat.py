"""``steerlm chat`` against a server: turns, settings, errors, an interrupted response."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import httpx
import pytest

from steerlm_megatron.errors import UserError
from steerlm_megatron.serve import chat as module
from steerlm_megatron.serve.chat import Chat, chat, connect
from tests.helpers.server import SCHEMA, Server, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(SCHEMA) as found:
        yield found


@pytest.fixture
def talk(server: Server) -> Chat:
    said: list[str] = []
    found = connect(server.client, server.url, said.append)
    found.said = said  # type: ignore[attr-defined]
    found.line("/set max_tokens 8")
    found.line("/set seed 1")
    said.clear()
    return found


def said(talk: Chat) -> str:
    text = "".join(talk.said)  # type: ignore[attr-defined]
    talk.said.clear()  # type: ignore[attr-defined]
    return text


def test_turns_are_what_the_server_answers(server: Server, talk: Chat) -> None:
    assert talk.line("hello")
    first = said(talk)
    messages = [{"role": "user", "content": "hello"}]
    body = server.post("chat/completions", messages=messages, max_tokens=8, seed=1).json()
    expected = body["choices"][0]["message"]["content"]
    assert first == (f"{expected}\n" if expected else "[an empty response]\n")
    assert talk.messages == [*messages, {"role": "assistant", "content": expected}]
    talk.line("again")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    before = talk.messages[:-1]
    talk.line("/set seed 2")
    talk.line("/retry")
    assert talk.messages[:-1] == before
    talk.line("/system be kind")
    talk.line("hello")
    talk.line("/reset")
    assert talk.messages == [{"role": "system", "content": "be kind"}]
    assert not talk.line("/quit")


def test_attributes_are_asked_for(server: Server, talk: Chat) -> None:
    talk.line("/set humor 3")
    assert said(talk) == "[humor=3, max_tokens=8, seed=1, quality=9 (the server's), toxicity=0 (the server's)]\n"
    talk.line("hello")
    body = server.post("chat/completions", messages=talk.messages[:1], max_tokens=8, seed=1, attributes={"humor": 3})
    assert talk.messages[1]["content"] == body.json()["choices"][0]["message"]["content"]
    said(talk)
    for line, words in (
        ("/set humor 12", "humor goes from 0 to 9"),
        ("/set humor much", "takes a number"),
        ("/set grace 3", "there are quality, toxicity, humor, temperature"),
        ("/unset grace", "nothing is set by that name"),
        ("/dance", "/dance is not known"),
        ("/help", "/retry"),
    ):
        assert talk.line(line)
        assert words in said(talk)
    assert talk.attributes == {"humor": 3}
    talk.line("/unset humor")
    assert talk.attributes == {}


def test_what_fails_is_no_part_of_the_conversation(talk: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.line("/retry")
    assert said(talk) == "nothing has been answered yet\n"
    talk.line("/set max_tokens 100000")
    said(talk)
    talk.line("hello")
    assert "max_tokens=100000" in said(talk) and talk.messages == []

    def interrupted(*_: object) -> Iterator[str]:
        yield "Well"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_stream", interrupted)
    talk.line("hello")
    assert said(talk).startswith("Well\n[ended;") and talk.messages == []


def test_as_a_command(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set max_tokens 4\nhello\n/quit\nnever read\n"))
    chat([f"{server.url}/v1/"])
    out = capsys.readouterr().out
    assert "max_tokens=4" in out and "never" not in out
    with pytest.raises(UserError, match="no server answers at http://127.0.0.1:9 .*steerlm serve checkpoint="):
        chat(["http://127.0.0.1:9"])
    with httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, json={"data": []}))) as other:
        with pytest.raises(UserError, match="does not answer as OpenAI"):
            connect(other, "http://x", print)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ('data: {"choices": [{"delta": {"content": "Well"}}]}\n\n', "Well\n[the response broke off"),
        ("data: {oops\n\n", "[the server does not answer as OpenAI's API does: {oops]"),
        ("data: []\n\n", "does not answer as OpenAI"),
        ('data: {"choices": [5]}\n\n', "does not answer as OpenAI"),
        ('data: {"choices": null}\n\n', "broke off"),
        ('data: {"error": "bad"}\n\n', "[bad]"),
        ('data: {"error": {"message": "worse"}}\n\n', "[worse]"),
    ],
)
def test_a_response_that_breaks_off_or_is_none_ends_no_chat(sent: str, words: str) -> None:
    told: list[str] = []
    with httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text=sent))) as http:
        talk = Chat(http, "http://x", "m", None, told.append)
        assert talk.line("hello")
    assert words in "".join(told) and talk.messages == []


@pytest.mark.parametrize("end", ["data: [DONE]\n\n", 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'])
def test_a_response_is_whole_when_it_says_so(end: str) -> None:
    sent = 'data: {"choices": [{"delta": {"content": "Well"}}]}\n\n' + end
    with httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text=sent))) as http:
        talk = Chat(http, "http://x", "m", None, lambda text: None)
        talk.line("hello")
    assert talk.messages[-1] == {"role": "assistant", "content": "Well"}


def test_what_cannot_be_sent_is_told(
    server: Server, talk: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("nan", "inf", "-inf"):
        talk.line(f"/set temperature {value}")
        assert "takes a number" in said(talk) and "temperature" not in talk.settings
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/set max_tokens 4\n\xff\xfehello\n"), "utf-8"))
    chat([server.url])
    assert capsys.readouterr().out.count("\n") == 2, "the settings, and a response"
    with pytest.raises(UserError, match="--api-key holds characters"):
        chat([server.url, "--api-key", "schlüssel"])
    with pytest.raises(UserError, match="no server answers at http://"):
        chat(["http://[::1"])
