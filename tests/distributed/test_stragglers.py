"""A replica that makes the others wait is measured and named."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from distributed.test_checkpoint import config, write_shards

from steerlm_megatron.config.schema import ParallelConfig
from steerlm_megatron.data.feed.loader import StepLoader
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import barrier
from steerlm_megatron.stages import train as train_stage
from steerlm_megatron.train import stragglers
from steerlm_megatron.train.stragglers import Stragglers
from tests.helpers.dist import run_ranks
from tests.helpers.engines import Case, make, step_batches

pytestmark = pytest.mark.distributed

SLEEP_SEC = 0.3
CASES = {
    "DP2": Case("ap"),
    "DP2 overlap": Case("ap", overlap=True),
    "ZeRO 2": Case("ap", zero=2),
}


def slow_forward(case: Case) -> list[dict[str, float]]:
    engine = make(case)
    if engine.layout.rank == 1:
        loss = engine.objective.loss

        def slow(*args: Any) -> Any:
            time.sleep(SLEEP_SEC)
            return loss(*args)

        engine.objective.loss = slow
    stragglers, found = Stragglers(engine.layout), []
    for step in range(5):
        start = time.perf_counter()
        result = engine.train_step(step_batches(step))
        found.append(stragglers.look(step, result.seconds["own"], time.perf_counter() - start))
    return found


@pytest.mark.parametrize("name", CASES)
def test_own_time_is_what_a_replica_computes_alone(name: str) -> None:
    """Other work on the machine makes a step only longer, so the shortest of the steps is compared."""
    for steps in run_ranks(2, slow_forward, CASES[name]):
        assert all(step["sec/replica_slowest"] >= SLEEP_SEC for step in steps)
        fast = min(step["sec/replica_median"] for step in steps)
        assert fast < SLEEP_SEC / 2, "the fast replica's time has no waiting in it"
        assert max(step["straggler_share"] for step in steps) > 0.2


def slow_reading(root: Path) -> None:
    stragglers._WINDOW_SEC = 0.0  # makes every log interval count
    parallel.initialize(ParallelConfig(data=2), seed=1)
    if parallel.layout().is_main:
        write_shards(root / "data")
    barrier()
    if parallel.layout().rank == 1:
        read = StepLoader.__next__

        def slow(loader: StepLoader) -> Any:
            time.sleep(1.0)
            return read(loader)

        StepLoader.__next__ = slow  # type: ignore[method-assign]
    wanted = config("train_ap", root / "run", root / "data")
    wanted.parallel = ParallelConfig(data=2)
    train_stage.run(wanted)


def test_a_run_says_which_rank_reads_slowly(tmp_path: Path) -> None:
    run_ranks(2, slow_reading, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "straggler_share" in row]
    assert len(rows) == 6 and all(row["sec/replica_slowest"] >= 1.0 for row in rows)
    assert all("sec/own" not in row for row in rows)
    lines = [li for li in (tmp_path / "run" / "log" / "rank_0.log").read_text().splitlines() if " is slow" in li]
    assert len(lines) == 1, "once, not at every log line"
    assert re.search(r"step [3-6]: replica 1 \(rank 1 on host ", lines[0]), "after three in a row"


def even(own_sec: dict[int, list[float]], interval_sec: float = 1.0, window_sec: float = 0.0) -> list[str]:
    """Return the log lines for one log interval per number, each with steps of 2 s."""
    now = 0.0
    stragglers._WINDOW_SEC, stragglers.monotonic = window_sec, lambda: now
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    parallel.initialize(ParallelConfig(data=2), seed=1)
    at = parallel.layout()
    looking = Stragglers(at)
    for step, own in enumerate(own_sec[at.rank]):
        now += interval_sec
        looking.look(step, own, 2.0)
    return lines


def test_chance_is_no_straggler() -> None:
    """A replica that is slow from time to time, in turns with others, or by less than a fifth, is not named."""
    lines, _ = run_ranks(2, even, {0: [1, 1, 1, 1, 1, 2, 1, 1, 1], 1: [2, 2, 1, 2, 2, 1, 1.3, 1.3, 1.3]})
    assert lines == []


def test_short_log_intervals_are_looked_at_together() -> None:
    """Steps of milliseconds vary, so three slow ones in a row are chance, and a fast one among them acquits nobody."""
    chance = {0: [1.0] * 80, 1: ([2.0] * 4 + [0.2] * 4) * 10}
    slow = {0: [1.0] * 80, 1: [2.0, 2.0, 2.0, 1.1] * 20}
    assert run_ranks(2, even, chance, 1.0, 8.0)[0] == []
    (line,) = run_ranks(2, even, slow, 1.0, 8.0)[0]
    assert line.startswith("step 23: replica 1 (rank 1 on host ") and "wait for it 39 % of a step, 3 times" in line


def one_replica() -> dict[str, float]:
    parallel.initialize(ParallelConfig(tensor=2), seed=1)
    return Stragglers(parallel.layout()).look(1, 1.0, 1.0)


def test_ranks_of_one_replica_are_not_compared() -> None:
    assert run_ranks(2, one_replica) == [{}, {}]
