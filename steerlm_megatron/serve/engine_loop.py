"""The engine's thread and its health.

Owns: starting, watching and stopping the thread that steps a generator. Invariant: :meth:`EngineLoop.problem` is None
only while that thread is alive and has given a recent sign of life, so that a live HTTP thread in front of a dead
engine does not count as healthy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)


class EngineLoop:
    """Step ``generator`` in a separate thread, on the leader of a replica."""

    def __init__(
        self, generator: Generator, stall_sec: float = 120.0, on_failure: Callable[[], None] | None = None
    ) -> None:
        """A step that takes longer than ``stall_sec`` counts as a fault (the first step of a large model can take
        long). ``on_failure`` is called once, from the engine's thread, when an error has ended it.
        """
        self.generator = generator
        self.stall_sec = stall_sec
        self.failure: str | None = None  # the error that ended the engine; None after a regular stop
        self._on_failure = on_failure
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steerlm-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.generator.last_beat_sec = time.monotonic()
        self._thread.start()

    def _run(self) -> None:
        try:
            self.generator.run_until(self._stop)
            if self.generator.error is None:
                self.generator.stop_workers()
                self.generator.fail("the server is shutting down")
        except BaseException as e:
            # fail() below resolves the requests that wait.
            reason = f"{type(e).__name__}: {e}"
            self.generator.fail(reason)
            log.exception("the engine stopped")
            if not self._stop.is_set():
                self.failure = reason
                if self._on_failure is not None:
                    self._on_failure()

    def problem(self) -> str | None:
        """Return why no response can be expected, or None."""
        if self.generator.error is not None:
            return f"the engine stopped: {self.generator.error}"
        if not self._thread.is_alive():
            return "the engine's thread is not running"
        silent_sec = time.monotonic() - self.generator.last_beat_sec
        if silent_sec > self.stall_sec:
            return f"the engine has not finished a step for {silent_sec:.0f} s"
        return None

    def stop(self, timeout_sec: float = 30.0) -> None:
        """End the thread after its current step. Pending requests fail, and the replica's other ranks leave
        ``worker_loop``.
        """
        self._stop.set()
        self.generator.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_sec)
