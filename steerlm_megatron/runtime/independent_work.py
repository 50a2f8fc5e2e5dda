"""Work that ranks do independently of each other, and the wait for the slowest of them, which may take hours longer.

Owns: the signs of life that every rank writes into the ranks' store meanwhile. Invariants: no collective is pending
while a rank works or waits, so that a signal ends it there as anywhere else; a rank is given up only if it gave no sign
of life for as long as a collective would have waited for it.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch.distributed as dist

from steerlm_megatron.runtime.collectives import barrier

SIGN_SEC = 5.0  # between two signs
_POLL_SEC = 0.1
_END_SEC = 10.0
_calls = count()  # the same number on every rank


@contextmanager
def independent_work() -> Iterator[None]:
    """Wrap work that shares nothing with other replicas. On leaving, each rank waits for all others while they live.

    Collective over the world.

    Raises:
        RuntimeError: the ranks that it names gave no sign of life for ``engine.timeout_sec``: they are dead, stopped or
            cut off. ``dist.DistError``: the rank that holds the store is.
    """
    world = dist.get_world_size()
    if world == 1:
        yield
        return
    default: Any = dist.distributed_c10d._get_default_store()
    rank, prefix, done = dist.get_rank(), f"independent_work_{next(_calls)}", threading.Event()
    store = dist.PrefixStore(prefix, default)
    store.set(f"who_{rank}", f"host {socket.gethostname()}, pid {os.getpid()}")
    store.set(f"sign_{rank}", "0")
    barrier()  # every rank has given a first sign
    own = dist.PrefixStore(
        prefix, default.clone()
    )  # a connection for this thread, so that it never waits for another thread's request
    thread = threading.Thread(target=_give_signs, args=(own, rank, done), name="signs of life", daemon=True)
    thread.start()
    try:
        yield
        store.add("arrived", 1)
        _wait(store, world, default.timeout.total_seconds())
        barrier()  # no rank reads the keys any more, so they can be deleted
    finally:
        done.set()
        thread.join(_END_SEC)  # a stopped store must not hold up the end
    for key in (f"who_{rank}", f"sign_{rank}", *(["arrived"] if rank == 0 else [])):
        store.delete_key(key)


def _give_signs(store: Any, rank: int, done: threading.Event) -> None:
    for sign in count(1):
        if done.wait(SIGN_SEC):
            return
        try:
            store.set(f"sign_{rank}", str(sign))
        except dist.DistError:  # the rank that holds the store is gone; the wait below reports it
            return


def _wait(store: Any, world: int, timeout_sec: float) -> None:
    """Wait until all ``world`` ranks arrive, or raise when one is silent for ``timeout_sec``."""
    keys = [f"sign_{rank}" for rank in range(world)]
    # Silence is counted in checks of the store, so that time in which this process itself was stopped does not count.
    limit = math.ceil(timeout_sec / SIGN_SEC)
    last, silent, looked = [b""] * world, [0] * world, -math.inf
    while store.add("arrived", 0) < world:
        if time.monotonic() - looked >= SIGN_SEC:
            signs = store.multi_get(keys)
            silent = [looks + 1 if new == old else 0 for looks, new, old in zip(silent, signs, last, strict=True)]
            last, looked = signs, time.monotonic()
            if lost := [rank for rank, looks in enumerate(silent) if looks > limit]:
                named = "; ".join(f"rank {rank} ({store.get(f'who_{rank}').decode()})" for rank in lost[:4])
                more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
                raise RuntimeError(
                    f"no sign of life for {timeout_sec:.0f} s (engine.timeout_sec) from {named}{more}: stopped, dead or"
                    " cut off; see its log and its host, then start the same command again"
                )
        time.sleep(_POLL_SEC)
