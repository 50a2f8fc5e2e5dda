"""Report which rank holds up the others, by a thread on every rank that notices when its rank makes no progress.

Owns: the beats of the loop, and the report when they stop. Does not own: ending the run, which a collective's timeout
does after ``engine.timeout_sec``. Invariants: the thread uses a separate connection to the ranks' store and no
collective, so that it can report while every rank waits; a beat costs no more than making a tuple.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from steerlm_megatron.observe.log import get_logger

_PACKAGE = Path(__file__).resolve().parents[1]
_SHARE_OF_TIMEOUT = (
    0.5  # time without a beat before the report: long enough to avoid false alarms, and before the timeout ends the run
)
_ANSWER_SEC = 10.0  # time that the store, and ranks that publish their position, may take to answer
_STACK_LINES = 8


@dataclass(frozen=True)
class Position:
    """The position of a rank. ``beats`` counts beats since the start, and is equal on all ranks at the same point."""

    rank: int
    host: str
    pid: int
    beats: int
    step: int
    doing: str
    frame: str  # innermost line of this package on the stack, if there is one
    waits: bool  # whether it is inside one of torch.distributed's collectives
    stack: str

    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class Watch:
    """Context manager around a loop that all ranks run in lockstep, calling :meth:`beat` on the way.

    A rank without a beat for half of ``timeout_sec`` publishes its position. Rank 0, or the first rank that is not
    stopped itself, gathers the positions and logs one warning that names the ranks that the others wait for: those that
    do not answer (stopped, dead, cut off), else those that are furthest behind, else those that are not inside a
    collective. An error that then leaves the loop carries the report as a note. A single process is not watched.
    """

    def __init__(self, timeout_sec: float, answer_sec: float | None = None) -> None:
        """``answer_sec`` bounds how long the store and other ranks may take to answer; None means a share of the
        timeout.
        """
        self._limit = _SHARE_OF_TIMEOUT * timeout_sec
        self.interval_sec = min(5.0, self._limit / 8)
        self._answer = min(_ANSWER_SEC, self._limit / 4) if answer_sec is None else answer_sec
        self._beat: tuple[int, float, int, str] = (0, time.monotonic(), 0, "starting")
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched = 0
        self.report: str | None = None
        self._rank = self._world = 0

    def beat(self, step: int, doing: str) -> None:
        """Record progress: this rank is in step ``step`` and is now ``doing`` this (words for the report)."""
        self._beat = (self._beat[0] + 1, time.monotonic(), step, doing)

    def __enter__(self) -> Watch:
        self.beat(0, "starting")
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
            self._watched = threading.get_ident()
            default: Any = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore("steerlm_watch", default.clone())
            store.set_timeout(timedelta(seconds=self._answer))
            store.set(f"who_{self._rank}", f"host {socket.gethostname()}, pid {os.getpid()}")
            self._thread = threading.Thread(target=self._run, args=(store,), name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(self.interval_sec)
        if self.report is not None and isinstance(error, Exception):
            error.add_note(self.report)

    # ---- the thread

    def _run(self, store: Any) -> None:
        looked = time.monotonic()
        while not self._end.wait(self.interval_sec):
            asleep, looked = time.monotonic() - looked, time.monotonic()
            beats, since, _, _ = self._beat
            if asleep > self._limit / 2:  # this process itself was stopped, so the others are not late yet
                get_logger(__name__).warning("this process was stopped, or its host stood still, for %.0f s", asleep)
                continue
            if time.monotonic() - since < self._limit:
                continue
            # The store does not answer at all, not even with an error, while its process is stopped.
            alone = threading.Timer(3.2 * self._answer, self._no_store)
            alone.start()
            try:
                self._stuck(store, beats)
            except dist.DistError:
                self._no_store()
            finally:
                alone.cancel()
            while self._beat[0] == beats:
                if self._end.wait(self.interval_sec):
                    return
            self.report = None
            get_logger(__name__).warning("going on after %.0f s without progress", time.monotonic() - since)
            self._forget(store, beats)
            looked = time.monotonic()

    def _stuck(self, store: Any, beats: int) -> None:
        """Publish this rank's position; rank 0, or the first rank that answers, reports."""
        key = f"report_{beats}"
        store.set(str(self._rank), json.dumps(asdict(self._position())))
        if self._rank != 0:
            # This goes into the rank's log file; the console shows rank 0's report alone.
            get_logger(__name__).info("no progress for %.0f s: %s", self._age(), _describe(self._position()))
            if report := self._wait_for(store, [key], 2 * self._answer):
                self.report = report[key]
                return
        found = self._wait_for(store, [str(rank) for rank in range(self._world)], self._answer)
        positions = [Position(**json.loads(found[str(rank)])) for rank in range(self._world) if str(rank) in found]
        if self._beat[0] != beats or positions[0].rank != self._rank:
            return
        silent = sorted(set(range(self._world)) - {p.rank for p in positions})
        known = self._wait_for(store, [f"who_{rank}" for rank in silent], self.interval_sec)
        named = {rank: known.get(f"who_{rank}", "unknown") for rank in silent}
        text = f"no progress for {self._age():.0f} s at step {self._beat[2]}: {explain(positions, named)}"
        store.set(key, text)
        self._say(text)

    def _forget(self, store: Any, beats: int) -> None:
        """Delete what this rank published, so that a rank that is silent next time is not taken to have answered."""
        try:
            store.delete_key(str(self._rank))
            store.delete_key(f"report_{beats}")
        except dist.DistError as error:
            get_logger(__name__).warning("the ranks' store does not answer: %s", error)

    def _wait_for(self, store: Any, keys: list[str], seconds: float) -> dict[str, str]:
        """Return those of ``keys`` that come in time, with their values."""
        deadline = time.monotonic() + seconds
        values: dict[str, str] = {}
        while True:
            for key in keys:
                if key not in values and store.check([key]):
                    values[key] = store.get(key).decode()
            if len(values) == len(keys) or time.monotonic() > deadline or self._end.wait(min(1.0, self.interval_sec)):
                return values

    def _no_store(self) -> None:
        self._say(
            f"no progress for {self._age():.0f} s, and the ranks' store does not answer: the process that has it (rank "
            f"0's, or its launcher's) is stopped, dead or cut off. {_describe(self._position())}",
            logging.WARNING
            if self._rank < 2
            else logging.INFO,  # every rank writes it into its log file; two show it on the console
        )

    def _say(self, report: str, level: int = logging.WARNING) -> None:
        self.report = report
        get_logger(__name__).log(level, "%s", report)

    def _age(self) -> float:
        return time.monotonic() - self._beat[1]

    def _position(self) -> Position:
        beats, _, step, doing = self._beat
        lines = traceback.extract_stack(sys._current_frames()[self._watched])
        ours = [line for line in lines if _PACKAGE in Path(line.filename).parents]
        inner = ours[-1] if ours else lines[-1]
        file = Path(inner.filename)
        place = f"{file.relative_to(_PACKAGE) if ours else file.name}:{inner.lineno} {inner.name}"
        waits = any(re.search(r"torch.distributed.(distributed_c10d|c10d_logger)\.py$", one.filename) for one in lines)
        stack = "".join(traceback.format_list(lines[-_STACK_LINES:]))
        return Position(self._rank, socket.gethostname(), os.getpid(), beats, step, doing, place, waits, stack)


