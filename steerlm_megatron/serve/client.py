"""A client for bulk sampling over HTTP, with the interface of ``Engine.generate``.

Owns: spreading requests over servers, bounded concurrency, tries, watching servers that come and go. Does not own:
making prompts (it gets token ids), using results, what a server takes and serves (``upstream.py``). Invariants: results
come in the order of requests, or an exception says what went wrong; a request that is sent again gives the same result,
since it carries its seed; a server with another model than the expected one gets no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import httpx

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import Progress, Request, Result
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.upstream import (
    Expected,
    ServerFailure,
    Unreachable,
    Upstream,
    WrongModel,
    message,
    refused_key,
    retry_after,
)

log = get_logger(__name__)

__all__ = ["Expected", "SamplingClient", "ServerFailure"]

_BUSY_SEC = 1.0  # wait after an answer 429 that does not say how long
_MISSED_PINGS = 2  # a server that misses this many in a row is down


class SamplingClient:
    """Draws responses from the servers at ``urls`` (``server.urls``): ours, or others with OpenAI's API."""

    def __init__(
        self,
        urls: Sequence[str],
        concurrency: int = 64,
        timeout_sec: float = 600.0,
        max_tries: int = 8,
        model: str | None = None,
        *,
        expected: Expected | None = None,
        api_key: str | None = None,
        wait_sec: float = 0.0,
        ping_sec: float = 5.0,
    ) -> None:
        """``concurrency`` bounds the requests in flight over all servers. ``timeout_sec`` is for one try of one
        request.

        ``max_tries`` is counted by request: a server that breaks off, is late or answers with an error counts, and so
        does a round of probes in which no server could be reached; answers that say when to retry (429, 503) do not.
        Such rounds end a request only after ``wait_sec`` without any server. ``model`` is the name to ask for;
        None takes the first served one. ``expected`` is what every server has to serve; None compares nothing.
        ``ping_sec`` is the time between two looks at whether a server is alive.
        """
        if not urls:
            raise UserError("server.urls is empty; name at least one, for example server.urls=[http://127.0.0.1:8000]")
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"server.urls: {url!r} must begin with http:// or https://")
        if concurrency < 1:
            raise UserError(f"generation.concurrency={concurrency} must be at least 1")
        self.urls = list(dict.fromkeys(url.rstrip("/").removesuffix("/v1").rstrip("/") for url in urls))
        self.servers = [Upstream(url, model, expected) for url in self.urls]
        self.concurrency, self.timeout_sec, self.max_tries = concurrency, timeout_sec, max_tries
        self.wait_sec, self.ping_sec = wait_sec, ping_sec
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    # ---- entries ----

    def check(self) -> None:
        """Raise UserError unless some server is healthy and all that answer serve the expected model. Commands call it
        before any long work. Servers that do not answer are named in a warning, and are used when they do.
        """
        self._run(self._check)

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Result]:
        """Do the same as ``Engine.generate``. ``progress`` is called in the order of finishing, from another thread
        than the caller's only if the caller itself runs inside an event loop.

        Raises UserError (a server refused a request, or serves another model), ServerFailure."""
        for request in requests:
            request.params.checked()
        return self._run(lambda: self.generate_async(requests, progress))

    def _run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine to its end, in a thread if the caller has an event loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(work())
        box: list[Any] = []

        def run() -> None:
            try:
                box.append(asyncio.run(work()))
            except BaseException as e:
                box.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    async def _check(self) -> None:
        async with self._http() as http:
            found = await asyncio.gather(*(server.learn(http) for server in self.servers), return_exceptions=True)
        wrong = [str(e) for e in found if isinstance(e, UserError)]
        away = [(server, e) for server, e in zip(self.servers, found, strict=True) if isinstance(e, Unreachable)]
        for e in found:
            if isinstance(e, BaseException) and not isinstance(e, UserError | Unreachable):
                raise e
        problems = wrong + self._disagreement()
        if problems:
            raise UserError("server.urls: " + "\n".join(problems))
        if len(away) == len(self.servers):
            told = "\n".join(str(e) for _, e in away)
            raise UserError(f"server.urls: {told}; start it with `steerlm serve`")
        for server, e in away:
            server.down(str(e))
            log.warning("server.urls: %s; the others draw until it does", e)

    def _disagreement(self) -> list[str]:
        """Return what is wrong if foreign servers differ in the first token of a greedy response to one prompt: they
        serve different models. Later tokens may differ by rounding.
        """
        first: dict[str, str] = {}
        for server in self.servers:
            if server.probe is not None:
                first.setdefault(server.probe[0] if server.probe else "(none)", server.url)
        if len(first) < 2:
            return []
        told = ", ".join(f"{url} with {token!r}" for token, url in first.items())
        return [f"servers answer the same greedy request differently from its first token on: {told}"]

    def _http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self.concurrency + 2 * len(self.servers))
        return httpx.AsyncClient(timeout=self.timeout_sec, limits=limits, trust_env=False, headers=self._headers)

    async def generate_async(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Result]:
        """Do :meth:`generate` for callers with an event loop."""
        results: list[Result | None] = [None] * len(requests)
        # The longest come first, so that stragglers start early. Workers share one iterator, so `concurrency` are in
        # flight.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids) - requests[i].params.max_tokens)
        todo = iter(order)
        async with self._http() as http:
            work = _Work(self, http)
            await work.begin(requests)

            async def worker() -> None:
                for i in todo:
                    sent = time.monotonic()
                    answer = await work.one(requests[i])
                    results[i] = result = replace(answer, seconds=time.monotonic() - sent)
                    if progress is not None:
                        progress(result)

            async def all_workers() -> None:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.concurrency, len(requests))):
                        group.create_task(worker())
                for watcher in watchers:
                    watcher.cancel()

            try:
                async with asyncio.TaskGroup() as group:
                    watchers = [group.create_task(work.watch(server)) for server in self.servers]
                    group.create_task(all_workers())
            except BaseExceptionGroup as e:
                raise _first(e) from None
        return [result for result in results if result is not None]


