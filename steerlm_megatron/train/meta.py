"""What a checkpoint says about itself: ``meta.json``, which makes it usable alone.

Owns: the tasks that a model can have been trained for, the metadata's fields, reading metadata of this and earlier
formats. Does not own: folders, commit, retention (``checkpoint.py``). Invariant: ``meta.json`` has the size and SHA-256
of every file beside it, and of itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import to_strict_json, write_json_atomic
from steerlm_megatron.steer.attributes import AttributeSchema

_FORMAT = 4
_OWN_DIGEST = "sha256"  # in meta.json: of the rest of it


@dataclass(frozen=True)
class Task:
    """What a model was trained for, and what follows from it.

    Args:
        head: ``lm``, an output layer for tokens, or ``regression``, one value per attribute.
        conditioned: whether responses were trained with label lines.
        view: what of a stored conversation it saw and learnt (``data/views.py``).
        predicts: whether it predicts the attributes of a response, which is then all that it is for: by the regression
            head, or as a language model that writes the label string.
    """

    head: Literal["lm", "regression"]
    conditioned: bool
    view: Literal["lm", "sft", "acsft", "ap", "ap_text"]
    predicts: bool = False


TASKS: dict[str, Task] = {
    "lm": Task("lm", False, "lm"),
    "sft": Task("lm", False, "sft"),
    "acsft": Task("lm", True, "acsft"),
    "ap_regression": Task("regression", False, "ap", predicts=True),
    "ap_generative": Task("lm", False, "ap_text", predicts=True),
}


def task_of(view: str) -> str:
    """The task that is trained on a view of the data."""
    return next(name for name, task in TASKS.items() if task.view == view)


@dataclass
class CheckpointMeta:
    """What a checkpoint says about itself.

    ``task``: one of :data:`TASKS`. ``schema``: the attribute schema's dict, None for a model without attributes.
    ``loader``: where the data stood. ``metric``: validation loss. ``label_mean``: attribute prediction only, the
    training labels' mean per attribute (the constant predictor), None where there were none. ``label_counts``: labels
    per attribute that this model and those it started from were trained on; empty where they do not enter (plain SFT),
    and in checkpoints of earlier versions. ``base``: of a model that began as a Hugging Face folder, what of that
    folder an export gives back (``stages/published.py``). ``lora``: the adapters beside the weights
    (``model/lora.py``), and as ``base`` the Hugging Face model whose weights these are; None for a model without.
    """

    step: int
    task: str
    model: dict[str, Any]
    vocab_size: int
    schema: dict[str, Any] | None
    template: dict[str, Any]
    tokenizer_hash: str
    training_state: bool = True  # False: an export, the model alone
    loader: dict[str, int] = field(default_factory=dict)
    metric: float | None = None
    label_mean: list[float | None] = field(default_factory=list)
    label_counts: dict[str, int] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    # of the run that saved it: its resolved configuration, and what decides the order of its data (stages/train.py)
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → {"bytes", "sha256"}
    format: int = _FORMAT

    @property
    def head(self) -> str:
        """``lm`` (an output layer for tokens) or ``regression``."""
        return TASKS[self.task].head

    @property
    def predicts(self) -> bool:
        """Whether the model predicts attributes of responses."""
        return TASKS[self.task].predicts

    @property
    def conditioned(self) -> bool:
        """Whether responses were trained with label lines."""
        return TASKS[self.task].conditioned

    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.model)

    def attributes(self) -> AttributeSchema | None:
        """The schema, with the attributes that the model never saw a label of as ``unseen``; None without one."""
        if self.schema is None:
            return None
        schema = AttributeSchema.from_dict(self.schema)
        if self.label_counts:
            unseen = [name for name in schema.names if not self.label_counts.get(name)]
        else:
            unseen = [name for name, mean in zip(schema.names, self.label_mean, strict=False) if mean is None]
        return replace(schema, unseen=tuple(unseen))


def read_meta(folder: Path) -> CheckpointMeta:
    """The metadata of a checkpoint folder, after checking that its files have the sizes they were saved with
    (:func:`verify` compares their contents).
    """
    raw = _read_meta_file(folder)
    if raw.get("format") == 3:
        raw |= {"task": _task_of_format_3(raw), "format": _FORMAT}
    if raw.get("format") != _FORMAT:
        raise UserError(
            f"{folder / 'meta.json'}: checkpoint format {raw.get('format')}, this version reads 3 and {_FORMAT}"
        )
    if raw.get("task") not in TASKS:
        raise UserError(f"{folder / 'meta.json'}: task {raw.get('task')!r}, this version knows: {' '.join(TASKS)}")
    known = {f.name for f in dataclasses.fields(CheckpointMeta)}
    try:
        meta = CheckpointMeta(**{k: v for k, v in raw.items() if k in known})
        sizes = {name: saved["bytes"] for name, saved in meta.files.items() if len(saved["sha256"]) == 64}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'meta.json'}: an entry is missing or odd ({error}); the checkpoint is damaged"
        ) from None
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise UserError(
                f"{folder / name}: {'missing' if found is None else f'{found} bytes'}, saved with "
                f"{size}: torn checkpoint"
            )
    return meta


def _task_of_format_3(raw: Mapping[str, Any]) -> str:
    """The task of a checkpoint that says its head and whether it is conditioned instead."""
    if raw.get("head") == "regression":
        return "ap_regression"
    if raw.get("conditioned"):
        return "acsft"
    data = raw.get("data")
    return "lm" if isinstance(data, Mapping) and data.get("task") == "lm" else "sft"


def _read_meta_file(folder: Path) -> dict[str, Any]:
    """What ``meta.json`` says, after comparing it with its own SHA-256 (checkpoints of earlier versions have none)."""
    path = folder / "meta.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a checkpoint: it has no meta.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); the checkpoint is damaged") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object; the checkpoint is damaged")
    said = raw.pop(_OWN_DIGEST, None)
    if said is not None and said != _digest(raw):
        raise UserError(f"{path}: its content is not what was saved (SHA-256 differs)")
    return raw


def _digest(meta: dict[str, Any]) -> str:
    """SHA-256 of the metadata as JSON: nothing else vouches for the file that vouches for all others."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def write_meta(folder: Path, meta: CheckpointMeta) -> None:
    content = to_strict_json(dataclasses.asdict(meta))
    write_json_atomic(folder / "meta.json", content | {_OWN_DIGEST: _digest(content)})
