"""The engine's thread and its health.

Owns: starting, watching and stopping the thread that steps a generator. Invariant: :meth:`EngineLoop.problem` is None
only while that thread is alive and has given a recent sign of life, so that a live HTTP thread in front of a dead
engine does not count as healthy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.protocol import EngineDead, ShuttingDown
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.watch import Watch

log = get_logger(__name__)

SHUTTING_DOWN = "the server is shutting down"
_FIRST_STEP_SEC = 120.0  # the first step of a large model can take long, and so can work between steps
_STALL_SEC = 30.0
_IDLE_SEC = 15.0  # an idle leader hears of the other ranks every few seconds (group.HEARTBEAT_SEC)
_SLOW_STEPS = 10  # a step that takes as long as so many of the slowest before it counts as a stall
_SHARE_OF_TIMEOUT = 0.25  # a stall is reported by then,
_DEAD_SHARE = 0.6  # and is the end by then if it is known which ranks are waited for,
_LAST_SHARE = 0.75  # or else by then, so that the process has ended within engine.timeout_sec
_GIVEN_UP_SEC = 0.5  # wait for the thread of an engine that was given up
_WATCH_SEC = 240.0  # the ranks that are waited for are named after half of this at the latest


class EngineLoop:
    """Step ``generator`` in a separate thread, on the leader of a replica."""

    def __init__(
        self, generator: Engine, timeout_sec: float = 600.0, on_failure: Callable[[], None] | None = None
    ) -> None:
        """``timeout_sec``: ``engine.timeout_sec``; a replica whose ranks have exchanged no message for most of that
        time is given up. ``on_failure`` is called once, from any thread, when an error has ended the engine.
        """
        self.generator, self.timeout_sec = generator, timeout_sec
        self.failure: str | None = None  # the error that ended the engine; None after a regular stop
        self._on_failure = on_failure
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._watch = watch_of(timeout_sec)
        self._thread = threading.Thread(target=self._run, name="steerlm-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.generator.last_beat_sec = time.monotonic()
        self._thread.start()

    def _run(self) -> None:
        try:
            with watched(self.generator, self._watch):
                self.generator.run_until(self._stop)
        except BaseException as e:
            # A step that finds the engine failed after stop() is no error.
            if not (self._stop.is_set() and isinstance(e, EngineDead)):
                log.exception("the engine stopped")
                self._fail(f"{type(e).__name__}: {e}")
                return
        if self.failure is None:
            self.generator.fail(SHUTTING_DOWN, ShuttingDown)
            self.generator.stop_workers()
            self.generator.group.wait_for_all()  # a rank that has stopped would hold up the end of the others

    def _fail(self, reason: str) -> None:
        """Resolve the requests that wait with ``reason``, and tell the server once."""
        with self._lock:
            first, self.failure = self.failure is None, self.failure or reason
        self.generator.fail(reason)
        if first and self._on_failure is not None:
            self._on_failure()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def problem(self) -> str | None:
        """Return why no response can be expected, or None."""
        if self.generator.error is not None:
            return f"the engine stopped: {self.generator.error}"
        if not self._thread.is_alive():
            return "the engine's thread is not running"
        silent_sec = self._silent_sec()
        if silent_sec > min(self._patience_sec(), _SHARE_OF_TIMEOUT * self.timeout_sec):
            return f"the engine has not finished a step for {silent_sec:.0f} s{self._waited_for()}"
        return None

    def _patience_sec(self) -> float:
        """Return how long the engine may be silent: it is when ranks compute a step, and when one does not answer."""
        if self.generator.between.running:
            return _FIRST_STEP_SEC
        if not self.generator.jobs:
            return _IDLE_SEC
        if not self.generator.steps:
            return _FIRST_STEP_SEC
        return max(_STALL_SEC, _SLOW_STEPS * self.generator.longest_step_sec)

    def _silent_sec(self) -> float:
        return time.monotonic() - self.generator.last_beat_sec

    def _waited_for(self) -> str:
        """Return which ranks are waited for, as soon as that is known."""
        return "" if self._watch.report is None else f" ({self._watch.report.splitlines()[0]})"

    def look(self) -> None:
        """Give up an engine that waits for other processes and has stood still for most of ``timeout_sec``: one of its
        ranks is stopped or cut off, or vLLM is, and the wait cannot be ended otherwise. The server calls it often.
        """
        if not self.generator.waits_for_others or self.failure is not None or not self._thread.is_alive():
            return
        silent_sec = self._silent_sec()
        last = _LAST_SHARE if self._watch.report is None else _DEAD_SHARE
        if silent_sec > last * self.timeout_sec:
            several = self.generator.group.size > 1
            what = "the ranks have exchanged no message" if several else "the engine has not finished a step"
            reason = f"{what} for {silent_sec:.0f} s{self._waited_for()}"
            log.error("the engine is given up: %s", reason)
            self._fail(reason)

    def abort(self) -> None:
        """End the requests that are being answered; the thread ends after its current step."""
        self._stop.set()
        self.generator.fail(SHUTTING_DOWN, ShuttingDown)

    def stop(self, timeout_sec: float = 30.0) -> None:
        """End the thread after its current step. Pending requests fail, and the replica's other ranks leave
        ``worker_loop``. An engine that waits for other processes and whose thread does not end in time has failed: one
        of these is stopped.
        """
        self._stop.set()
        self.generator.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_sec if self.failure is None else _GIVEN_UP_SEC)
        if self._thread.is_alive() and self.generator.waits_for_others:
            silent = f"no step has ended for {self._silent_sec():.0f} s{self._waited_for()}"
            who = "ranks" if self.generator.group.size > 1 else "engine"
            self._fail(f"the {who} did not stop within {timeout_sec:.0f} s: {silent}")


def watch_of(timeout_sec: float) -> Watch:
    """Return the watch over the ranks of a replica, which names those that the others wait for."""
    return Watch(min(timeout_sec, _WATCH_SEC))


@contextmanager
def watched(generator: Engine, watch: Watch) -> Iterator[None]:
    """Let ``watch`` follow the messages between the ranks of ``generator``'s replica. Every rank enters it, in the
    thread that exchanges them.
    """
    if generator.group.size == 1:
        yield
        return
    with watch:
        generator.on_message = lambda: watch.beat(generator.steps, "generating")
        try:
            yield
        finally:
            generator.on_message = lambda: None