def explain(positions: list[Position], silent: dict[int, str]) -> str:
    """Return the report in words: the ranks that are waited for, their position, and where the others wait.

    ``positions`` are those of the ranks that answered; ``silent`` has the ranks that did not, with host and process.
    """
    late: list[Position] = []
    if silent:
        named = "; ".join(f"rank {rank} ({who})" for rank, who in list(silent.items())[:4])
        more = f" and {len(silent) - 4} more: {_ranks(list(silent)[4:])}" if len(silent) > 4 else ""
        parts = [f"no answer from {named}{more}: stopped, dead or cut off"]
    else:
        behind = min(p.beats for p in positions)
        late = [p for p in positions if p.beats == behind]
        if len(late) == len(positions):
            late = [p for p in positions if not p.waits]
        parts = [f"waited for is {_describe(p)}\n{p.stack}".rstrip() for p in late[:4]]
        if len(late) > 4:
            parts.append(f"and {len(late) - 4} more: rank {_ranks([p.rank for p in late[4:]])}")
        if not late:
            parts = ["every rank waits in a collective: different ones, or the network between them is down"]
    places: dict[str, list[int]] = {}
    for p in positions:
        if p not in late:
            places.setdefault(f"{p.doing} at {p.frame}", []).append(p.rank)
    parts += [f"rank {_ranks(ranks)}: {place}" for place, ranks in places.items()]
    return "\n".join(parts)


def _describe(p: Position) -> str:
    return f"{p.name()}, {p.doing} of step {p.step}, at {p.frame}"


def _ranks(ranks: list[int]) -> str:
    """Write sorted ``ranks`` as ranges, such as ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
