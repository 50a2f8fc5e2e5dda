"""Many conversations, each to be answered once, by somebody's server with OpenAI's chat API.

Owns: one address (any service or server that speaks ``/chat/completions``), bounded concurrency, tries with back-off,
what an error means. Does not own: what is asked and what is made of an answer (``evaluate/llm_judge.py``); sampling
from models of this project, which goes by token ids over several servers (``client.py``). Invariants: the API key is
sent to this address alone, and is in no message; a server that says when to come back is left alone until then; an
endpoint that gives no answer any more ends the work with one error that names it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from steerlm_megatron.errors import TryLater, UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.upstream import message, retry_after

log = get_logger(__name__)

ChatMessage = Mapping[str, str]  # ``role`` and ``content``
Ask = Callable[[Sequence[ChatMessage]], Awaitable["Reply"]]
T = TypeVar("T")

_BACKOFF_SEC, _BACKOFF_MAX_SEC = 0.5, 30.0
_REFUSED = (400, 413, 422)  # a server may refuse one request (too long, filtered) and take others
_MOST_REFUSED = 8  # requests that are refused before any is answered: then it is not these requests
_THOUGHTS = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.DOTALL)  # without an end where max_tokens cut them off


@dataclass(frozen=True)
class Reply:
    """An answer. ``refused`` is the server's reason if it would not answer this conversation; ``text`` is empty then.

    Tokens are None where the server does not count them. ``seconds`` is the time of the request that was answered.
    """

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    refused: str | None = None


@dataclass(frozen=True)
class ChatLimits:
    """How an endpoint is asked.

    Args:
        concurrency: requests that are under way at once.
        timeout_sec: longest time of one try.
        max_tries: tries of a request that is broken off, late or answered with an error.
    """

    concurrency: int = 8
    timeout_sec: float = 120.0
    max_tries: int = 6


class ChatEndpoint:
    """A server with OpenAI's chat API at ``url``, the address that OpenAI's client calls ``base_url``."""

    def __init__(
        self,
        url: str,
        model: str | None,
        key: str,
        *,
        api_key_env: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int = 1024,
        limits: ChatLimits = ChatLimits(),
    ) -> None:
        """``key`` is the configuration's section, which errors name. ``model``: None takes the first that is served.
        ``api_key_env`` names the environment variable with the API key; unset, none is sent. ``temperature``: None
        leaves it to the server.

        Raises:
            UserError: the address is none, holds a password, or the API key holds what no key has.
        """
        self.key, self.model, self.limits = key, model, limits
        self.url, self._env = base_url(url, key), api_key_env
        self._secret = os.environ.get(api_key_env, "").strip() if api_key_env else ""
        if self._secret and not (self._secret.isascii() and self._secret.isprintable()):
            raise UserError(f"{key}.api_key_env: ${api_key_env} holds characters that no API key has; a key is ASCII")
        self._fields: dict[str, Any] = {"max_tokens": max_tokens}
        if temperature is not None:
            self._fields["temperature"] = temperature
        self._answered = self._refusals = 0
        self._free_at = 0.0  # no request is sent before

    def check(self) -> str:
        """Return the name of the model that answers. Raises UserError if the endpoint does not work."""
        return asyncio.run(self._check())

    async def _check(self) -> str:
        async with self._http() as http:
            try:
                response = await http.get(f"{self.url}/models", timeout=min(30.0, self.limits.timeout_sec))
            except httpx.HTTPError as error:
                raise UserError(f"{self._name()} does not answer ({type(error).__name__}): is it up?") from error
        self._raise_if_hopeless(response, lists=True)
        try:
            names = [entry["id"] for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            names = []
        if self.model is None:
            if not names:
                raise UserError(f"{self._name()} does not list its models; set {self.key}.model")
            self.model = names[0]
        elif names and self.model not in names:
            # A service may take more names than it lists (aliases), so the first request has the last word.
            log.warning("%s does not list %s.model=%s; it lists %s", self.url, self.key, self.model, _few(names))
        return self.model

    def run(self, jobs: Sequence[Callable[[Ask], Coroutine[Any, Any, T]]]) -> list[T]:
        """Run all ``jobs``, each of which asks what it wants to know, and return their results in order.

        Raises:
            UserError: the endpoint refuses the key, the model or every request; or (TryLater, for which the same
                command may be started again) it gives no answer any more. What jobs have kept until then stays kept.
        """
        return asyncio.run(self._run(jobs))

    async def _run(self, jobs: Sequence[Callable[[Ask], Coroutine[Any, Any, T]]]) -> list[T]:
        results: dict[int, T] = {}
        todo = iter(enumerate(jobs))  # the workers share it, so that as many jobs as workers are under way
        async with self._http() as http:

            async def ask(messages: Sequence[ChatMessage]) -> Reply:
                return await self._ask(http, messages)

            async def worker() -> None:
                for index, job in todo:
                    results[index] = await job(ask)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.limits.concurrency, len(jobs))):
                        group.create_task(worker())
            except BaseExceptionGroup as several:
                raise several.exceptions[0] from None  # the first failure; the others are cancelled by it
        return [results[index] for index in range(len(jobs))]

    def _http(self) -> httpx.AsyncClient:
        headers = {"Content-Type": "application/json"}
        if self._secret:
            headers["Authorization"] = f"Bearer {self._secret}"
        return httpx.AsyncClient(
            timeout=self.limits.timeout_sec,
            headers=headers,
            trust_env=not is_local(self.url),  # proxies are for the way out; a server on this host is not behind one
            verify=self.url.startswith("https:"),  # without TLS nothing is to be verified, and certificates load slowly
        )

    async def _ask(self, http: httpx.AsyncClient, messages: Sequence[ChatMessage]) -> Reply:
        """Return the answer to ``messages``, after as many tries as it takes and ``max_tries`` allows."""
        tries, busy, backoff, last = 0, 0, _BACKOFF_SEC, ""
        answered = self._answered
        while max(tries, busy) < self.limits.max_tries:
            if (wait := self._free_at - time.monotonic()) > 0:
                await asyncio.sleep(wait * random.uniform(1.0, 1.1))
                continue
            wait_sec, start, fields = backoff, time.monotonic(), dict(self._fields)
            # Escaped JSON, since half of a UTF-16 pair in a text has no UTF-8.
            body = json.dumps({"model": self.model, "messages": [dict(m) for m in messages], **fields})
            try:
                response = await http.post(f"{self.url}/chat/completions", content=body.encode())
            except httpx.TimeoutException:
                last, wait_sec = f"no answer within {self.limits.timeout_sec:g} s", 0.0
            except httpx.HTTPError as error:
                last = f"the connection failed: {type(error).__name__}"
            else:
                status = response.status_code
                if status == 200:
                    if (reply := _reply(response, time.monotonic() - start)) is not None:
                        self._answered += 1
                        return reply
                    last = f"no answer of OpenAI's API: {self._said(response)}"
                elif status in _REFUSED:
                    if self._learn(response, fields):
                        continue
                    return self._refusal(response)
                else:
                    self._raise_if_hopeless(response)
                    last, told = f"HTTP {status}: {self._said(response)}", retry_after(response)
                    wait_sec = backoff if told is None else told
                    if status == 429:
                        # As long as other requests get through, this one only has to wait for its turn.
                        self._free_at = max(self._free_at, time.monotonic() + wait_sec)
                        busy = busy + 1 if self._answered == answered else 1
                        answered, backoff = self._answered, min(_BACKOFF_MAX_SEC, 2 * backoff)
                        continue
            tries, backoff = tries + 1, min(_BACKOFF_MAX_SEC, 2 * backoff)
            if tries < self.limits.max_tries:
                log.debug("%s: %s; again", self.url, last)
                await asyncio.sleep(wait_sec * random.uniform(1.0, 1.2))
        raise TryLater(f"{self._name()} gives no answer, in {max(tries, busy)} tries of a request; the last: {last}")

    def _refusal(self, response: httpx.Response) -> Reply:
        """Return the refusal of a request. Raises UserError once the endpoint has refused several and answered none."""
        said = self._said(response)
        self._refusals += 1
        if not self._answered and self._refusals >= _MOST_REFUSED:
            raise UserError(f"{self._name()} refuses every request (HTTP {response.status_code}): {said}")
        return Reply("", refused=said)

    def _learn(self, response: httpx.Response, sent: Mapping[str, Any]) -> bool:
        """Return whether a refusal names a field of those that were ``sent`` that can be sent in another way, and note
        that way.
        """
        said = response.text
        if "max_completion_tokens" in said and "max_tokens" in sent:  # newer models of OpenAI
            if "max_tokens" in self._fields:  # else a request that was under way at the same time has noted it
                self._fields["max_completion_tokens"] = self._fields.pop("max_tokens")
            return True
        if "temperature" in said and "temperature" in sent:
            raise UserError(
                f"{self._name()} refuses the temperature {self._fields['temperature']:g} ({self._said(response)}); set "
                f"{self.key}.temperature=null to leave it to the server: its verdicts may then differ from run to run"
            )
        return False

    def _raise_if_hopeless(self, response: httpx.Response, lists: bool = False) -> None:
        """Raise UserError for an answer that no further try can change. ``lists``: it is to a request for the models,
        which not every service lists.
        """
        status = response.status_code
        if status in (401, 403):
            has = f"the API key in ${self._env}" if self._secret else "a request without an API key"
            name = self._env or "the environment variable that you name there"
            raise UserError(
                f"{self._name()} refuses {has} (HTTP {status}: {self._said(response)}); put one that it takes into "
                f"{name} ({self.key}.api_key_env)"
            )
        if status == 404 and not lists:
            raise UserError(
                f"{self._name()} has no such page or no model {self.model} (HTTP 404: {self._said(response)}); "
                f"{self.key}.url is the address up to /chat/completions, such as https://api.example.org/v1"
            )
        if status == 402 or (status == 429 and "insufficient_quota" in response.text):
            raise UserError(f"{self._name()}: the account has no credit left (HTTP {status}: {self._said(response)})")

    def _said(self, response: httpx.Response) -> str:
        """Return what an error response says, without the API key, which some services repeat."""
        said = " ".join(message(response).split())
        return said.replace(self._secret, "…") if self._secret else said

    def _name(self) -> str:
        return f"{self.key}.url={self.url}"


def base_url(url: str, key: str) -> str:
    """Return the address without a slash or ``/chat/completions`` at its end, and with ``/v1`` where it has no path.

    Raises:
        UserError: it is no address of HTTP, or holds a password.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{key}.url={url!r} must begin with http:// or https:// and name a host")
    if parts.username or parts.password:
        raise UserError(f"{key}.url holds a user or password; put the key into the variable of {key}.api_key_env")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def is_local(url: str) -> bool:
    """Return whether an address is of this host by its name."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reply(response: httpx.Response, seconds: float) -> Reply | None:
    """Return the answer in a response, None if there is none. Thoughts that a model wrote in front of it are left
    out."""
    try:
        answer = response.json()
        text = answer["choices"][0]["message"].get("content") or ""
        usage = answer.get("usage") or {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str):
            return None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    counted = [value if isinstance(value, int) else None for value in tokens]
    return Reply(_THOUGHTS.sub("", text), counted[0], counted[1], seconds)


def _few(names: Sequence[str]) -> str:
    return " ".join(names[:5]) + (" …" if len(names) > 5 else "")
