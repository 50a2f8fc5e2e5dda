"""Chunks tokenised by processes, handed back in order.

Owns: the processes, how many chunks are under way, reusing what lies in the work folder. Does not own: the work itself
(``chunks.py``). Invariants: results come in the order of the chunks, whatever the number of processes; so many chunks
are in memory and no more; no process outlives the one that started it.
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
    """Return the cores this process may use."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def tokenized(
    chunks: Iterator[Chunk], job: Job, folder: Path, workers: int
) -> Generator[tuple[Chunk, Tokenized], None, None]:
    """Yield each chunk and what became of it, in order; its file in ``folder`` is read if it is there, and else made.

    With one worker all is done in this process. ``UserError``: of the earliest chunk with an error (those before it
    have been yielded); a process was killed. ``OSError``: ``folder`` cannot be written.
    """
    if workers == 1:
        for chunk in chunks:
            yield chunk, _found(chunk, job, folder) or _make(chunk, job, folder)
        return
    # Spawned, not forked: the caller may have threads and CUDA.
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
    """Return what lies in the folder; None if nothing does, a power cut tore it, or it skipped what is now an error."""
    found = Tokenized.load(folder / chunk.name)
    return None if found is not None and found.malformed and job.on_error == "error" else found


def _make(chunk: Chunk, job: Job, folder: Path) -> Tokenized:
    made = tokenize(chunk, job)
    made.save(folder / chunk.name)
    return made


# In the processes

_given: tuple[Job, Path] | None = None


def _start(job: Job, folder: Path) -> None:
    global _given
    _given = job, folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without it, a process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> None:
    assert _given is not None
    _make(chunk, *_given)
