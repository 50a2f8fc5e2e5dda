"""Run functions on real ranks in tests: one process each, gloo, CPU; all have ended when the call returns.

Ranks are forked from a server that has imported torch, Megatron-Core and DeepSpeed once, which saves the seconds that
every fresh process takes. The server itself starts no threads and no groups and does not use CUDA.
"""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.config.commands import COMMANDS

# What ranks and whole commands import. A process that has several kinds of children has one such server for all.
_PRELOAD = ["deepspeed", "torch._dynamo", "hydra.main", "steerlm_megatron.data.feed.loader", "steerlm_megatron.cli"]
_PRELOAD += [f"steerlm_megatron.stages.{command.module}" for command in COMMANDS.values()]
_GRACE_SEC = 2.0  # after one rank has failed, the others have this long to report what they saw


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 600.0) -> list[Any]:
    """Call ``function(*args)`` in ``ranks`` processes and return their (picklable) results in rank order.

    ``function`` is at the top of a module. If a rank raises or dies, or after ``timeout`` seconds, all are ended and an
    ``AssertionError`` carries the failing ranks' tracebacks and last output.
    """
    context = forks()
    with tempfile.TemporaryDirectory(prefix="ranks_") as name:
        folder, port = Path(name), _free_port()
        processes = [
            context.Process(target=_rank, args=(rank, ranks, port, folder, function, args)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            problem = _wait(processes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                end(process)
        if problem:
            raise AssertionError("\n".join([problem, *(_story(folder, rank) for rank in range(ranks))]))
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(ranks)]


def forks() -> Any:
    """Return the context of ``multiprocessing`` whose processes are forked from a server that imports ``_PRELOAD``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def once(factory: pytest.TempPathFactory, name: str, compute: Callable[[], Any]) -> Any:
    """Call ``compute()`` once for all tests and workers of pytest-xdist, which get its result or its failure."""
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    result, failure = folder / f"{name}.result", folder / f"{name}.failure"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if failure.exists():
                raise AssertionError(f"as the first test that asked for it:\n{failure.read_text()}")
            if not result.exists():
                try:
                    found = compute()
                except Exception as error:
                    failure.write_text(str(error))
                    raise
                result.write_bytes(pickle.dumps(found))
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # unlocked explicitly, since a forked child may still hold the file open
    return pickle.loads(result.read_bytes())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait(processes: list[Any], deadline: float, timeout: float) -> str | None:
    """Return None once all processes have succeeded, or the first failure as soon as it happens."""
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            _ask_where(processes)
            return f"rank {failed[0]} of {len(processes)} ended with exit code {codes[failed[0]]}"
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.02)
    _ask_where(processes)
    alive = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    return f"ranks {alive} of {len(processes)} still ran after {timeout:.0f} s"


def _ask_where(processes: list[Any]) -> None:
    """Make ranks that still run write their stacks into their logs, after giving them time to fail by themselves."""
    time.sleep(_GRACE_SEC)
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGQUIT)
    time.sleep(0.2)


def end(process: Any) -> None:
    """Kill the process and its children. It leads a session, unless it has not got that far yet."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _story(folder: Path, rank: int) -> str:
    parts = [f"---- rank {rank}"]
    for kind, size in (("log", 2000), ("error", 6000)):
        path = folder / f"{rank}.{kind}"
        if path.exists():
            parts.append(path.read_text(errors="replace")[-size:])
    return "\n".join(parts)


def _rank(rank: int, ranks: int, port: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setsid()
    log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in world.items()})
    # The CPU is used also on a machine with a GPU, because sums have a fixed order there.
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported is no garbage: collections, of which new groups make one, pass over it
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=False)  # shows where a rank hangs
    try:
        result = pickle.dumps(function(*args))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    (folder / f"{rank}.result").write_bytes(result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skips exit handlers of threads and groups, since everything that matters is written
