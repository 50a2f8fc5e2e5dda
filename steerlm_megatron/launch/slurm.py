"""SLURM's commands: submitting, asking, cancelling.

Owns: the calls of sbatch, squeue, scancel and sinfo, and what their errors mean to users. Does not own: scripts
(``script.py``). Invariant: a command that is missing or refuses is a :class:`UserError` of one line.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from steerlm_megatron.config.cluster import ClusterConfig
from steerlm_megatron.errors import UserError

_TIMEOUT_SEC = 60
_QUEUE_FORMAT = "%i|%T|%r|%M|%l|%N|%j"


@dataclass(frozen=True)
class Queued:
    """A job as SLURM knows it. ``elapsed`` and ``limit`` are times as SLURM writes them (``1-02:03:04``)."""

    job: str
    state: str
    reason: str
    elapsed: str
    limit: str
    nodes: str
    name: str


def require(command: str) -> None:
    """Raise UserError unless the command is on PATH."""
    if shutil.which(command) is None:
        raise UserError(
            f"{command} is not found: launch from a login node of the cluster; --dry-run prints the script, and "
            "bash launch/local.sh runs a command as a job on this machine"
        )


def call(*command: str) -> str:
    """Run one of SLURM's commands and return what it prints.

    Raises:
        UserError: the command is missing, refuses, or does not answer.
    """
    require(command[0])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SEC, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer within {_TIMEOUT_SEC} s: is SLURM's controller up?") from None
    if done.returncode != 0:
        raise UserError(f"{command[0]}: {said(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def said(stderr: str) -> str:
    """Return SLURM's error messages as one line without their prefixes."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in stderr.splitlines() if line.strip()]
    lines = [line.removeprefix("Batch job submission failed: ") for line in lines]
    return "; ".join(dict.fromkeys(lines))


def submit(script: Path, cluster: ClusterConfig, options: Sequence[str] = ()) -> str:
    """Submit a script with more ``options`` of sbatch, and return the job's id.

    Raises:
        UserError: sbatch refuses it; the message names the keys that its words are about.
    """
    try:
        return call("sbatch", "--parsable", *options, str(script)).split(";")[0]
    except UserError as error:
        raise UserError(explained(str(error), cluster)) from None


# What sbatch says, and the keys that it is about.
_ABOUT = {
    "partition": ("partition",), "account": ("account", "partition", "qos"), "qos": ("qos",),
    "reservation": ("reservation",), "node configuration": ("nodes", "gpus_per_node", "tasks_per_node", "memory"),
    "node count": ("nodes",), "gres": ("gpus_per_node",), "time limit": ("time", "partition"), "memory": ("memory",),
    "time specification": ("time",),
}  # fmt: skip


def explained(message: str, cluster: ClusterConfig) -> str:
    """Return sbatch's refusal with the keys that it is about, and the partitions that there are if it is about one."""
    keys = dict.fromkeys(key for words, keys in _ABOUT.items() if words in message.lower() for key in keys)
    values = " ".join(f"cluster.{key}={getattr(cluster, key)}" for key in keys if getattr(cluster, key) is not None)
    there = ""
    if "partition" in keys:
        try:
            found = [line.rstrip("*") for line in call("sinfo", "--noheader", "--format=%P").split()]
            there = f"; partitions here: {' '.join(found)}"
        except UserError:
            there = ""  # the first refusal says enough
    return f"{message}{f' ({values})' if values else ''}{there}"


def queue(jobs: Iterable[str]) -> list[Queued]:
    """Return what SLURM still knows of ``jobs``, one entry per task of an array. It forgets jobs some minutes after
    their end.
    """
    wanted = set(jobs)
    if not wanted:
        return []
    lines = call("squeue", "--noheader", "--me", "--states=all", "--array", f"--format={_QUEUE_FORMAT}").splitlines()
    found = [Queued(*line.split("|")) for line in lines if line.count("|") == _QUEUE_FORMAT.count("|")]
    return [one for one in found if one.job in wanted or one.job.split("_")[0] in wanted]


ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
)  # fmt: skip


def alive(jobs: Iterable[str]) -> list[Queued]:
    """Return those of ``jobs`` that run or wait."""
    return [one for one in queue(jobs) if one.state not in ENDED]


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs. The ranks of running ones save first, within SLURM's KillWait."""
    call("scancel", *jobs)
