"""``steerlm launch``: a command, all jobs of a sweep, or the steps of ``run``, as SLURM jobs.

Owns: the checks before any job exists, the snapshot of configuration and code, the order of submitting. Does not own:
scripts (``script.py``), the chain of steps (``chain.py``), SLURM (``slurm.py``). Invariants: nothing is written and
nothing submitted before all checks passed; torch is imported only for the checks that need a model's shape or the
pipeline's steps.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from steerlm_megatron import __version__
from steerlm_megatron.config import compose, load
from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.help import launch_help
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_text_atomic
from steerlm_megatron.launch import record, slurm
from steerlm_megatron.launch.script import Job, render, script_path, tasks_per_node
from steerlm_megatron.observe.runfolder import default_run_dir, hub_source, read_summary
from steerlm_megatron.plan.memory import check_before_launch
from steerlm_megatron.stages import hub

_SHARED = ("annotate", "generate", "bootstrap", "weigh")  # their records can be split over an array
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


@dataclass(frozen=True)
class Planned:
    """A job, the names of the jobs before it, and where it works. ``begins_with`` may run already when it starts."""

    job: Job
    run_dir: Path
    after: tuple[str, ...] = ()
    begins_with: tuple[str, ...] = ()
    kind: str = "job"


def launch(arguments: list[str]) -> None:
    """Check, snapshot, render and submit what ``arguments`` ask for: a command and its overrides, ``--dry-run``.

    Raises:
        UserError: with a line for each problem, before any job exists.
    """
    if not arguments or arguments[0] in ("-h", "--help") or "--help" in arguments or "-h" in arguments:
        print(launch_help(compose.options))
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"launch {command}: no such command{compose.nearest(command, COMMANDS)}")
    dry = "--dry-run" in rest
    rest = compose.absolute_files([one for one in rest if one != "--dry-run"])
    compose.check(command, rest, launched=True)
    jobs = compose.sweep(rest)
    configs = [load.from_container(compose.composed(command, overrides)) for overrides in jobs]
    for config, overrides in zip(configs, jobs, strict=True):
        _check(command, config, overrides)
    if not dry:
        slurm.require("sbatch")
    config, overrides = configs[0], jobs[0]
    run_dir = _run_dir(command, config, dry)
    _refuse_used(run_dir, config.overwrite, dry)
    here = Place.of(run_dir, shlex.join(["steerlm", "launch", *arguments]), config)
    if len(jobs) > 1:
        planned = _sweep(here, command, config, jobs)
    elif command == "run":
        from steerlm_megatron.launch.chain import chain

        planned = chain(here, config, own(overrides))
    else:
        planned = _one(here, command, config, own(overrides))
    if dry:
        print("\n".join(render(one.job) for one in planned), end="")
        return
    here.snapshot(config)
    hub.record(run_dir)  # jobs take the commits of this host
    for number, one in enumerate(jobs if len(jobs) > 1 else []):
        hub.record(run_dir / str(number))
        lines = [*own(one), f"run_dir={run_dir / str(number)}"]
        write_text_atomic(here.folder / "arguments" / str(number), "".join(f"{line}\n" for line in lines))
    submit(here, planned)


def own(overrides: list[str]) -> tuple[str, ...]:
    """Return the overrides that the job's command gets: those that are not about the cluster, nor its folder."""
    return tuple(o for o in overrides if not compose.is_of_cluster(o) and o.partition("=")[0] != "run_dir")


