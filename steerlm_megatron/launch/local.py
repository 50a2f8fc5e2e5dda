"""Run ranks on this host: start them with torchrun's agent, restart them after a fault, end them together. On a cluster
the agents of all nodes meet, and number the ranks together.

Owns: processes, their signals and exit codes, restarts. Does not own: reading ranks from the environment
(``runtime/launcher.py``), clusters. Invariant: the exit code tells what to do next: 0 nothing, 2 correct the input, 75
start the same command again; any other is a fault.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from typing import Any

from steerlm_megatron.errors import Interrupted, UserError
from steerlm_megatron.runtime import launcher, signals


def run_ranks(ranks: int, arguments: list[str], max_restarts: int) -> int:
    """Run a command on ``ranks`` processes of this host and return the exit code.

    After a fault they are started again up to ``max_restarts`` times, each time from the run's last checkpoint. A stop
    (75), an input error (2) and a signal are no faults.
    """
    for restart in range(max_restarts + 1):
        code = _launch(ranks, arguments)
        if code in (0, UserError.code, Interrupted.CODE) or code > 128 or restart == max_restarts:
            return code
        print(
            f"steerlm: starting all ranks again from the last checkpoint (train.max_restarts: {restart + 1} of "
            f"{max_restarts})",
            file=sys.stderr,
        )
    raise AssertionError("the loop returns")


_LAUNCHER = "STEERLM_LAUNCHER_PID"
_SERVER_RANKS_SEC = 5  # after a server's fault the other ranks have nothing to save
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Make a rank that steerlm started get SIGTERM when its launcher dies (kill -9), so that it saves and stops.

    Otherwise ranks would go on unnoticed and hold the files and ports that a new start needs.
    """
    launcher = os.environ.pop(_LAUNCHER, None)  # removed, so that processes that this rank starts do not inherit it
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # the launcher died before prctl was called
        os.kill(os.getpid(), signal.SIGTERM)


def _launch(ranks: int, arguments: list[str]) -> int:
    """Start ``ranks`` processes of this command on this host with torchrun's agent. Return the exit code of the first
    rank that fails.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The rank's own messages, the exit code and, after a fault, the lines below tell how a rank ended.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ[_LAUNCHER] = str(os.getpid())
    # The agent waits this long after SIGTERM before it kills, since its default of 30 s may be too short for saving.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(signals.SAVING_SEC)))
    serves = arguments[0] == "serve"
    _listen(serves)
    if signals.asked():
        raise Interrupted
    nodes, endpoint, meeting = launcher.agents()
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # the agents meet there; the ranks get another port from them
        os.environ.pop(name, None)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id=meeting,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"is_host": launcher.global_rank() == 0} if nodes > 1 else {},
        local_addr="127.0.0.1" if nodes == 1 else None,
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGHUP,SIGQUIT" if serves else "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "steerlm_megatron", *arguments)
    except ChildFailedError as error:
        return _code_of(error)
    except SignalException as error:
        return Interrupted.CODE if error.sigval == signal.SIGTERM else 128 + int(error.sigval)
    finally:
        del os.environ[_LAUNCHER]
    return 0


def _listen(serves: bool) -> None:
    """Pass signals on to the ranks, as far as the agent does not."""

    def pass_on(number: int, _frame: Any) -> None:
        import psutil

        ranks = psutil.Process().children()
        if not ranks:
            raise Interrupted(signal.Signals(number).name)
        for rank in ranks:
            rank.send_signal(number)

    signal.signal(signal.SIGUSR1, pass_on)  # the agent passes on SIGTERM and SIGINT by itself
    if serves:
        # A server ends by itself after SIGTERM, in a time of its own choice, and its exit code is the command's; the
        # agent would kill it meanwhile. A terminal's Ctrl-C reaches the ranks without a launcher.
        signal.signal(signal.SIGTERM, pass_on)
        signal.signal(signal.SIGINT, signal.SIG_IGN if sys.stdin.isatty() else pass_on)
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_SERVER_RANKS_SEC)


def _code_of(error: Any) -> int:
    """Return the command's exit code after ``ChildFailedError``: some rank has not ended with 0."""
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if UserError.code in codes.values():
        return UserError.code
    # Ranks that were killed before they listened to signals had nothing to save. After a fault of one rank the
    # agent stops the others, whose code 75 is then not the run's.
    stopped = (Interrupted.CODE, -signal.SIGTERM, -signal.SIGUSR1)
    faults = {rank: code for rank, code in codes.items() if code not in stopped}
    if not faults:
        return Interrupted.CODE
    first, _ = error.get_first_failure()
    rank = first if first in faults else min(faults)
    print(f"steerlm: rank {rank} {how_it_ended(faults[rank])}; its log is in run_dir/log", file=sys.stderr)
    return 1 if faults[rank] <= 0 else faults[rank]


def how_it_ended(code: int) -> str:
    """Say in words how a process failed. ``code`` is its exit code, or minus the number of the signal that ended it."""
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = {
        "SIGKILL": " (perhaps for want of host memory: see dmesg)",
        "SIGBUS": " (perhaps a data file got shorter while it was read, or /dev/shm is full)",
    }
    return f"was killed by {name}{why.get(name, '')}"
