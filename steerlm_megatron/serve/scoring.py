"""Attribute values of conversations, by an attribute-prediction model beside the one that is served.

Owns: the thread in which that model computes, what waits for it, and the batches that it gets. Does not own: how values
are computed (``stages/scoring.py``), bodies of requests and responses (``more_routes.py``). Invariants: every
conversation that was submitted gets values or an exception; one that cannot be scored does not affect those that were
in its batch; the engine that draws responses never waits for any of this.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from steerlm_megatron.generate.protocol import EngineDead, QueueFull, RequestFailed
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation

log = get_logger(__name__)

_BATCH = 256  # conversations that are given to the model at a time, unless one request has more
TurnValues = Mapping[int, Mapping[str, float]]  # index of an assistant's message -> attribute -> value


class ScorerLike(Protocol):
    """The part of ``stages.scoring.Scorer`` that serving uses."""

    @property
    def schema(self) -> AttributeSchema: ...

    def score(self, conversations: Sequence[Conversation]) -> Sequence[TurnValues]: ...


class _Job:
    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations
        self.future: Future[list[TurnValues]] = Future()
        self.future.set_running_or_notify_cancel()  # from now on the queue alone resolves it


class ScoreQueue:
    """Scores conversations in a thread of its own, all that wait in one batch."""

    def __init__(self, scorer: ScorerLike, max_waiting: int) -> None:
        """``max_waiting`` conversations may wait (``server.max_queue``)."""
        self.scorer, self.max_waiting = scorer, max_waiting
        self._waiting: deque[_Job] = deque()
        self._work = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="steerlm-scores", daemon=True)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes of which there are values."""
        schema = self.scorer.schema
        return tuple(name for name in schema.names if name not in schema.unseen)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[TurnValues]]:
        """Queue the conversations of one request; the future has values for each, or ``RequestFailed``.

        Raises QueueFull, EngineDead."""
        job = _Job(conversations)
        with self._work:
            if self._stopped:
                raise EngineDead("the server is shutting down")
            waiting = sum(len(other.conversations) for other in self._waiting)
            if waiting + len(conversations) > self.max_waiting:
                raise QueueFull(waiting, retry_after_sec=1)
            self._waiting.append(job)
            self._work.notify()
        return job.future

    def stop(self, timeout_sec: float = 30.0) -> None:
        """End the thread after its current batch. What waits gets EngineDead."""
        with self._work:
            self._stopped = True
            jobs = list(self._waiting)
            self._waiting.clear()
            self._work.notify()
        for job in jobs:
            job.future.set_exception(EngineDead("the server is shutting down"))
        if self._thread.is_alive():
            self._thread.join(timeout_sec)

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._waiting and not self._stopped:
                    self._work.wait()
                if self._stopped:
                    return
                jobs = [self._waiting.popleft()]
                count = len(jobs[0].conversations)
                while self._waiting and count + len(self._waiting[0].conversations) <= _BATCH:
                    jobs.append(self._waiting.popleft())
                    count += len(jobs[-1].conversations)
            self._score(jobs)

    def _score(self, jobs: Sequence[_Job]) -> None:
        try:
            scores = self.scorer.score([conversation for job in jobs for conversation in job.conversations])
        except Exception as e:
            if len(jobs) > 1:
                for job in jobs:
                    self._score([job])
                return
            log.exception("scoring the conversations of a request raised")
            failed = RequestFailed(f"{type(e).__name__}: {e}")
            failed.__cause__ = e
            jobs[0].future.set_exception(failed)
            return
        at = 0
        for job in jobs:
            job.future.set_result(list(scores[at : at + len(job.conversations)]))
            at += len(job.conversations)
