"""The sampling server: OpenAI's HTTP API over a generator.

Owns: routes, back pressure, the port, and shutting down. Does not own: what all requests pass (``gate.py``), reading
requests (``read_request.py``), their meaning (``service.py``), streams (``stream.py``), the engine's thread
(``engine_loop.py``). Invariants: every request is answered unless its connection is gone; when the engine dies, all
waiting requests are answered with HTTP 500, and then the process ends; a client that leaves frees its row; requests
beyond ``server.max_queue`` are refused with HTTP 429, and those that meet a shutdown with HTTP 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from steerlm_megatron import __version__
from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.job import Handle
from steerlm_megatron.generate.protocol import EngineDead, QueueFull, RequestFailed, Result, ShuttingDown
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.api import ChatBody, CompletionBody, read
from steerlm_megatron.serve.engine_loop import SHUTTING_DOWN, EngineLoop, watch_of, watched
from steerlm_megatron.serve.errors import ApiError
from steerlm_megatron.serve.gate import RETRY_AFTER_SEC, AccessLog, Gate, error_response, read_keys, shutting_down
from steerlm_megatron.serve.metrics import Metrics
from steerlm_megatron.serve.more_routes import add_routes
from steerlm_megatron.serve.read_request import ClientGone, parse_json, read_body, timed_protocol
from steerlm_megatron.serve.scoring import ScoreQueue, ScorerLike
from steerlm_megatron.serve.service import Ask, Service
from steerlm_megatron.serve.stream import EventStream, Pump, Stream
from steerlm_megatron.steer.attributes import AttributeSchema

log = get_logger(__name__)

_SHORT_BODY = 4096  # bytes; reading such a body takes less time than handing it to a thread
_CLIENT_LEFT = 499  # nobody reads this status, but it is counted in the metrics
_SECOND_SIGNAL_SEC = 2.0
_FLUSH_SEC = 5  # time for the last answers to be written, after the engine has ended them
_FILES = 256  # open files beside connections


class _Endpoints:
    """The code that the two completion endpoints share."""

    def __init__(self, service: Service, loop: EngineLoop, metrics: Metrics) -> None:
        self.service, self.loop, self.metrics = service, loop, metrics
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
        except ApiError as e:
            response = visit.refused(e)
        except UserError as e:
            response = visit.refused(ApiError(400, str(e)))
        except QueueFull as e:
            error = ApiError(429, f"{e}; try again later", kind="rate_limit_error", code="queue_full")
            response = visit.refused(error, e.retry_after_sec)
        except (EngineDead, RequestFailed) as e:
            response = visit.refused(_failure(e))
        visit.end(response.status_code)
        return response

    async def _whole(self, ask: Ask, http: HttpRequest, visit: _Visit) -> Response:
        handles = self.generator.submit_all(ask.requests)
        visit.handles = handles
        results = asyncio.ensure_future(_all_results(handles))
        gone = asyncio.ensure_future(_disconnected(http))
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

        gone = asyncio.ensure_future(_disconnected(visit.http))
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
            return EventStream(stream, lambda e: _failure(e).body, end)
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
        return Response(status_code=_CLIENT_LEFT)

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


def _failure(error: BaseException) -> ApiError:
    """Return the error for a client whose response will not come."""
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


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def create_app(service: Service, loop: EngineLoop, scores: ScoreQueue | None = None) -> Gate:
    """Return the ASGI application. The caller starts and stops the engine loop, and ``scores``.

    Raises UserError if the keys or the log of requests cannot be used."""
    app = FastAPI(title="steerlm_megatron", docs_url=None, redoc_url=None, openapi_url=None)
    server = service.server
    metrics = Metrics(service.generator)
    endpoints = _Endpoints(service, loop, metrics)
    gate = Gate(
        app,
        keys=read_keys(server.api_keys, server.api_key_file),
        root_path=server.root_path,
        log_file=None if server.access_log is None else AccessLog(server.access_log),
        rejected=lambda reason: metrics.rejected.labels(reason).inc(),
    )

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
            return JSONResponse({"status": "draining" if gate.draining else "ok", "steps": service.generator.steps})
        return JSONResponse({"status": "failed", "reason": problem}, 503)

    @app.get("/ready")
    async def ready() -> Response:
        problem = SHUTTING_DOWN if gate.draining else loop.problem()
        if problem is None:
            return JSONResponse({"status": "ready"})
        headers = {"Retry-After": str(RETRY_AFTER_SEC)}
        return JSONResponse({"status": "not ready", "reason": problem}, 503, headers=headers)

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": __version__, "model": server.model_name}

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return gate


@dataclass(frozen=True)
class Running:
    """A server that accepts connections. ``stop``, from any thread, makes :func:`serve` finish running requests and
    return.
    """

    url: str
    stop: Callable[[], None]


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that reports when it listens, answers while it shuts down, and does not raise a signal again at
    its end, as uvicorn would.

    The first SIGTERM or SIGINT begins the shutdown: new and queued requests are refused, and running ones may finish
    within ``drain_sec``. Another one, unless it comes at once (a terminal signals the launcher, which passes it on, and
    its ranks), ends them. ``stop_now`` ends the server without waiting for anything.
    """

    def __init__(
        self, config: uvicorn.Config, gate: Gate, loop: EngineLoop, drain_sec: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.gate, self.loop, self.drain_sec = gate, loop, drain_sec
        self.stop_now = False
        self._asked_sec: float | None = None
        self._deadline: float | None = None
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def drain(self) -> None:
        """Begin to shut down. Any thread, and a signal handler, may call it."""
        if self._asked_sec is None:
            self._asked_sec = time.monotonic()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked_sec is not None and time.monotonic() - self._asked_sec > _SECOND_SIGNAL_SEC:
            self._deadline = 0.0
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Look after the engine and the shutdown; uvicorn calls it ten times a second."""
        await super().on_tick(counter)
        self.loop.look()
        if self._asked_sec is not None and not self.gate.draining:
            self.gate.draining = True
            refused = self.loop.generator.refuse_waiting(ShuttingDown(SHUTTING_DOWN))
            log.info("shutting down: %d waiting requests are refused; running ones have %g s", refused, self.drain_sec)
            if self._deadline is None:
                self._deadline = time.monotonic() + self.drain_sec
        if self.stop_now:
            return True
        if not self.gate.draining or self._deadline is None:
            return False
        if self.gate.active and time.monotonic() > self._deadline:
            log.warning("%d requests did not finish in server.drain_sec and are ended", self.gate.active)
            self.loop.abort()
            return True
        return not self.gate.active

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
    linger_sec: float = 5.0,
    timeout_sec: float = 600.0,
    identity: Mapping[str, Any] | None = None,
    scorer: ScorerLike | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or ``Running.stop``; then refuse new requests and those that wait, and give running
    ones ``server.drain_sec``.

    ``server.port`` 0 takes a free port. Ranks other than the replica's leader follow it and return when it ends. An
    error that ends the engine ends the server too: for ``linger_sec`` waiting clients and ``/health`` get the reason,
    and then EngineDead is raised with it. So it is if the replica's ranks stand still for most of ``timeout_sec``
    (``engine.timeout_sec``), or do not end. ``identity`` says in ``/v1/models`` which checkpoint is served; ``scorer``
    answers ``/v1/score``. Raises UserError if the port, the keys or a file cannot be used. Collective over the replica.
    """
    if not generator.group.is_leader:
        with watched(generator, watch_of(timeout_sec)):
            generator.worker_loop()
        generator.group.wait_for_all()
        return
    linger_sec = min(linger_sec, timeout_sec / 10)

    def end_soon() -> None:
        timer = threading.Timer(linger_sec, stop_now)
        timer.daemon = True
        timer.start()

    def stop_now() -> None:
        http.stop_now = True

    loop = EngineLoop(generator, timeout_sec, on_failure=end_soon)
    scores = None if scorer is None else ScoreQueue(scorer, server.max_queue)
    service = Service(generator, schema, server, sampling, identity)
    gate = create_app(service, loop, scores)
    listener = _listen(server.host, server.port)
    port = listener.getsockname()[1]
    host = f"[{server.host}]" if ":" in server.host else server.host
    url = f"{'http' if server.tls_cert is None else 'https'}://{host}:{port}"
    _allow_files(server.max_connections + _FILES)
    config = uvicorn.Config(
        _with_cors(gate, server.cors),
        http=timed_protocol(server.read_timeout_sec, server.idle_timeout_sec, server.max_connections),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=math.ceil(server.idle_timeout_sec) + 1,
        timeout_graceful_shutdown=_FLUSH_SEC,
        ssl_certfile=server.tls_cert,
        ssl_keyfile=server.tls_key,
    )

    def on_ready() -> None:
        log.info("serving %s on %s", server.model_name, url)
        if ready is not None:
            ready(Running(url, http.drain))

    http = _Uvicorn(config, gate, loop, server.drain_sec, on_ready)
    gate.crowded = lambda: len(http.server_state.connections) > server.max_connections
    loop.start()
    if scores is not None:
        service.scored_attributes = scores.attributes
        scores.start()
    try:
        http.run(sockets=[listener])
    finally:
        loop.stop(min(30.0, timeout_sec / 4))
        if scores is not None:
            scores.stop()
        listener.close()
    if loop.failure is not None:
        raise EngineDead(loop.failure)


def _with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Return ``app`` with the headers by which browsers let pages of ``origins`` call it, its refusals included."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )


def _allow_files(wanted: int) -> None:
    """Let this process open as many files as ``wanted`` connections need, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def check_server(server: ServerConfig) -> None:
    """Raise UserError with everything that keeps a server from starting: its port, keys and files. Commands call it
    before any long work.
    """
    problems = []
    checks: list[Callable[[], object]] = [
        lambda: read_keys(server.api_keys, server.api_key_file),
        lambda: check_port(server.host, server.port) if server.port else None,
        lambda: _check_tls(server),
        lambda: None if server.access_log is None else AccessLog(server.access_log).close(),
    ]
    for check in checks:
        try:
            check()
        except UserError as e:
            problems.append(str(e))
    if problems:
        raise UserError("\n".join(problems))


def _check_tls(server: ServerConfig) -> None:
    if server.tls_cert is None:
        if server.tls_key is not None:
            raise UserError("server.tls_key is set without server.tls_cert; name the certificate too")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.tls_cert, server.tls_key)
    except (OSError, ssl.SSLError) as e:
        raise UserError(f"server.tls_cert={server.tls_cert} server.tls_key={server.tls_key} cannot be used: {e}") from e


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
