"""``steerlm chat``: talk with a served model in the terminal, and change what is asked of it on the way.

Owns: the conversation, the lines that begin with a slash, printing a response as it comes. Does not own: the server
(``server.py``); any server with OpenAI's API will do, but for attributes. Invariant: the conversation holds complete
turns alone: what was interrupted or failed is not part of it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from steerlm_megatron.errors import UserError

_URL = "http://127.0.0.1:8000"
_HELP = """\
/set NAME VALUE   ask for an attribute's value, or set temperature, top_p, top_k, max_tokens, seed
/unset NAME       ask for the server's own value again
/settings         what is asked for
/system TEXT      begin again with this system message (without TEXT: with none)
/retry            another response to the last message
/reset            begin again
/quit             end (so does Ctrl-D; Ctrl-C ends a response)"""
_NUMBERS = {"temperature": float, "top_p": float, "top_k": int, "max_tokens": int, "seed": int}


@dataclass
class Chat:
    """A conversation with the model ``model`` of the server at ``url``, whose attributes are ``schema`` (None: it has
    none)."""

    http: httpx.Client
    url: str
    model: str
    schema: dict[str, Any] | None
    say: Callable[[str], None]
    messages: list[dict[str, str]] = field(default_factory=list)
    attributes: dict[str, float] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)

    def line(self, text: str) -> bool:
        """Answer a line of the user's; return whether the conversation goes on. What is wrong with it is said."""
        text = text.strip()
        if not text:
            return True
        if not text.startswith("/"):
            self._ask([*self.messages, {"role": "user", "content": text}])
            return True
        name, _, rest = text[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        command = {
            "set": self._set, "unset": self._unset, "settings": self._show, "system": self._system,
            "retry": self._retry, "reset": self._reset, "help": lambda _: self.say(f"{_HELP}\n"),
        }.get(name)  # fmt: skip
        if command is None:
            self.say(f"/{name} is not known.\n{_HELP}\n")
        else:
            command(rest.strip())
        return True

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        names = [] if self.schema is None else list(self.schema["names"])
        try:
            if name in names:
                level, most = float(value), self.schema["max_level"] if self.schema else 0
                if not 0 <= level <= most:
                    self.say(f"{name} goes from 0 to {most}\n")
                    return
                self.attributes[name] = int(level) if level == int(level) else level
            elif name in _NUMBERS:
                number = _NUMBERS[name](value)
                if not math.isfinite(number):
                    raise ValueError(value)
                self.settings[name] = number
            else:
                self.say(f"{name or '/set'}: there are {', '.join([*names, *_NUMBERS])}\n")
                return
        except ValueError:
            self.say(f"/set {name} takes a number, such as /set {name} 1\n")
            return
        self._show("")

    def _unset(self, name: str) -> None:
        if self.attributes.pop(name, None) is None and self.settings.pop(name, None) is None:
            self.say(f"{name or '/unset'}: nothing is set by that name\n")
        self._show("")

    def _show(self, _: str) -> None:
        asked = {**self.attributes, **self.settings}
        own = {} if self.schema is None else {n: v for n, v in self.schema["best"].items() if n not in asked}
        shown = [f"{name}={value:g}" for name, value in asked.items()]
        shown += [f"{name}={value:g} (the server's)" for name, value in own.items()]
        self.say(f"[{', '.join(shown) or 'the settings of the server'}]\n")

    def _system(self, text: str) -> None:
        self.messages = [{"role": "system", "content": text}] if text else []

    def _reset(self, _: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def _retry(self, _: str) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.say("nothing has been answered yet\n")
            return
        self._ask(self.messages[:-1])

    def _ask(self, messages: list[dict[str, str]]) -> None:
        """Print the response to ``messages`` as it comes, and keep it; an error or Ctrl-C leaves all as it was."""
        body = {"model": self.model, "messages": messages, "stream": True, **self.settings}
        if self.attributes:
            body["attributes"] = self.attributes
        answer = ""
        try:
            for piece in _stream(self.http, f"{self.url}/v1/chat/completions", body):
                answer += piece
                self.say(piece)
        except KeyboardInterrupt:
            self.say("\n[ended; it is not part of the conversation]\n")
            return
        except UserError as error:
            self.say(f"\n[{error}]\n" if answer else f"[{error}]\n")
            return
        self.say("\n" if answer else "[an empty response]\n")
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def _stream(http: httpx.Client, url: str, body: dict[str, Any]) -> Iterator[str]:
    """Yield the pieces of a response. Raises UserError with what the server says is wrong, or if the response breaks
    off.
    """
    whole = False
    try:
        with http.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise UserError(_reason(response))
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:"):
                    continue
                if data == "[DONE]":
                    whole = True
                    continue
                piece, ended = _piece(data)
                whole = whole or ended
                yield piece
    except httpx.HTTPError as error:
        raise UserError(f"the server does not answer: {type(error).__name__}: {error}") from error
    if not whole:
        raise UserError("the response broke off before its end")


def _piece(data: str) -> tuple[str, bool]:
    """Return the text in an event of a stream, and whether the response ends with it. Raises UserError."""
    try:
        event = json.loads(data)
        if "error" not in event:
            choices = event.get("choices") or ()
            text = "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)
            return text, any(choice.get("finish_reason") for choice in choices)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the server does not answer as OpenAI's API does: {data[:200]}") from error
    told = event["error"]
    raise UserError(str(told.get("message", told) if isinstance(told, dict) else told))


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"


def connect(http: httpx.Client, url: str, say: Callable[[str], None]) -> Chat:
    """Return a conversation with the first model of the server. Raises UserError if there is no such server."""
    try:
        response = http.get(f"{url}/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            f"no server answers at {url} ({type(error).__name__}); start one with: steerlm serve checkpoint=…, "
            "or name another: steerlm chat http://HOST:PORT"
        ) from error
    if response.status_code != 200:
        raise UserError(f"{url}/v1/models: {_reason(response)}")
    try:
        found = response.json()["data"][0]
        return Chat(http, url, found["id"], found.get("attributes"), say)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{url}/v1/models does not answer as OpenAI's API does") from error


def chat(arguments: Sequence[str]) -> None:
    """Run ``steerlm chat [URL] [--api-key KEY]`` until the input ends."""
    parser = argparse.ArgumentParser(prog="steerlm chat", description="Talk with a served model.", epilog=_HELP,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("url", nargs="?", default=_URL, help=f"the server's address ({_URL})")
    parser.add_argument("--api-key", help="where the server asks for one")
    known = parser.parse_args(list(arguments))
    url = known.url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {known.api_key}"} if known.api_key else {}
    if known.api_key and not (known.api_key.isascii() and known.api_key.isprintable()):
        raise UserError("--api-key holds characters that no API key has; a key is ASCII")
    for stream in (sys.stdin, sys.stdout):
        # Text that the terminal's encoding lacks is shown as "?", and bytes that are no text are not sent.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401  # it gives input() a history and editing

    def say(text: str) -> None:
        print(text, end="", flush=True)

    with httpx.Client(headers=headers, timeout=httpx.Timeout(600.0, connect=5.0), trust_env=False) as http:
        talk = connect(http, url, say)
        if asks:
            say(f"{talk.model} at {url}; /help says what else there is\n")
            talk.line("/settings")
        while True:
            try:
                line = input("> " if asks else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                say("\n")
                return
            if not talk.line(line):
                return
