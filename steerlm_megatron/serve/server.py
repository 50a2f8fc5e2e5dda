"""The sampling server: OpenAI's HTTP API over a generator.

Owns: routes, and the start of everything that serves. Does not own: what all requests pass (``gate.py``), completions
(``completions.py``), the port and the shutdown (``orderly.py``), the engine's thread (``engine_loop.py``). Invariants:
every request is answered unless its connection is gone; when the engine dies, all waiting requests are answered with
HTTP 500, and then the process ends; requests beyond ``server.max_queue`` are refused with HTTP 429, and those that meet
a shutdown with HTTP 503.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.protocol import EngineDead
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.api import ChatBody, CompletionBody, read
from steerlm_megatron.serve.completions import Endpoints
from steerlm_megatron.serve.engine_loop import SHUTTING_DOWN, EngineLoop, watch_of, watched
from steerlm_megatron.serve.errors import ApiError
from steerlm_megatron.serve.gate import RETRY_AFTER_SEC, AccessLog, Gate, read_keys
from steerlm_megatron.serve.metrics import Metrics
from steerlm_megatron.serve.more_routes import add_routes
from steerlm_megatron.serve.orderly import OrderlyServer, allow_files, listen
from steerlm_megatron.serve.page import add_page, page_address
from steerlm_megatron.serve.read_request import timed_protocol
from steerlm_megatron.serve.scoring import ScoreQueue, ScorerLike
from steerlm_megatron.serve.service import Service
from steerlm_megatron.steer.attributes import AttributeSchema

log = get_logger(__name__)

_FLUSH_SEC = 5  # time for the last answers to be written, after the engine has ended them
_FILES = 256  # open files beside connections


def create_app(service: Service, loop: EngineLoop, scores: ScoreQueue | None = None) -> Gate:
    """Return the ASGI application. The caller starts and stops the engine loop, and ``scores``.

    Raises UserError if the keys or the log of requests cannot be used."""
    app = FastAPI(title="steerlm_megatron", docs_url=None, redoc_url=None, openapi_url=None)
    server = service.server
    metrics = Metrics(service.generator)
    endpoints = Endpoints(service, metrics)
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

    _add_probes(app, service, loop, gate, metrics)
    if server.page:
        add_page(app, server.root_path)
    return gate


def _add_probes(app: FastAPI, service: Service, loop: EngineLoop, gate: Gate, metrics: Metrics) -> None:
    """Add the routes that say how the server is, to ``app`` behind ``gate``."""

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
        return {"version": __version__, "model": service.server.model_name}

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


@dataclass(frozen=True)
class Running:
    """A server that accepts connections. ``stop``, from any thread, makes :func:`serve` finish running requests and
    return.
    """

    url: str
    stop: Callable[[], None]


def serve(
    generator: Engine,
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
        _follow(generator, timeout_sec)
        return
    linger_sec = min(linger_sec, timeout_sec / 10)

    def end_soon() -> None:
        timer = threading.Timer(linger_sec, lambda: setattr(http, "stop_now", True))
        timer.daemon = True
        timer.start()

    loop = EngineLoop(generator, timeout_sec, on_failure=end_soon)
    scores = None if scorer is None else ScoreQueue(scorer, server.max_queue)
    service = Service(generator, schema, server, sampling, identity)
    gate = create_app(service, loop, scores)
    listener = listen(server.host, server.port)
    url = _address(server, listener.getsockname()[1])
    allow_files(server.max_connections + _FILES)

    def on_ready() -> None:
        _say_where(server, url)
        if ready is not None:
            ready(Running(url, http.drain))

    abort = (lambda: None) if scores is None else scores.abort
    http = OrderlyServer(_uvicorn_config(gate, server), gate, loop, server.drain_sec, on_ready, abort)
    gate.crowded = lambda: len(http.server_state.connections) > server.max_connections
    loop.start()
    if scores is not None:
        service.scored_attributes, service.scored_max_level = scores.attributes, scores.max_level
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


def _follow(generator: Engine, timeout_sec: float) -> None:
    """Do what the leader of the replica asks for, until it ends."""
    with watched(generator, watch_of(timeout_sec)):
        generator.worker_loop()
    generator.group.wait_for_all()


def _address(server: ServerConfig, port: int) -> str:
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"{'http' if server.tls_cert is None else 'https'}://{host}:{port}"


def _say_where(server: ServerConfig, url: str) -> None:
    log.info("serving %s on %s", server.model_name, url)
    if server.page:
        log.info("to chat with it, open %s in a browser (or run: steerlm chat %s)", page_address(server, url), url)


def _uvicorn_config(gate: Gate, server: ServerConfig) -> uvicorn.Config:
    """Return how uvicorn serves ``gate``."""
    return uvicorn.Config(
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
