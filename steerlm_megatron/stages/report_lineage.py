"""What was trained on what: the steps of a run, what each was made from, counts, sources with their licences, and which
values the responses had before and after annotation and bootstrapping.

Owns: following the paths in configurations from a run folder to those that it was made from. Does not own: how a
report shows this (``steerlm_megatron/report``). Invariants: only files that exist are read, and nothing is guessed: a
path that leads nowhere is named as it was written; a run folder that was moved finds its own steps again.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from steerlm_megatron.config.load import from_container
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import read_json_object
from steerlm_megatron.steer.records import Conversation

# By data.source: the corpus, and the licence that its publishers name.
CORPORA = {
    "oasst": ("OpenAssistant Conversations (OASST)", "Apache-2.0"),
    "helpsteer": ("HelpSteer", "CC-BY-4.0"),
    "hh_rlhf": ("HH-RLHF", "MIT"),
}
STEP = re.compile(r"\d\d-(.+)")  # the name of a step's folder in that of steerlm run
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is many times faster, and not everywhere
_MOST_STEPS = 200  # steps that are followed from a run folder
_CLIMB = 3  # folders between a path in a configuration and the run folder that it is in
_TRAINING = ("train_ap", "train_sft")
# Command → the keys of its configuration that name what it was made from.
_MADE_FROM = {
    "train_ap": ("init_from", "data.train"),
    "train_sft": ("init_from", "data.train", "data.targets"),
    "annotate": ("checkpoint", "input"),
    "generate": ("checkpoint", "input"),
    "bootstrap": ("checkpoint", "ap_checkpoint", "input"),
    "weigh": ("checkpoint", "steerlm2.base", "input"),
    "evaluate": ("ap_checkpoint", "evaluate.models", "input", "evaluate.prompts"),
    "export": ("checkpoint",),
    "preprocess": ("data.input",),
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a ``config.yaml``; nothing where there is none. ``UserError`` if it cannot be read."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _YAML)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return found if isinstance(found, dict) else {}


def step_folders(root: Path, only: Container[str] | None = None) -> list[Path]:
    """Return the folders of the steps in a folder of ``steerlm run``, in their order; none in any other folder.

    ``only`` names those that count, where others are left of an earlier configuration.
    """
    found = [path for path in sorted(root.iterdir()) if path.is_dir() and STEP.fullmatch(path.name)]
    return [path for path in found if (path / "config.yaml").is_file() and (only is None or path.name in only)]


@dataclass(frozen=True)
class RunFiles:
    """A run folder, or a folder of shards that stands alone: what its small files say."""

    folder: Path
    name: str

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_yaml(self.folder / "config.yaml")

    @cached_property
    def summary(self) -> dict[str, Any]:
        return read_json_object(self.folder / "summary.json")

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What the last checkpoint says of itself; nothing without one."""
        found = sorted((self.folder / "checkpoints").glob("step_*/meta.json"))
        return read_json_object(found[-1]) if found else {}

    @property
    def command(self) -> str:
        return str(self.summary.get("command") or self.config.get("command") or "shards")

    @cached_property
    def shards(self) -> list[Path]:
        """The folders of training shards in it."""
        places = [self.folder, self.folder / "train", self.folder / "shards" / "train"]
        output = (self.config.get("data") or {}).get("output_dir") if self.command == "preprocess" else None
        if output and (found := self.find(str(output))) is not None:
            places += [found, found / "train"]
        return [path for path in places if (path / "manifest.json").is_file()][:1]

    def values(self) -> Iterator[str]:
        """Yield the paths in its configuration that it was made from."""
        for key in _MADE_FROM.get(self.command, ()):
            value: Any = self.config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            yield from _paths(value)

    def find(self, path: str) -> Path | None:
        """Return what a path in the configuration names; None where there is no such file or folder.

        A relative path starts where the command worked. Where the whole run was moved, a step is found by its name.
        """
        places = [Path(path), Path(read_json_object(self.folder / "env.json").get("working_dir") or ".") / path]
        parts = Path(path).parts
        for at, part in enumerate(parts):
            if STEP.fullmatch(part):
                places.insert(0, self.folder.parent.joinpath(*parts[at:]))
                places.append(self.folder.parent / part)  # what was in the step may have been deleted
        return next((place for place in places if place.exists()), None)


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _paths(one)


def _owner(path: Path) -> Path | None:
    """Return the run folder that a path is in, or the folder of shards; None for any other file."""
    for place in (path, *path.parents[:_CLIMB]):
        if (place / "summary.json").is_file() or (place / "manifest.json").is_file():
            # Shards that a run folder holds are told of by the run folder.
            holder = next((one for one in place.parents[:2] if (one / "summary.json").is_file()), None)
            return place if (place / "summary.json").is_file() or holder is None else holder
    return None


def followed(folder: Path, only: Container[str] | None = None) -> tuple[list[RunFiles], dict[Path, list[str]]]:
    """Return the steps that lead to a run folder, each after those that it was made from, and per step the names of
    what it was made from: other steps, and paths that are no run folders. ``only`` is of :func:`step_folders`.
    """
    roots = step_folders(folder, only) if folder.is_dir() else []
    orders: dict[Path, dict[str, list[str]]] = {}  # folder of steerlm run → what its steps of data are made from
    found: dict[Path, RunFiles] = {}
    made: dict[Path, list[str]] = {}

    def visit(place: Path, name: str) -> RunFiles:
        key = place.resolve()
        if key in found or len(found) + len(made) > _MOST_STEPS:
            return found.get(key, RunFiles(place, name))
        step = RunFiles(place, name)
        made[key] = []
        names = []
        if STEP.fullmatch(place.name):
            if place.parent not in orders:
                orders[place.parent] = _after(place.parent)
            names = [visit(place.parent / one, one).name for one in orders[place.parent].get(place.name, ())]
        for value in step.values():
            target = step.find(value)
            owner = None if target is None else _owner(target)
            if owner is None or owner.resolve() in (key, folder.resolve()):
                names.append(value)
            elif owner.resolve() in made and owner.resolve() not in found:
                names.append(value)  # a circle, which only an edited configuration makes
            else:
                short = owner.name if owner.parent == place.parent and STEP.fullmatch(owner.name) else str(owner)
                names.append(visit(owner, short).name)
        found[key] = step
        made[key] = list(dict.fromkeys(names))
        return step

    for place in roots:
        visit(place, place.name)
    if not roots:
        visit(folder, folder.name)
    return [step for step in found.values() if step.command != "report"], made


