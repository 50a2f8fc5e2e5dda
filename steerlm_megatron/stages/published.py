"""What a Hugging Face folder says beside its weights: what of it a trained model keeps, and what one of ours says.

Owns: the files of a base that survive training, our section ``steerlm``, the names of a classifier's values. Does not
own: the model's shape and the labels' names (``model/hf``), writing a folder (``export_hf.py``).

The section of a classifier stands in ``config.json``, beside the names of its values. That of a language model stands
in ``tokenizer_config.json``, beside the chat template that it describes, which an adapter's folder has as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlm_megatron.config.schema import AttributesConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import read_json_object
from steerlm_megatron.model.hf import SECTION, HFFolder, unnamed
from steerlm_megatron.observe.runfolder import hub_source
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.templates import Template
from steerlm_megatron.train.meta import TASKS, CheckpointMeta

TOKENIZER_CONFIG = "tokenizer_config.json"
# Of the tokenizer's settings: a model that was trained has its own chat template and its own list of tokens.
_NOT_KEPT = ("chat_template", "added_tokens_decoder", SECTION)
_LANGUAGE_TASKS = tuple(name for name, task in TASKS.items() if task.head == "lm" and not task.predicts)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_LICENCE_KEYS = ("license", "license_name", "license_link")


def kept_of(folder: Path, hf: HFFolder) -> dict[str, Any]:
    """Return what a model that is trained from a folder keeps of it, as plain data: ``name``, ``family``, the content
    of ``config.json``, ``generation_config.json`` and ``tokenizer_config.json``, the licence that its model card names,
    and the commit (``revision``) of a model that came from the hub.
    """
    tokenizer = read_json_object(folder / TOKENIZER_CONFIG)
    section = (tokenizer if hf.head == "lm" else hf.config).get(SECTION)
    source = hub_source(folder)
    out: dict[str, Any] = {
        "name": folder.resolve().name if source is None else source[0],
        "family": hf.family.name,
        "config": {key: value for key, value in hf.config.items() if key != SECTION},
        "generation_config": read_json_object(folder / "generation_config.json"),
        "tokenizer_config": {k: v for k, v in tokenizer.items() if k not in _NOT_KEPT},
        "licence": _licence(folder),
    }
    if source is not None:
        out["revision"] = source[1]
    if isinstance(section, Mapping) and section.get("base"):
        out["trained_from"] = str(section["base"])
    return out


def _licence(folder: Path) -> dict[str, str]:
    """Return what the folder's model card says of its licence, by the keys of a model card's header."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = _FRONT_MATTER.match(text)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    if not isinstance(header, dict):
        return {}
    return {key: str(header[key]) for key in _LICENCE_KEYS if isinstance(header.get(key), str)}


def section_of(meta: CheckpointMeta) -> dict[str, Any]:
    """Return our section of the folder of a model that was trained here: what it needs to come back."""
    out: dict[str, Any] = {"attributes": meta.schema, "template": meta.template, "label_counts": meta.label_counts}
    out |= {"label_mean": meta.label_mean} if meta.head == "regression" else {"task": meta.task}
    name = meta.base.get("trained_from") or meta.base.get("name")
    return out | ({"base": name} if name else {})


def told_of_classifier(hf: HFFolder) -> dict[str, Any]:
    """Return what our section of a classifier's ``config.json`` says, by :func:`section_of`'s keys; nothing of one
    that somebody else made. ``attributes`` alone give somebody else's model names and a scale.

    Raises:
        UserError: the section is not what we write.
    """
    section, told = hf.config.get(SECTION), f"{hf.key}={hf.folder}: config.json: {SECTION}"
    if not isinstance(section, Mapping) or "attributes" not in section:
        return {}
    assert hf.labels is not None
    out = _read_section(section, told)
    if out["attributes"] is None:
        raise UserError(f"{told}: attributes and template must be objects")
    if len(out["attributes"]["names"]) != len(hf.labels.names):
        raise UserError(f"{told}: attributes names {len(out['attributes']['names'])} of {len(hf.labels.names)} values")
    mean = section.get("label_mean") or []
    if not isinstance(mean, list) or not all(isinstance(value, int | float | None) for value in mean):
        raise UserError(f"{told}.label_mean is not a list of numbers")
    return {**out, "label_mean": mean}


def told_of_language_model(hf: HFFolder) -> dict[str, Any]:
    """Return what our section of a language model's ``tokenizer_config.json`` says, by :func:`section_of`'s keys;
    nothing of one that somebody else made.

    Raises:
        UserError: the section is not what we write.
    """
    section = read_json_object(hf.folder / TOKENIZER_CONFIG).get(SECTION)
    told = f"{hf.key}={hf.folder}: {TOKENIZER_CONFIG}: {SECTION}"
    if not isinstance(section, Mapping) or not section.get("template"):
        return {}
    task = section.get("task")
    if not isinstance(task, str) or task not in _LANGUAGE_TASKS:
        raise UserError(f"{told}.task={task!r}, this version knows: {' '.join(_LANGUAGE_TASKS)}")
    if TASKS[task].conditioned == (section.get("attributes") is None):
        raise UserError(f"{told}: attributes are of a model of task acsft, and of no other")
    return {**_read_section(section, told), "task": task}


def _read_section(section: Mapping[str, Any], told: str) -> dict[str, Any]:
    """Return what the section of either kind of model says: ``attributes``, ``template`` and ``label_counts``."""
    attributes, template = section.get("attributes"), section.get("template", {})
    if not isinstance(attributes, Mapping | None) or not isinstance(template, Mapping):
        raise UserError(f"{told}: attributes and template must be objects")
    try:
        schema = None if attributes is None else AttributeSchema.from_dict(attributes).to_dict()
        kept = Template.from_dict(template).to_dict() if template else {}
    except UserError as error:
        raise UserError(f"{told}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a list where a name belongs, say
        raise UserError(f"{told}: attributes or template have values of another kind ({error})") from None
    counts = section.get("label_counts") or {}
    if not isinstance(counts, Mapping) or not all(type(count) is int and count >= 0 for count in counts.values()):
        raise UserError(f"{told}.label_counts is not an object of whole numbers")
    return {"attributes": schema, "template": kept, "label_counts": dict(counts)}


def schema_of_labels(names: Sequence[str], chosen: AttributesConfig | None, told: str) -> AttributeSchema:
    """Return the schema that gives the values of somebody else's classifier their names and their scale.

    Args:
        names: what the classifier calls its values.
        chosen: the section ``attributes`` of the configuration; None for a command that does not read it for this.
        told: ``key=path``, for messages.

    Raises:
        UserError: no schema is chosen, or it is one of other attributes.
    """
    said = f"{told} is a classifier of {len(names)} values ({' '.join(names)}), and says nothing of their scale"
    if chosen is None or not chosen.names:
        written = f'"{SECTION}": {{"attributes": {{"names": [...], "max_level": ...}}}}'
        either = "" if chosen is None else "choose a schema with attributes=..., or "
        raise UserError(f"{said}; {either}write {written} into its config.json")
    if len(chosen.names) != len(names) or (len(names) > 1 and list(names) not in (chosen.names, unnamed(len(names)))):
        raise UserError(
            f"{said}; attributes={chosen.name} has {' '.join(chosen.names)}: choose a schema with its names, in order"
        )
    return AttributeSchema.from_config(chosen)
