"""What every HTTP request passes on its way in and out: its id, the API key, the log of requests, refusals.

Owns: these, as an ASGI application around another. Does not own: limits of a single request (``read_request.py``), what
endpoints do (``server.py``). Invariants: every answer has ``X-Request-Id``; keys are compared in constant time; a
refusal has OpenAI's error body; while the server shuts down, it begins no new work.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.errors import ApiError

log = get_logger(__name__)

OPEN_PATHS = ("/", "/health", "/ready", "/version")  # probes and the page need no key,
OPEN_FOLDERS = ("/page/",)  # nor do the files of the page
PROBES = ("/health", "/ready", "/metrics")  # these are answered however many connections there are
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
RETRY_AFTER_SEC = 5


class Gate:
    """An ASGI application in front of ``app``."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str] = (),
        root_path: str = "",
        log_file: AccessLog | None = None,
        rejected: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """``rejected`` is called with the code of a refusal. ``root_path`` is removed from the beginning of paths."""
        self.app, self._log, self._rejected = app, log_file, rejected
        self._keys = [key.encode() for key in keys]
        self._root = root_path.rstrip("/")
        self.draining = False
        self.active = 0  # requests that are being answered, those of PROBES left out
        self.crowded: Callable[[], bool] = lambda: False  # whether there are too many connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        if self._root and path.startswith(f"{self._root}/"):
            path = scope["path"] = path[len(self._root) :]
        headers = {name: value for name, value in scope["headers"] if name in (b"x-request-id", b"authorization")}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        note: dict[str, Any] = {}
        scope.setdefault("state", {})["note"] = note
        scope["state"]["request_id"] = request_id
        began, status, sent = time.monotonic(), 0, 0

        async def out(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        counts = path not in PROBES
        self.active += counts
        try:
            refusal = self._refusal(scope, path, headers.get(b"authorization", b""))
            if refusal is None:
                await self.app(scope, receive, out)
            else:
                self._rejected(str(refusal.body["error"]["code"]))
                await error_response(refusal)(scope, receive, out)
        except asyncio.CancelledError:
            # At the end of a shutdown, of which a request that has not arrived completely is not told otherwise.
            if not self.draining or status:
                raise
            await error_response(shutting_down())(scope, receive, out)
        finally:
            self.active -= counts
            if self._log is not None:
                client = scope.get("client")
                self._log.write(
                    {
                        "time": time.time(), "id": request_id, "client": client[0] if client else None,
                        "method": scope["method"], "path": path, "status": status, "bytes": sent,
                        "seconds": round(time.monotonic() - began, 6), **note,
                    }
                )  # fmt: skip

    def _refusal(self, scope: Scope, path: str, authorization: bytes) -> ApiError | None:
        if path in (*OPEN_PATHS, self._root) or path.startswith(OPEN_FOLDERS) or scope["method"] == "OPTIONS":
            return None
        if self._keys and not self._is_known(authorization):
            told = "is missing; send Authorization: Bearer KEY" if not authorization else "is not one of this server's"
            return ApiError(401, f"the API key {told}", kind="authentication_error", code="invalid_api_key")
        if path in PROBES:
            return None
        if self.draining and scope["method"] == "POST":
            return shutting_down()
        if self.crowded():
            told = "too many connections are open (server.max_connections); try again later"
            return ApiError(503, told, kind="server_error", code="too_many_connections", close=True)
        return None

    def _is_known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        # All keys are compared, so that the time tells nothing of which one is near.
        known = [hmac.compare_digest(key.strip(), one) for one in self._keys]
        return scheme.lower() == b"bearer" and any(known)


class AccessLog:
    """A file with one line of JSON per answered request; ``-`` is standard output."""

    def __init__(self, path: str) -> None:
        """Raises UserError if the file cannot be written."""
        self._lock = threading.Lock()
        self._path, self._lost = path, 0  # ``_lost``: lines in a row that could not be written
        self._file: IO[bytes] | None = None  # None is standard output
        if path == "-":
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer, a line that cannot be written does not come in the way of later ones.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # it is open while the server is
        except OSError as e:
            raise UserError(f"server.access_log={path} cannot be written: {e.strerror}") from e

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line. One that cannot be written is lost and the request is not: a warning says so, once until
        lines can be written again.
        """
        line = json.dumps(entry) + "\n"
        with self._lock:
            try:
                if self._file is None:
                    print(line, end="", flush=True)
                else:
                    self._file.write(line.encode())
            except OSError as e:
                self._lost += 1
                if self._lost == 1:
                    log.warning("server.access_log=%s cannot be written: %s; lines are lost", self._path, e.strerror)
            else:
                if self._lost:
                    log.warning("server.access_log=%s is written again; %d lines are lost", self._path, self._lost)
                self._lost = 0

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def shutting_down() -> ApiError:
    """Return the answer to a request that comes, or still waits, while the server shuts down."""
    told = "the server is shutting down; send the request again, to another server or later"
    return ApiError(503, told, kind="server_error", code="shutting_down", close=True)


def error_response(error: ApiError, retry_after_sec: int | None = None) -> JSONResponse:
    """Return the HTTP response of an error; one with status 503 says when to try again."""
    headers = {"Connection": "close"} if error.close else {}
    if error.status == 503 or retry_after_sec is not None:
        headers["Retry-After"] = str(retry_after_sec or RETRY_AFTER_SEC)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers=headers)


def read_keys(keys: Sequence[str], path: str | None) -> list[str]:
    """Return the API keys of ``server.api_keys`` and, one a line, of the file ``server.api_key_file``.

    Raises UserError if the file cannot be read or has no key, or if a key cannot be sent in a header."""
    found = list(keys)
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"server.api_key_file={path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UserError(f"server.api_key_file={path} holds no key; write one a line")
    if any(not _REQUEST_ID.fullmatch(key) for key in found):
        raise UserError("server.api_keys and server.api_key_file: a key is 1 to 128 ASCII characters without blanks")
    return list(dict.fromkeys(found))
