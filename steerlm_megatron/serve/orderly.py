"""uvicorn's server with a shutdown in order, and what must be true before a server starts.

Owns: the signals that end a server, the time that running requests get, the port, and checks of it, of keys and of
files. Does not own: the application (``server.py``). Invariant: a shutdown refuses what waits and what comes, and lets
what runs finish within ``server.drain_sec``.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from steerlm_megatron.config.schema import ServerConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import ShuttingDown
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.engine_loop import SHUTTING_DOWN, EngineLoop
from steerlm_megatron.serve.gate import AccessLog, Gate, read_keys

log = get_logger(__name__)

_SECOND_SIGNAL_SEC = 2.0


class OrderlyServer(uvicorn.Server):
    """A uvicorn server that reports when it listens, answers while it shuts down, and does not raise a signal again at
    its end, as uvicorn would.

    The first SIGTERM or SIGINT begins the shutdown: new and queued requests are refused, and running ones may finish
    within ``drain_sec``. Another one, unless it comes at once (a terminal signals the launcher, which passes it on, and
    its ranks), ends them. ``stop_now`` ends the server without waiting for anything.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        gate: Gate,
        loop: EngineLoop,
        drain_sec: float,
        on_ready: Callable[[], None],
        abort: Callable[[], None] = lambda: None,
    ) -> None:
        """``abort`` is called when requests are ended, beside ``loop.abort``."""
        super().__init__(config)
        self._abort = abort
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
            self._abort()
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


def allow_files(wanted: int) -> None:
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


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises UserError if it cannot."""
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
    listen(host, port).close()
