"""Running a server: shutting down, ranks that stop, keys, ids, logs, limits of connections, metrics."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from steerlm_megatron.config.schema import ServerConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.group import LocalGroup
from steerlm_megatron.generate.protocol import EngineDead, ShuttingDown
from steerlm_megatron.serve.engine_loop import EngineLoop
from steerlm_megatron.serve.errors import ApiError
from steerlm_megatron.serve.gate import AccessLog, error_response, read_keys
from steerlm_megatron.serve.orderly import check_server
from tests.helpers.server import USER, Server, make_generator, running, wait_for

ASK = {"prompt": "hello", "max_tokens": 40, "seed": 1}


class Asker:
    """Sends requests in threads and keeps their answers by name."""

    def __init__(self, server: Server) -> None:
        self.server, self.answers = server, dict[str, httpx.Response]()
        self.threads: list[threading.Thread] = []

    def ask(self, name: str, **body: Any) -> None:
        def run() -> None:
            self.answers[name] = self.server.post("completions", **{**ASK, **body})

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def is_openai_error(body: dict[str, Any], code: str) -> bool:
    return (
        set(body) == {"error"}
        and set(body["error"]) == {"message", "type", "param", "code"}
        and (body["error"]["code"] == code)
    )


def test_a_shutdown_refuses_what_waits_and_finishes_what_runs(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(max_batch=2, step_sec=0.01) as server:
        server.model.stop_bias = -1e9
        asker = Asker(server)
        asker.ask("running")
        asker.ask("running stream", stream=True)
        wait_for(lambda: len(server.generator.scheduler.running) == 2)
        for name in ("waiting", "waiting list", "waiting stream"):
            body = {"prompt": ["a", "b"]} if "list" in name else {"stream": "stream" in name}
            asker.ask(name, **body)
        wait_for(lambda: len(server.generator.scheduler.waiting) == 4)
        server.model.go.clear()  # what runs waits until everything else is answered
        server.stop()
        wait_for(lambda: server.client.get(f"{server.url}/ready").status_code == 503)
        ready = server.client.get(f"{server.url}/ready")
        assert "shutting down" in ready.json()["reason"] and ready.headers["Retry-After"]
        health = server.client.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (200, "draining")
        asker.ask("new")
        wait_for(lambda: len(asker.answers) == 4)
        server.model.go.set()
        asker.join()
        server.thread.join(60)
        assert not server.thread.is_alive() and not server.ended
    answers = asker.answers
    assert answers["running"].json()["usage"]["completion_tokens"] == 40
    assert answers["running stream"].text.endswith("data: [DONE]\n\n")
    for name in ("waiting", "waiting list", "waiting stream", "new"):
        assert answers[name].status_code == 503, name
        assert int(answers[name].headers["Retry-After"]) >= 1
        assert is_openai_error(answers[name].json(), "shutting_down")
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert "Traceback" not in capfd.readouterr().err


def test_what_does_not_finish_in_time_ends_with_an_error_of_openais_form(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(step_sec=0.05, drain_sec=0.4) as server:
        server.model.stop_bias = -1e9
        asker = Asker(server)
        asker.ask("whole", max_tokens=380)
        asker.ask("stream", max_tokens=380, stream=True)
        wait_for(lambda: len(server.generator.scheduler.running) == 2)
        time.sleep(0.2)  # some tokens are sent
        begin = time.monotonic()
        server.stop()
        asker.join()
        server.thread.join(60)
        assert not server.ended and time.monotonic() - begin < 10
    assert asker.answers["whole"].status_code == 503 and is_openai_error(asker.answers["whole"].json(), "shutting_down")
    events = asker.answers["stream"].text.split("\n\n")
    assert asker.answers["stream"].status_code == 200 and len(events) > 2
    assert is_openai_error(json.loads(events[-2].removeprefix("data: ")), "shutting_down")
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_that_has_not_arrived_at_the_end_of_a_shutdown_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("steerlm_megatron.serve.server._FLUSH_SEC", 1)
    with running(drain_sec=0.2) as server:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
        )
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as half:
            half.sendall(head.encode())
            time.sleep(0.2)  # the head has arrived
            server.stop()
            half.settimeout(30)
            answer = b"".join(iter(lambda: half.recv(65536), b"")).decode()
        server.thread.join(60)
        assert not server.ended
    assert answer.startswith("HTTP/1.1 503") and is_openai_error(
        json.loads(answer.partition("\r\n\r\n")[2]), "shutting_down"
    )
    assert not [record for record in caplog.records if record.exc_info]


def test_a_full_disk_loses_lines_of_the_log_and_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with running(access_log="/dev/full") as server:
        for _ in range(3):
            assert server.post("completions", **ASK).status_code == 200
        assert server.client.get(f"{server.url}/version").status_code == 200
    told = [r.getMessage() for r in caplog.records if "server.access_log=/dev/full cannot be written" in r.getMessage()]
    assert len(told) == 1 and "No space left" in told[0]
    assert not [record for record in caplog.records if record.exc_info]


class StoppedRank(LocalGroup):
    """A replica of two ranks, of which the other does not answer."""

    size, heartbeat_sec = 2, 0.05

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()

    def wait_for_all(self) -> None:
        self.answers.wait(60)


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_a_rank_that_does_not_answer_ends_the_server(
    asked_to_stop: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = StoppedRank()
    monkeypatch.setattr("tests.helpers.server.Generator", lambda *args: _of_group(group, *args))
    timeout_sec = 4.0
    with running(timeout_sec=timeout_sec, drain_sec=0.2) as server:
        assert server.post("completions", **{**ASK, "max_tokens": 2}).status_code == 200
        group.answers.clear()
        begin = time.monotonic()
        if asked_to_stop:
            server.stop()
        else:
            wait_for(lambda: server.client.get(f"{server.url}/health").status_code == 503)
            assert time.monotonic() - begin < timeout_sec / 2
            assert "has not finished a step" in server.client.get(f"{server.url}/health").json()["reason"]
        server.thread.join(30)
        assert not server.thread.is_alive() and time.monotonic() - begin < timeout_sec + 1
        assert len(server.ended) == 1
        assert ("did not stop" if asked_to_stop else "have exchanged no message") in str(server.ended[0])
        group.answers.set()


def _of_group(group: LocalGroup, *args: Any) -> Any:
    from steerlm_megatron.generate.generator import Generator

    return Generator(*args, group)


def test_an_engine_loop_that_is_ended_tells_the_requests_why() -> None:
    generator, _ = make_generator()
    loop = EngineLoop(generator)
    loop.start()
    generator.runner.model.go.clear()  # type: ignore[operator, union-attr]
    request = _request("a")
    handle = generator.submit_all([request])[0]
    loop.abort()
    generator.runner.model.go.set()  # type: ignore[operator, union-attr]
    with pytest.raises(ShuttingDown):
        handle.future.result(timeout=30)
    loop.stop()
    assert not loop.is_alive and loop.failure is None and "shutting down" in str(loop.problem())
    with pytest.raises(EngineDead):
        generator.submit_all([request])


def _request(name: str) -> Any:
    from steerlm_megatron.generate.protocol import Request, SamplingParams

    return Request(name, (5, 6, 7), SamplingParams(max_tokens=300))


def test_waiting_requests_can_be_refused() -> None:
    generator, _ = make_generator(max_batch=1)
    handles = generator.submit_all([_request("a"), _request("b")])
    assert generator.refuse_waiting(ShuttingDown("now")) == 2
    assert all(isinstance(h.future.exception(), ShuttingDown) and h.result is None for h in handles)
    assert not generator.jobs and generator.counters()["waiting"] == 0


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    log = tmp_path_factory.mktemp("access") / "log" / "access.jsonl"
    changes = {"api_keys": ["key-1", "key-2"], "access_log": str(log), "cors": ["https://chat.example"]}
    with running(**changes, root_path="/steerlm", max_connections=20) as server:
        yield server, log


def entries(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_keys(guarded: tuple[Server, Path]) -> None:
    server, _ = guarded
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer key-3"}, 401),
        ({"Authorization": "key-1"}, 401),
        ({"Authorization": "Basic key-1"}, 401),
        ({"Authorization": "Bearer key-1"}, 200),
        ({"Authorization": "bearer key-2"}, 200),
    ):
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
            body = {**ASK, "max_tokens": 1} if method == "POST" else None
            answer = server.client.request(method, f"{server.url}{path}", json=body, headers=headers)
            assert answer.status_code == status, (headers, path)
            if status == 401:
                assert is_openai_error(answer.json(), "invalid_api_key") and answer.headers["WWW-Authenticate"]
    for path in ("/health", "/ready", "/version"):
        assert server.client.get(f"{server.url}{path}").status_code == 200


def test_ids_the_log_and_the_path_of_a_proxy(guarded: tuple[Server, Path]) -> None:
    server, log = guarded
    key = {"Authorization": "Bearer key-1"}
    body = {"messages": USER, "max_tokens": 3, "n": 2, "seed": 1}
    url = f"{server.url}/steerlm/v1/chat/completions"
    named = server.client.post(url, json=body, headers={**key, "X-Request-Id": "mine-1"})
    assert named.status_code == 200 and named.headers["X-Request-Id"] == "mine-1"
    drawn = server.client.post(url, json={**body, "stream": True}, headers={**key, "X-Request-Id": "no blanks" * 99})
    assert len(drawn.headers["X-Request-Id"]) == 32 and drawn.headers["content-type"].startswith("text/event-stream")
    refused = server.client.post(url, json={**body, "n": 0}, headers=key)
    assert refused.status_code == 400 and refused.headers["X-Request-Id"]
    wait_for(lambda: any(entry["id"] == refused.headers["X-Request-Id"] for entry in entries(log)))
    by_id = {entry["id"]: entry for entry in entries(log)}
    for answer, stream in ((named, False), (drawn, True)):
        entry = by_id[answer.headers["X-Request-Id"]]
        assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/chat/completions", 200)
        assert entry["stream"] is stream and entry["choices"] == 2 and entry["client"] == "127.0.0.1"
        assert entry["completion_tokens"] <= 6 and len(entry["finish_reasons"]) == 2
        assert entry["bytes"] == len(answer.content) and 0 < entry["seconds"] < 60
    assert by_id[refused.headers["X-Request-Id"]]["status"] == 400
    assert not any("hello" in line or "key-1" in line for line in log.read_text().splitlines()), "no texts, no keys"


def test_pages_of_listed_origins_may_ask(guarded: tuple[Server, Path]) -> None:
    server, _ = guarded
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in (("https://chat.example", True), ("https://else.example", False)):
        answer = server.client.options(f"{server.url}/v1/chat/completions", headers={"Origin": origin, **asked})
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    refused = server.client.get(f"{server.url}/v1/models", headers={"Origin": "https://chat.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://chat.example"


def test_more_connections_than_allowed_are_refused_but_probes_are_answered(guarded: tuple[Server, Path]) -> None:
    server, _ = guarded
    host, port = server.url.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(25)]
    try:
        time.sleep(0.2)
        with httpx.Client(trust_env=False, headers={"Authorization": "Bearer key-1"}) as client:
            answer = client.post(f"{server.url}/v1/completions", json=ASK)
            assert answer.status_code == 503 and is_openai_error(answer.json(), "too_many_connections")
            assert "max_connections" in answer.json()["error"]["message"] and answer.headers["Retry-After"]
            assert client.get(f"{server.url}/health").status_code == 200
            assert 'reason="too_many_connections"' in client.get(f"{server.url}/metrics").text
        held += [socket.create_connection((host, int(port))) for _ in range(70)]
        assert held[-1].recv(1) == b"", "one beyond all reserves is closed at once"
    finally:
        for connection in held:
            connection.close()
    key = {"Authorization": "Bearer key-1"}
    wait_for(lambda: server.client.get(f"{server.url}/v1/models", headers=key).status_code == 200)


def metric(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def test_metrics_of_streams_are_of_their_whole_time(caplog: pytest.LogCaptureFixture) -> None:
    with running(step_sec=0.02, max_batch=1) as server:
        server.model.stop_bias = -1e9
        asker = Asker(server)
        asker.ask("first", max_tokens=50, stream=True)
        wait_for(lambda: len(server.generator.scheduler.running) == 1)
        asker.ask("second", max_tokens=10, stream=True)
        asker.join()
        server.post("completions", prompt="hello", temperature=-1)
        text = server.client.get(f"{server.url}/metrics").text
        assert metric(text, 'steerlm_request_seconds_sum{endpoint="/v1/completions"}') > 50 * 0.02 + 60 * 0.02
        assert metric(text, "steerlm_queue_seconds_sum") > 0.5, "the second waited for the first"
        first = metric(text, "steerlm_time_to_first_token_seconds_sum")
        assert first > metric(text, "steerlm_queue_seconds_sum") + 2 * 0.02
        assert 2 * 0.02 < metric(text, "steerlm_inter_token_seconds_sum") < first
        assert metric(text, "steerlm_longest_inter_token_seconds_count") == 2
        assert metric(text, 'steerlm_finished_total{reason="length"}') == 2
        assert metric(text, "steerlm_response_tokens_sum") == 60
        assert metric(text, "steerlm_request_prompt_tokens_count") == 2
        assert metric(text, "steerlm_rejected_requests_total") == 1
        assert metric(text, "steerlm_steps_total") >= 60 and metric(text, "steerlm_running ") == 0
        with caplog.at_level(logging.INFO), server.client.stream("POST", f"{server.url}/v1/completions", json={
            **ASK, "stream": True, "max_tokens": 380
        }) as answer:  # fmt: skip
            next(answer.iter_raw())
        wait_for(lambda: not server.generator.jobs)
        wait_for(lambda: metric(server.client.get(f"{server.url}/metrics").text, "steerlm_clients_left_total") == 1)
        text = server.client.get(f"{server.url}/metrics").text
        assert metric(text, 'steerlm_finished_total{reason="cancelled"}') == 1


def test_a_stream_waits_for_nobody_and_joins_what_waits() -> None:
    """Chunks are at most as many as tokens, their text is the whole, and many tokens that wait come in one."""
    with running(max_batch=64, max_sequence_tokens=400, max_cache_tokens=64 * 400) as server:
        server.model.stop_bias = -1e9
        whole = server.post("completions", **{**ASK, "max_tokens": 300}).json()["choices"][0]["text"]
        asker = Asker(server)
        for i in range(32):
            asker.ask(str(i), max_tokens=300, stream=True)
        asker.join()
        counts = []
        for answer in asker.answers.values():
            chunks = [json.loads(e.removeprefix("data: ")) for e in answer.text.split("\n\n")[:-2]]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
            counts.append(len(chunks))
        assert max(counts) < 200, "tokens that wait are joined"


def test_settings_of_a_server_are_checked_together(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    bad = ServerConfig(port=0, api_key_file=str(tmp_path / "keys"), tls_cert=str(tmp_path / "no.pem"),
                       access_log=str(tmp_path / "keys" / "x"))  # fmt: skip
    with pytest.raises(UserError) as error:
        check_server(bad)
    assert all(word in str(error.value) for word in ("holds no key", "server.tls_cert=", "server.access_log="))
    with pytest.raises(UserError, match="without server.tls_cert"):
        check_server(ServerConfig(port=0, tls_key="x"))
    (tmp_path / "keys").write_text("# of ours\none\n two \n\none\n")
    assert read_keys(["zero"], str(tmp_path / "keys")) == ["zero", "one", "two"]
    with pytest.raises(UserError, match="without blanks"):
        read_keys(["a b"], None)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys([], str(tmp_path / "none"))
    check_server(ServerConfig(port=0, api_keys=["a"], access_log=str(tmp_path / "new" / "log")))
    log = AccessLog(str(tmp_path / "new" / "log"))
    log.write({"a": 1})
    log.close()
    assert (tmp_path / "new" / "log").read_text() == '{"a": 1}\n'
    assert error_response(ApiError(429, "x"), 7).headers["Retry-After"] == "7"


def test_https(tmp_path: Path) -> None:
    certificate = Path(__file__).with_name("localhost.pem")  # self-signed, with its key, for 127.0.0.1
    check_server(ServerConfig(port=0, tls_cert=str(certificate)))
    trusted = ssl.create_default_context(cafile=str(certificate))
    with running(tls_cert=str(certificate)) as server:
        assert server.url.startswith("https://")
        with httpx.Client(verify=trusted, trust_env=False) as client:
            assert client.get(f"{server.url}/version").json()["model"] == "steerlm"
