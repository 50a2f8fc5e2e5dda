"""The two completion endpoints: a request from its body to the end of its response.

Owns: their answers, whole or streamed, the errors that these become, and what is counted of them. Does not own: what
they mean (``service.py``), the bytes of streams (``stream.py``), routes (``server.py``). Invariants: every request is
answered unless its connection is gone; a client that leaves frees its row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.job import Handle
from steerlm_megatron.generate.protocol import EngineDead, QueueFull, RequestFailed, Result, ShuttingDown
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.errors import ApiError
from steerlm_megatron.serve.gate import error_response, shutting_down
from steerlm_megatron.serve.metrics import Metrics
from steerlm_megatron.serve.read_request import ClientGone, disconnected, parse_json, read_body
from steerlm_megatron.serve.service import Ask, Service
from steerlm_megatron.serve.stream import EventStream, Pump, Stream

log = get_logger(__name__)

_SHORT_BODY = 4096  # bytes; reading such a body takes less time than handing it to a thread
CLIENT_LEFT = 499  # nobody reads this status, but it is counted in the metrics
REFUSALS = (ApiError, UserError, QueueFull, EngineDead, RequestFailed)  # they become an answer, by ``api_error``


class Endpoints:
    """The code that the two completion endpoints share."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self.generator = service.generator
        self.pump = Pump()

    async def answer(self, name: str, understand: Callable[[dict[str, Any]], Ask], http: HttpRequest) -> Response:
        """Read a request, interpret it, run it, respond and count it. ``understand`` interprets a JSON object."""
        visit = _Visit(self.metrics, name, http)
        server = self.service.server
        response: Response
        try:
            body = await read_body(http, server.max_body_bytes, server.read_timeout_sec)
            # Parsing and tokenising a long body take time, so a thread does it and other clients do not wait.
            if len(body) > _SHORT_BODY:
                ask = await asyncio.to_thread(lambda: understand(parse_json(body)))
            else:
                ask = understand(parse_json(body))
            visit.took(ask)
            if ask.body.stream:
                return await self._stream(ask, visit)
            response = await self._whole(ask, http, visit)
        except ClientGone:
            response = visit.left()
        except REFUSALS as e:
            response = visit.refused(api_error(e), getattr(e, "retry_after_sec", None))
        visit.end(response.status_code)
        return response

    async def _whole(self, ask: Ask, http: HttpRequest, visit: _Visit) -> Response:
        handles = self.generator.submit_all(ask.requests)
        visit.handles = handles
        results = asyncio.ensure_future(_all_results(handles))
        gone = asyncio.ensure_future(disconnected(http))
        try:
            await asyncio.wait([results, gone], return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                return visit.left()
            return JSONResponse(self.service.response(ask, await results))
        finally:
            gone.cancel()
            results.cancel()
            _cancel(handles)
            await asyncio.gather(
                gone, results, return_exceptions=True
            )  # otherwise asyncio logs exceptions that were never retrieved

    async def _stream(self, ask: Ask, visit: _Visit) -> Response:
        """Return the response of a stream. Its head is sent with the first token, so that an error until then has a
        status of its own.
        """
        self.pump.attach()
        stream = Stream(self.pump, self.service, ask)
        stream.submit(self.generator)
        visit.handles = stream.handles

        def end() -> None:
            _cancel(stream.handles)
            if stream.gone and len(stream.results) < len(stream.handles):
                visit.left()
            visit.end(200)

        gone = asyncio.ensure_future(disconnected(visit.http))
        gone.add_done_callback(lambda task: None if task.cancelled() else stream.leave())
        try:
            error = await stream.first()
        except BaseException:
            _cancel(stream.handles)
            raise
        finally:
            left = gone.done()
            gone.cancel()
        if error is None and not left:
            return EventStream(stream, lambda e: api_error(e).body, end)
        _cancel(stream.handles)
        if error is not None:
            raise error
        raise ClientGone


class _Visit:
    """A request to a completion endpoint, from its arrival to the end of its response."""

    def __init__(self, metrics: Metrics, endpoint: str, http: HttpRequest) -> None:
        self.http = http
        self.handles: Sequence[Handle] = ()
        self._metrics, self._endpoint = metrics, endpoint
        self._began = time.monotonic()

    def took(self, ask: Ask) -> None:
        """Note what is asked for."""
        prompts = [len(r.prompt_ids) for r in ask.requests[:: ask.body.n]]
        self._metrics.prompts(prompts)
        self._note(prompt_tokens=sum(prompts), choices=len(ask.requests), stream=ask.body.stream)

    def refused(self, error: ApiError, retry_after_sec: int | None = None) -> Response:
        """Return the response of an error."""
        self._metrics.rejected.labels(error.body["error"]["code"] or "invalid_request").inc()
        self._note(error=error.body["error"]["code"])
        return error_response(error, retry_after_sec)

    def left(self) -> Response:
        """Note that the client has left; nobody reads the response that is returned."""
        self._metrics.left.inc()
        self._note(left=True)
        log.info("request %s: the client left after %.1f s", self._id(), time.monotonic() - self._began)
        return Response(status_code=CLIENT_LEFT)

    def end(self, status: int) -> None:
        """Count the request, whose response has ended."""
        self._metrics.requests.labels(self._endpoint, str(status)).inc()
        self._metrics.seconds.labels(self._endpoint).observe(time.monotonic() - self._began)
        self._metrics.responses(self.handles)
        results = [handle.result for handle in self.handles]
        if results:
            self._note(
                completion_tokens=sum(handle.times.tokens for handle in self.handles),
                finish_reasons=[None if result is None else result.finish_reason for result in results],
            )

    def _id(self) -> str:
        return str(self.http.scope.get("state", {}).get("request_id", "?"))

    def _note(self, **entries: Any) -> None:
        """Add to the line in the log of requests."""
        self.http.scope.get("state", {}).get("note", {}).update(entries)


def api_error(error: BaseException) -> ApiError:
    """Return the error for a client whose response will not come."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", kind="rate_limit_error", code="queue_full")
    if isinstance(error, RequestFailed):
        return ApiError(500, f"this request failed: {error}", kind="server_error", code="request_failed")
    if isinstance(error, ShuttingDown):
        return shutting_down()
    return ApiError(500, f"the engine stopped: {error}", kind="server_error", code="engine_stopped")


async def _all_results(handles: Sequence[Handle]) -> list[Result]:
    """Return the results of all handles, or raise the first exception of any."""
    return await asyncio.gather(*(asyncio.wrap_future(handle.future) for handle in handles))


def _cancel(handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.cancel()
