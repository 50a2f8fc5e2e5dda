"""A real SLURM on this machine: munged, slurmctld and several slurmd as plain processes, each node with a port and an
address of 127.0.1.x.

Owns: starting and ending these processes. Does not own: what is submitted. Nothing outside ``folder`` is written, and
no cgroup, container or namespace is used, so that it runs wherever Debian's packages slurmctld, slurmd, slurm-client
and munge are. The nodes share the host's name and processes; node names are known to SLURM alone.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONF = """ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for cred_expire seconds before it starts again: 120 by default, as for values below 5.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue={requeue}
KillWait=20
SlurmdTimeout=10
SlurmctldTimeout=15
MessageTimeout=10
MinJobAge=600
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Return the programs that this machine lacks for a SLURM."""
    return [name for name in NEEDED if shutil.which(name, path=_PATH) is None]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    listening = [socket.socket() for _ in range(count)]
    try:
        for one in listening:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in listening]
    finally:
        for one in listening:
            one.close()


class Slurm:
    """A running SLURM. ``environment`` is what its commands need; ``close`` ends all that was started.

    Args:
        folder: a new folder in a folder of this process alone; the path is short, since that of a Unix socket has at
            most 108 bytes.
        nodes: how many nodes there are, with 8 CPUs each (which they need not have).
        requeue: whether jobs may be requeued; false: ``scontrol requeue`` is refused for jobs that do not ask for it.
    """

    def __init__(self, folder: Path, nodes: int = 2, requeue: bool = True) -> None:
        self.folder, self.nodes = folder, [f"node{number + 1}" for number in range(nodes)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool", "key"):
            (folder / name).mkdir(parents=True)
        for shown in (folder, folder.parent):  # munged wants its socket to be reachable for all users
            shown.chmod(0o755)
        (folder / "key").chmod(0o700)
        key = folder / "key" / "munge.key"
        key.touch(0o400)
        key.write_bytes(os.urandom(128))
        port, *ports = free_ports(1 + nodes)
        host = os.uname().nodename.split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.1.{number + 1} Port={ports[number]} CPUs=8 Sockets=1 "
            "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=16000 State=UNKNOWN"
            for number, name in enumerate(self.nodes)
        ]
        text = _CONF.format(
            host=host, user=getpass.getuser(), folder=folder, port=port, nodes="\n".join(lines), requeue=int(requeue)
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").touch()

    def start(self, timeout: float = 60.0) -> Slurm:
        """Start all daemons, and return when every node is idle."""
        sock = self.folder / "munge.sock"
        self._start(
            "munged", "munged", "-F", "-S", str(sock), f"--key-file={self.folder}/key/munge.key",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/key/seed", "--num-threads=4",
        )  # fmt: skip
        self.wait(sock.exists, timeout, "munged does not listen")
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for name in self.nodes:
            self.start_node(name)
        self.wait(lambda: self.idle() == self.nodes, timeout, "the nodes are not idle")
        return self

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start(name, "slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"))

    def kill_node(self, name: str) -> None:
        """Kill the slurmd of a node by SIGKILL. What it started goes on."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def _start(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path=_PATH)
        assert program is not None, command[0]
        with open(self.folder / f"{name}.out", "ab") as out:
            self.processes[name] = subprocess.Popen(
                [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env={"PATH": _PATH, "HOME": os.environ.get("HOME", "/"), "SLURM_CONF": str(self.folder / "slurm.conf")},
            )  # fmt: skip

    def run(self, *command: str, check: bool = True, timeout: float = 60.0) -> str:
        """Run one of SLURM's commands and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def idle(self) -> list[str]:
        """Return the nodes that are idle."""
        said = self.run("sinfo", "-h", "-N", "-p", "debug", "-t", "idle", "-o", "%N", check=False)
        return sorted(said.split())

    def state(self, job: str) -> str:
        """Return the state of a job, such as ``RUNNING``; one line per task of an array."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False)

    def wait_for(self, job: str, *states: str, timeout: float = 120.0) -> str:
        """Wait until the job is in one of ``states``, and return which."""
        self.wait(lambda: self.state(job) in states, timeout, f"job {job} is not {' or '.join(states)}")
        return self.state(job)

    def wait(self, true: Callable[[], bool], timeout: float, otherwise: str) -> None:
        """Wait until ``true()``; fail with ``otherwise`` and SLURM's queue after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < end, f"{otherwise}\n{self.run('squeue', '-l', '-t', 'all', check=False)}"
            time.sleep(0.1)

    def close(self) -> None:
        """End all jobs and daemons."""
        if "slurmctld" in self.processes and self.processes["slurmctld"].poll() is None:
            # Down partitions keep requeued jobs from starting again.
            self.run("scontrol", "update", "PartitionName=debug,high", "State=DOWN", check=False)
            self.run("scancel", "--full", "-s", "KILL", "-t", "RUNNING", check=False)
            self.run("scancel", "-u", getpass.getuser(), check=False)
            end = time.monotonic() + 10
            while self.run("squeue", "-h", check=False) and time.monotonic() < end:
                time.sleep(0.1)
        for name in ("slurmctld", *self.nodes, "munged"):
            if name in self.processes:
                process = self.processes.pop(name)
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
