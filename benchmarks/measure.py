"""Helpers of the benchmarks: interleaved timing, spreads, the machine's matrix-product peak, and tables.

Invariant: contestants take turns (A B C, B C A, …), so that other load of the machine affects all of them alike, and a
ratio is taken within a round, never across rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each call, ``rounds`` per contestant, after ``warmup`` unmeasured rounds. The order
    rotates.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize()
            start = time.perf_counter()
            contestants[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def text(self, digits: int = 0) -> str:
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}–{self.high:,.{digits}f})"


def rates(seconds: Sequence[float], units: float) -> Spread:
    """Return median and quartiles of units per second."""
    return Spread.of([units / s for s in seconds])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return how many times faster ``ours`` is, round by round (both did the same work)."""
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])


def gemm_peak(dtype: torch.dtype, size: int | None = None, repeats: int = 7) -> float:
    """Measure the FLOP/s of a square matrix product in ``dtype`` on this machine's device and threads.

    A peak is what the machine can reach, so the best time counts and not the median.
    """
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = size or (8192 if where.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(3):
            a @ b
        synchronize()
        best = min(best, (time.perf_counter() - start) / 3)
    return 2 * size**3 / best


def machine() -> str:
    """Describe the machine in one line: processor or GPU, cores and threads used, versions."""
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        model = ""
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        except OSError:  # not Linux
            model = platform.processor()
        where = f"{model or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}"


def commit() -> str:
    """Return the short commit hash of the checkout, with ``+`` if it has changes."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is aligned left and whose other columns are aligned right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
