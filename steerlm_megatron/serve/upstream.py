"""One server as the client sees it: which fields it takes, which model it serves, and whether it answers now.

Owns: bodies and answers of ``POST /v1/completions``, for our own server and for others with OpenAI's API (vLLM,
SGLang); the comparison of the served model with the expected one; a server's state with its back-off. Does not own:
which request goes where (``client.py``). Invariants: a field that the server has refused is not sent to it again; a
field without which the result would differ (``top_k``) is never left out silently.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import FinishReason, Request, Result, SamplingParams
from steerlm_megatron.generate.text import ResponseText
from steerlm_megatron.serve.sampling_fields import fields_of, result_of

OWNER = "steerlm_megatron"  # ``owned_by`` of the models of our own server
_BACKOFF_SEC, _BACKOFF_MAX_SEC = 0.5, 30.0
_PROBE_TOKENS = 12
_PROBE_TEXT = "The quick brown fox jumps over the lazy dog."
_REFUSED = (400, 404, 422)
# Fields that OpenAI's API lacks. vLLM and SGLang take some of them; a server that refuses one is asked without it.
_EXTENSIONS = ("return_token_ids", "stop_token_ids", "top_k")


class ServerFailure(RuntimeError):
    """A server answered with an error that a retry cannot remove, or all tries failed."""


class WrongModel(UserError):
    """A server serves another model than the one that the caller asks for, or writes text in another way."""


class Unreachable(Exception):
    """A server does not answer, or says that it cannot work now. The message begins with its address."""


class Decoder(Protocol):
    """The part of a tokenizer that the client uses."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Expected:
    """What the caller knows of the model that servers have to serve.

    Args:
        identity: what our own server says of its checkpoint in ``/v1/models`` (``stages.sampling.identity``).
        tokenizer: the tokenizer that made the prompts.
        stop_ids: the tokens that end a response.
        stop_strings: their texts, for servers that take no ids.
        suffix: what the template puts between a response and its stop token.
    """

    identity: Mapping[str, Any]
    tokenizer: Decoder
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    suffix: str


