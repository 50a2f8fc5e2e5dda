"""The device that this process computes on. Invariant: importing this module touches no CUDA state."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime import launcher

# What tensors on ``meta`` stand for inside of :func:`standing_in`: "cpu" or "cuda"; None outside.
_stand_in: str | None = None


def has_cuda() -> bool:
    """Return whether this process can use a CUDA device."""
    return _stand_in is None and torch.cuda.is_available()


@contextmanager
def standing_in(kind: str) -> Iterator[None]:
    """Let ``meta`` be the device of this process, and stand for one of ``kind`` ("cpu" or "cuda").

    Tensors then have shapes and no values: the same code runs without computing anything and without memory, as a plan
    of a run needs it (``plan/trace.py``).
    """
    global _stand_in
    before, _stand_in = _stand_in, kind
    try:
        yield
    finally:
        _stand_in = before


def on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` is on a GPU, or stands for one that is."""
    return tensor.is_cuda or (tensor.is_meta and _stand_in == "cuda")


def device() -> torch.device:
    """Return the device of this process: ``cuda:LOCAL_RANK`` where there is one, else ``cpu``; inside of
    :func:`standing_in`, ``meta``.
    """
    if _stand_in is not None:
        return torch.device("meta")
    if has_cuda():
        return torch.device("cuda", launcher.local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def device_name() -> str:
    """Return the GPU's name as torch gives it; ``cpu`` where there is no GPU."""
    return torch.cuda.get_device_name() if has_cuda() else "cpu"


def compiles_kernels() -> bool:
    """Return whether kernels can be made on this process's GPU: Triton is there, and a C compiler for its stubs."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))
    return has_cuda() and importlib.util.find_spec("triton") is not None and compiler


def total_memory() -> int:
    """Return the bytes of this process's GPU that torch can allocate at most."""
    return torch.cuda.get_device_properties(device()).total_memory


def peak_memory_gib() -> float:
    """Return the peak memory so far (since :func:`forget_peak_memory`), in GiB: allocated on this rank's GPU, or
    resident in this process.
    """
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def forget_peak_memory() -> None:
    """Let :func:`peak_memory_gib` count from here on, as far as the system allows it."""
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        # man 5 proc: 5 sets a process's peak resident size to what it has at this moment.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:  # no Linux, or a container that forbids it: the peak is then that of the whole process
        get_logger(__name__).debug("the peak of resident memory cannot be set back: %s", error)


def backend() -> str:
    """Return the collective backend that fits :func:`device`. With CUDA, CPU tensors go through gloo."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def dtype_of(precision: str) -> torch.dtype:
    """Return ``fp32`` or ``bf16`` as a torch dtype."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def emulates_bf16() -> bool:
    """Return whether this process's device is a CPU without instructions for bf16: torch then converts every number on
    the way into a matrix product, and back.
    """
    return not has_cuda() and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def set_cpu_threads(ranks_on_host: int) -> None:
    """Share the host's cores between its ranks, unless ``OMP_NUM_THREADS`` says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, ranks_on_host)))


def to_device(values: np.ndarray[Any, Any], where: torch.device) -> torch.Tensor:
    """Return an array as a tensor on ``where``; the host does not wait for the copy, and pinned memory is kept until it
    is done.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else tensor.to(where)


class HostCopy:
    """A tensor's values for the host, which waits for them when it reads them and not before.

    A copy into pinned memory is queued behind what computes the tensor; on a CPU the values are there at once.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._values, self._copied = tensor, torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._copied.record()

    def tolist(self) -> list[Any]:
        """Return the values. The host waits for the device here, unless it has waited since the copy was queued."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class Stopwatch:
    """Measure seconds of this process's device from :meth:`start` to :meth:`stop`. On a GPU they are between two events
    in its stream, without a host sync.
    """

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if has_cuda() else []
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def seconds(self) -> float:
        """Return the measured seconds; call this after a host sync that is later than :meth:`stop`."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]

    def _mark(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        else:
            self._times[which] = time.perf_counter()
