"""The ranks that wait name the rank that holds them up."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from functools import partial
from typing import Never

import pytest
import torch.distributed as dist

from steerlm_megatron.config.schema import ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import barrier, gather_objects, on_main
from steerlm_megatron.runtime.watch import Position, Watch, explain
from tests.helpers.dist import run_ranks

TIMEOUT_SEC = 6.0  # the watch reports after half of it


class _Lines(logging.Handler):
    """A handler that keeps the package's log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _start() -> _Lines:
    parallel.initialize(ParallelConfig(data=dist.get_world_size() if dist.is_initialized() else 2), seed=1)
    logger, lines = get_logger(), _Lines()
    logger.addHandler(lines)
    logger.setLevel("INFO")
    return lines


def _watch(answer_sec: float = 30.0) -> Watch:
    """Return a watch that gives ranks on a busy machine time to answer."""
    return Watch(TIMEOUT_SEC, answer_sec)


def _until(lines: _Lines, word: str) -> list[str]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(word in line for line in lines.lines):
        time.sleep(0.05)
    return lines.lines


def _reads_slowly(watch: Watch) -> None:
    deadline = time.monotonic() + 60
    while watch.report is None and time.monotonic() < deadline:
        time.sleep(0.05)


def _one_reads() -> tuple[list[str], int]:
    lines = _start()
    with _watch() as watch:
        barrier()  # all ranks are watched from here
        watch.beat(7, "reading data")
        if dist.get_rank() == 1:
            _reads_slowly(watch)
        watch.beat(7, "computing")
        barrier()
        # Both go on now, and a second standstill gives another report.
        watch.beat(8, "reading data")
        _until(lines, "going on")
    return lines.lines, os.getpid()


def _one_is_stopped(stopped: int, report: str) -> list[str]:
    lines = _start()
    pids = gather_objects(os.getpid())
    with _watch(2.0) as watch:  # short, since one rank will not answer
        barrier()
        watch.beat(3, "computing")
        if dist.get_rank() == stopped:
            time.sleep(2 * watch.interval_sec)  # its watch has read the clock by then
            os.kill(os.getpid(), signal.SIGSTOP)
            return _until(lines, "this process was stopped")
        _until(lines, report)
        os.kill(pids[stopped], signal.SIGCONT)
    return [*lines.lines, str(pids[stopped])]


def _raises() -> list[str]:
    lines = _start()
    try:
        with _watch():
            barrier()
            if dist.get_rank() == 0:
                _until(lines, "no progress")
                raise RuntimeError("timed out")
            _until(lines, "no progress")
    except RuntimeError as error:
        return list(getattr(error, "__notes__", []))
    return []


@pytest.mark.distributed
def test_the_rank_that_is_waited_for_is_named_with_its_place() -> None:
    (lines, _), (_, pid) = run_ranks(2, _one_reads)
    report = next(line for line in lines if line.startswith("no progress"))
    assert "at step 7" in report
    assert f"waited for is rank 1 (host {os.uname().nodename}, pid {pid}), reading data of step 7" in report
    assert "_reads_slowly" in report  # the stack of that rank
    assert "rank 0: computing at runtime/collectives.py" in report
    assert any(line.startswith("going on after") for line in lines)


@pytest.mark.distributed
def test_a_stopped_rank_is_named_though_it_cannot_speak() -> None:
    lines, own = run_ranks(2, _one_is_stopped, 1, "no answer from")
    pid = lines.pop()
    report = next(line for line in lines if "no answer from" in line)
    assert f"no answer from rank 1 (host {os.uname().nodename}, pid {pid}): stopped, dead or cut off" in report
    assert "rank 0: computing" in report
    assert any(line.startswith("this process was stopped") for line in own)


@pytest.mark.distributed
def test_a_stopped_store_is_reported_without_it() -> None:
    """Without a launcher's store (srun) rank 0's process holds it, and while that is stopped none can be read."""
    _, lines = run_ranks(2, _one_is_stopped, 0, "store does not answer")
    report = next(line for line in lines if "store does not answer" in line)
    assert "the process that has it (rank 0's, or its launcher's) is stopped" in report
    assert "rank 1 (host" in report


@pytest.mark.distributed
def test_the_error_that_ends_the_loop_carries_the_report() -> None:
    (note,), _ = run_ranks(2, _raises)
    assert note.startswith("no progress for")


def _at(rank: int, beats: int, waits: bool, frame: str = "train/loop.py:1 fit") -> Position:
    return Position(rank, "node", 100 + rank, beats, 5, "computing", frame, waits, "  File ...\n")


@pytest.mark.parametrize(
    ("positions", "silent", "expected"),
    [
        ([_at(0, 9, True), _at(1, 8, True), _at(2, 9, True)], {}, "waited for is rank 1 (host node, pid 101)"),
        ([_at(0, 9, True), _at(1, 9, False), _at(2, 9, True)], {}, "waited for is rank 1 (host node, pid 101)"),
        ([_at(0, 9, True), _at(2, 9, True)], {1: "host x, pid 3"}, "no answer from rank 1 (host x, pid 3)"),
        ([_at(0, 9, True), _at(1, 9, True)], {}, "every rank waits in a collective"),
        ([_at(r, 9, True) for r in (0, 1, 2, 5)] + [_at(6, 2, False)], {}, "rank 0-2, 5: computing at train/loop.py"),
        ([_at(0, 9, True)], dict.fromkeys(range(1, 9), "?"), "and 4 more: 5-8"),
    ],
)
def test_the_report_is_of_the_one_that_is_late(
    positions: list[Position], silent: dict[int, str], expected: str
) -> None:
    assert expected in explain(positions, silent)


def test_one_process_is_not_watched() -> None:
    with Watch(0.1) as watch:
        watch.beat(1, "computing")
        assert not any(thread.name == "watch" for thread in threading.enumerate())


def test_a_failing_action_of_rank_0_ends_the_others_in_the_same_way() -> None:
    assert run_ranks(2, _on_main) == [
        ["made", "UserError: no such file", "SystemExit: 75", "ZeroDivisionError: none"],
        ["None", "ReportedElsewhere: no such file", "SystemExit: 75", "RuntimeError: rank 0 failed: none"],
    ]


def _on_main() -> list[str]:
    _start()

    def fail(error: BaseException) -> Never:
        raise error

    seen = [str(on_main(lambda: "made"))]
    for error in (UserError("no such file"), SystemExit(75), ZeroDivisionError("none")):
        try:
            on_main(partial(fail, error))
        except BaseException as caught:
            seen.append(f"{type(caught).__name__}: {caught}")
    return seen
