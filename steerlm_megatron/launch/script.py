"""The script of a job: what a site and a job ask for, above the shell code of ``launch/slurm``.

Owns: finding ``launch/``, the lines for sbatch, modules, variables; one readable script without other files. Does not
own: the shell code itself, submitting (``slurm.py``). Invariant: the script alone says all that a job does, and
resubmitting it by hand does that again.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from steerlm_megatron.config.cluster import ClusterConfig
from steerlm_megatron.errors import UserError

_RULE = "# " + "-" * 126  # what is above it in a file of launch/slurm is for jobs by hand, and is replaced
_SOURCE = "source launch/slurm/job.sh\n"


@dataclass(frozen=True)
class Job:
    """One job, or an array of like ones.

    Args:
        name: of the job: of the step or command.
        arguments: the command line of steerlm, command first.
        cluster: what it asks for.
        launch_dir: absolute path of ``launch`` in the run folder: history, logs.
        launch_id: the name of this launch, which all attempts of its jobs share.
        code: folder that the job imports this package from.
        work_dir: folder that it runs in.
        command_line: what the user typed.
        array: ``records``: the tasks share the records of one command; ``sweep``: each has its own arguments, in a file
            of ``arguments_dir``; empty: no array.
        tasks: how many tasks the array has.
        serves: folder into which the job's server writes its address; None: it is no server.
        servers: folder of the servers that draw for this job, which end when it ends.
    """

    name: str
    arguments: tuple[str, ...]
    cluster: ClusterConfig
    launch_dir: Path
    launch_id: str
    code: Path
    work_dir: Path
    command_line: str
    python: str
    array: str = ""
    tasks: int = 1
    arguments_dir: Path | None = None
    serves: Path | None = None
    servers: Path | None = None
    preflight: tuple[str, ...] = field(default=())

    @property
    def is_array(self) -> bool:
        return bool(self.array) or self.tasks > 1

    @property
    def log(self) -> str:
        """Path of the job's log with SLURM's names for the job's id."""
        return str(self.launch_dir / ("slurm-%A_%a.out" if self.is_array else "slurm-%j.out"))


def launch_files() -> Path:
    """Return the folder of shell code: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "launch" / "scripts", package.parent / "launch"):
        if (candidate / "slurm" / "job.sh").exists():
            return candidate
    raise UserError(f"no launch/slurm/job.sh beside {package} or in it; the installation is incomplete")


def tasks_per_node(cluster: ClusterConfig) -> int:
    """Return how many ranks a node has."""
    return cluster.tasks_per_node or max(1, cluster.gpus_per_node)


def sbatch_lines(job: Job) -> list[str]:
    """Return the options of sbatch, one a line without ``#SBATCH``."""
    c = job.cluster
    lines = [f"--job-name=steerlm-{job.name}", f"--nodes={c.nodes}", f"--ntasks-per-node={tasks_per_node(c)}"]
    asked = {
        "cpus-per-task": c.cpus_per_task, "gpus-per-node": c.gpus_per_node or None, "partition": c.partition,
        "account": c.account, "qos": c.qos, "reservation": c.reservation, "time": c.time, "mem": c.memory,
    }  # fmt: skip
    lines += [f"--{name}={value}" for name, value in asked.items() if value is not None]
    lines += ["--exclusive"] if c.exclusive else []
    if job.is_array:
        lines.append(f"--array=0-{job.tasks - 1}")
    lines += [f"--chdir={job.work_dir}", f"--output={job.log}", "--open-mode=append"]
    if job.serves is None:
        lines.append(f"--signal=B:USR1@{c.signal_sec}")
        lines.append("--requeue" if c.requeue == "scontrol" else "--no-requeue")
    return [*lines, *c.sbatch_lines]


def variables(job: Job) -> dict[str, str]:
    """Return the environment variables that ranks get, by name."""
    c = job.cluster
    found = {"PYTHONPATH": str(job.code), "PYTHONUNBUFFERED": "1"}
    if c.network_interface is not None:
        found |= {"NCCL_SOCKET_IFNAME": c.network_interface, "GLOO_SOCKET_IFNAME": c.network_interface}
    return found | {f"NCCL_{name}": str(value) for name, value in c.nccl.items()} | c.environment


def settings(job: Job) -> list[str]:
    """Return the shell lines that set what ``job.sh`` reads."""
    c = job.cluster
    mounts = c.mounts or [str(job.work_dir), str(job.launch_dir.parent)]
    values = {
        "SCRIPT": str(script_path(job)), "LAUNCH_ID": job.launch_id, "LAUNCH_DIR": str(job.launch_dir),
        "PYTHON": job.python, "STARTER": c.starter, "TASKS_PER_NODE": str(tasks_per_node(c)), "BINDING": c.binding,
        "REQUEUE": c.requeue, "MAX_REQUEUES": str(c.max_requeues),
        "MAX_HOURS": "" if c.max_hours is None else f"{c.max_hours:g}",
        "RUN_PREFLIGHT": str(c.preflight and job.serves is None).lower(),
        "EXCLUDE_BAD_NODES": str(c.exclude_bad_nodes).lower(), "CONTAINER": c.container, "IMAGE": c.image or "",
        "ARRAY": job.array, "ARGUMENTS": str(job.arguments_dir or ""), "SERVED": str(job.serves or ""),
        "SERVERS_OF_THIS_JOB": str(job.servers or ""),
    }  # fmt: skip
    arrays = {"SRUN_ARGUMENTS": c.srun_arguments, "MOUNTS": mounts, "PREFLIGHT": job.preflight, "by_hand": ()}
    return [
        *(f"{name}={shlex.quote(value)}" for name, value in values.items()),
        *(f"{name}=({shlex.join(items)})" for name, items in arrays.items()),
    ]


def script_path(job: Job) -> Path:
    """Return where the job's script is kept."""
    return job.launch_dir / job.launch_id / f"{job.name}.sbatch"


def render(job: Job) -> str:
    """Return the whole script."""
    folder = launch_files() / "slurm"
    template = (folder / ("serve.sbatch" if job.serves is not None else "train.sbatch")).read_text(encoding="utf-8")
    below = template.partition(f"{_RULE}\n")[2]
    assert _SOURCE in below, "the template reads job.sh below its rule"
    below = below.replace(_SOURCE, (folder / "job.sh").read_text(encoding="utf-8"))
    lines = [shlex.quote(argument) for argument in job.arguments]
    below = below.replace('steerlm_job "$@"', " \\\n  ".join(["steerlm_job", *lines]))
    c = job.cluster
    head = [
        "#!/bin/bash",
        f"# {job.command_line}",
        "# Written by that command, and complete: sbatch takes it again as it is.",
        *(f"#SBATCH {line}" for line in sbatch_lines(job)),
        *(f"module load {shlex.quote(module)}" for module in c.modules),
        *c.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in variables(job).items()),
        *settings(job),
    ]
    return "\n".join(head) + f"\n{_RULE}\n{below}"