@dataclass(frozen=True)
class Place:
    """Where a launch puts what, and what all its jobs have in common."""

    run_dir: Path
    launch_id: str
    command_line: str
    work_dir: Path
    python: str

    @staticmethod
    def of(run_dir: Path, command_line: str, config: Config) -> Place:
        launch_id = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
        return Place(run_dir, launch_id, command_line, Path.cwd(), config.cluster.python or sys.executable)

    @property
    def launch_dir(self) -> Path:
        return self.run_dir / record.FOLDER

    @property
    def folder(self) -> Path:
        """The folder of this launch: scripts, code, configuration."""
        return self.launch_dir / self.launch_id

    def job(self, name: str, config: Config, arguments: tuple[str, ...], **more: object) -> Job:
        """Return a job of this launch. ``config.cluster`` is what it asks for."""
        c = config.cluster
        preflight = (
            str(self.run_dir), str(c.gpus_per_node), f"{c.min_bandwidth_gbs:g}", f"{c.min_free_gb:g}",
            *(str(p) for p in _read_before(config)),
        ) if c.preflight else ()  # fmt: skip
        return Job(
            name=name, arguments=arguments, cluster=c, launch_dir=self.launch_dir, launch_id=self.launch_id,
            code=self.folder / "code", work_dir=self.work_dir, command_line=self.command_line, python=self.python,
            preflight=preflight, **more,  # type: ignore[arg-type]
        )  # fmt: skip

    def snapshot(self, config: Config) -> None:
        """Copy the code and the composed configuration into the folder of this launch, so that what is edited later
        changes no attempt of its jobs.
        """
        package = Path(__file__).resolve().parents[1]
        for name in (package.name, "data_tools", "conf", "launch"):
            source = package.parent / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(source, self.folder / "code" / name, ignore=ignore)
        write_text_atomic(self.folder / "config.yaml", load.to_yaml(config))
        write_text_atomic(self.folder / "command.txt", f"{self.command_line}\n# steerlm_megatron {__version__}\n")


def _read_before(config: Config) -> list[str]:
    """Return the files and folders that a command reads at its start, for the check of the nodes."""
    values = (config.init_from, config.checkpoint, config.ap_checkpoint, config.tokenizer.path)
    # A node may have a cache of the hub of its own, which it fills.
    return [value for value in values if value is not None and hub_source(value) is None]


def _check(command: str, config: Config, overrides: list[str]) -> None:
    """Check everything about one job that can be checked without a GPU.

    Raises:
        UserError: with a line for each problem.
    """
    problems = cluster_problems(command, config)
    world = config.cluster.nodes * tasks_per_node(config.cluster)
    try:
        hub.resolve(config)  # on this host, whose cache nodes without a network may share
        if config.init_from is not None:
            if not Path(config.init_from).exists():
                raise UserError(f"init_from={config.init_from}: no such folder")
            from steerlm_megatron.stages.base import adopt_shape

            adopt_shape(config, overrides)
        # A step of run has ranks of its own (chain.py).
        load.finalize(config, world if COMMANDS[command].ranks and command != "run" else None, alone=True)
        if config.cluster.gpus_per_node:  # ranks on CPUs have as much memory as their nodes, which nobody knows here
            check_before_launch(config, world)
    except UserError as error:
        problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def cluster_problems(command: str, config: Config) -> list[str]:
    """Return what is wrong with ``cluster.*`` for a command."""
    c, problems = config.cluster, []
    if c.container != "none" and c.image is None:
        problems.append(f"cluster.container={c.container} needs cluster.image: name the image")
    if c.container == "none" and c.image is not None:
        problems.append(f"cluster.image={c.image} is of a container; set cluster.container=pyxis or apptainer")
    if c.time is not None and not _TIME.fullmatch(c.time):
        problems.append(f"cluster.time={c.time} is no time of SLURM; write 24:00:00 or 7-00:00:00")
    if c.array > 1 and command not in (*_SHARED, "run"):
        problems.append(
            f"cluster.array={c.array}: {command} does not split over an array; {', '.join(_SHARED)} and run do"
        )
    if c.servers and command != "run":
        problems.append(f"cluster.servers={c.servers} is of launch run; start servers with launch serve")
    if c.steps and command != "run":
        problems.append("cluster.steps is of launch run; set the keys of cluster by themselves")
    if c.exclude_bad_nodes and not c.preflight:
        problems.append("cluster.exclude_bad_nodes=true needs cluster.preflight=true, which finds them")
    return problems


def _run_dir(command: str, config: Config, dry: bool) -> Path:
    if config.run_dir is not None:
        return Path(config.run_dir).absolute()
    if dry:
        return Path("runs", command, "TIME").absolute()
    return default_run_dir(command).absolute()