class _Work:
    """One call of ``generate``: its requests on their way to servers."""

    def __init__(self, client: SamplingClient, http: httpx.AsyncClient) -> None:
        self.client, self.http, self.servers = client, http, client.servers
        self._changed = asyncio.Event()
        self._none_since: float | None = None  # since when no server has been up

    async def begin(self, requests: Sequence[Request]) -> None:
        """Look at what the servers serve, ours also if :meth:`SamplingClient.check` did a while ago, and refuse what
        none could answer.
        """
        for server in self.servers:
            server.in_flight, server.posts = 0, set()
        look = [s for s in self.servers if s.reason is None and (s.is_ours or not s.known)]
        await asyncio.gather(*(self._probe(server, False) for server in look))
        problems = [str(server.excluded) for server in self.servers if server.excluded] + self.client._disagreement()
        if problems:
            raise UserError("\n".join(problems))
        known = [server for server in self.servers if server.known]
        told = [next((p for r in requests if (p := server.problem(r))), None) for server in known]
        if any(told):
            raise UserError("\n".join(filter(None, told)))
        self._note()

    async def _probe(self, server: Upstream, ready: bool = True) -> None:
        """Ask a server that is down, or not known, whether it works and what it serves."""
        try:
            await server.learn(self.http, ready)
            if server.reason is not None and (problems := self.client._disagreement()):
                raise WrongModel("\n".join(problems))
        except Unreachable as e:
            server.down(str(e))
        except WrongModel as e:
            server.excluded = e
            log.error("%s; %s gets no request", e, server.url)
        else:
            if server.reason is not None:
                log.warning("%s answers again", server.url)
            server.up()
        self._note()

    def _note(self) -> None:
        """Wake the requests that wait for a server, after a server has changed its state."""
        if any(server.is_up for server in self.servers):
            self._none_since = None
        else:
            self._none_since = self._none_since or time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until_changed(self, seconds: float) -> None:
        """Wait until a server changes its state, or for ``seconds``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def _lost(self, server: Upstream, reason: str, wait_sec: float | None = None) -> None:
        if server.reason is None:
            log.warning("%s; the requests that it had go to other servers or wait", reason)
            server.down(reason, wait_sec)
            self._note()

    async def watch(self, server: Upstream) -> None:
        """Keep a server's state true for as long as there is work: a dead one is probed, with back-off, until it is
        back, and one that stops answering loses its requests to the others.
        """
        missed, next_ping = 0, time.monotonic() + self.client.ping_sec
        while server.excluded is None:
            if server.reason is not None:
                await asyncio.sleep(max(0.0, server.retry_at - time.monotonic()) * random.uniform(0.9, 1.1))
                await self._probe(server)
                continue
            if (wait_sec := next_ping - time.monotonic()) > 0:
                await self._until_changed(wait_sec)
                continue
            next_ping = time.monotonic() + self.client.ping_sec
            try:
                await server.ping(self.http, 2 * self.client.ping_sec)
                missed = 0
            except Unreachable as e:
                missed += 1
                if missed >= _MISSED_PINGS:
                    missed = 0
                    self._lost(server, str(e))
                    server.abandon()
        if all(one.excluded is not None for one in self.servers):
            raise server.excluded

    async def _server_for(self, request: Request, failed: dict[str, int], last: str, tries: int) -> Upstream:
        """Return the least loaded server that works, one on which ``request`` has not failed if there is such a one."""
        while True:
            now = time.monotonic()
            free = [server for server in self.servers if server.has_room(now)]
            if free:
                return min(free, key=lambda s: (failed.get(s.url) == s.incarnation, s.in_flight, random.random()))
            rounds = tries + min((s.failures for s in self.servers if s.excluded is None), default=0)
            if self._none_since is not None and rounds >= self.client.max_tries:
                if now - self._none_since >= self.client.wait_sec:
                    said = "; ".join(server.reason for server in self.servers if server.reason) or last
                    raise ServerFailure(f"request {request.id}: given up after {rounds} tries; the last: {said}")
            busy = [server.busy_until - now for server in self.servers if server.is_up and server.proven]
            wait_sec = max(0.01, min([*busy, 1.0])) * random.uniform(1.0, 1.2)
            await self._until_changed(wait_sec)  # after that time a server that was busy may be free

    async def one(self, request: Request) -> Result:
        """Return the result of a request, from whichever server gives it."""
        tries, last = 0, ""
        failed: dict[str, int] = {}  # server → its incarnation that answered with an error
        while True:
            server = await self._server_for(request, failed, last, tries)
            if problem := server.problem(request):
                raise UserError(problem)
            try:
                response = await self._post(server, request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as e:
                last = f"{server.url}: {e!r}"
                self._lost(server, last)
                continue  # the request was not sent, so this was no try of it
            except httpx.ReadTimeout:
                # The server drops the request when the connection closes. One timeout is enough: a second try elsewhere
                # may be the last.
                last, fatal = f"{server.url}: no answer within {self.client.timeout_sec:g} s", False
                tries += max(0, (self.client.max_tries - 1) // 2)
            except httpx.TransportError as e:
                last, fatal = f"{server.url}: {e!r}", False
                self._lost(server, last)
            except Unreachable as e:
                last, fatal = str(e), False
            else:
                if response.status_code == 200:
                    result = server.result(request, response)
                    if not server.proven:
                        server.answered()
                        self._note()
                    server.answered()
                    return result
                counts, fatal, last = self._take_error(server, request, response)
                if not counts:
                    continue
            tries += 1
            if fatal:
                failed[server.url] = server.incarnation
                left = [s for s in self.servers if s.excluded is None and failed.get(s.url) != s.incarnation]
                if not left:
                    raise ServerFailure(f"request {request.id}: {last}")
            if tries >= self.client.max_tries:
                raise ServerFailure(f"request {request.id}: given up after {tries} tries; the last: {last}")
            log.debug("request %s: %s; again", request.id, last)

    def _take_error(self, server: Upstream, request: Request, response: httpx.Response) -> tuple[bool, bool, str]:
        """Note an answer other than 200. Return whether it counts as a try of the request, whether this server would
        say the same again, and what it says.
        """
        status, told = response.status_code, message(response)
        last = f"{server.url}: HTTP {status}: {told}"
        if status == 429:
            server.busy_until = time.monotonic() + (retry_after(response) or _BUSY_SEC)
            return False, False, last
        if status in (401, 403):
            raise refused_key(server.url, response)
        if status in (400, 404, 422):
            if not server.is_ours and server.learn_refusal(response):
                return True, False, last
            raise UserError(f"request {request.id} was refused by {last}")
        if status in (502, 503, 504):
            self._lost(server, last, retry_after(response))
            return False, False, last
        if not (server.is_ours and "request_failed" in response.text):
            self._lost(server, last)  # an error of this request alone leaves the server to the others
        return True, True, last

    async def _post(self, server: Upstream, request: Request) -> httpx.Response:
        """Send a request. Raises Unreachable if the server was found to be down meanwhile."""
        post = asyncio.ensure_future(self.http.post(f"{server.url}/v1/completions", json=server.body(request)))
        server.posts.add(post)
        server.in_flight += 1
        try:
            await asyncio.wait([post])
            if post.cancelled():
                raise Unreachable(server.reason or f"{server.url} was given up")
            return post.result()
        finally:
            post.cancel()
            server.posts.discard(post)
            server.in_flight -= 1


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first exception of nested groups."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
