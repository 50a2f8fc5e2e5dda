"""Signals outside of any loop, and the part of a job's time that is kept for saving."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from steerlm_megatron.observe.log import close_logging, setup_logging
from steerlm_megatron.runtime import signals
from steerlm_megatron.runtime.signals import StopRequest

# A process does one of these after it has printed "ready". Each would take ten minutes.
BODIES = {
    "python": "time.sleep(600)",
    # A mutex is locked twice: C code that no signal brings back to Python, like the wait for other ranks to start.
    "C": "m = ctypes.create_string_buffer(64); c = ctypes.CDLL(None); [c.pthread_mutex_lock(m) for _ in range(2)]",
    # Python drops what a handler raises inside a destructor.
    "destructor": "Slow(600); time.sleep(600)",
    # Python removes handlers when it ends, which takes a second with torch.
    "end": "left = Slow(1); os.kill(os.getpid(), signals.signal.SIGTERM)",
    # A further signal is handled while the handler notes the first.
    "handler": "signals._asked = Asked(); os.kill(os.getpid(), signals.signal.SIGTERM); time.sleep(600)",
}
PROGRAM = """
import ctypes, os, time
from steerlm_megatron.runtime import signals
class Slow:
    def __init__(self, seconds):
        self.seconds = seconds
    def __del__(self, sleep=time.sleep):
        sleep(self.seconds)
class Asked(list):
    def append(self, name):
        super().append(name)
        if len(self) == 1:
            signals.signal.raise_signal(signals.signal.SIGUSR1)
signals._HANDLED_SEC = 0.3
signals.listen()
print("ready", flush=True)
{body}
"""


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_process_with_75_wherever_it_is(body: str, name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=BODIES[body])],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(3):  # as impatient users and launchers do
            process.send_signal(getattr(signals.signal, name))
            time.sleep(0.1)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, said


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    signals.slurm_times.cache_clear()
    yield
    signals.slurm_times.cache_clear()


@pytest.mark.parametrize("told", [True, False], ids=["told", "asked for"])
@pytest.mark.parametrize(
    ("minutes", "kept_sec"), [(60, signals.SAVING_SEC), (5, 60)], ids=["an hour", "five minutes: a fifth of them"]
)
def test_the_end_of_a_slurm_job(
    minutes: int, kept_sec: float, told: bool, slurm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(signals.time, "time", lambda: now[0])
    start, end = now[0], now[0] + 60 * minutes
    if told:
        monkeypatch.setenv("SLURM_JOB_START_TIME", f"{start:.0f}")
        monkeypatch.setenv("SLURM_JOB_END_TIME", f"{end:.0f}")
    else:
        squeue(tmp_path, monkeypatch, " ".join(datetime.fromtimestamp(t).isoformat() for t in (start, end)))
    stop = StopRequest()
    now[0] = end - kept_sec - 1
    assert not stop.requested
    now[0] += 2
    assert stop.requested and stop.reason == "the end of the SLURM job's time"


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """Install a stand-in for squeue, which SLURM before 23.02 needs, that prints ``says`` for job 7."""
    (folder / "squeue").write_text(f'#!/bin/sh\n[ "$2" = --jobs=7 ] || exit 1\n{says and f"echo {says}" or "exit 1"}\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("says", ["2026-11-25T01:13:58 NONE", ""], ids=["no limit", "no answer"])
def test_a_slurm_job_without_an_end(
    says: str, slurm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue(tmp_path, monkeypatch, says)
    setup_logging(terminal=False)
    try:
        assert not StopRequest().requested
    finally:
        close_logging()
    said = capsys.readouterr().err
    assert said == "" if says else "set train.max_minutes, or #SBATCH --signal=USR1@180" in said
