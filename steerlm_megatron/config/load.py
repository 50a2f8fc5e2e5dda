"""Turn plain data into a checked :class:`Config`.

Owns: strict merging and every rule that can be checked before work starts. Does not own: Hydra (``compose.py``), rules
between keys of training (``training_rules.py``).
Invariant: :func:`finalize` reports all problems at once, each as ``key=value rule; remedy``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerlm_megatron.config.commands import COMMANDS, unset
from steerlm_megatron.config.fields import broken_rules
from steerlm_megatron.config.schema import KEYS, RENAMED, BootstrapConfig, Config
from steerlm_megatron.config.training_rules import check_engine, check_lora, check_objective, check_trainable
from steerlm_megatron.errors import UserError


def from_container(*layers: Mapping[str, Any] | DictConfig | ListConfig) -> Config:
    """Return a typed config from nested plain data, later layers on top of earlier ones. Unknown keys and wrong types
    are ``UserError``s naming the key.
    """
    return filled(Config(), *layers)


def filled(config: Config, *layers: Mapping[str, Any] | DictConfig | ListConfig) -> Config:
    """Set what ``layers`` name in ``config``, as :func:`from_container` does in a new one, and return it."""
    for key, value in _merged(layers).items():
        setattr(config, key, value)
    return config


def _merged(layers: Sequence[Mapping[str, Any] | DictConfig | ListConfig]) -> dict[str, Any]:
    """Return the sections and keys outside of sections that ``layers`` name, typed and checked. What no layer names is
    left out, because merging all of a configuration takes a tenth of a second, and a run merges one for every step.
    """
    named = list(dict.fromkeys(str(key) for layer in layers for key in layer))
    known = [key for key in named if key in _TOP]
    try:
        schema = OmegaConf.masked_copy(_schema(), known) if len(known) == len(named) else _schema()
        merged = cast(DictConfig, OmegaConf.merge(schema, *layers))
        found = {
            key: OmegaConf.to_object(value) if OmegaConf.is_config(value := merged[key]) else value for key in known
        }
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise UserError(renamed(key) or f"config key {key}: {str(error).splitlines()[0]}") from None
    return found


_TOP = frozenset(field.name for field in dataclasses.fields(Config))


@cache
def _schema() -> DictConfig:
    """Return what all configurations are merged into: making it takes longer than merging. ``OmegaConf.merge`` and
    ``masked_copy`` copy it, so that nothing writes to it.
    """
    schema: DictConfig = OmegaConf.structured(Config)
    return schema


def renamed(key: str) -> str | None:
    """Return the error for a key that has another name now; None for any other key."""
    if key not in RENAMED:
        return None
    new, why = RENAMED[key]
    return f"{key} is now {new}: {why}"


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a copy of ``config`` with nested ``overrides`` on top, as strictly checked as the command line."""
    if "pipeline" in overrides:
        raise UserError("pipeline: a step's overrides cannot hold a pipeline section")
    result = copy.deepcopy(config)
    base = {key: _plain(getattr(result, key)) for key in overrides if key in _TOP}
    # These mappings are values and not sections, so an override replaces them as a whole.
    for section, name in (
        ("attributes", "best"), ("train", "label_weights"), ("data", "map"), ("bootstrap", "max_distance"),
        ("bootstrap", "best_by"), ("evaluate", "judge_attributes"),
    ):  # fmt: skip
        if isinstance(over := overrides.get(section), Mapping) and over.get(name) is not None:
            base[section][name] = {}
    return filled(result, base, dict(overrides))


def _plain(value: Any) -> Any:
    """Return the plain data of a section, or the value of a key outside of sections."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def to_container(config: Config) -> dict[str, Any]:
    """Return plain nested data, the inverse of :func:`from_container`."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, as stored in every run folder."""
    return OmegaConf.to_yaml(OmegaConf.create(to_container(config)))


def world_of(config: Config) -> int:
    """Return how many ranks the layout asks for; with ``parallel.data=null`` the fewest that it can run on."""
    p = config.parallel
    return p.tensor * p.pipeline * p.context * (p.data or 1)


def job_of_array(config: Config) -> tuple[int | None, int]:
    """Return the number of this job among those that share the records, and how many these are. The number is None
    where this job does all that is left, as it is for commands that do not share records.
    """
    if config.command in COMMANDS and COMMANDS[config.command].reads_key("array"):
        return config.array.task, config.array.tasks
    return None, 1


