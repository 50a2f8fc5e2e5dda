"""Whether one data-parallel replica keeps the others waiting, and which.

Owns: the comparison and its warning. Does not own: the seconds (the engine and the loop take them). Only replicas are
compared: the ranks of one wait for each other inside every layer or micro-batch, so their times are one.
"""

from __future__ import annotations

import socket
import statistics
from collections import defaultdict
from collections.abc import Mapping
from time import monotonic

from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import gather_objects
from steerlm_megatron.runtime.parallel import Layout

_SHARE = 0.2  # of a step, that the others wait: worth a warning
_WINDOW_SEC = 10.0  # log intervals are put together to at least this long: of milliseconds, most are chance
_IN_A_ROW = 3  # such windows with the same replica


class Stragglers:
    """Looked at once per log interval."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._slowest, self._streak, self._warn_at = -1, 0, _IN_A_ROW
        # Of the window so far: seconds by replica, and of steps.
        self._own: defaultdict[int, float] = defaultdict(float)
        self._step_sec = 0.0
        self._since = monotonic()

    def look(self, step: int, own_sec: float, step_sec: float) -> dict[str, float]:
        """Metrics ``sec/replica_median``, ``sec/replica_slowest`` and ``straggler_share``, the part of a step that the
        typical replica waits for the slowest. Empty with one replica. Collective over the world.

        ``own_sec``: mean seconds of this rank's steps until it first waited for other replicas. ``step_sec``: of steps.
        """
        if self.layout.dp_size == 1:
            return {}
        ranks = gather_objects((self.layout.dp_rank, socket.gethostname(), own_sec))
        replicas: defaultdict[int, list[tuple[int, str, float]]] = defaultdict(list)
        for rank, (replica, host, seconds) in enumerate(ranks):
            replicas[replica].append((rank, host, seconds))
        own = {replica: max(seconds for _, _, seconds in members) for replica, members in replicas.items()}
        for replica, seconds in own.items():
            self._own[replica] += seconds
        self._step_sec += step_sec
        if monotonic() - self._since >= _WINDOW_SEC:
            self._end_window(step, replicas)
        median, slowest = statistics.median_low(own.values()), max(own.values())
        share = (slowest - median) / max(step_sec, 1e-9)
        return {"sec/replica_median": median, "sec/replica_slowest": slowest, "straggler_share": share}

    def _end_window(self, step: int, replicas: Mapping[int, list[tuple[int, str, float]]]) -> None:
        slowest = max(self._own, key=lambda replica: self._own[replica])
        excess = self._own[slowest] - statistics.median_low(self._own.values())
        share = excess / max(self._step_sec, 1e-9)
        if share > _SHARE:
            self._note(step, slowest, replicas[slowest], share)
        else:
            self._slowest, self._streak, self._warn_at = -1, 0, _IN_A_ROW
        self._own.clear()
        self._step_sec, self._since = 0.0, monotonic()

    def _note(self, step: int, slowest: int, members: list[tuple[int, str, float]], share: float) -> None:
        if slowest != self._slowest:
            self._slowest, self._streak, self._warn_at = slowest, 0, _IN_A_ROW
        self._streak += 1
        if self._streak < self._warn_at or not self.layout.is_main:
            return
        self._warn_at *= 10
        ranks = " ".join(str(rank) for rank, _, _ in members)
        hosts = " ".join(dict.fromkeys(host for _, host, _ in members))
        get_logger(__name__).warning(
            "step %d: replica %d (rank %s on host %s) is slow: the others wait for it %.0f %% of a step, %d times in a "
            "row that this was looked at over %.0f s or a log interval",
            step, slowest, ranks, hosts, 100 * share, self._streak, _WINDOW_SEC,
        )  # fmt: skip