def _after(root: Path) -> dict[str, list[str]]:
    """Return per step's folder those of the data that the step takes by the order of the pipeline alone."""
    from steerlm_megatron.stages.pipeline_steps import steps_of  # imported here, since a step of them writes the report

    try:
        steps = steps_of(from_container(read_yaml(root / "config.yaml")))
    except UserError:
        return {}  # a configuration of another version: the paths in the steps' configurations are what is known
    folders = {found[1]: path.name for path in step_folders(root) if (found := STEP.fullmatch(path.name))}
    return {
        folders[name]: [folders[one] for one in step.after if one in folders]
        for name, step in steps.items()
        if name in folders and step.command == "preprocess"
    }


def lineage(steps: list[RunFiles], made: Mapping[Path, list[str]]) -> dict[str, Any]:
    """Return ``{steps, sources}``: per step its name, command, status, what it was made ``from``, records ``in`` and
    ``out``, and for a training the ``steps``, ``conversations``, ``tokens`` and ``labels``; per source a name, what it
    is, its licence and the step that used it. What is not known is None.
    """
    sources: dict[str, Any] = {}
    for one in (one for step in steps for one in _sources(step)):
        sources.setdefault(one["name"], one)
    return {
        "steps": [_described(step, made.get(step.folder.resolve(), [])) for step in steps],
        "sources": list(sources.values()),
    }


def _described(step: RunFiles, made_from: list[str]) -> dict[str, Any]:
    counts, meta = step.summary.get("counts") or {}, step.meta
    loader = meta.get("loader") or {}
    if not step.summary and step.shards:
        counts = read_json_object(step.shards[0] / "manifest.json").get("counts") or {}
    labels = meta.get("label_counts") or {}
    trains = step.command in _TRAINING
    return {
        "name": step.name,
        "command": step.command,
        "status": step.summary.get("status", "complete" if step.shards else "unknown"),
        "from": made_from,
        "in": None if trains else counts.get("in"),
        "out": None if trains else counts.get("out"),
        "steps": meta.get("step"),
        "conversations": loader.get("consumed_samples"),
        "tokens": loader.get("tokens", counts.get("tokens")),
        "labels": sum(labels.values()) if labels and trains else None,
        "seconds": step.summary.get("wall_sec"),
    }


def _sources(step: RunFiles) -> Iterator[dict[str, Any]]:
    """Yield the corpora and base models that a step took from outside."""
    data = step.config.get("data") or {}
    of_records = STEP.fullmatch(step.name) and not step.name.endswith("-data")  # that an earlier step made
    if step.command == "preprocess" and not of_records and data.get("source") == "demo":
        yield _source("the embedded corpus", "corpus", "made by a program of this package", step)
    elif step.command == "preprocess" and not of_records:
        known = CORPORA.get(str(data.get("source")))
        for path in _paths(data.get("input")):
            name = Path(path).name
            yield _source(f"{known[0]}: {name}" if known else name, "corpus", known[1] if known else None, step)
    base = step.meta.get("base") or {}
    if model := base.get("trained_from") or base.get("name"):
        licence = base.get("licence") or {}
        revision = f" at {base['revision'][:12]}" if base.get("revision") and base.get("name") == model else ""
        yield _source(f"{model}{revision}", "base model", licence.get("license_name") or licence.get("license"), step)


def _source(name: str, kind: str, licence: str | None, step: RunFiles) -> dict[str, Any]:
    return {"name": name, "kind": kind, "licence": licence, "used_by": step.name}


def distributions(steps: list[RunFiles]) -> dict[str, Any]:
    """Return how often each level occurs in the training shards of each step: attribute → step → ``{mean, levels}``,
    the number of responses by level (values are rounded half to even, as labels are written).

    Raises:
        UserError: shards that are damaged.
    """
    from steerlm_megatron.data.shards import ShardReader  # imported here, since it loads libraries that take long

    found: dict[str, Any] = {}
    for step in steps:
        for folder in step.shards:
            reader = ShardReader(folder)
            if reader.schema is None:
                continue
            top, names = reader.schema.max_level, reader.schema.names
            counts, sums = np.zeros((len(names), top + 1), np.int64), np.zeros(len(names))
            for shard in reader.shards:
                trained = np.asarray(shard.turns["weight"]) > 0
                for column in range(len(names)):
                    values = np.asarray(shard.values[trained, column], dtype=np.float64)
                    values = values[~np.isnan(values)]
                    levels = np.clip(np.rint(values), 0, top).astype(np.int64)
                    counts[column] += np.bincount(levels, minlength=top + 1)
                    sums[column] += values.sum()
            for name, levels_L, total in zip(names, counts, sums, strict=True):
                if n := int(levels_L.sum()):
                    found.setdefault(name, {})[step.name] = {"mean": float(total / n), "levels": levels_L.tolist()}
    return found


def text_of_prompt(prompt: Conversation) -> str:
    """Return a prompt as a reader sees it: its message, or all of its messages with their roles."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