def value_at(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def paths_of(value: Any) -> list[str]:
    """Return the paths of a key that takes one or a list of them; None: none. ``UserError`` for anything else."""
    paths = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise UserError(f"{value!r} is not a path or a list of paths")
    return paths


def finalize(config: Config, world: int | None = None, alone: bool = False) -> Config:
    """Check every rule, and fill in values that follow from others.

    Args:
        world: number of ranks; None where it is still to be chosen.
        alone: whether the command gets no more than this. A step of a pipeline gets its inputs from earlier steps
            later.

    Raises:
        UserError: with one line per problem.
    """
    problems = [
        *(unset(config.command, partial(value_at, config)) if alone else ()),
        *broken_rules(tuple(KEYS.values()), partial(value_at, config)),
        *_check_model(config),
        *_check_parallel(config, world),
        *_check_attributes(config),
        *check_engine(config),
        *_check_train(config),
        *_check_blend(config),
        *check_profile(config),
        *check_trainable(config),
        *check_lora(config, alone),
        *check_objective(config, alone),
        *_check_array(config),
        *_check_bootstrap(config),
    ]
    if problems:
        raise UserError("\n".join(problems))
    config.data.input = _as_list(config.data.input)
    config.data.valid_input = _as_list(config.data.valid_input)
    return config


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]


def lays_out_training(config: Config) -> bool:
    """Return whether the command lays out a training run. A config without a command was built by hand and may."""
    return config.command not in COMMANDS or COMMANDS[config.command].trains


def head_values(config: Config) -> int | None:
    """Return how many values the head of the model that is trained gives; None for a language model."""
    return len(config.attributes.names) if config.command == "train_ap" and config.ap.kind == "regression" else None


