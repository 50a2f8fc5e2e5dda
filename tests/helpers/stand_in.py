"""A stand-in for somebody else's server with OpenAI's API: it refuses fields that it does not know, and has no
``/health``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import Request, SamplingParams
from tests.helpers.server import TOKENIZER, make_generator

OPENAI = frozenset(
    ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "logprobs", "stream", "echo")
)
VLLM = OPENAI | {"top_k", "stop_token_ids", "return_token_ids"}


@dataclass
class StandIn:
    """How a server behaves, and what it was asked. ``break_after``: answers until it breaks off its connections."""

    fields: frozenset[str] = VLLM
    model: str = "exported/model"
    max_model_len: int = 400
    status: int = 200  # of completions
    garbles: bool = False  # its tokenizer writes other texts than ours
    hangs: bool = False
    break_after: int | None = None
    seconds: float = 0.0  # of an answer
    generator: Generator = field(default_factory=lambda: make_generator()[0])
    asked: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    listed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    counter: int = 0

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        unknown = set(body) - self.fields
        if unknown:
            self.refused.append(body)
            name = sorted(unknown)[0]
            return 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs"}]}
        if body["model"] != self.model:
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        if self.status != 200:
            return self.status, {"error": {"message": "no luck", "type": "InternalServerError"}}
        ids = body["prompt"]
        params = SamplingParams(
            body["temperature"], max(0, body.get("top_k", 0)), body.get("top_p", 1.0), body["max_tokens"],
            body.get("seed", 0),
        )  # fmt: skip
        time.sleep(self.seconds)
        with self.lock:
            self.counter += 1
            result = self.generator.generate([Request(str(self.counter), tuple(ids), params)])[0]
        text = result.text
        if body.get("echo"):
            text = TOKENIZER.decode(ids) + text
        if self.garbles:
            text = text[::-1]
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": result.finish_reason, "logprobs": None}
        if body.get("return_token_ids"):
            choice["token_ids"] = list(result.token_ids)
        usage = {"prompt_tokens": len(ids), "completion_tokens": result.completion_tokens}
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}


@contextmanager
def standing_in(how: StandIn, port: int = 0) -> Iterator[str]:
    """Yield the address of a server that behaves as ``how`` says."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def wait_while_it_hangs(self) -> None:
            while how.hangs:
                time.sleep(0.05)

        def do_GET(self) -> None:
            self.wait_while_it_hangs()
            if self.path != "/v1/models":
                self.answer(404, {"detail": "Not Found"})
                return
            how.listed += 1
            entry = {"id": how.model, "object": "model", "owned_by": "vllm", "max_model_len": how.max_model_len}
            self.answer(200, {"object": "list", "data": [entry]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            how.asked.append(body)
            self.wait_while_it_hangs()
            if how.break_after is not None and len(how.asked) > how.break_after:
                self.close_connection = True
                self.connection.close()
                return
            self.answer(*how.complete(body))

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            pass  # a client that has gone is no fault here

    server = Listener(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        how.hangs = False
        server.shutdown()
        server.server_close()
        thread.join()
