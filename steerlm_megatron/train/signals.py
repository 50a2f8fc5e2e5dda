"""Being asked to stop: SIGTERM, SIGUSR1 and the end of the time become a flag that the loop looks at between steps."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import psutil

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SLURM_MARGIN_SEC = 180.0  # of a SLURM job's time, kept for saving


class StopRequest:
    """Context manager. Inside, ``requested`` turns true on SIGTERM or SIGUSR1, after ``max_minutes`` of this process's
    life, or shortly before a SLURM job's time is over (``SLURM_JOB_END_TIME``). Handlers are put back on leaving.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._signal: str | None = None
        self._limit: tuple[float, str] = (float("inf"), "")  # seconds since the epoch, and what is over then
        if max_minutes is not None:
            self._limit = (psutil.Process().create_time() + 60 * max_minutes, f"train.max_minutes={max_minutes:g}")
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if end.isdigit():
            self._limit = min(self._limit, (int(end) - _SLURM_MARGIN_SEC, "the end of the SLURM job's time"))
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self._signal is not None or time.time() >= self._limit[0]

    @property
    def reason(self) -> str:
        """What asked for it, in words; on other ranks than the one asked, that it was another."""
        if self._signal is not None:
            return self._signal
        return self._limit[1] if time.time() >= self._limit[0] else "another rank"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
