"""Work of ranks that may differ by hours, and the wait for the last of them.

Owns: every rank's signs of life in the ranks' store meanwhile. Invariants: no collective is pending while a rank works
or waits, so a signal ends it there as anywhere else; a rank is given up only if it gave no sign for as long as a
collective would have waited for it.
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
    """Around work that shares nothing with other replicas: on leaving, each rank waits for all, as long as they live.

    Collective over the world.

    Raises:
        RuntimeError: ranks, which it names, gave no sign of life for ``engine.timeout_sec``: they are dead, stopped or
            cut off. ``dist.DistError``: the store's rank is.
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
    barrier()  # every rank has given one
    own = dist.PrefixStore(prefix, default.clone())  # its connection waits for no other thread's
    thread = threading.Thread(target=_give_signs, args=(own, rank, done), name="signs of life", daemon=True)
    thread.start()
    try:
        yield
        store.add("arrived", 1)
        _wait(store, world, default.timeout.total_seconds())
        barrier()  # nobody looks any more
    finally:
        done.set()
        thread.join(_END_SEC)  # not for a store that is stopped
    for key in (f"who_{rank}", f"sign_{rank}", *(["arrived"] if rank == 0 else [])):
        store.delete_key(key)


def _give_signs(store: Any, rank: int, done: threading.Event) -> None:
    for sign in count(1):
        if done.wait(SIGN_SEC):
            return
        try:
            store.set(f"sign_{rank}", str(sign))
        except dist.DistError:  # the store's rank is gone, which this one notices when it waits
            return


def _wait(store: Any, world: int, timeout_sec: float) -> None:
    """For all ``world`` ranks to arrive, or for one that is silent for ``timeout_sec``."""
    keys = [f"sign_{rank}" for rank in range(world)]
    # Silence is counted in looks: time in which this process was stopped, and perhaps all were, does not count.
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
