"""The engine's thread, and the truth about its health.

Owns: starting, watching and stopping the thread that steps a generator. Invariant: :meth:`EngineLoop.problem` is None
only while that thread is alive and has shown life a moment ago; a live HTTP thread in front of a dead engine is not
health.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)


class EngineLoop:
    """Steps ``generator`` in a thread of its own, on the leader of a replica."""

    def __init__(
        self, generator: Generator, stall_sec: float = 120.0, on_failure: Callable[[], None] | None = None
    ) -> None:
        """``stall_sec``: a step that takes longer counts as a fault (a first step on a large model can take long).
        ``on_failure``: called once, from the engine's thread, when an error has ended it."""
        self.generator = generator
        self.stall_sec = stall_sec
        self.failure: str | None = None  # the error that ended the engine; being stopped is none
        self._on_failure = on_failure
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steerlm-engine", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self.generator.last_beat_sec = time.monotonic()
        self._thread.start()

    def _run(self) -> None:
        try:
            self.generator.run_until(self._stop)
            if self.generator.error is None:
                self.generator.stop_workers()
                self.generator.fail("the server is shutting down")
        except BaseException as e:
            # Whoever waits for a response is told by fail().
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
        """End the thread after its present step; what is pending fails. The replica's other ranks leave
        ``worker_loop``."""
        self._stop.set()
        self.generator.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_sec)
