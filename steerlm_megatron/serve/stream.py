"""Responses that are sent while they are generated, as server-sent events.

Owns: the way of tokens from the engine's thread to connections, their text, the size and pace of chunks. Does not own:
what a chunk looks like (``service.py``). Invariants: the engine's thread only appends tokens to a list; text is made in
the event loop's thread; tokens that wait are sent as one chunk; making chunks takes a bounded share of the time,
however many streams there are, and so do chunks get longer instead of tokens slower.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.job import Handle
from steerlm_megatron.generate.protocol import Delta, Result
from steerlm_megatron.serve.service import Ask, Service

_PAUSE = 8  # a round of sending is followed by a pause of so many times its length,
_LONGEST_PAUSE_SEC = 0.1  # or of this
_MARK = "\ue000text\ue000"  # stands for the text in a chunk that is made once for all of a stream

Event = tuple[int, Delta | Result | BaseException]


class Pump:
    """Wakes the streams of a server whose tokens wait, all in one round. It belongs to one event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._due: deque[Stream] = deque()
        self._planned = False
        self._resume_at = 0.0

    def attach(self) -> None:
        """Belong to the running loop."""
        self._loop = asyncio.get_running_loop()

    def wake(self, stream: Stream) -> None:
        """Have ``stream`` sent. Any thread may call it; the engine's thread pays for one wake-up a round."""
        self._due.append(stream)
        if not self._planned and self._loop is not None and not self._loop.is_closed():
            self._planned = True
            self._loop.call_soon_threadsafe(self._plan)

    def _plan(self) -> None:
        assert self._loop is not None
        pause = self._resume_at - time.monotonic()
        if pause > 0:
            self._loop.call_later(pause, self._round)
        else:
            self._round()

    def _round(self) -> None:
        assert self._loop is not None
        self._planned = False  # before the streams are taken, so that a token that comes now plans the next round
        began = time.monotonic()
        while self._due:
            self._due.popleft().ready.set()
        # The streams' tasks run before this callback, which is in the queue behind them.
        self._loop.call_soon(self._rest, began)

    def _rest(self, began: float) -> None:
        now = time.monotonic()
        self._resume_at = now + min(_LONGEST_PAUSE_SEC, _PAUSE * (now - began))


class Stream:
    """One response with its choices. ``handles`` are set once the requests are submitted."""

    def __init__(self, pump: Pump, service: Service, ask: Ask) -> None:
        self.pump, self.service, self.ask = pump, service, ask
        self.handles: Sequence[Handle] = ()
        self.results: dict[int, Result] = {}
        self.gone = False  # the client has left
        self.ready = asyncio.Event()
        self._events: deque[Event] = deque()
        self._texts = [service.generator.new_text(request) for request in ask.requests]
        self._sent = [0] * len(ask.requests)  # characters
        self._begun = [False] * len(ask.requests)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def submit(self, generator: Engine) -> None:
        """Queue the requests; their tokens come to this stream. Raises what ``Engine.submit_all`` does."""
        sinks = [self._sink(i) for i in range(len(self.ask.requests))]
        self.handles = generator.submit_all(self.ask.requests, sinks, text=False)
        for put, handle in zip(sinks, self.handles, strict=True):
            handle.future.add_done_callback(lambda future, put=put: put(future.exception() or future.result()))  # type: ignore[misc]

    def _sink(self, index: int) -> Callable[[Any], None]:
        def put(event: Any) -> None:
            self._events.append((index, event))
            self.pump.wake(self)

        return put

    def leave(self) -> None:
        """Note that the client has left."""
        self.gone = True
        self.ready.set()

    async def first(self) -> BaseException | None:
        """Wait for the first event; return the error if it is one, so that it can still become a status."""
        while not self._events and not self.gone:
            await self._wait()
        event = self._events[0][1] if self._events else None
        return event if isinstance(event, BaseException) else None

    async def chunks(self, failure: Callable[[BaseException], dict[str, Any]]) -> AsyncIterator[bytes]:
        """Yield the stream's bytes. ``failure`` makes the last chunk of one that ends on an error."""
        while len(self.results) < len(self.handles):
            while not self._events:
                await self._wait()
                if self.gone:
                    return
            waiting: dict[int, list[int]] = {}
            ended: list[tuple[int, Result]] = []
            error: BaseException | None = None
            while self._events:
                index, event = self._events.popleft()
                if isinstance(event, BaseException):
                    error = error or event
                elif isinstance(event, Result):
                    ended.append((index, event))
                    waiting.setdefault(index, [])
                else:
                    self.service.take(self.ask, index, event)
                    waiting.setdefault(index, []).extend(event.token_ids)
            self.results.update(ended)
            data = b"".join(self._piece(index, ids) for index, ids in waiting.items())
            data += b"".join(
                sse(self.service.chunk(self.ask, index, None, (), result.finish_reason, result=result))
                for index, result in ended
            )
            if error is not None:
                yield data + sse(failure(error))
                return
            if len(self.results) == len(self.handles):
                data += self._end()
            if data:
                yield data

    async def _wait(self) -> None:
        await self.ready.wait()
        self.ready.clear()

    def _piece(self, index: int, ids: list[int]) -> bytes:
        """Return the chunk with the text that new tokens make final, if there is any."""
        result, text = self.results.get(index), self._texts[index]
        if result is not None:
            new = result.text[self._sent[index] :]
        else:
            new = "".join([text.push(i) for i in ids])
        self._sent[index] += len(new)
        body = self.ask.body
        if ((body.return_token_ids or body.wants_logprobs) and ids) or not self._begun[index]:
            first, self._begun[index] = not self._begun[index], True
            # Of a text that a stop string has cut off, the complete result alone says which bytes of tokens are in it;
            # the log-probabilities of the rest come with the finish reason.
            whole = result is None and text.stopped_at is None and text.whole
            return sse(self.service.chunk(self.ask, index, new, ids, first=first, whole=whole))
        if not new:
            return b""
        if index not in self._frames:
            frame = sse(self.service.chunk(self.ask, index, _MARK, ())).split(
                json.dumps(_MARK, ensure_ascii=False).encode()
            )
            self._frames[index] = (frame[0], frame[1])
        head, tail = self._frames[index]
        return head + json.dumps(new, ensure_ascii=False).encode() + tail

    def _end(self) -> bytes:
        body = self.ask.body
        done = b"data: [DONE]\n\n"
        if body.stream_options is not None and body.stream_options.include_usage:
            results = [self.results[i] for i in range(len(self.handles))]
            return sse(self.service.usage_chunk(self.ask, results)) + done
        return done


class EventStream(Response):
    """The HTTP response of a stream. It writes to the connection directly, and ends when the client leaves."""

    def __init__(
        self, stream: Stream, failure: Callable[[BaseException], dict[str, Any]], at_end: Callable[[], None]
    ) -> None:
        """``at_end`` is called once, however the stream ends."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        # The length is not known, and proxies (nginx) are not to collect chunks.
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        self.raw_headers.append((b"x-accel-buffering", b"no"))
        self._stream, self._failure, self._at_end = stream, failure, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._stream.leave()

        gone = asyncio.ensure_future(until_gone())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._stream.chunks(self._failure):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._at_end()


def sse(body: dict[str, Any]) -> bytes:
    """Return a server-sent event with a JSON body."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
