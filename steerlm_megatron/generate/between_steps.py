"""Work that all ranks of a replica do between two steps of its engine, as another model that they hold needs it.

Owns: what waits for it, its order, and what becomes of its errors. Does not own: when it is done (``engine.py``), what
is computed (``compute``, which whoever owns the engine sets on every rank). Invariants: every rank does the same work
in the same order, since the leader tells the others of each; work that was submitted gets a result or an exception.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.generate.protocol import EngineDead
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)


class BetweenSteps:
    """Work between the steps of an engine.

    Attributes:
        compute: from what was submitted to its result; the same on every rank. It may exchange messages with the other
            ranks.
        beat: called by ``compute`` as it goes on, so that long work does not look like a stop.
    """

    def __init__(
        self, group: ModelGroup, send: Callable[[Any], None], wake: Callable[[], None], beat: Callable[[], None]
    ) -> None:
        """``send`` tells the other ranks of a piece of work; ``wake`` ends the sleep of the engine's thread; ``beat``
        notes a sign of life of it.
        """
        self._group, self._send, self._wake, self.beat = group, send, wake, beat
        self.compute: Callable[[Any], Any] | None = None
        self._computing: Future[Any] | None = None
        self._waiting: deque[tuple[Any, Future[Any]]] = deque()
        self._ended: EngineDead | None = None
        self._lock = threading.Lock()

    def submit(self, work: Any) -> Future[Any]:
        """Queue ``work`` for :attr:`compute`; any thread of the leader may. The future has its result, the exception
        that it raised, or EngineDead.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._ended is None:
                self._waiting.append((work, future))
        if self._ended is not None:
            _resolve(future, self._ended)
        self._wake()
        return future

    @property
    def waits(self) -> bool:
        """Whether there is work to do."""
        return bool(self._waiting)

    @property
    def running(self) -> bool:
        """Whether the leader computes now."""
        return self._computing is not None

    def do_one(self) -> bool:
        """Do the piece of work that waits longest; return whether there was one. The engine's thread of the leader
        calls it; collective over the replica if there is one.

        Raises:
            EngineDead: some ranks have computed it and others could not.
        """
        with self._lock:
            if not self._waiting:
                return False
            work, future = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                return True
            self._computing = future
        try:
            self._send(work)
            outcome = self._computed(work)
        except BaseException as error:
            _resolve(future, error if isinstance(error, EngineDead) else EngineDead(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._computing = None
        _resolve(future, outcome)
        return True

    def follow(self, work: Any) -> None:
        """Do the part of another rank than the leader. Collective over the replica."""
        outcome = self._computed(work)
        if isinstance(outcome, Exception):
            log.warning("work beside drawing raised %s: %s", type(outcome).__name__, outcome)

    def _computed(self, work: Any) -> Any:
        """Return the result, or the exception that was raised on all ranks. EngineDead where some ranks have a result
        and others an exception: they may have gone different ways, and the next message could wait for ever.
        """
        assert self.compute is not None, "set compute on every rank"
        try:
            outcome = self.compute(work)
        except Exception as error:
            outcome = error
        failed = int(isinstance(outcome, Exception))
        if self._group.size > 1 and self._group.least(failed) != -self._group.least(-failed):
            raise EngineDead(
                f"what was asked beside drawing failed on this rank alone ({type(outcome).__name__}: {outcome})"
                if failed
                else "another rank could not compute what was asked beside drawing; its log has the reason"
            )
        return outcome

    def end(self, error: EngineDead) -> None:
        """End what waits or is computed, and what comes later, with ``error``."""
        with self._lock:
            self._ended = self._ended or error
            futures = [future for _, future in self._waiting]
            futures += [self._computing] if self._computing is not None else []
            self._waiting.clear()
        for future in futures:
            _resolve(future, error)


def _resolve(future: Future[Any], outcome: Any) -> None:
    """Give a future its outcome, unless whoever waited for it has withdrawn it."""
    with suppress(InvalidStateError):
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
