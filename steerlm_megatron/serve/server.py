"""The sampling server: OpenAI's HTTP API over a generator.

Owns: routes, streaming, disconnects, back pressure, metrics, the port, and shutting down. Does not own: reading
requests (``read_request.py``), their meaning (``service.py``), the engine's thread (``engine_loop.py``). Invariants:
every request is answered unless its connection is gone; when the engine dies, all waiting requests are answered with
HTTP 500, and then the process ends; a client that leaves frees its row; requests beyond ``server.max_queue`` are
refused with HTTP 429.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException

from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.job import Handle
from steerlm_megatron.generate.protocol import Delta, EngineDead, QueueFull, RequestFailed, Result
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.api import ChatBody, CompletionBody, read
from steerlm_megatron.serve.engine_loop import EngineLoop
from steerlm_megatron.serve.errors import ApiError
from steerlm_megatron.serve.more_routes import add_routes
from steerlm_megatron.serve.read_request import ClientGone, parse_json, read_body, timed_protocol
from steerlm_megatron.serve.scoring import ScoreQueue, ScorerLike
from steerlm_megatron.serve.service import Ask, Service
from steerlm_megatron.steer.attributes import AttributeSchema

log = get_logger(__name__)


class _GeneratorCollector:
    """Prometheus collector of the generator's numbers, which are read when metrics are requested."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def collect(self) -> Iterator[Metric]:
        generator, scheduler = self.generator, self.generator.scheduler
        yield GaugeMetricFamily("steerlm_running", "Sequences being generated", value=len(scheduler.running))
        yield GaugeMetricFamily("steerlm_waiting", "Requests waiting for a row", value=len(scheduler.waiting))
        yield GaugeMetricFamily("steerlm_cache_tokens", "Tokens in the KV cache", value=scheduler.cached_tokens)
        yield CounterMetricFamily("steerlm_steps", "Engine steps", value=generator.steps)
        yield CounterMetricFamily("steerlm_sampled_tokens", "Tokens sampled", value=generator.sampled_tokens)


class _Metrics:
    def __init__(self, generator: Generator) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_GeneratorCollector(generator))
        self.requests = Counter("steerlm_requests", "HTTP requests", ["endpoint", "status"], registry=self.registry)
        self.prompt_tokens = Counter("steerlm_prompt_tokens", "Prompt tokens taken in", registry=self.registry)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.seconds = Histogram(
            "steerlm_request_seconds", "Time to answer", ["endpoint"], registry=self.registry, buckets=buckets
        )


class _Endpoints:
    """The code that the two completion endpoints share."""

    def __init__(self, service: Service, loop: EngineLoop, metrics: _Metrics) -> None:
        self.service, self.loop, self.metrics = service, loop, metrics
        self.generator = service.generator

    async def answer(self, name: str, understand: Callable[[dict[str, Any]], Ask], http: HttpRequest) -> Response:
        """Read a request, interpret it, run it, respond and count it. ``understand`` interprets a JSON object in a
        thread.
        """
        began = time.monotonic()
        server = self.service.server
        try:
            body = await read_body(http, server.max_body_bytes, server.read_timeout_sec)
            # Parsing and tokenising a long body take time, so a thread does it and other clients do not wait.
            ask = await asyncio.to_thread(lambda: understand(parse_json(body)))
            response = await (self._stream(ask) if ask.body.stream else self._whole(ask, http))
            self.metrics.prompt_tokens.inc(sum(len(r.prompt_ids) for r in ask.requests[:: ask.body.n]))
        except ClientGone:
            response = Response(status_code=499)
        except ApiError as e:
            response = JSONResponse(e.body, e.status, headers={"Connection": "close"} if e.close else None)
        except UserError as e:
            response = JSONResponse(ApiError(400, str(e)).body, 400)
        except QueueFull as e:
            error = ApiError(429, f"{e}; try again later", kind="rate_limit_error", code="queue_full").body
            response = JSONResponse(error, 429, headers={"Retry-After": str(e.retry_after_sec)})
        except (EngineDead, RequestFailed) as e:
            response = JSONResponse(_failure(e).body, 500)
        self.metrics.requests.labels(name, str(response.status_code)).inc()
        self.metrics.seconds.labels(name).observe(time.monotonic() - began)
        return response

    async def _whole(self, ask: Ask, http: HttpRequest) -> Response:
        handles = self.generator.submit_all(ask.requests)
        results = asyncio.ensure_future(_all_results(handles))
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait([results, gone], return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                return Response(status_code=499)  # nobody reads it, but it is counted in the metrics
            return JSONResponse(self.service.response(ask, await results))
        finally:
            gone.cancel()
            results.cancel()
            _cancel(handles)
            await asyncio.gather(
                gone, results, return_exceptions=True
            )  # otherwise asyncio logs exceptions that were never retrieved

    async def _stream(self, ask: Ask) -> Response:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Delta | Result | BaseException]] = asyncio.Queue()

        def sink(index: int) -> Callable[[Any], None]:
            def put(event: Any) -> None:
                if not loop.is_closed():  # it is closed if a server that was stopped did not wait for this response
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return put

        sinks = [sink(i) for i in range(len(ask.requests))]
        handles = self.generator.submit_all(ask.requests, sinks)
        for put, handle in zip(sinks, handles, strict=True):
            handle.future.add_done_callback(lambda future, put=put: put(future.exception() or future.result()))  # type: ignore[misc]
        return StreamingResponse(self._events(ask, handles, events), media_type="text/event-stream")

    async def _events(
        self, ask: Ask, handles: Sequence[Handle], events: asyncio.Queue[tuple[int, Delta | Result | BaseException]]
    ) -> AsyncIterator[bytes]:
        results: dict[int, Result] = {}
        begun: set[int] = set()
        try:
            while len(results) < len(handles):
                index, event = await events.get()
                if isinstance(event, BaseException):
                    yield _sse(_failure(event).body)
                    return
                if isinstance(event, Result):
                    results[index] = event
                    yield _sse(self.service.chunk(ask, index, None, (), event.finish_reason, result=event))
                    continue
                self.service.take(ask, index, event)
                if event.text or ask.body.return_token_ids or index not in begun:
                    first = index not in begun
                    whole = event.whole
                    yield _sse(self.service.chunk(ask, index, event.text, event.token_ids, first=first, whole=whole))
                    begun.add(index)
            if ask.body.stream_options is not None and ask.body.stream_options.include_usage:
                yield _sse(self.service.usage_chunk(ask, [results[i] for i in range(len(handles))]))
            yield b"data: [DONE]\n\n"
        finally:
            _cancel(handles)


