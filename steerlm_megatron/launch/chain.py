"""The steps of ``steerlm run`` as a chain of jobs: each with its own size, each after those whose results it reads.

Owns: which job does what, and its size. Does not own: the steps (``stages/pipeline_steps.py``), submitting
(``submit.py``). Invariant: every step's configuration is checked for the ranks of its job before any job exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerlm_megatron.config import compose
from steerlm_megatron.config.cluster import ClusterConfig
from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.fields import broken_rules, keys_of
from steerlm_megatron.config.help import shown
from steerlm_megatron.config.load import value_at
from steerlm_megatron.config.schema import KEYS, Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.launch.script import tasks_per_node
from steerlm_megatron.launch.submit import Place, Planned, cluster_problems
from steerlm_megatron.observe.runfolder import RunFolder
from steerlm_megatron.runtime.parallel import Layout
from steerlm_megatron.stages.pipeline_run import Run, Step, refuse_unknown
from steerlm_megatron.stages.pipeline_steps import steps_of
from steerlm_megatron.stages.session import Session

_SERVERS = "servers"  # the kind, in cluster.steps as well, of the jobs of bootstrap's servers
_SPLIT = ("annotate", "bootstrap", "weigh")  # commands whose records an array can share


def cluster_of(config: Config, name: str) -> ClusterConfig:
    """Return what the job of a step asks for: ``cluster.*`` for training; one node for scoring and drawing; one process
    without a GPU for the rest. The values of ``cluster.steps`` come on top, for a step of a later round those of the
    first round before those of the step.

    Raises:
        UserError: a value is of a wrong type or breaks a rule.
    """
    base, step = config.cluster, steps_of(config).get(name)
    if step is not None and not COMMANDS[step.command].ranks:
        base = replace(base, nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=None, exclusive=False)
    elif step is None or not COMMANDS[step.command].trains:
        base = replace(base, nodes=1)
    if step is None or step.command not in _SPLIT:
        base = replace(base, array=1)
    found: Any = replace(base, steps={})
    keys = tuple(keys_of(ClusterConfig))
    for given in dict.fromkeys((*((_SERVERS,) if step is None else step.overridden_by), name)):
        more: Mapping[str, Any] = config.cluster.steps.get(given) or {}
        try:
            found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(found), dict(more)))
        except OmegaConfBaseException as error:
            raise UserError(f"cluster.steps.{given}: {str(error).splitlines()[0]}") from None
        if problems := broken_rules(keys, partial(getattr, found)):
            raise UserError("\n".join(f"cluster.steps.{given}.{problem}" for problem in problems))
    assert isinstance(found, ClusterConfig)
    return found


def chain(here: Place, config: Config, overrides: tuple[str, ...]) -> list[Planned]:
    """Return the jobs of all steps in an order in which each comes after those that it waits for.

    Raises:
        UserError: with a line for each problem of any step.
    """
    steps = steps_of(config)
    known = [name for step in steps.values() for name in step.overridden_by]
    known += [name for step in steps.values() if step.command == "bootstrap" for name in (_SERVERS, _servers_of(step))]
    known = list(dict.fromkeys(known))
    refuse_unknown("cluster.steps", config.cluster.steps, known)
    names = [name for name in steps if name != "base" or config.init_from is None]
    if config.steps:
        names = [name for name in names if name in config.steps]
    problems: list[str] = []
    planned: list[Planned] = []
    for name in names:
        try:
            planned += _jobs(here, config, overrides, name, names)
        except UserError as error:
            problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return planned


def _servers_of(step: Step) -> str:
    """Return the name of the jobs of a bootstrap's servers: ``servers``, in later rounds ``servers_2`` and so on; of
    another kind of step that draws, ``servers_`` and the step's name.
    """
    return step.name.replace(step.kind, _SERVERS, 1) if step.kind == "bootstrap" else f"{_SERVERS}_{step.name}"


def _jobs(here: Place, config: Config, overrides: tuple[str, ...], name: str, names: list[str]) -> list[Planned]:
    """Return the jobs of one step: one; an array and what puts its parts together; servers before them."""
    step, cluster = steps_of(config)[name], cluster_of(config, name)
    world = cluster.nodes * tasks_per_node(cluster)
    at = Layout(rank=0, world_size=world, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=world)
    folder = RunFolder(here.run_dir, "run", rank=1)  # only rank 0 writes
    run = Run(replace(config, steps=[name]), Session(config, at, folder), steps_of(config))
    checked = step.config(run)
    if problems := cluster_problems(step.command, replace(config, cluster=replace(cluster, steps={}, servers=0))):
        raise UserError("\n".join(f"cluster.steps.{name}: {problem}" for problem in problems))
    sized = replace(config, cluster=cluster)
    after = tuple(one for one in step.after if one in names)
    own = tuple(o for o in overrides if o.partition("=")[0].lstrip("+") != "steps")
    arguments = ("run", *own, f"run_dir={here.run_dir}", f"steps=[{name}]")
    where, planned = run.folder(name), []
    begins: tuple[str, ...] = ()
    served = here.folder / _servers_of(step) if step.command == "bootstrap" and cluster.servers else None
    if served is not None:
        servers = _servers(here, config, checked, served, cluster.servers)
        waits = tuple(one for one in after if str(run.folder(one)) == checked.checkpoint)  # for what they serve
        planned.append(Planned(servers, here.run_dir, waits, kind="server"))
        begins = (servers.name,)
        arguments = (*arguments, f"server.folder={served}", f"server.count={cluster.servers}")
    last = here.job(name, sized, arguments, servers=served)
    if cluster.array > 1:
        tasks = (*arguments, f"array.tasks={cluster.array}")
        parts = here.job(f"{name}-array", sized, tasks, array="records", tasks=cluster.array)
        planned.append(Planned(parts, where, after, begins, kind="records"))
        after, begins = (*after, parts.name), ()
    return [*planned, Planned(last, where, after, begins)]


def _servers(here: Place, config: Config, bootstrap: Config, served: Path, count: int) -> Any:
    """Return the array of servers of what ``bootstrap`` draws from: each one replica of the layout that it would have.
    Their addresses are in ``served``.
    """
    cluster = cluster_of(config, served.name)
    ranks, most = bootstrap.parallel.tensor * bootstrap.parallel.pipeline, tasks_per_node(cluster)
    per_node = min(ranks, most)
    if ranks % per_node:
        raise UserError(
            f"cluster.servers={count}: a server of parallel.tensor x parallel.pipeline = {ranks} ranks does not fill "
            f"nodes of {most} ranks; choose a divisor or a multiple"
        )
    cluster = replace(
        cluster, nodes=ranks // per_node, tasks_per_node=per_node, gpus_per_node=min(per_node, cluster.gpus_per_node)
    )
    usual = compose.composed("serve", [])
    differing = []
    sections = ("sampling", "generation", "parallel", "engine")
    for key in KEYS:
        read = COMMANDS["serve"].reads_key(key) and key.split(".")[0] in sections
        value = value_at(bootstrap, key) if read else None
        if read and key != "parallel.data" and value != _at(usual, key):
            differing.append(f"{key}={shown(value)}")
    arguments = ("serve", f"checkpoint={bootstrap.checkpoint}", f"server.folder={served}", *differing)
    return here.job(served.name, replace(config, cluster=cluster), arguments, serves=served, tasks=count)


def _at(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found
