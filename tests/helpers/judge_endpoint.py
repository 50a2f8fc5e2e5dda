"""A stand-in for a language model that judges: OpenAI's chat API over real HTTP, with the faults that services have."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = tuple[int, dict[str, str], Any] | str  # status, headers and body; or "cut", "late"
_ANSWERS = re.compile(r"=== Assistant (?:A|1) ===\n(.*?)\n=== Assistant (?:B|2) ===\n(.*?)\n===", re.DOTALL)


def shown(messages: list[dict[str, str]]) -> tuple[str, str]:
    """Return the two answers of the last turn in one of our prompts for pairs."""
    asked = next(m["content"] for m in messages if m["role"] == "user")
    found = _ANSWERS.findall(asked)[-1]
    return found[0], found[1]


def longer(messages: list[dict[str, str]]) -> str:
    """Judge by length alone, whatever the place."""
    a, b = map(len, shown(messages))
    return f"Thus [[{'A' if a > b else 'B' if b > a else 'C'}]]"


@dataclass
class JudgeStandIn:
    """How the endpoint behaves, and what it was asked.

    Args:
        says: what it writes about a conversation.
        faults: what it does instead, one per request, until there are none left. None is an answer.
        fault_of: what it does instead by the request's body, or None.
        usage: whether it counts tokens; ``key``: the API key that it wants; ``models``: what it lists.
    """

    says: Callable[[list[dict[str, str]]], str] = longer
    faults: list[Fault | None] = field(default_factory=list)
    fault_of: Callable[[dict[str, Any]], Fault | None] = lambda body: None
    usage: bool = True
    key: str | None = None
    models: tuple[str, ...] = ("judge-1",)
    lists: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    seconds: float = 0.0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, body: dict[str, Any]) -> Fault | None:
        with self._lock:
            self.asked.append(body)
            self.times.append(time.monotonic())
            if self.faults:
                return self.faults.pop(0)
        return self.fault_of(body)


class _Handler(BaseHTTPRequestHandler):
    """Answers as ``how`` says, which each endpoint sets in a class of its own."""

    how: JudgeStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        self.how.headers.append(dict(self.headers))
        if self.how.key is None or self.headers.get("Authorization") == f"Bearer {self.how.key}":
            return False
        given = self.headers.get("Authorization", "")
        self.answer(401, {}, {"error": {"message": f"Incorrect API key provided: {given}"}})
        return True

    def do_GET(self) -> None:
        if self.refused():
            return
        if self.path != "/v1/models" or not self.how.lists:
            self.answer(404, {}, {"error": {"message": "no such page"}})
            return
        self.answer(200, {}, {"object": "list", "data": [{"id": name} for name in self.how.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        if self.path != "/v1/chat/completions":
            self.answer(404, {}, {"error": {"message": "no such page"}})
            return
        fault = self.how.take(body)
        if fault == "cut":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "late":
            time.sleep(0.6)
        if isinstance(fault, tuple):
            self.answer(*fault)
            return
        with self.how._lock:
            self.how._now += 1
            self.how.most_at_once = max(self.how.most_at_once, self.how._now)
        time.sleep(self.how.seconds)
        text = self.how.says(body["messages"])
        with self.how._lock:
            self.how._now -= 1
        message = {"role": "assistant", "content": text}
        told: dict[str, Any] = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        if self.how.usage:
            told["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
        self.answer(200, {}, told)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        pass  # a client that has gone is no fault here


@contextmanager
def judging(how: JudgeStandIn) -> Iterator[str]:
    """Yield the address of an endpoint that behaves as ``how`` says."""

    server = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"how": how}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
