"""Attribute values of conversations, by an attribute-prediction model beside the one that is served.

Owns: the thread in which that model computes, what waits for it, and the batches that it gets. Does not own: how values
are computed (``stages/scoring.py``), bodies of requests and responses (``more_routes.py``). Invariants: every
conversation that was submitted gets values or an exception; one that cannot be scored does not affect those that were
in its batch; what nobody waits for any more is not computed.

On one rank, the engine that draws responses never waits for any of this. On several, whose messages must have one
order, the two models take turns: a few conversations, then a step (:class:`TakingTurns`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Protocol

from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.protocol import EngineDead, QueueFull, RequestFailed, ShuttingDown
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.serve.engine_loop import SHUTTING_DOWN
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation

log = get_logger(__name__)

_BATCH = 256  # conversations that are given to the model at a time, unless one request has more
_TURN, _TURN_CHARS = 8, 32_768  # conversations and their characters, scored between two steps of several ranks
TurnValues = Mapping[int, Mapping[str, float]]  # index of an assistant's message -> attribute -> value


class ScorerLike(Protocol):
    """The part of ``stages.scoring.Scorer`` that serving uses."""

    @property
    def schema(self) -> AttributeSchema: ...

    def score(
        self, conversations: Sequence[Conversation], progress: Callable[[int], None] | None = None
    ) -> Sequence[TurnValues]: ...


def responses_of(conversations: Sequence[Conversation]) -> int:
    """Return the number of messages that get values."""
    return sum(message.role == "assistant" for one in conversations for message in one.messages)


class TakingTurns:
    """A scorer over the ranks of ``engine``'s replica, which computes between the engine's steps. Every rank makes one,
    and the leader's scores.
    """

    def __init__(self, scorer: ScorerLike, engine: Engine) -> None:
        self.schema, self._between = scorer.schema, engine.between
        self._between.compute = lambda given: scorer.score(given, lambda _: engine.between.beat())

    def score(
        self, conversations: Sequence[Conversation], progress: Callable[[int], None] | None = None
    ) -> Sequence[TurnValues]:
        """Return what the scorer does, for the leader. Raises EngineDead, and what the scorer raises."""
        out: list[TurnValues] = []
        while len(out) < len(conversations):
            part = _turn(conversations[len(out) :])
            out += self._between.submit(part).result()
            if progress is not None:
                progress(responses_of(part))
        return out


def _turn(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Return the first conversations, as many as are scored between two steps: one in any case."""
    sizes = [sum(len(message.content) for message in one.messages) for one in conversations[:_TURN]]
    count = 1
    while count < len(sizes) and sum(sizes[: count + 1]) <= _TURN_CHARS:
        count += 1
    return list(conversations[:count])


class _NobodyWaits(Exception):
    """All requests of the batch that is computed have ended."""


class _Job:
    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations, self.responses = conversations, responses_of(conversations)
        self.future: Future[list[TurnValues]] = Future()


class ScoreQueue:
    """Scores conversations in a thread of its own, all that wait in one batch."""

    def __init__(self, scorer: ScorerLike, max_waiting: int) -> None:
        """``max_waiting`` responses may wait (``server.max_queue``)."""
        self.scorer, self.max_waiting = scorer, max_waiting
        self._waiting: deque[_Job] = deque()
        self._running: Sequence[_Job] = ()
        self._work = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="steerlm-scores", daemon=True)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes of which there are values."""
        schema = self.scorer.schema
        return tuple(name for name in schema.names if name not in schema.unseen)

    @property
    def max_level(self) -> int:
        """The highest level on the scale of the values; the lowest is 0."""
        return self.scorer.schema.max_level

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[TurnValues]]:
        """Queue the conversations of one request; the future has values for each, or an exception (``RequestFailed``,
        ``EngineDead``, ``ShuttingDown``). Cancelling it withdraws them.

        Raises QueueFull, ShuttingDown."""
        job = _Job(conversations)
        with self._work:
            if self._stopped:
                raise ShuttingDown(SHUTTING_DOWN)
            waiting = sum(other.responses for other in self._waiting if not other.future.cancelled())
            if waiting + job.responses > self.max_waiting:
                raise QueueFull(waiting, retry_after_sec=1)
            self._waiting.append(job)
            self._work.notify()
        return job.future

    def abort(self) -> None:
        """End what waits, and what is computed, with ShuttingDown. The thread ends after its current forward pass."""
        self._end_waiting()
        for job in self._running:
            _resolve(job, ShuttingDown(SHUTTING_DOWN))

    def stop(self, timeout_sec: float = 30.0) -> None:
        """End the thread after its current batch. What waits gets ShuttingDown."""
        self._end_waiting()
        if self._thread.is_alive():
            self._thread.join(timeout_sec)

    def _end_waiting(self) -> None:
        with self._work:
            self._stopped = True
            jobs = list(self._waiting)
            self._waiting.clear()
            self._work.notify()
        for job in jobs:
            _resolve(job, ShuttingDown(SHUTTING_DOWN))

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
                self._running = jobs = [job for job in jobs if not job.future.done()]
            self._score(jobs)

    def _score(self, jobs: Sequence[_Job]) -> None:
        def progress(_: int) -> None:
            if all(job.future.done() for job in jobs):
                raise _NobodyWaits

        if all(job.future.done() for job in jobs):
            return
        try:
            scores = self.scorer.score([conversation for job in jobs for conversation in job.conversations], progress)
        except _NobodyWaits:
            return
        except EngineDead as e:
            for job in jobs:
                _resolve(job, e)
            return
        except Exception as e:
            if len(jobs) > 1:
                for job in jobs:
                    self._score([job])
                return
            log.exception("scoring the conversations of a request raised")
            failed = RequestFailed(f"{type(e).__name__}: {e}")
            failed.__cause__ = e
            _resolve(jobs[0], failed)
            return
        at = 0
        for job in jobs:
            _resolve(job, list(scores[at : at + len(job.conversations)]))
            at += len(job.conversations)


def _resolve(job: _Job, outcome: list[TurnValues] | Exception) -> None:
    """Give a job its outcome, unless the client has left or the queue was ended."""
    with suppress(InvalidStateError):
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