def _failure(error: BaseException) -> ApiError:
    """Return the error for a client whose response will not come."""
    if isinstance(error, RequestFailed):
        return ApiError(500, f"this request failed: {error}", kind="server_error", code="request_failed")
    return ApiError(500, f"the engine stopped: {error}", kind="server_error", code="engine_stopped")


async def _all_results(handles: Sequence[Handle]) -> list[Result]:
    """Return the results of all handles, or raise the first exception of any."""
    return await asyncio.gather(*(asyncio.wrap_future(handle.future) for handle in handles))


def _cancel(handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.cancel()


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def create_app(service: Service, loop: EngineLoop, scores: ScoreQueue | None = None) -> FastAPI:
    """Return the ASGI application. The caller starts and stops the engine loop, and ``scores``."""
    app = FastAPI(title="steerlm_megatron", docs_url=None, redoc_url=None)
    metrics = _Metrics(service.generator)
    endpoints = _Endpoints(service, loop, metrics)

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, e: HTTPException) -> Response:
        return JSONResponse(ApiError(e.status_code, f"{http.method} {http.url.path}: {e.detail}").body, e.status_code)

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        return await endpoints.answer("/v1/chat/completions", lambda data: service.chat(read(ChatBody, data)), http)

    @app.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        return await endpoints.answer(
            "/v1/completions", lambda data: service.completion(read(CompletionBody, data)), http
        )

    add_routes(app, service, scores, lambda path, status: metrics.requests.labels(path, str(status)).inc())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return service.models()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        try:
            return JSONResponse(service.model(name))
        except ApiError as e:
            return JSONResponse(e.body, e.status)

    @app.get("/health")
    async def health() -> Response:
        problem = loop.problem()
        if problem is None:
            return JSONResponse({"status": "ok", "steps": service.generator.steps})
        return JSONResponse({"status": "failed", "reason": problem}, 503)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


@dataclass(frozen=True)
class Running:
    """A server that accepts connections. ``stop``, from any thread, makes :func:`serve` finish running requests and
    return.
    """

    url: str
    stop: Callable[[], None]


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that reports when it listens. At its end it does not raise a signal again, as uvicorn would."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    generator: Generator,
    schema: AttributeSchema | None,
    server: ServerConfig,
    sampling: SamplingConfig,
    ready: Callable[[Running], None] | None = None,
    grace_sec: int = 30,
    linger_sec: float = 5.0,
    scorer: ScorerLike | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or ``Running.stop``; then refuse new connections and give running requests
    ``grace_sec``.

    ``server.port`` 0 takes a free port. Ranks other than the replica's leader follow it and return when it ends. An
    error that ends the engine ends the server too: for ``linger_sec`` waiting clients and ``/health`` get the reason,
    and then EngineDead is raised with it.
    ``scorer`` answers ``/v1/score``. Raises UserError if the port is taken. Collective over the replica.
    """
    if not generator.group.is_leader:
        generator.worker_loop()
        return
    listener = _listen(server.host, server.port)

    def end_soon() -> None:
        timer = threading.Timer(linger_sec, stop)
        timer.daemon = True
        timer.start()

    def stop() -> None:
        http.should_exit = True

    loop = EngineLoop(generator, on_failure=end_soon)
    scores = None if scorer is None else ScoreQueue(scorer, server.max_queue)
    service = Service(generator, schema, server, sampling)
    app = create_app(service, loop, scores)
    port = listener.getsockname()[1]
    host = f"[{server.host}]" if ":" in server.host else server.host
    url = f"http://{host}:{port}"
    config = uvicorn.Config(
        app,
        http=timed_protocol(server.read_timeout_sec),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=grace_sec,
    )

    def on_ready() -> None:
        log.info("serving %s on %s", server.model_name, url)
        if ready is not None:
            ready(Running(url, stop))

    http = _Uvicorn(config, on_ready)
    loop.start()
    if scores is not None:
        service.scored_attributes = scores.attributes
        scores.start()
    try:
        http.run(sockets=[listener])
    finally:
        loop.stop()
        if scores is not None:
            scores.stop()
        listener.close()
    if loop.failure is not None:
        raise EngineDead(loop.failure)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Binding succeeds beside another server that set SO_REUSEADDR too; listening fails.
        listener.listen(2048)
    except (OSError, OverflowError) as e:
        listener.close()
        raise UserError(
            f"server.host={host} server.port={port} cannot be used: {getattr(e, 'strerror', None) or e}; "
            "stop what listens there or choose another server.port"
        ) from e
    return listener


def check_port(host: str, port: int) -> None:
    """Raise UserError if the port cannot be listened on now. Commands call it before any long work."""
    _listen(host, port).close()
