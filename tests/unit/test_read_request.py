"""Reading requests: sizes and counts that can never fit are refused at once, and incomplete requests are ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.server import USER, Server, running, wait_for

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
WHOLE = f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(read_timeout_sec=1.0, idle_timeout_sec=1.0, max_body_bytes=100_000, max_queue=50) as one:
        yield one


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Return everything that the server sends until it closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, len(WHOLE) - 1), min_size=1, max_size=12), st.booleans())
def test_half_sent_requests_end(server: Server, lengths: list[int], after_a_whole_one: bool) -> None:
    """A request is cut anywhere in its head or body, as the first of a connection or a later one."""
    begin = time.monotonic()
    connections = [connect(server) for _ in lengths]
    for connection, length in zip(connections, lengths, strict=True):
        connection.sendall((WHOLE if after_a_whole_one else b"") + WHOLE[:length])
    for connection, length in zip(connections, lengths, strict=True):
        answers = read_all(connection)
        assert answers.count(b"HTTP/1.1 200") == after_a_whole_one
        assert answers.count(b"HTTP/1.1 408") == (length > 0)
        connection.close()
    assert time.monotonic() - begin < 20
    assert server.client.get(f"{server.url}/health").status_code == 200


def test_a_request_that_drips_ends(server: Server) -> None:
    for data in (WHOLE[:60], WHOLE[: len(WHOLE) - 4]):
        with connect(server) as connection:
            begin, sent = time.monotonic(), 0
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - begin < 30 and sent < len(data):
                    connection.sendall(data[sent : sent + 1] if sent > len(data) - 20 else data[sent : len(data) - 20])
                    sent = sent + 1 if sent > len(data) - 20 else len(data) - 19
                    time.sleep(0.1)
            assert b"HTTP/1.1 408" in read_all(connection)
            assert time.monotonic() - begin < 20


def test_many_half_sent_requests_leave_the_server_to_others(server: Server) -> None:
    connections = [connect(server) for _ in range(220)]
    for i, connection in enumerate(connections):
        connection.sendall(WHOLE[: 1 + i % (len(WHOLE) - 1)])
    assert server.post("completions", prompt="hello", max_tokens=2).status_code == 200
    for connection in connections:
        assert b"HTTP/1.1 408" in read_all(connection)
        connection.close()


def test_a_declared_body_is_refused_before_it_is_read(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(f"{HEAD}Content-Length: 50000000\r\n\r\n".encode())
        answer = b""
        while b"max_body_bytes" not in answer:  # head and body may come in separate packets
            answer += (piece := connection.recv(65536))
            assert piece
        assert b"HTTP/1.1 413" in answer and b"max_body_bytes=100000" in answer


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_it_all_reads_the_refusal(server: Server, chunked: bool) -> None:
    data = json.dumps({"prompt": "a" * 20_000_000}).encode()
    content: Any = iter([data[i : i + 100_000] for i in range(0, len(data), 100_000)]) if chunked else data
    answer = server.client.post(
        f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    assert server.post("completions", prompt="hello", max_tokens=2).status_code == 200


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 128), st.booleans())
def test_choices_that_can_never_be_queued_are_refused_at_once(server: Server, prompts: int, n: int, ids: bool) -> None:
    limit = 50 + 16  # max_queue + max_batch
    if prompts * n <= limit:
        return
    count = min(prompts, 20_000)
    if count * n <= limit:
        count = limit + 1
    begin = time.monotonic()
    answer = server.post("completions", prompt=[[5]] * count if ids else ["a"] * count, n=n, max_tokens=1)
    assert answer.status_code == 400 and time.monotonic() - begin < 10
    error = answer.json()["error"]
    assert f"{count * n} choices" in error["message"] and f"ever queue, {limit} " in error["message"]
    assert error["code"] == "too_many_choices"


def test_as_many_choices_as_the_queue_holds_are_answered(server: Server) -> None:
    answer = server.post("completions", prompt=["hello", "world"], n=33, max_tokens=1)
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 66
    answer = server.post("chat/completions", messages=USER, n=67, max_tokens=1)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a b " * 20_000}, "prompt"),
        ("completions", {"prompt": ["a", "b" * 90_000]}, "prompt"),
        ("completions", {"prompt": [7] * 400}, "prompt"),
        ("completions", {"prompt": "hello", "max_tokens": 2**62}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a b " * 20_000}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": ""}] * 400}, "messages"),
    ],
)
def test_a_prompt_that_is_too_long_is_not_tokenised(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    def encode(*_: Any) -> Any:
        raise AssertionError("tokenised")

    if "max_tokens" not in body:
        monkeypatch.setattr(type(server.generator.tokenizer), "encode", encode)
        monkeypatch.setattr(type(server.generator.tokenizer), "encode_segments", encode)
    answer = server.post(path, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert "max_sequence_tokens=400" in error["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"", {"Content-Type": "application/json"}, 400, "body is empty"),
        (b"", {}, 400, "Content-Type is missing"),
        (BODY, {}, 400, "Content-Type is missing"),
        (BODY, {"Content-Type": "application/x-www-form-urlencoded"}, 400, "Content-Type is 'application/x-www"),
        (BODY, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415, "Content-Encoding is 'gzip'"),
        (b"\xff\xfe", {"Content-Type": "application/json"}, 400, "not valid UTF-8"),
        (b"{", {"Content-Type": "application/json"}, 400, "not valid JSON"),
        (b"[" * 50_000, {"Content-Type": "application/json"}, 400, "nested too deeply"),
        (b'{"a":' * 15_000 + b"1" + b"}" * 15_000, {"Content-Type": "application/json"}, 400, "nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, {"Content-Type": "application/json"}, 400, "unknown parameter: a"),
        (b'{"prompt": "x", "top_p": NaN}', {"Content-Type": "application/json"}, 400, "NaN"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", {"Content-Type": "application/json"}, 400, "not valid JSON"),
        (b"[]", {"Content-Type": "application/json"}, 400, "a JSON array; it must be an object"),
        (b"null", {"Content-Type": "application/json"}, 400, "a JSON null"),
        (b'{"prompt": ""}', {"Content-Type": "application/json"}, 400, "prompt is empty"),
        (b'{"prompt": "\\ud800"}', {"Content-Type": "application/json"}, 400, "not valid Unicode"),
        (b'{"model": "\\ud800", "prompt": "a"}', {"Content-Type": "application/json"}, 404, "is not served here"),
        (b'{"\\ud800": 1, "prompt": "a"}', {"Content-Type": "application/json"}, 400, "unknown parameter"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(
    server: Server, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    answer = server.client.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_the_forms_of_json_that_clients_send(server: Server) -> None:
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        for content in (BODY, b"\xef\xbb\xbf" + BODY):
            answer = server.client.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": kind})
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_at_any_time_leave_no_traceback(
    stream: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Clients leave while they send the head or body, while they wait, and while they read."""
    caplog.set_level(logging.WARNING)
    with running(step_sec=0.005) as server:
        server.model.stop_bias = -1e9
        body = json.dumps({"prompt": "hello", "max_tokens": 300, "n": 3, "stream": stream}).encode()
        data = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
        for length in range(1, len(data), 7):
            with connect(server) as connection:
                connection.sendall(data[:length])
        for delay in (0, 0.01, 0.05, 0.2):
            with connect(server) as connection:
                connection.sendall(data)
                time.sleep(delay)
        wait_for(lambda: not server.generator.scheduler.running and not server.generator.scheduler.waiting)
        assert server.client.get(f"{server.url}/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert "Traceback" not in capfd.readouterr().err  # uvicorn logs there


def test_health_answers_while_a_long_body_is_parsed() -> None:
    with running(max_body_bytes=60_000_000) as server:
        data = json.dumps({"prompt": "hello", "metadata": ["x"] * 6_000_000}).encode()
        done: list[int] = []

        def send() -> None:
            with httpx.Client(timeout=120, trust_env=False) as client:
                headers = {"Content-Type": "application/json"}
                done.append(client.post(f"{server.url}/v1/completions", content=data, headers=headers).status_code)

        thread = threading.Thread(target=send)
        thread.start()
        longest = 0.0
        while not done:
            begin = time.monotonic()
            assert server.client.get(f"{server.url}/health").status_code == 200
            longest = max(longest, time.monotonic() - begin)
        thread.join()
        assert done == [200] and longest < 10


DEAD_ENGINE = """
import sys, threading, time, httpx
from steerlm_megatron.config.schema import SamplingConfig
from steerlm_megatron.serve.server import serve
from tests.helpers.server import SCHEMA, make_generator
generator, config = make_generator()
generator.runner.model.fail_at = 3

def ready(running):
    def ask():
        body = {"prompt": "hello", "max_tokens": 50}
        answer = httpx.post(running.url + "/v1/completions", json=body, trust_env=False)
        print(answer.status_code, answer.json()["error"]["message"], flush=True)
    threading.Thread(target=ask).start()

serve(generator, SCHEMA, config, SamplingConfig(), ready=ready, linger_sec=0.5)
print("returned")
"""


@pytest.mark.integration
def test_an_engine_that_died_ends_the_process_with_its_reason() -> None:
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DEAD_ENGINE], cwd=root, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["500 the engine stopped: RuntimeError: the model broke"]
    assert "EngineDead: RuntimeError: the model broke" in done.stderr
