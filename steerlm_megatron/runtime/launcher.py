"""The rank of this process according to its launcher: torchrun's variables, or those of a SLURM step.

Owns: reading ranks from the environment, and completing it with what ``torch.distributed`` asks for. Does not own:
starting processes (``launch``), process groups (``parallel.py``). Standard library only, so that the command line can
ask before torch is imported. Invariant: inside a batch script that no launcher started, a process counts as the only
one, however many tasks the job has.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

from steerlm_megatron.errors import UserError

# The ranks' store takes ports above those of services and below those that Linux gives to outgoing connections.
_FIRST_PORT, _PORTS = 15000, 15000

# The variables that make a process a rank, or one that starts ranks. A process that a rank starts for a work of its own
# must not inherit them: it would wait for the other ranks, or count as the rank's own end.
OF_A_RANK = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_STEP_ID",
    "STEERLM_RANKS_PER_NODE", "STEERLM_EXITS",
)  # fmt: skip


def is_rank() -> bool:
    """Return whether a launcher (torchrun, srun) started this process as one of several."""
    return "RANK" in os.environ or (_in_slurm_step() and ranks_of_agent() is None)


def ranks_of_agent() -> int | None:
    """Return how many ranks this process is to start as the agent of its node (``cluster.starter=torchrun``); None for
    a process that is no agent.
    """
    ranks = os.environ.get("STEERLM_RANKS_PER_NODE")
    return int(ranks) if ranks and "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ else None


def agents() -> tuple[int, str, str]:
    """Return how many agents there are, the address and port at which they meet, and a name for their meeting that all
    of them know.
    """
    if ranks_of_agent() is None:
        return 1, "127.0.0.1:0", f"steerlm-{os.getpid()}"
    address = os.environ.get("MASTER_ADDR") or _address_of_first_node()
    port = os.environ.get("MASTER_PORT") or str(step_port())
    job, step = os.environ.get("SLURM_JOB_ID", "0"), os.environ["SLURM_STEP_ID"]
    return _slurm_tasks(), f"{address}:{port}", f"steerlm-{job}-{step}"


def note_exit(code: object) -> None:
    """Leave the exit code of this process for the job's script, in the folder ``STEERLM_EXITS``: srun has one code for
    all ranks, the highest, which does not tell a fault from the stop of the others that follows it.
    """
    folder = os.environ.get("STEERLM_EXITS")
    if not folder or code in (None, 0):
        return
    try:
        with open(os.path.join(folder, f"{global_rank()}"), "a", encoding="ascii") as file:
            file.write(f"{code if isinstance(code, int) else 1}\n")
    except OSError as error:  # the folder's disk is full, or gone: srun's code has to do
        print(f"steerlm: {folder}: {error}", file=sys.stderr)


def _in_slurm_step() -> bool:
    """Return whether srun started this process as one of several tasks.

    A batch script has ``SLURM_PROCID`` and the job's ``SLURM_NTASKS`` as well, but no step, so it is no rank.
    """
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ and _slurm_tasks() > 1


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))


def world_size() -> int:
    """Return how many ranks were started."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if (ranks := ranks_of_agent()) is not None:
        return ranks * _slurm_tasks()
    return _slurm_tasks() if _in_slurm_step() else 1


def global_rank() -> int:
    """Return the number of this process among all ranks."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if _in_slurm_step() else 0


def local_rank() -> int:
    """Return the number of this process among the ranks of its host."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    return int(os.environ.get("SLURM_LOCALID", "0")) if _in_slurm_step() else 0


def set_torch_variables() -> None:
    """Inside a SLURM step, set those of torchrun's variables that are missing: rank, sizes, and the address of rank 0.

    ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set.

    Raises:
        UserError: the step's first node has no address that this node can find.
    """
    if "RANK" in os.environ or not _in_slurm_step():
        return
    found = {
        "RANK": str(global_rank()),
        "WORLD_SIZE": str(world_size()),
        "LOCAL_RANK": str(local_rank()),
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node()),
        "MASTER_PORT": str(step_port()),
    }
    if "MASTER_ADDR" not in os.environ:
        found["MASTER_ADDR"] = _address_of_first_node()
    for name, value in found.items():
        os.environ.setdefault(name, value)


def step_port() -> int:
    """Return a port derived from the SLURM job and step, so that all ranks know it and two jobs on a node differ."""
    job, step = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_STEP_ID", "0")
    return _FIRST_PORT + (int(job) * 31 + int(step)) % _PORTS


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM host list: ``gpu[07-09,12],cpu1`` → ``gpu07``.

    >>> first_host("rack[2-3]n[001,005]")
    'rack2n001'
    """
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_per_node(text: str) -> list[int]:
    """Return numbers of tasks by node from SLURM's short form.

    >>> tasks_per_node("4(x2),1")
    [4, 4, 1]
    """
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def _tasks_on_this_node() -> int:
    counts = tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


def _address_of_first_node() -> str:
    """Return a name or address of the node that rank 0 runs on: the first of the step's nodes."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    host = first_host(nodes)
    try:
        socket.getaddrinfo(host, None)
        return host
    except (OSError, UnicodeError) as error:
        unknown = error
    try:  # the address by which SLURM itself reaches the node, where only SLURM knows the node's name
        asked = subprocess.run(
            ["scontrol", "show", "node", host], capture_output=True, text=True, timeout=20, check=True
        ).stdout
        return re.findall(r"\bNodeAddr=(\S+)", asked)[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UserError(
            f"MASTER_ADDR is not set, and the first node of SLURM_STEP_NODELIST={nodes}, {host!r}, has no address that "
            f"this node can find ({unknown}); set MASTER_ADDR to that node's address"
        ) from None
