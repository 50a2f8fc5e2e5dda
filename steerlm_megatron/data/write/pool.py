"""Tokenise chunks in several processes and return the results in order.

Owns: the processes, the number of chunks in flight, reusing finished chunks of the work folder. Does not own:
tokenising (``chunks.py``). Invariants: results come in the order of the chunks for any number of processes; the number
of chunks in memory is bounded; no process outlives its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from steerlm_megatron.data.write.chunks import Chunk, Job, Tokenized, tokenize
from steerlm_megatron.errors import UserError

_MOST_WORKERS = 64


def default_workers() -> int:
    """Return the number of cores that this process may use."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def tokenized(
    chunks: Iterator[Chunk], job: Job, folder: Path, workers: int
) -> Generator[tuple[Chunk, Tokenized], None, None]:
    """Yield each chunk and its result in order. A result is read from ``folder`` if it is there, and else computed.

    With one worker all is done in this process. Raises ``UserError`` for the earliest chunk with an error (after the
    results before it), or if a process was killed, and ``OSError`` if ``folder`` cannot be written.
    """
    if workers == 1:
        for chunk in chunks:
            yield chunk, _found(chunk, job, folder) or _make(chunk, job, folder)
        return
    # Processes are spawned and not forked, since the caller may have threads and CUDA.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job, folder))
    waiting: deque[tuple[Chunk, Future[None] | None]] = deque()
    try:
        for chunk in chunks:
            known = (folder / chunk.name).exists()
            waiting.append((chunk, None if known else pool.submit(_work, chunk)))
            if len(waiting) > 2 * workers:
                yield _result(*waiting.popleft(), job, folder)
        while waiting:
            yield _result(*waiting.popleft(), job, folder)
    except BrokenProcessPool:
        raise UserError(
            f"one of the {workers} processes that tokenise was killed, perhaps for want of memory; lower data.workers "
            "and run the same command again: it goes on from where it was"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(chunk: Chunk, future: Future[None] | None, job: Job, folder: Path) -> tuple[Chunk, Tokenized]:
    if future is not None:
        future.result()
    return chunk, _found(chunk, job, folder) or _make(chunk, job, folder)


def _found(chunk: Chunk, job: Job, folder: Path) -> Tokenized | None:
    """Return the stored result of a chunk; None if it is missing, torn, or skipped lines that are errors now."""
    found = Tokenized.load(folder / chunk.name)
    return None if found is not None and found.malformed and job.on_error == "error" else found


def _make(chunk: Chunk, job: Job, folder: Path) -> Tokenized:
    made = tokenize(chunk, job)
    made.save(folder / chunk.name)
    return made


# ---- functions that run in the worker processes

_given: tuple[Job, Path] | None = None


def _start(job: Job, folder: Path) -> None:
    global _given
    _given = job, folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> None:
    assert _given is not None
    _make(chunk, *_given)
