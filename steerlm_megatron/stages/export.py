"""``export``: write a checkpoint with the model alone: weights, tokenizer, schema and template, without the optimizer,
random generators and loader position.

Owns: what is left out, and the check of the target folder. Does not own: reading and writing (``session.py``,
``train/checkpoint.py``). Invariant: every command that takes a checkpoint takes an export, except that a training run
cannot be resumed from it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import versions
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages import adapters, export_hf
from steerlm_megatron.stages.base import Base, open_base
from steerlm_megatron.stages.model_card import RunFacts
from steerlm_megatron.stages.session import load_model, open_checkpoint, session
from steerlm_megatron.train.checkpoint import verify, write_checkpoint
from steerlm_megatron.train.meta import read_meta
from steerlm_megatron.train.sharded import ShardedWriter, stored_dtype

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def run(config: Config) -> None:
    """Export ``checkpoint`` to the folder ``output``. Collective over the world."""
    base = open_base(str(config.checkpoint), "checkpoint")
    source, target = base.folder, Path(str(config.output))
    if config.export.format == "hf":
        _to_hf(config, base, target)
        return
    if base.hf is not None:
        raise UserError(
            f"checkpoint={source} is a Hugging Face folder, which commands take as it is; set export.format=hf to "
            "write another"
        )
    with session(config) as here:
        on_main(lambda: check_target(target, source, config.overwrite))
        stored = _PRECISIONS[stored_dtype(source, "decoder.")]
        precision = stored if config.export.precision == "stored" else config.export.precision
        config.engine.precision = precision
        loaded = load_model(str(source), config, "checkpoint")
        meta = dataclasses.replace(
            loaded.meta,
            training_state=False,
            loader={},
            config={},  # the configuration holds paths of the machine of the run
            data={},
            parallel=dataclasses.asdict(loaded.parallel),
            versions=versions(),
            files={},
        )
        writer, state = ShardedWriter(), {"model": loaded.model.sharded_state_dict()}
        write_checkpoint(target, meta, lambda folder: writer.begin(state, folder), loaded.tokenizer.save)
        here.run.update(outputs={"checkpoint": str(target)})
        if here.layout.is_main:
            size = sum(entry["bytes"] for entry in read_meta(target).files.values())
            before = sum(entry["bytes"] for entry in read_meta(source).files.values())
            get_logger(__name__).info(
                "%s: %s model of step %d in %s, %s MB (the checkpoint: %s MB)",
                target, "attribute-prediction" if meta.predicts else "language", meta.step, precision,
                f"{size / 1e6:,.1f}", f"{before / 1e6:,.1f}",
            )  # fmt: skip


def _to_hf(config: Config, base: Base, target: Path) -> None:
    """Write a Hugging Face folder. Collective over the world."""
    of = adapters.check_export(config, base) if config.export.adapter else None
    opened = open_checkpoint(
        str(config.checkpoint) if base.hf is not None else str(base.folder), "checkpoint", asked=False
    )
    export_hf.check(config, opened)
    facts = RunFacts.of(base.folder, opened.meta.step, config.export.evaluation)
    with session(config) as here:
        if of is not None:
            on_main(lambda: _check_folder(target, base.folder, config.overwrite, "adapter_config.json"))
            verify(base.folder)
            tensors, about = adapters.adapter_of(config, base, of)
            on_main(lambda: export_hf.write_adapter_folder(opened, target, tensors, about))
            here.run.update(outputs={"checkpoint": str(target)})
            get_logger(__name__).info("%s: an adapter of %s, for the peft package", target, of)
            return
        on_main(lambda: _check_folder(target, base.folder, config.overwrite, "config.json"))
        stored = base.hf.precision if base.hf is not None else _PRECISIONS[stored_dtype(base.folder, "decoder.")]
        precision = stored if config.export.precision == "stored" else config.export.precision
        config.engine.precision = precision
        loaded = load_model(str(config.checkpoint), config, "checkpoint", asked=False)
        on_main(lambda: export_hf.write(loaded, target, precision, facts))
        here.run.update(outputs={"checkpoint": str(target)})
        get_logger(__name__).info("%s: a Hugging Face folder in %s", target, precision)


def _check_folder(target: Path, source: Path, overwrite: bool, sign: str) -> None:
    export_hf.take_back_unfinished(target)
    check_target(target, source, overwrite, sign)


def check_target(target: Path, source: Path, overwrite: bool, sign: str = "meta.json") -> None:
    """Refuse to replace anything but an earlier export or checkpoint, and that only with ``overwrite``."""
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise UserError(f"output={target} lies in the checkpoint itself; choose another folder")
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if not target.exists():
        return
    if not (target / sign).exists():
        raise UserError(f"output={target} exists and is not a checkpoint; choose a new folder")
    if not overwrite:
        raise UserError(f"output={target} holds a checkpoint; choose another folder, or overwrite=true to replace it")
