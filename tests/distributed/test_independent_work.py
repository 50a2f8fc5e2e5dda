"""Ranks that work independently wait for each other while they give signs of life."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from steerlm_megatron.config.schema import ParallelConfig
from steerlm_megatron.runtime import independent_work as module
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import barrier
from steerlm_megatron.runtime.independent_work import independent_work
from tests.helpers.dist import run_ranks

pytestmark = pytest.mark.distributed

TIMEOUT_SEC = 10


def one_is_late() -> list[float]:
    at = parallel.initialize(ParallelConfig(data=2), 0, TIMEOUT_SEC)
    module.SIGN_SEC = 0.1
    waited = []
    for seconds in (1.5 * TIMEOUT_SEC, 0.0):
        start = time.monotonic()
        with independent_work():
            time.sleep(seconds * at.rank)
        waited.append(time.monotonic() - start)
    barrier()
    keys = [f"independent_work_{call}/{key}_{rank}" for call in (0, 1) for key in ("who", "sign") for rank in (0, 1)]
    left = [
        key for key in [*keys, "independent_work_0/arrived"] if dist.distributed_c10d._get_default_store().check([key])
    ]
    barrier()  # rank 0 holds the store, so it must not leave first
    assert not left, "they do not pile up"
    return waited


def test_they_wait_beyond_the_timeout() -> None:
    for first, _ in run_ranks(2, one_is_late):
        assert first >= 1.5 * TIMEOUT_SEC


def one_is_stopped() -> None:
    at = parallel.initialize(ParallelConfig(data=2), 0, 60)
    module.SIGN_SEC = 0.1
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=5))
    with independent_work():
        if at.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)


def test_nobody_waits_for_a_rank_that_gives_no_sign_of_life() -> None:
    """A process that is stopped or cut off does not close its connections, so silence is all that others notice."""
    with pytest.raises(
        AssertionError,
        match=r"(?s)rank 0 of 2 .*RuntimeError: no sign of life for 5 s .* from rank 1 \(host \S+, pid",
    ):
        run_ranks(2, one_is_stopped)
