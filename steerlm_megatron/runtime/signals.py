"""Requests to stop: SIGTERM, SIGUSR1 and the end of a time limit.

Owns: the effect of a signal. Inside a :class:`StopRequest` a signal sets a flag that the loop reads between steps;
elsewhere (:func:`listen`) it ends the process at once with exit code 75, which is safe since every file is complete or
absent at any time. Invariant: the first signal counts; further ones do not disturb the saving and the exit.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from functools import cache
from types import FrameType, TracebackType
from typing import Any

import psutil

from steerlm_megatron.errors import Interrupted
from steerlm_megatron.runtime import launcher

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAVING_SEC = 180.0  # time kept for saving before a SLURM job's time is over, or after a signal to a launcher
_SAVING_SHARE = 0.2  # at most this share of a SLURM job's time, so that a job of few minutes trains in some of them
_HANDLED_SEC = 10.0
_NO_LIMIT = "NONE"  # squeue's word for the end of a job that may run for ever

_listening = False
_asked: list[str] = []  # the signals that this process got since listen()
_leaving = False  # the first signal came outside of a StopRequest, and the process is ending
_settled = False


def asked() -> bool:
    """Return whether a signal asked this process to stop. This is not collective: other ranks may not have got one."""
    return bool(_asked)


def leaving() -> bool:
    """Return whether a signal is ending this process outside of any loop, so that errors that follow can be ignored."""
    return _leaving


def listen() -> None:
    """Make SIGTERM and SIGUSR1 end this process with exit code 75 where no :class:`StopRequest` handles them: while it
    starts, loads, or writes a report.
    """
    global _listening
    if threading.current_thread() is not threading.main_thread():
        return
    _listening = True
    for number in _SIGNALS:
        signal.signal(number, _leave)
    atexit.register(_at_the_end)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_leave_anyway, args=(reader,), name="signals", daemon=True).start()


def settle() -> None:
    """Fix the exit code of this process at 75, whatever happens until it ends."""
    global _settled
    _settled = True


def _at_the_end() -> None:
    """Keep the exit code at 75 while Python shuts down. Python removes its signal handlers before it ends, which takes
    a second with torch; and an operation that the signal interrupted may still run below Python, where tearing it down
    would abort the process.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if _settled:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the stream is closed, or its reader has gone
                stream.flush()
        os._exit(Interrupted.CODE)


def _leave(number: int, frame: FrameType | None) -> None:
    global _leaving
    first = not _asked  # read before any call: a call is where Python may handle a further signal within this handler
    _asked.append(signal.Signals(number).name)
    if first:
        _leaving = True
        raise Interrupted(_asked[0])


def _leave_anyway(reader: int) -> None:
    """End the process from a thread if the handler did not. Python runs a handler only when the main thread returns to
    Python code, which it does not while it waits for other ranks to start; and an exception raised by the handler
    inside a destructor or a callback is dropped.
    """
    while received := os.read(reader, 1):
        if received[0] not in _SIGNALS:
            continue
        time.sleep(_HANDLED_SEC)
        if (_leaving or not _asked) and signal.getsignal(received[0]) is _leave:
            name = signal.Signals(received[0]).name
            print(f"steerlm: stopped by {name} while waiting: start the same command again", file=sys.stderr)
            os._exit(Interrupted.CODE)


@cache
def slurm_times() -> tuple[float, float] | None:
    """Return start and end of this process's SLURM job in seconds since the epoch; None without a job, or without an
    end.

    Since SLURM 23.02 environment variables have them; before, one process asks the controller.
    """
    job, start, end = (os.environ.get(f"SLURM_JOB_{name}", "") for name in ("ID", "START_TIME", "END_TIME"))
    if end.isdigit():
        return float(start) if start.isdigit() else float("-inf"), float(end)
    if not job or launcher.global_rank() != 0:
        return None
    ask = ["squeue", "--noheader", f"--jobs={job}", "--format=%S %e"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        times = [datetime.fromisoformat(word).timestamp() for word in said if word != _NO_LIMIT]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        from steerlm_megatron.observe.log import get_logger  # importing rich is slow, and --help does not need it

        get_logger(__name__).warning(
            "the end of SLURM job %s is not known (%s): set train.max_minutes, or #SBATCH --signal=USR1@180", job, error
        )
        return None
    return (times[0], times[1]) if len(times) == 2 else None


class StopRequest:
    """Context manager that turns requests to stop into a flag. ``requested`` becomes true on SIGTERM or SIGUSR1, after
    ``max_minutes`` of this process's life, or shortly before a SLURM job's time is over. The handlers are restored on
    leaving. If a signal came before, ``requested`` is true from the start.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._signal: str | None = _asked[0] if _asked else None
        self._limit: tuple[float, str] = (float("inf"), "")  # seconds since the epoch, and the name of the limit
        if max_minutes is not None:
            self._limit = (psutil.Process().create_time() + 60 * max_minutes, f"train.max_minutes={max_minutes:g}")
        if (times := slurm_times()) is not None:
            start, end = times
            margin = min(SAVING_SEC, _SAVING_SHARE * (end - start))
            self._limit = min(self._limit, (end - margin, "the end of the SLURM job's time"))
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self._signal is not None or time.time() >= self._limit[0]

    @property
    def reason(self) -> str | None:
        """The cause of the request in words; None if there is no request."""
        if self._signal is not None:
            return self._signal
        return self._limit[1] if time.time() >= self._limit[0] else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if _listening:
            _asked.append(self._signal)

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
