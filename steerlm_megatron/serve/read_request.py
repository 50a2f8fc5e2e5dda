"""Read a request's head and body, within limits of size and time.

Owns: these limits, and parsing JSON. Does not own: the meaning of the JSON (``api.py``). Invariants: a request that has
not arrived completely after ``server.read_timeout_sec`` is ended; no more than ``server.max_body_bytes`` of a body are
kept; a body that declares a larger size is refused before it is read.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from starlette.requests import Request as HttpRequest
from uvicorn.protocols.http.h11_impl import H11Protocol

from steerlm_megatron.serve.errors import ApiError

_SPARE_CONNECTIONS = 64  # beyond the limit, for probes and for refusals that say why


class ClientGone(Exception):
    """The client left before its request had arrived completely, so nobody waits for an answer."""


class _TimedProtocol(H11Protocol):
    """uvicorn's protocol with the limits of :func:`timed_protocol`."""

    read_timeout_sec: float
    idle_timeout_sec: float
    max_connections: int
    _deadline: asyncio.TimerHandle | None = None
    _idle = False  # the deadline is that of a connection on which nothing has arrived since its last answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections + _SPARE_CONNECTIONS:
            transport.close()
            return
        self._watch(self.read_timeout_sec)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle:
            self._unwatch()
        self._watch(self.read_timeout_sec)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_between_requests():
            self._unwatch()
            self._watch(self.idle_timeout_sec)
            self._idle = self._deadline is not None
        else:
            self._watch(self.read_timeout_sec)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _is_between_requests(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _watch(self, seconds: float) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(seconds, self._expire)

    def _unwatch(self) -> None:
        self._idle = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()


def timed_protocol(read_timeout_sec: float, idle_timeout_sec: float, max_connections: int) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with time limits; by itself it waits for the rest of a request's head for ever.

    A new connection, and one on which a request has begun to arrive, has ``read_timeout_sec`` for the rest of the
    head; one that has been answered is kept for ``idle_timeout_sec``. The rest of a body that was refused is read and
    discarded for ``read_timeout_sec``: if the connection were closed at once, a client that writes the complete body
    before it reads would see a reset instead of the refusal.

    Of ``max_connections`` and a few more for probes, connections are closed as soon as they are made.
    """
    limits = {
        "read_timeout_sec": read_timeout_sec,
        "idle_timeout_sec": idle_timeout_sec,
        "max_connections": max_connections,
    }
    return type("TimedProtocol", (_TimedProtocol,), limits)


async def read_body(http: HttpRequest, max_bytes: int, timeout_sec: float) -> bytes:
    """Return the body of a JSON request. Raises ApiError (400, 408, 413, 415), ClientGone."""
    _check_headers(http, max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_sec):
            more = True
            while more:
                message = await http.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > max_bytes:
                    raise _too_large(f"more than {max_bytes}", max_bytes)
    except TimeoutError:
        late = f"the body was not whole after server.read_timeout_sec={timeout_sec:g} s; {len(body)} bytes came"
        raise ApiError(408, late, code="request_timeout", close=True) from None
    if not body:
        raise ApiError(400, "the body is empty; it must be a JSON object")
    return bytes(body)


async def disconnected(http: HttpRequest) -> None:
    """Return when the client has left; its body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _check_headers(http: HttpRequest, max_bytes: int) -> None:
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(declared[:20], max_bytes)
    kind = http.headers.get("content-type", "")
    media = kind.partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        given = f"is {kind[:100]!r}" if kind else "is missing"
        remedy = "it must be application/json (curl: -H 'Content-Type: application/json')"
        raise ApiError(400, f"the header Content-Type {given}; {remedy}", "content-type")
    encoding = http.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"the header Content-Encoding is {encoding[:100]!r}; send the body as it is, without that header"
        raise ApiError(415, message, "content-encoding")


def _too_large(given: str, max_bytes: int) -> ApiError:
    message = f"the body has {given} bytes, and server.max_body_bytes={max_bytes}; send less at a time"
    return ApiError(413, message, code="request_too_large")


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises ApiError if it is not UTF-8, not JSON, or no object."""
    try:
        data = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON here: it is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is a JSON {_JSON_TYPES.get(type(data), 'number')}; it must be an object")
    return data


_JSON_TYPES = {list: "array", str: "string", bool: "boolean", type(None): "null"}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
