"""A client for bulk sampling over HTTP, with the interface of ``Generator.generate``.

Owns: spreading requests over servers, bounded concurrency, retries, time limits. Does not own: making prompts (it gets
token ids), using results. Invariants: results come in the order of requests, or an exception says what went wrong; a
request is sent again only if its server has surely not answered it, and gives the same result then, since it carries
its seed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Sequence
from typing import Any

import httpx

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import Progress, Request, Result
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.sampling_fields import fields_of, result_of

log = get_logger(__name__)

_RETRY_STATUS = (429, 502, 503, 504)
_BACKOFF_MAX_SEC = 30.0


class ServerFailure(RuntimeError):
    """A server answered with an error that a retry cannot remove, or all tries failed."""


class SamplingClient:
    """Draws responses from the servers at ``urls`` (``server.urls``)."""

    def __init__(
        self,
        urls: Sequence[str],
        concurrency: int = 64,
        timeout_sec: float = 600.0,
        max_tries: int = 8,
        model: str | None = None,
    ) -> None:
        """``concurrency`` bounds the requests in flight over all servers. ``timeout_sec`` is for one try of one
        request. ``max_tries`` are made with backoff in between; the default waits about two minutes in all, and answers
        that say when to retry (429) do not count. ``model`` is the name to ask for; None takes the served one.
        """
        if not urls:
            raise UserError("server.urls is empty; name at least one, for example server.urls=[http://127.0.0.1:8000]")
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"server.urls: {url!r} must begin with http:// or https://")
        if concurrency < 1:
            raise UserError(f"generation.concurrency={concurrency} must be at least 1")
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.concurrency, self.timeout_sec, self.max_tries, self.model = concurrency, timeout_sec, max_tries, model

    def check(self) -> None:
        """Raise UserError unless every server is healthy. Commands call it before any long work."""
        for url in self.urls:
            try:
                response = httpx.get(f"{url}/health", timeout=10.0, trust_env=False)
            except httpx.HTTPError as e:
                message = f"server.urls: {url} does not answer ({e!r}); start it with `steerlm serve`"
                raise UserError(message) from e
            if response.status_code != 200:
                raise UserError(f"server.urls: {url}/health says {response.status_code}: {response.text[:300]}")

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Result]:
        """Do the same as ``Generator.generate``. ``progress`` is called in the order of finishing, from another thread
        than the caller's only if the caller itself runs inside an event loop.

        Raises UserError (a server refused a request), ServerFailure."""
        for request in requests:
            request.params.checked()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.generate_async(requests, progress))
        box: list[Any] = []

        def run() -> None:
            try:
                box.append(asyncio.run(self.generate_async(requests, progress)))
            except BaseException as e:
                box.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    async def generate_async(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Result]:
        """Do :meth:`generate` for callers with an event loop."""
        results: list[Result | None] = [None] * len(requests)
        # The longest come first, so that stragglers start early. Workers share one iterator, so `concurrency` are in
        # flight.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids) - requests[i].params.max_tokens)
        todo = iter(order)
        turns = itertools.cycle(self.urls)
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)

        async with httpx.AsyncClient(timeout=self.timeout_sec, limits=limits, trust_env=False) as http:

            async def worker() -> None:
                for i in todo:
                    results[i] = result = await self._one(http, turns, requests[i])
                    if progress is not None:
                        progress(result)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.concurrency, len(requests))):
                        group.create_task(worker())
            except BaseExceptionGroup as e:
                raise e.exceptions[0] from None
        return [result for result in results if result is not None]

    async def _one(self, http: httpx.AsyncClient, turns: itertools.cycle[str], request: Request) -> Result:
        body = _body(request, self.model)
        tries = 0
        while True:
            url = next(turns)
            wait_sec: float | None = None
            try:
                response = await http.post(f"{url}/v1/completions", json=body)
            except httpx.ReadTimeout:
                # The server drops the request when the connection closes, so a retry would be safe; but one timeout is
                # enough.
                reason = f"{url}: no answer within {self.timeout_sec:g} s"
                tries += max(0, (self.max_tries - 1) // 2)
            except httpx.TransportError as e:
                reason = f"{url}: {e!r}"
            else:
                if response.status_code == 200:
                    return _result(request, response, url)
                reason = f"{url}: HTTP {response.status_code}: {_message(response)}"
                if response.status_code in (400, 404, 422):
                    raise UserError(f"request {request.id} was refused by {reason}")
                if response.status_code not in _RETRY_STATUS:
                    raise ServerFailure(f"request {request.id}: {reason}")
                wait_sec = _retry_after(response)
            if wait_sec is None or response.status_code != 429:
                tries += 1  # a full queue (429) is not counted as a failure
            if tries >= self.max_tries:
                raise ServerFailure(f"request {request.id}: given up after {tries} tries; the last: {reason}")
            if wait_sec is None:
                wait_sec = min(_BACKOFF_MAX_SEC, 0.5 * 2**tries)
            log.debug("request %s: %s; again in %.1f s", request.id, reason, wait_sec)
            await asyncio.sleep(wait_sec * random.uniform(0.8, 1.2))  # random, so that not all retry at the same moment


def _body(request: Request, model: str | None) -> dict[str, Any]:
    body = {"prompt": list(request.prompt_ids), **fields_of(request.params), "return_token_ids": True}
    return body if model is None else {**body, "model": model}


def _result(request: Request, response: httpx.Response, url: str) -> Result:
    try:
        answer = response.json()
        choice, usage = answer["choices"][0], answer["usage"]
        return result_of(request, choice, usage)
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise ServerFailure(f"{url} does not answer like `steerlm serve` ({e!r}): {response.text[:300]}") from e


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:300]


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return min(_BACKOFF_MAX_SEC, max(0.0, float(response.headers["Retry-After"])))
    except (KeyError, ValueError):
        return None
