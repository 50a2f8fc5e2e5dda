"""Error responses of the server, with OpenAI's error body.

Owns: the body's fields, and how a value is shown in a message. Does not own: which requests are refused.
"""

from __future__ import annotations

from typing import Any

_SHOWN_CHARS = 100


class ApiError(Exception):
    """An error with OpenAI's body. ``param`` names the parameter at fault; ``close`` ends the connection."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.close = status, close
        named = None if param is None else writable(param)
        self.body = {"error": {"message": writable(message), "type": kind, "param": named, "code": code}}


def writable(text: str) -> str:
    """Return ``text`` with its lone surrogates, which JSON can write and UTF-8 cannot, as ``\\udcXX``."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: Any) -> str:
    """Return a value as an error message quotes it: its beginning, if it is long."""
    part = value[: _SHOWN_CHARS + 1] if isinstance(value, str | list) else value
    text = repr(part)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
