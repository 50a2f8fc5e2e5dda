"""Compute something for each record, in chunks that a journal keeps, on all replicas.

Owns: the chunks, their order, the stop between two of them. Does not own: the journal's file (``journal.py``), what is
computed. Invariant: a job that is killed or stopped loses at most the chunk in flight of each replica.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.errors import Interrupted
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.runtime.collectives import any_rank, barrier
from steerlm_megatron.runtime.signals import StopRequest
from steerlm_megatron.stages.journal import Journal
from steerlm_megatron.stages.session import Session

_CHUNK = 512  # records between two writes of the journal


def compute_in_chunks(
    here: Session,
    journal: Journal,
    done: Collection[int],
    sizes: Sequence[int],
    compute: Callable[[list[int]], Sequence[Any]],
    title: str,
    unit: str = "record",
) -> int:
    """Do ``compute`` for the numbers 0 … N − 1 of records, but for those in ``done``, and write what it returns for
    each into ``journal``. Collective over the world; returns when the journals of all ranks are complete.

    Args:
        sizes: a length of each of the N records; those of similar length are computed together, so that rows fill
            better and chunks take equal time.
        compute: takes numbers of records, and returns a value in JSON for each. Collective over the replica.
        title, unit: words of the progress bar.

    Returns:
        the number of records that this job answers for: all of them, or those of its part of an array.

    Raises:
        Interrupted: a signal asked for a stop; what was computed is in the journal.
    """
    layout = here.layout
    task, tasks = job_of_array(here.config)
    left = [i for i in range(len(sizes)) if task is None or i % tasks == task]
    mine = sorted((i for i in left[layout.dp_rank :: layout.dp_size] if i not in done), key=lambda i: sizes[i])
    total, started = len(left), sum(i in done for i in left)
    if started:
        get_logger(__name__).info("resuming: %d of %d %ss are done", started, total, unit)
    chunks = [mine[start : start + _CHUNK] for start in range(0, len(mine), _CHUNK)]
    with Progress(total, title, unit=unit, initial=started, enabled=layout.is_main) as bar, StopRequest() as stop:
        while any_rank(bool(chunks)):
            chunk = chunks.pop(0) if chunks else []
            values = compute(chunk)
            if layout.is_model_head:
                journal.append(zip(chunk, values, strict=True))
            bar.set(min(bar.total or 0, bar.completed + len(chunk) * layout.dp_size))
            if any_rank(stop.requested):
                barrier()
                raise Interrupted(stop.reason or "what asked another rank to")
    barrier()  # wait until every journal is written
    return total
