"""Sections about jobs on a cluster: what ``steerlm launch`` asks for, and the part of an array that one job does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerlm_megatron.config.fields import above, at_least, one_of, option


@dataclass
class ClusterConfig:
    """How jobs run on a cluster. A site's values are a file: conf/cluster/NAME.yaml, or yours (cluster=/path.yaml)."""

    nodes: int = option(1, at_least(1), "nodes of a job")
    gpus_per_node: int = option(8, at_least(0), "GPUs that are asked for on each node; 0: none, ranks compute on CPUs")
    tasks_per_node: int | None = option(None, at_least(1), "ranks on each node; null: one per GPU, or one")
    cpus_per_task: int | None = option(None, at_least(1), "CPUs of a rank; null: the site's default")
    partition: str | None = option(None, "partition, or several with commas; null: the site's default")
    account: str | None = option(None, "account that is charged")
    qos: str | None = option(None, "quality of service")
    reservation: str | None = option(None, "reservation of nodes")
    time: str | None = option(None, "longest time of one job, such as 24:00:00 or 7-00:00:00; null: the partition's")
    memory: str | None = option(None, "host memory of a node, such as 900G; 0: all of it; null: the site's default")
    exclusive: bool = option(False, "no other job runs on the nodes")
    sbatch_lines: list[str] = option([], "more options of sbatch, such as --constraint=hbm80")
    srun_arguments: list[str] = option([], "more options of every srun, such as --mpi=none")
    starter: str = option(
        "srun", one_of("srun", "torchrun"), "srun starts every rank; or one agent of torchrun a node, which starts its"
    )
    binding: str = option("none", one_of("none", "cores", "numa"), "what SLURM binds each rank to, with its memory")
    modules: list[str] = option([], "modules that a job loads")
    setup: list[str] = option([], "shell lines that a job runs before anything else")
    environment: dict[str, str] = option({}, "environment variables of all ranks")
    network_interface: str | None = option(None, "interface by which ranks find each other (NCCL, gloo), such as ib0")
    nccl: dict[str, str] = option({}, "settings of NCCL and the fabric without their prefix, such as IB_HCA: mlx5")
    python: str | None = option(None, "interpreter on the nodes or in the container; null: that of steerlm launch")
    container: str = option("none", one_of("none", "pyxis", "apptainer"), "what a job's ranks run in")
    image: str | None = option(None, "container image: a file, or for pyxis a name such as docker://…")
    mounts: list[str] = option([], "folders that the container sees, as SOURCE:TARGET or one path for both")
    signal_sec: int = option(300, at_least(60), "seconds before the end of a job's time at which it saves and stops")
    requeue: str = option(
        "scontrol",
        one_of("scontrol", "dependent", "off"),
        "how a stopped job comes back: scontrol requeue, or a new job where the site forbids that; off: not at all",
    )
    max_requeues: int = option(10, at_least(0), "how often one job comes back")
    max_hours: float | None = option(None, above(0), "hours that a job may run in all its attempts together")
    preflight: bool = option(False, "the nodes are checked before the work: devices, versions, network, file system")
    exclude_bad_nodes: bool = option(False, "preflight: the job comes back without a node that fails the check")
    min_bandwidth_gbs: float = option(0.0, at_least(0), "preflight: GB/s between two nodes; less is a fault")
    min_free_gb: float = option(10.0, at_least(0), "preflight: GB that have to be free in the run folder")
    array: int = option(1, at_least(1), "annotate, generate and bootstrap: jobs that share the records")
    servers: int = option(0, at_least(0), "launch run: servers, each a job, that bootstrap draws from; 0: none")
    steps: dict[str, Any] = option({}, "launch run: step name to values of this section for that step alone")


@dataclass
class ArrayConfig:
    """The part of the records that this process does, where several jobs share them. steerlm launch sets it."""

    task: int | None = option(None, at_least(0), "number of this job; null: it does what is left, and writes output")
    tasks: int = option(1, at_least(1), "how many jobs share the records")
