"""Collectives on plain values: an error that all ranks meet is reported once."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist

from steerlm_megatron.config.schema import ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import barrier, first_to_report, on_each_host, sum_over_data_parallel
from tests.helpers.dist import run_ranks

pytestmark = pytest.mark.distributed


def ranks_talk() -> dict[str, object]:
    at = parallel.initialize(ParallelConfig(context=2), 0)
    said = first_to_report("everybody's error")
    again = first_to_report("everybody's error")
    alone = first_to_report("of the last rank") if at.rank == 1 else None
    barrier()
    summed = [sum_over_data_parallel([1.0, at.rank], with_context=wide) for wide in (False, True)]
    return {"said": said, "again": again, "alone": alone, "summed": summed}


def hosts_work() -> dict[str, object]:
    at = parallel.initialize(ParallelConfig(), 0)
    # Three ranks on two hosts: two of them are the first of theirs.
    os.environ["LOCAL_RANK"] = str({0: 0, 1: 1, 2: 0}[at.rank])
    worked: list[int] = []
    on_each_host(lambda: worked.append(at.rank))

    def refuse() -> None:
        if at.rank == 2:
            raise UserError("no room on this host")

    try:
        on_each_host(refuse)
        ended: object = None
    except UserError as error:
        ended = (type(error).__name__, str(error))
    return {"worked": worked, "ended": ended}


def groups_of_layouts() -> list[int]:
    counts = []
    for layout in (ParallelConfig(context=2), ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(context=2)):
        parallel.initialize(layout, 0)
        assert sum_over_data_parallel([1.0], with_context=True) == [2.0 / layout.tensor]
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def test_the_first_rank_of_each_host_works_and_its_error_ends_all() -> None:
    found = run_ranks(3, hosts_work)
    assert [one["worked"] for one in found] == [[0], [], [2]]
    text = "no room on this host"
    assert [one["ended"] for one in found] == [("ReportedElsewhere", text)] * 2 + [("UserError", text)]


def test_another_layout_takes_the_place_of_the_last() -> None:
    """Between steps of `steerlm run` the layout changes; old groups, with NCCL's buffers, must not accumulate."""
    for counts in run_ranks(2, groups_of_layouts):
        assert max(counts) - min(counts) <= 2 and counts[0] == counts[-1], counts


def test_an_error_of_all_ranks_is_said_by_the_main_one() -> None:
    main, other = run_ranks(2, ranks_talk)
    assert (main["said"], other["said"]) == (True, False)
    assert not main["again"] and not other["again"]
    assert other["alone"], "one that the main rank does not have is said all the same"
    assert main["summed"] == [[1.0, 0.0], [2.0, 1.0]] and other["summed"] == [[1.0, 1.0], [2.0, 1.0]]