class Upstream:
    """A server of ``server.urls``."""

    def __init__(self, url: str, model: str | None, expected: Expected | None) -> None:
        self.url, self.model, self.expected = url, model, expected
        self.max_model_len: int | None = None
        self.probe: tuple[str, ...] | None = None  # the greedy answer of a foreign server
        self.known = False  # whether /v1/models was read
        self.is_ours = True
        self.excluded: WrongModel | None = None
        self.reason: str | None = None  # why it is down; None while it is up
        self.retry_at = self.busy_until = 0.0
        self.failures = 0  # contacts in a row that failed
        self.incarnation = 0  # how often it has come back
        self.proven = True  # whether it has answered a request since it came back
        self.in_flight = 0
        self.posts: set[asyncio.Task[Any]] = set()
        self._backoff_sec = _BACKOFF_SEC
        self._refused: set[str] = set()  # extensions that the server does not take

    # ---- state ----

    @property
    def is_up(self) -> bool:
        return self.reason is None and self.excluded is None

    def has_room(self, now: float) -> bool:
        """Return whether a request may be sent to it now. One that has just come back gets a single one first."""
        return self.is_up and now >= self.busy_until and (self.proven or not self.in_flight)

    def down(self, reason: str, retry_after_sec: float | None = None) -> None:
        """Note that it takes no requests. The next probe comes after a time that doubles until it has answered again.

        Requests that it has may still be answered; :meth:`abandon` ends them."""
        self.proven = False
        self.reason = reason
        self.failures += 1
        wait_sec = self._backoff_sec if retry_after_sec is None else max(retry_after_sec, self._backoff_sec)
        self._backoff_sec = min(_BACKOFF_MAX_SEC, 2 * self._backoff_sec)
        self.retry_at = time.monotonic() + wait_sec

    def abandon(self) -> None:
        """End the requests that it has, which nobody expects to be answered any more."""
        for post in self.posts:
            post.cancel()

    def up(self) -> None:
        """Note that a probe was answered."""
        self.failures = 0
        if self.reason is not None:
            self.reason = None
            self.incarnation += 1

    def answered(self) -> None:
        """Note that it has answered a request, so that the next fault begins with a short back-off."""
        self.proven, self._backoff_sec = True, _BACKOFF_SEC

    # ---- what it serves ----

    async def learn(self, http: httpx.AsyncClient, ready: bool = True) -> None:
        """Read ``/v1/models``, compare the model with the expected one and, with ``ready``, ask whether it takes
        requests.

        Raises:
            Unreachable: no answer, or one that says that it cannot work now.
            WrongModel: it serves something else.
            UserError: it refuses the API key.
        """
        listed = await self._get(http, "/v1/models")
        try:
            models = {entry["id"]: entry for entry in listed.json()["data"]}
            name = self.model if self.model in models or not models else next(iter(models))
            entry = models[name]
        except (ValueError, KeyError, TypeError, StopIteration) as e:
            raise WrongModel(
                f"{self.url}/v1/models does not answer as an OpenAI-compatible server: {listed.text[:200]}"
            ) from e
        if self.model is not None and name != self.model:
            raise WrongModel(f"{self.url} serves {', '.join(models)} and not {self.model}")
        self.model = name
        self.is_ours = entry.get("owned_by") == OWNER
        if isinstance(entry.get("max_model_len"), int):
            self.max_model_len = entry["max_model_len"]
        self.known = True
        if self.is_ours:
            self._compare(entry.get("checkpoint"))
            if ready:
                await self._get(http, "/ready")
        else:
            await self._try_out(http)

    async def ping(self, http: httpx.AsyncClient, timeout_sec: float) -> None:
        """Raise Unreachable unless the server answers now and calls itself healthy, as one that shuts down also does
        while it finishes its requests.
        """
        await self._get(http, "/health" if self.is_ours else "/v1/models", timeout_sec)

    async def _get(self, http: httpx.AsyncClient, path: str, timeout_sec: float = 10.0) -> httpx.Response:
        try:
            response = await http.get(f"{self.url}{path}", timeout=timeout_sec)
        except httpx.HTTPError as e:
            raise Unreachable(f"{self.url} does not answer ({e!r})") from e
        if response.status_code in (401, 403):
            raise refused_key(self.url, response)
        if response.status_code != 200:
            raise Unreachable(f"{self.url}{path} says {response.status_code}: {message(response)}")
        return response

    def _compare(self, served: Any) -> None:
        """Compare what our own server says of its checkpoint with what the caller expects."""
        if self.expected is None:
            return
        if not isinstance(served, Mapping):
            raise WrongModel(f"{self.url} does not say which checkpoint it serves; start it with this version")
        wanted = self.expected.identity
        differing = [key for key, value in wanted.items() if served.get(key) != value]
        if differing:
            told = ", ".join(f"{key} {_short(served.get(key))} instead of {_short(wanted[key])}" for key in differing)
            raise WrongModel(f"{self.url} serves another model than checkpoint: {told}")

    async def _try_out(self, http: httpx.AsyncClient) -> None:
        """Send a foreign server one greedy request and compare its tokens and text with the expected tokenizer's.

        A server that gives no token ids is asked to repeat a text whose token ids it gets.
        """
        if self.expected is None:
            return
        tokenizer = self.expected.tokenizer
        ids = tuple(tokenizer.encode(_PROBE_TEXT))
        request = Request("probe", ids, SamplingParams(temperature=0.0, top_k=0, max_tokens=_PROBE_TOKENS))
        answer = await self._asked(http, request)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        if usage.get("prompt_tokens", len(ids)) != len(ids):
            raise WrongModel(
                f"{self.url} counts {usage['prompt_tokens']} tokens of a prompt of {len(ids)} token ids: it adds or "
                "drops some"
            )
        given = choice.get("token_ids")
        if given is None:
            repeated = await self._repeated(http, ids)
            if repeated is not None and not repeated.lstrip().startswith(_PROBE_TEXT):
                raise WrongModel(
                    f"{self.url} has another tokenizer than checkpoint: it reads the token ids of {_PROBE_TEXT!r} as "
                    f"{repeated[:80]!r}"
                )
            self.probe = tuple(choice["text"].split())
            return
        outside = [i for i in given if not 0 <= i < tokenizer.vocab_size]
        text = self._text(given, request.params, choice["finish_reason"])
        if outside or text.split() != self._cut(choice["text"], choice["finish_reason"]).split():
            raise WrongModel(
                f"{self.url} has another tokenizer than checkpoint: the tokens {list(given)} are {choice['text']!r} "
                f"there and {'partly unknown' if outside else repr(text)} here"
            )
        self.probe = tuple(map(str, given))

    async def _asked(self, http: httpx.AsyncClient, request: Request) -> dict[str, Any]:
        """Return the answer to ``request``; extensions that the server refuses are left out from then on."""
        while True:
            try:
                response = await http.post(f"{self.url}/v1/completions", json=self.body(request), timeout=120.0)
            except httpx.HTTPError as e:
                raise Unreachable(f"{self.url} does not answer ({e!r})") from e
            if response.status_code == 200:
                try:
                    answer: dict[str, Any] = response.json()
                    if isinstance(answer["choices"][0]["text"], str):
                        return answer
                except (ValueError, KeyError, IndexError, TypeError) as e:
                    raise WrongModel(f"{self.url} does not answer as OpenAI's API does: {response.text[:200]}") from e
            if response.status_code in (401, 403):
                raise refused_key(self.url, response)
            if response.status_code not in _REFUSED:
                raise Unreachable(f"{self.url} says {response.status_code}: {message(response)}")
            if not self.learn_refusal(response):
                raise WrongModel(
                    f"{self.url} refuses a prompt of token ids ({response.status_code}): {message(response)}"
                )

    def learn_refusal(self, response: httpx.Response) -> bool:
        """Note which extensions a refusal names (all, if it names none); return whether there was one to leave out."""
        left = [name for name in _EXTENSIONS if name not in self._refused]
        named = [name for name in left if name in response.text]
        self._refused.update(named or left)
        return bool(left)

    async def _repeated(self, http: httpx.AsyncClient, ids: Sequence[int]) -> str | None:
        """Return a prompt of token ids as the server writes it; None if it does not repeat prompts."""
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "echo": True}
        try:
            response = await http.post(f"{self.url}/v1/completions", json=body, timeout=120.0)
            return str(response.json()["choices"][0]["text"]) if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            return None  # repeating is a service that a server need not offer

    # ---- requests and results ----

    def problem(self, request: Request) -> str | None:
        """Return why this server cannot be sent ``request``, or None. Our own server says by itself."""
        if self.is_ours:
            return None
        params, tokens = request.params, len(request.prompt_ids) + request.params.max_tokens
        if "top_k" in self._refused and params.top_k and params.temperature:
            return (
                f"{self.url} takes no top_k, and sampling.top_k={params.top_k}: its responses would be drawn in "
                "another way; set sampling.top_k=0"
            )
        if self.max_model_len is not None and tokens > self.max_model_len:
            return (
                f"request {request.id}: prompt and max_tokens are {tokens} tokens together, and {self.url} takes "
                f"{self.max_model_len} (max_model_len); lower sampling.max_tokens or generation.max_sequence_tokens"
            )
        return None

    def body(self, request: Request) -> dict[str, Any]:
        """Return the body of ``POST /v1/completions`` in the form that this server takes."""
        params = request.params
        body: dict[str, Any] = {"prompt": list(request.prompt_ids), **fields_of(params)}
        stops = list(params.stop)
        if self.is_ours:
            body["return_token_ids"] = True
        else:
            body["model"] = self.model
            ids = sorted({*params.stop_token_ids, *(self.expected.stop_ids if self.expected is not None else ())})
            body |= {"return_token_ids": True, "stop_token_ids": ids, "top_k": params.top_k or -1}
            body = {name: value for name, value in body.items() if name not in self._refused}
            if "stop_token_ids" in self._refused and self.expected is not None:
                stops += self.expected.stop_strings
        if self.model is not None:
            body["model"] = self.model
        if stops:
            body["stop"] = stops
        return body

    def result(self, request: Request, response: httpx.Response) -> Result:
        """Return the result in a response with status 200. ``token_ids`` is empty if the server does not give them.

        Raises ServerFailure if it is none."""
        try:
            answer = response.json()
            choice, usage = answer["choices"][0], answer["usage"]
            if self.is_ours:
                return result_of(request, choice, usage)
            logprobs = choice["logprobs"]["token_logprobs"] if request.params.logprobs else None
            reason, text = choice["finish_reason"], choice["text"]
            ids = choice.get("token_ids") or ()
            if reason not in ("stop", "length"):
                raise ValueError(f"finish_reason is {reason!r}")
            if self.expected is not None:
                text = self._text(ids, request.params, reason) if ids else self._cut(text, reason)
            text = text.removeprefix(request.text_prefix)
            return Result(
                id=request.id,
                token_ids=tuple(ids),
                text=text,
                finish_reason=reason,
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
                logprobs=None if logprobs is None else tuple(logprobs),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
            raise ServerFailure(
                f"{self.url} does not answer as OpenAI's API does ({e!r}): {response.text[:300]}"
            ) from e

    def _text(self, ids: Sequence[int], params: SamplingParams, reason: FinishReason) -> str:
        """Return the text of token ids as our own engine makes it."""
        assert self.expected is not None
        ended = bool(ids) and ids[-1] in self.expected.stop_ids
        # A foreign server may keep the stop token to itself. Its text then lacks nothing that the tokens have.
        by_control = ended or (reason == "stop" and not params.stop)
        text = ResponseText(self.expected.tokenizer.decode, params.stop, self.expected.suffix)
        return text.finish(ids[:-1] if ended else ids, by_control)[0]

    def _cut(self, text: str, reason: FinishReason) -> str:
        """Return a foreign server's text without what ends a response."""
        assert self.expected is not None
        if reason != "stop":
            return text
        for stop in self.expected.stop_strings:
            text = text.removesuffix(stop)
        return text.removesuffix(self.expected.suffix)


def refused_key(url: str, response: httpx.Response) -> UserError:
    """Return the error for an answer that asks for another API key."""
    return UserError(
        f"{url} refuses the API key ({response.status_code}: {message(response)}); name one that it takes in "
        "server.api_key_file or server.api_keys"
    )


def message(response: httpx.Response) -> str:
    """Return the message of an error response, in whichever form it has one."""
    try:
        body = response.json()
        error = body.get("error") or body.get("reason") or body["message"]
        return str(error["message"] if isinstance(error, Mapping) else error)[:300]
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.text[:300]


def retry_after(response: httpx.Response) -> float | None:
    """Return the seconds of a ``Retry-After`` header, at most half a minute; None without a usable one."""
    try:
        return min(_BACKOFF_MAX_SEC, max(0.0, float(response.headers["Retry-After"])))
    except (KeyError, ValueError):
        return None


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