def _refuse_used(run_dir: Path, overwrite: bool, dry: bool) -> None:
    """Refuse a run folder whose run is complete, or whose jobs run or wait."""
    summary = read_summary(run_dir) or {}
    if summary.get("status") == "complete" and summary.get("command") != "run" and not overwrite:
        raise UserError(
            f"run_dir={run_dir} holds a complete run of '{summary.get('command', '?')}'; choose another run_dir, or "
            "set overwrite=true to replace it"
        )
    if not dry and record.has_jobs(run_dir):
        there = slurm.alive(job.job for job in record.submitted(run_dir))
        if there:
            jobs = ", ".join(f"{one.job} ({one.state.lower()})" for one in there[:4])
            raise UserError(f"run_dir={run_dir} has jobs: {jobs}; wait for them, or steerlm cancel {run_dir}")


def _one(here: Place, command: str, config: Config, overrides: tuple[str, ...]) -> list[Planned]:
    """Return the job of a command; where jobs share its records, an array, and the job that joins the parts."""
    arguments = (command, *overrides, f"run_dir={here.run_dir}")
    tasks = config.cluster.array
    if tasks == 1:
        return [Planned(here.job(command, config, arguments), here.run_dir)]
    parts = here.job(f"{command}-array", config, (*arguments, f"array.tasks={tasks}"), array="records", tasks=tasks)
    return [
        Planned(parts, here.run_dir, kind="records"),
        Planned(here.job(command, config, arguments), here.run_dir, after=(parts.name,)),
    ]


def _sweep(here: Place, command: str, config: Config, jobs: list[list[str]]) -> list[Planned]:
    """Return one array for all jobs of a ``--multirun``, each in a folder of its own."""
    if command == "run" or config.cluster.array > 1:
        raise UserError("--multirun makes an array by itself: give it one of the commands, without cluster.array")
    folder = here.folder / "arguments"
    job = here.job(command, config, (command,), array="sweep", tasks=len(jobs), arguments_dir=folder)
    return [Planned(job, here.run_dir, kind="sweep")]


def submit(here: Place, planned: list[Planned]) -> None:
    """Write the scripts, submit them in order, and say what follows. If one is refused, those before it are ended."""
    ids: dict[str, str] = {}
    try:
        for one in planned:
            job = one.job
            write_text_atomic(script_path(job), render(job))
            waits = [f"afterok:{ids[name]}" for name in one.after] + [f"after:{ids[name]}" for name in one.begins_with]
            options = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
            ids[job.name] = slurm.submit(script_path(job), job.cluster, options)
            c = job.cluster
            entry = record.Submitted(
                ids[job.name], job.name, job.launch_id, str(one.run_dir), job.log, f"{c.nodes}x{tasks_per_node(c)}",
                tuple(ids[name] for name in one.after), one.kind, job.tasks,
            )  # fmt: skip
            record.note(here.launch_dir, entry)
    except UserError:
        if ids:
            slurm.cancel(ids.values())
        raise
    for one in planned:
        if one.job.servers is not None:  # the servers end when none of their jobs is left
            clients = [ids[one.job.name], *(ids[name] for name in one.after if name.startswith(f"{one.job.name}-"))]
            write_text_atomic(one.job.servers / "clients", "".join(f"{job}\n" for job in clients))
    for one in planned:
        c, number = one.job.cluster, ids[one.job.name]
        after = f", after {' '.join(ids[name] for name in one.after)}" if one.after else ""
        many = f" x {one.job.tasks} tasks" if one.job.is_array else ""
        ranks = tasks_per_node(c)
        size = f"{c.nodes} node{'s' if c.nodes > 1 else ''} x {ranks} rank{'s' if ranks > 1 else ''}"
        print(f"job {number}: {one.job.name} on {size}{many}{after}")
    shown = shlex.quote(os.path.relpath(here.run_dir))
    first = planned[0].job
    log = first.log.replace("%j", ids[first.name]).replace("%A", ids[first.name]).replace("%a", "0")
    print(f"log:    {os.path.relpath(log)}")
    print(f"follow: steerlm status {shown} --watch    or: steerlm logs {shown}")
    print(f"cancel: steerlm cancel {shown}")
