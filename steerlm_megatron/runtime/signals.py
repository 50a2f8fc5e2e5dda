"""Being asked to stop: SIGTERM, SIGUSR1 and the end of the time.

Owns: what a signal does. Inside a :class:`StopRequest` it becomes a flag that the loop looks at between steps;
elsewhere (:func:`listen`) it ends the process with exit code 75 where it stands, since every file is whole or absent at
any time. Invariant: whoever has been asked is asked once; further signals do not disturb the saving and leaving.
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
SAVING_SEC = 180.0  # at the end of a SLURM job's time, or after a signal to a launcher, kept for saving
_SAVING_SHARE = 0.2  # of a SLURM job's whole time, at most: one of few minutes is to train in some of them
_HANDLED_SEC = 10.0
_NO_LIMIT = "NONE"  # squeue's word for the end of a job that may run for ever

_listening = False
_asked: list[str] = []  # the signals that this process got since it listens
_leaving = False  # the first one met no StopRequest
_settled = False


def asked() -> bool:
    """Return whether a signal asked this process to stop. Not collective: other ranks may not have got one."""
    return bool(_asked)


def leaving() -> bool:
    """Return whether this process is on its way out for that, outside of any loop: errors that follow are of no
    account.
    """
    return _leaving


def listen() -> None:
    """From now on SIGTERM and SIGUSR1 end this process with exit code 75 where no :class:`StopRequest` takes them:
    while it starts, loads, or writes a report.
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
    """How this process ends is settled: with 75."""
    global _settled
    _settled = True


def _at_the_end() -> None:
    """Python takes its handlers away before it ends, which takes a second with torch. And what a signal cut short may
    still be under way below Python, where taking it down ends in an abort.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if _settled:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads, or it is closed
                stream.flush()
        os._exit(Interrupted.CODE)


def _leave(number: int, frame: FrameType | None) -> None:
    global _leaving
    _asked.append(signal.Signals(number).name)
    if len(_asked) == 1:
        _leaving = True
        raise Interrupted(_asked[0])


def _leave_anyway(reader: int) -> None:
    """Python runs a handler when the main thread comes back to Python: not while it waits for other ranks to start. And
    what the handler raises may be raised inside a destructor or a callback, where Python drops it.
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
    """Start and end of the SLURM job that this process is part of, in seconds since the epoch; None: no job, no end.

    From SLURM 23.02 on jobs are told; before, one process asks the controller.
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
        from steerlm_megatron.observe.log import get_logger  # rich takes its time, which --help need not

        get_logger(__name__).warning(
            "the end of SLURM job %s is not known (%s): set train.max_minutes, or #SBATCH --signal=USR1@180", job, error
        )
        return None
    return (times[0], times[1]) if len(times) == 2 else None


class StopRequest:
    """Context manager. Inside, ``requested`` turns true on SIGTERM or SIGUSR1, after ``max_minutes`` of this process's
    life, or shortly before a SLURM job's time is over. Handlers are put back on leaving. A process that listens and was
    asked once is asked in every later one, too.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._signal: str | None = _asked[0] if _asked else None
        self._limit: tuple[float, str] = (float("inf"), "")  # seconds since the epoch, and what is over then
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
        """What asked for it, in words; None: nothing did."""
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
