"""The steps of ``steerlm run`` as a chain of jobs: each with its own size, each after those whose results it reads.

Owns: which job does what, and its size. Does not own: the steps (``stages/pipeline_steps.py``), submitting
(``submit.py``). Invariant: every step's configuration is checked for the ranks of its job before any job exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from steerlm_megatron.stages.pipeline_steps import STEPS, Run
from steerlm_megatron.stages.session import Session

_SERVERS = "servers"  # the name, in cluster.steps as well, of the jobs of bootstrap's servers
_SPLIT = ("annotate", "bootstrap")  # steps whose records an array can share


def cluster_of(config: Config, name: str) -> ClusterConfig:
    """Return what the job of a step asks for: ``cluster.*`` for training; one node for scoring and drawing; one process
    without a GPU for the rest; each with the step's values of ``cluster.steps`` on top.

    Raises:
        UserError: a value is of a wrong type or breaks a rule.
    """
    base = config.cluster
    if name != _SERVERS and not COMMANDS[STEPS[name].command].ranks:
        base = replace(base, nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=None, exclusive=False)
    elif name == _SERVERS or not COMMANDS[STEPS[name].command].trains:
        base = replace(base, nodes=1)
    if name not in _SPLIT:
        base = replace(base, array=1)
    more: Mapping[str, Any] = config.cluster.steps.get(name) or {}
    try:
        found: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(replace(base, steps={})), dict(more)))
    except OmegaConfBaseException as error:
        raise UserError(f"cluster.steps.{name}: {str(error).splitlines()[0]}") from None
    keys = tuple(keys_of(ClusterConfig))
    if problems := broken_rules(keys, lambda key: getattr(found, key)):
        raise UserError("\n".join(f"cluster.steps.{name}.{problem}" for problem in problems))
    assert isinstance(found, ClusterConfig)
    return found


def chain(here: Place, config: Config, overrides: tuple[str, ...]) -> list[Planned]:
    """Return the jobs of all steps in an order in which each comes after those that it waits for.

    Raises:
        UserError: with a line for each problem of any step.
    """
    known = [*STEPS, _SERVERS]
    if unknown := sorted(set(config.cluster.steps) - set(known)):
        raise UserError(f"cluster.steps: {' '.join(unknown)} unknown; legal: {' '.join(known)}")
    names = [name for name in STEPS if name != "base" or config.init_from is None]
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


def _jobs(here: Place, config: Config, overrides: tuple[str, ...], name: str, names: list[str]) -> list[Planned]:
    """Return the jobs of one step: one; an array and what puts its parts together; servers before them."""
    step, cluster = STEPS[name], cluster_of(config, name)
    world = cluster.nodes * tasks_per_node(cluster)
    at = Layout(rank=0, world_size=world, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=world)
    folder = RunFolder(here.run_dir, "run", rank=1)  # only rank 0 writes
    run = Run(replace(config, steps=[name]), Session(config, at, folder))
    checked = step.config(run)
    if problems := cluster_problems(step.command, replace(config, cluster=replace(cluster, steps={}, servers=0))):
        raise UserError("\n".join(f"cluster.steps.{name}: {problem}" for problem in problems))
    sized = replace(config, cluster=cluster)
    after = tuple(one for one in step.after if one in names)
    own = tuple(o for o in overrides if o.partition("=")[0].lstrip("+") != "steps")
    arguments = ("run", *own, f"run_dir={here.run_dir}", f"steps=[{name}]")
    where, planned = run.folder(name), []
    begins: tuple[str, ...] = ()
    served = here.folder / _SERVERS if name == "bootstrap" and cluster.servers else None
    if served is not None:
        servers = _servers(here, config, checked, str(run.folder("acsft")), served, cluster.servers)
        planned.append(Planned(servers, here.run_dir, tuple(o for o in after if o == "acsft"), kind="server"))
        begins = (servers.name,)
        arguments = (*arguments, f"server.folder={served}", f"server.count={cluster.servers}")
    last = here.job(name, sized, arguments, servers=served)
    if cluster.array > 1:
        tasks = (*arguments, f"array.tasks={cluster.array}")
        parts = here.job(f"{name}-array", sized, tasks, array="records", tasks=cluster.array)
        planned.append(Planned(parts, where, after, begins, kind="records"))
        after, begins = (*after, parts.name), ()
    return [*planned, Planned(last, where, after, begins)]


def _servers(here: Place, config: Config, bootstrap: Config, checkpoint: str, served: Any, count: int) -> Any:
    """Return the array of servers: each one replica of the layout that bootstrap would have."""
    cluster = cluster_of(config, _SERVERS)
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
    arguments = ("serve", f"checkpoint={checkpoint}", f"server.folder={served}", *differing)
    return here.job(_SERVERS, replace(config, cluster=cluster), arguments, serves=served, tasks=count)


def _at(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found
