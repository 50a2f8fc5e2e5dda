"""What ranks say once, and to whom."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist
from helpers.dist import run_ranks

from steerlm_megatron.config.schema import ParallelConfig
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import apart, barrier, first_to_say, sum_over_data_parallel

pytestmark = pytest.mark.distributed


def ranks_talk() -> dict[str, object]:
    at = parallel.initialize(ParallelConfig(context=2), 0)
    said = first_to_say("everybody's error")
    again = first_to_say("everybody's error")
    alone = first_to_say("of the last rank") if at.rank == 1 else None
    barrier()
    summed = [sum_over_data_parallel([1.0, at.rank], with_context=wide) for wide in (False, True)]
    return {"said": said, "again": again, "alone": alone, "summed": summed}


def groups_of_layouts() -> list[int]:
    counts = []
    for layout in (ParallelConfig(context=2), ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(context=2)):
        parallel.initialize(layout, 0)
        assert sum_over_data_parallel([1.0], with_context=True) == [2.0 / layout.tensor]
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def test_another_layout_takes_the_place_of_the_last() -> None:
    """As between the steps of `steerlm run`: groups, and NCCL's buffers with them, do not pile up."""
    for counts in run_ranks(2, groups_of_layouts):
        assert max(counts) - min(counts) <= 2 and counts[0] == counts[-1], counts


def test_an_error_of_all_ranks_is_said_by_the_main_one() -> None:
    main, other = run_ranks(2, ranks_talk)
    assert (main["said"], other["said"]) == (True, False)
    assert not main["again"] and not other["again"]
    assert other["alone"], "one that the main rank does not have is said all the same"
    assert main["summed"] == [[1.0, 0.0], [2.0, 1.0]] and other["summed"] == [[1.0, 1.0], [2.0, 1.0]]


def work_apart(ends: str) -> None:
    at = parallel.initialize(ParallelConfig(data=2), 0, timeout_sec=10)
    for _ in range(2):
        with apart():
            if at.rank == 1 and ends == "late":
                time.sleep(12)
            if at.rank == 1 and ends == "dead":
                os._exit(7)
        ends = "at once"
    barrier()


def test_ranks_that_work_apart_wait_beyond_every_timeout() -> None:
    run_ranks(2, work_apart, "late")


def test_nobody_waits_for_a_rank_that_died_apart() -> None:
    """Under srun no launcher ends the others."""
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 ended with exit code 7.*apart.*RuntimeError: "):
        run_ranks(2, work_apart, "dead")
