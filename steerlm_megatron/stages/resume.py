"""Check whether a checkpoint fits a training run that starts from it or resumes from it.

Owns: the comparisons. Does not own: finding checkpoints (``train/checkpoint.py``), loading them (engines). Invariant: a
resumed run computes the same as an uninterrupted one. Settings that do not affect that may change (layout, engine,
cadence), and so may settings that a user changes on purpose (learning rate, precision, dropout, size of a step, more
steps); a changed model, task or order of data is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.feed.blend import Corpora
from steerlm_megatron.data.groups import Groups
from steerlm_megatron.data.views import LABELLED, PREDICTION, View
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.arithmetic import padded_vocab_size
from steerlm_megatron.model.lora import Lora
from steerlm_megatron.stages.base import Base, model_differences, open_base
from steerlm_megatron.stages.published import schema_of_labels
from steerlm_megatron.train.meta import CheckpointMeta

# Names in a checkpoint's metadata and in errors.
_OF_ADAPTERS = {
    "rank": "lora.rank",
    "alpha": "lora.alpha",
    "targets": "lora.targets",
    "rows": "trained rows of lora.train_rows",
}


def data_order(config: Config, data: Corpora, view: View, groups: Groups | None = None) -> dict[str, Any]:
    """Return the settings that decide which samples a step has, by their names in errors. Checkpoints store them."""
    targets = {} if groups is None else {"data.targets": groups.hash, "steerlm2.normalize": groups.normalize}
    return {
        **targets,
        "train.objective": "steerlm2" if groups is not None else "tokens",
        "task": view,
        "train.seed": config.train.seed,
        "train.row_tokens": config.train.row_tokens,
        "data.overlong": config.data.overlong,
        "data.weights": list(config.data.weights),
        "data.train": [dataset.hash for dataset in data.datasets],
    }


def check_init(config: Config, data: Corpora, view: View) -> Base | None:
    """Return the model to start from, after checking that its vocabulary, shape and head fit this run."""
    if config.init_from is None:
        return None
    base = open_base(config.init_from, "init_from", config.lora.base)
    meta = base.meta
    ours, remedy = data.tokenizer.hash, base.folder / "tokenizer"
    if base.hf is not None:  # control strings are added to what the folder has
        ours, remedy = data.tokenizer.model_hash, base.folder
    if meta.tokenizer_hash != ours:
        raise UserError(
            f"vocabulary mismatch: init_from={config.init_from} was trained with another tokenizer "
            f"({meta.vocab_size} ids) than "
            f"{data.name} ({data.tokenizer.vocab_size} ids); preprocess with tokenizer.path={remedy}"
        )
    wrong = model_differences(config, meta, () if base.hf is None else ("vocab_multiple",))
    if base.hf is None:
        wrong += padding_differences(config, meta, view)
    if wrong:
        raise UserError(f"init_from={config.init_from} holds another model: {', '.join(wrong)}")
    if meta.head == "regression":
        _check_head(config, base, view)
    elif meta.predicts and view not in PREDICTION:
        raise UserError(
            f"init_from={config.init_from} holds an attribute-prediction model, which writes labels after responses; "
            f"start {config.command} from a language model (what that model was trained from, or a run of train_sft)"
        )
    return base


def _check_head(config: Config, base: Base, view: View) -> None:
    """Refuse an attribute-prediction model as a language model, or one whose head has other attributes."""
    meta = base.meta
    if view != "ap":
        raise UserError(
            f"init_from={config.init_from} holds an attribute-prediction model, which has no output layer for tokens; "
            f"start {config.command} from a language model (what that model was trained from, or a run of train_sft)"
        )
    if meta.schema is None and base.hf is not None and base.hf.labels is not None:
        schema_of_labels(base.hf.labels.names, config.attributes, f"init_from={config.init_from}")
        return
    names, level = (meta.schema or {}).get("names"), (meta.schema or {}).get("max_level")
    if names != config.attributes.names or level != config.attributes.max_level:
        raise UserError(
            f"init_from={config.init_from} predicts {', '.join(names or [])} on 0-{level}, "
            f"attributes={config.attributes.name} has {', '.join(config.attributes.names)} on "
            f"0-{config.attributes.max_level}; choose the same attributes, or start from a language model"
        )


def padding_differences(config: Config, meta: CheckpointMeta, view: View) -> list[str]:
    """Return an error if the layout changes the number of rows of the output layer.

    Rows beyond the vocabulary only pad the table, but a checkpoint has them, and its optimizer's state as well. A
    regression head has no such rows.
    """
    if view == "ap":
        return []

    def rows(tensor: int) -> int:
        return padded_vocab_size(meta.vocab_size, config.model.vocab_multiple, tensor)

    tensor, saved = config.parallel.tensor, meta.parallel.get("tensor", 1)
    if rows(tensor) == rows(saved):
        return []
    legal = [
        t for t in range(1, config.model.num_heads + 1) if config.model.num_heads % t == 0 and rows(t) == rows(saved)
    ]
    return [
        f"parallel.tensor={tensor}, which pads the vocabulary to {rows(tensor)} rows (checkpoint: {rows(saved)}; that "
        f"many have parallel.tensor={' '.join(map(str, legal))})"
    ]


def check_resume(
    config: Config, data: Corpora, view: View, folder: Path, meta: CheckpointMeta, lora: Lora | None = None,
    groups: Groups | None = None,
) -> None:  # fmt: skip
    """Refuse to resume from ``folder`` with settings that would make it another run, ``lora`` with other adapters. All
    differences are reported at once.
    """
    if not meta.training_state:
        raise UserError(f"{folder} is an export, which no run can resume from; start a new run with init_from={folder}")
    wrong = model_differences(config, meta) + padding_differences(config, meta, view)
    head = "regression" if view == "ap" else "lm"
    if meta.head != head:
        wrong.append(f"a model with head '{head}' (checkpoint: '{meta.head}')")
    if meta.tokenizer_hash != data.tokenizer.hash:
        wrong.append(f"the tokenizer of {data.name} (checkpoint: another)")
    if meta.schema is not None and data.schema is not None and view in LABELLED:
        ours, theirs = data.schema.to_dict(), meta.schema
        wrong += [
            f"attributes.{k}={ours[k]} (checkpoint: {theirs.get(k)})"
            for k in ("names", "max_level")
            if ours[k] != theirs.get(k)
        ]
    before = {"train.trainable": meta.config.get("train", {}).get("trainable"), **meta.data}
    now = {"train.trainable": config.train.trainable, **data_order(config, data, view, groups)}
    if lora is not None and meta.lora is not None:
        before |= {key: meta.lora[name] for name, key in _OF_ADAPTERS.items()}
        now |= {key: lora.to_dict()[name] for name, key in _OF_ADAPTERS.items()}
    for key, value in now.items():
        if before.get(key) is None or before[key] == value:  # checkpoints of earlier versions do not have the key
            continue
        hashed = {"data.train": "other shards in data.train", "data.targets": "other weights in data.targets"}
        wrong.append(hashed[key] if key in hashed else f"{key}={value} (checkpoint: {before[key]})")
    if wrong:
        raise UserError(
            f"run_dir={config.run_dir} would go on from {folder}, but now has {', '.join(wrong)}; set them as they "
            f"were, or start a new run: another run_dir, with init_from={folder} to start from its weights"
        )


def check_steps(config: Config, steps: int, folder: Path, meta: CheckpointMeta) -> None:
    """Refuse fewer steps than the checkpoint has behind it."""
    if steps < meta.step:
        asked = (
            f"train.steps={steps}" if config.train.steps else f"train.epochs={config.train.epochs:g} ({steps} steps)"
        )
        raise UserError(
            f"{asked} is less than the {meta.step} steps behind {folder}, from which run_dir={config.run_dir} would go "
            f"on; ask for at least {meta.step}, or use that checkpoint as it is"
        )