def _divisors(number: int) -> str:
    return " ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _check_model(config: Config) -> list[str]:
    m, p, problems = config.model, config.parallel, []
    if not lays_out_training(config):
        return []  # the checkpoint's model is compared with the layout when the checkpoint is opened
    groups = m.num_query_groups or m.num_heads
    if m.num_heads < 1 or groups < 1 or m.num_layers < 1 or p.tensor < 1 or p.pipeline < 1:
        return []  # reported already
    if m.num_heads % groups:
        problems.append(
            f"model.num_query_groups={groups} must divide model.num_heads={m.num_heads}; legal: "
            f"{_divisors(m.num_heads)}"
        )
    if m.head_dim is None and m.hidden_size % m.num_heads:
        problems.append(
            f"model.num_heads={m.num_heads} must divide model.hidden_size={m.hidden_size}, or set model.head_dim"
        )
    for key, value in (
        ("model.num_heads", m.num_heads),
        ("model.num_query_groups", groups),
        ("model.ffn_hidden_size", m.ffn_hidden_size),
    ):
        if value % p.tensor:
            problems.append(f"parallel.tensor={p.tensor} must divide {key}={value}; legal: {_divisors(value)}")
    rotated = int((m.head_dim or m.hidden_size // m.num_heads) * m.rotary_percent)
    if rotated % 2:
        problems.append(
            f"model.rotary_percent={m.rotary_percent:g} turns {rotated} dimensions of a head; RoPE turns pairs: choose "
            "model.head_dim (or model.hidden_size / model.num_heads) and model.rotary_percent for an even number"
        )
    if m.rotary_scaling == "llama3" and not m.rotary_low_frequency < m.rotary_high_frequency:
        problems.append(
            f"model.rotary_low_frequency={m.rotary_low_frequency:g} must be below model.rotary_high_frequency="
            f"{m.rotary_high_frequency:g} with model.rotary_scaling=llama3"
        )
    if m.full_attention_layers:
        if m.sliding_window is None:
            problems.append("model.full_attention_layers needs model.sliding_window: without it all layers are such")
        if wrong := [layer for layer in m.full_attention_layers if not 0 <= layer < m.num_layers]:
            problems.append(
                f"model.full_attention_layers has {' '.join(map(str, wrong))}; layers are 0 to {m.num_layers - 1}"
            )
    if m.rotary_local_base is not None and m.sliding_window is None:
        problems.append("model.rotary_local_base needs model.sliding_window: it is for layers that have one")
    stages = p.pipeline * (p.virtual_pipeline or 1)
    if m.num_layers % stages:
        key = "parallel.pipeline" if not p.virtual_pipeline else "parallel.pipeline x parallel.virtual_pipeline"
        problems.append(f"{key}={stages} must divide model.num_layers={m.num_layers}; legal: {_divisors(m.num_layers)}")
    return problems


def _check_parallel(config: Config, world: int | None) -> list[str]:
    p, problems = config.parallel, []
    unit = math.lcm(2, max(1, p.tensor) if p.sequence else 1) * p.context
    if p.context > 1 and lays_out_training(config) and config.train.row_tokens % unit:
        problems.append(
            f"train.row_tokens={config.train.row_tokens} must be a multiple of {unit} with "
            f"parallel.context={p.context}: each of its ranks takes two equal chunks of a row"
            + (f", each split over parallel.tensor={p.tensor} ranks" if p.sequence else "")
        )
    if p.sequence and p.tensor == 1:
        problems.append(
            "parallel.sequence=true splits over tensor-parallel ranks; set parallel.tensor to 2 or "
            "more, or parallel.sequence=false"
        )
    if p.virtual_pipeline is not None and p.pipeline < 2:
        problems.append(
            f"parallel.virtual_pipeline={p.virtual_pipeline} interleaves chunks of at least 2 pipeline stages "
            f"(parallel.pipeline={p.pipeline}); set it to null"
        )
    if p.data is not None and p.data < 1:
        pass  # reported already
    elif world is not None and min(p.tensor, p.pipeline, p.context) >= 1:
        unit = p.tensor * p.pipeline * p.context
        if p.data is not None and world != unit * p.data:
            problems.append(
                f"{world} ranks were started, parallel.* asks for {unit * p.data}; set "
                "parallel.data=null or start that many"
            )
        elif world % unit:
            problems.append(
                f"{world} ranks were started, not a multiple of parallel.tensor x parallel.pipeline x "
                f"parallel.context = {unit}"
            )
    if p.sequence and p.tensor >= 1 and config.train.row_tokens % p.tensor:  # a micro-batch may be one row
        problems.append(
            f"train.row_tokens={config.train.row_tokens} must be a multiple of "
            f"parallel.tensor={p.tensor} with parallel.sequence=true"
        )
    return problems


def _check_attributes(config: Config) -> list[str]:
    a, problems = config.attributes, []
    if not a.names:
        return []
    if a.quality not in a.names:
        problems.append(f"attributes.quality={a.quality} is not one of attributes.names: {' '.join(a.names)}")
    for key in a.best:
        if key not in a.names:
            problems.append(f"attributes.best.{key} is not one of attributes.names: {' '.join(a.names)}")
    for key, weight in config.train.label_weights.items():
        if key not in a.names:
            problems.append(f"train.label_weights.{key} is not one of attributes.names: {' '.join(a.names)}")
        if not 0 <= weight < math.inf:
            problems.append(f"train.label_weights.{key}={weight} must be a finite number, at least 0")
    for measure, key in config.evaluate.judge_attributes.items():
        if key not in a.names:
            problems.append(
                f"evaluate.judge_attributes.{measure}={key} is not one of attributes.names: {' '.join(a.names)}"
            )
    for key in config.evaluate.attributes:
        if key not in a.names:
            problems.append(f"evaluate.attributes: {key} is not one of attributes.names: {' '.join(a.names)}")
    return problems


def _check_array(config: Config) -> list[str]:
    task, tasks = config.array.task, config.array.tasks
    if task is not None and not task < tasks:
        return [f"array.task={task} must be below array.tasks={tasks}: they are numbered from 0"]
    return []


def _check_bootstrap(config: Config) -> list[str]:
    """Return errors of keys of bootstrapping. Names of attributes are compared with the model's when it is open."""
    b, problems = config.bootstrap, []
    if b.keep_best is not None and b.keep_best >= b.responses_per_prompt:
        problems.append(
            f"bootstrap.keep_best={b.keep_best} of bootstrap.responses_per_prompt={b.responses_per_prompt} leaves "
            "nothing out; raise the second, or set keep_best=null"
        )
    if b.best_by and b.keep_best is None:
        problems.append(f"bootstrap.best_by={b.best_by} does nothing without bootstrap.keep_best; leave it out")
    problems += [
        f"bootstrap.best_by.{name}={weight} must be a finite number"
        for name, weight in b.best_by.items()
        if not math.isfinite(weight)
    ]
    problems += [
        f"bootstrap.max_distance.{name}={most} must be a finite number, at least 0"
        for name, most in b.max_distance.items()
        if not 0 <= most < math.inf
    ]
    if b.repetition_ngram != BootstrapConfig().repetition_ngram and b.max_repetition is None:
        problems.append(
            f"bootstrap.repetition_ngram={b.repetition_ngram} does nothing without bootstrap.max_repetition; leave it "
            "out"
        )
    if b.mix == 1:
        problems.append("bootstrap.mix=1 trains on nothing that was sampled; choose a share below 1")
    return problems


def check_profile(config: Config) -> list[str]:
    steps = config.profile.steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        return [f"profile.steps={steps} must be two numbers, the first step and the last, counted from 1: [3,5]"]
    return []


def _check_blend(config: Config) -> list[str]:
    data, problems = config.data, []
    for key in ("train", "valid"):
        try:
            paths_of(getattr(data, key))
        except UserError as error:
            problems.append(f"data.{key}={error}")
    if problems or not data.weights:
        return problems
    count = len(paths_of(data.train))
    if len(data.weights) != count:
        problems.append(
            f"data.weights={data.weights} has {len(data.weights)} numbers, data.train {count} folders; give one each"
        )
    problems += [
        f"data.weights: {weight} must be a positive number"
        for weight in data.weights
        if not (weight > 0 and math.isfinite(weight))
    ]
    return problems


def _check_train(config: Config) -> list[str]:
    t, problems = config.train, []
    if t.row_tokens > config.model.max_position:
        problems.append(
            f"train.row_tokens={t.row_tokens} exceeds model.max_position={config.model.max_position}; "
            "lower the one or raise the other"
        )
    if config.optim.min_lr > config.optim.lr and config.optim.schedule != "constant":
        problems.append(f"optim.min_lr={config.optim.min_lr:g} exceeds optim.lr={config.optim.lr:g}; lower it")
    return problems
