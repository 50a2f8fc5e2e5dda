"""Adapters of a run: what they are like, what they start from, and how they leave alone.

Owns: the choice of adapters and trained rows from a configuration and a base, merging those of a checkpoint that a run
starts from, ``export.adapter=true``. Does not own: the layers (``model/lora.py``), the format (``model/hf/peft.py``).
Invariant: adapters that a run starts from are either trained on, as they are, or merged in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.hf import PeftFolder, family_for
from steerlm_megatron.model.hf.peft import adapter_config, adapter_tensors
from steerlm_megatron.model.hf.tables import EMBEDDING, OUTPUT
from steerlm_megatron.model.lora import Lora, is_adapter, merge
from steerlm_megatron.model.weights import global_names
from steerlm_megatron.runtime.device import dtype_of
from steerlm_megatron.stages.base import Base, told_of
from steerlm_megatron.stages.hub import HubName
from steerlm_megatron.train.sharded import load_sharded


def lora_of(config: Config, tokenizer: Tokenizer, base: Base | None) -> Lora | None:
    """Return the adapters that a run trains; None for a run without.

    Raises:
        UserError: adapters of the base are to be trained on, and the configuration has other ones.
    """
    if config.train.trainable != "lora":
        return None
    if base is None:
        raise UserError("train.trainable=lora adapts a model that is there: name it with init_from=")
    said, rows = config.lora, (0, 0)
    if said.train_rows == "auto" and tokenizer.base_size < tokenizer.vocab_size:
        rows = (tokenizer.base_size, tokenizer.vocab_size)
    before = None if said.merge else base.lora
    if before is not None:
        if isinstance(base.hf, PeftFolder) and not base.hf.in_one_piece:
            raise UserError(
                f"init_from={config.init_from} has rows of the embedding that are not one range of added tokens; they "
                "can be merged, and not be trained on: set lora.merge=true"
            )
        if said.train_rows == "auto" and before.rows != (0, 0):
            rows = before.rows if rows == (0, 0) else (min(before.rows[0], rows[0]), max(before.rows[1], rows[1]))
    ours = Lora(said.rank, said.alpha, tuple(said.targets), said.dropout, rows)
    if before is not None:
        differs = [
            f"lora.{name}={getattr(said, name)} (there: {_shown(getattr(before, name))})"
            for name in ("rank", "alpha")
            if getattr(ours, name) != getattr(before, name)
        ]
        if set(ours.targets) != set(before.targets):
            differs.append(f"lora.targets={said.targets} (there: {_shown(before.targets)})")
        if rows != before.rows and base.hf is None:
            differs.append(f"trained rows {_shown(rows)} (there: {_shown(before.rows)})")
        if differs:
            raise UserError(
                f"init_from={config.init_from} has an adapter, which would be trained on, but now has "
                f"{', '.join(differs)}; leave them out, or set lora.merge=true to merge it and start a new one"
            )
    return ours


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def described(config: Config, lora: Lora | None, base: Base | None) -> dict[str, Any] | None:
    """Return what a checkpoint says of its adapters: what they are like, and the Hugging Face model under them."""
    if lora is None or base is None:
        return None
    of: str | None = None
    if base.lora is not None:
        of = None if config.lora.merge else base.adapted
    elif base.hf is not None:
        of = told_of(Path(str(config.init_from)))
    return lora.to_dict() | {"base": of}


def merges(config: Config, lora: Lora | None, base: Base | None) -> bool:
    """Return whether a run starts from a checkpoint of ours whose adapters it merges."""
    return base is not None and base.hf is None and base.lora is not None and (lora is None or config.lora.merge)


def merged_weights(
    config: Config, base: Base, gpt: PackedGPTModel, vp_stage: int | None
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield the parameters of ``gpt`` with the values of a checkpoint whose adapters are merged, in host memory. Those
    that the checkpoint has not (a new head, new adapters) are left out. Collective over the world.
    """
    meta = base.meta
    schema = meta.attributes()
    source = build_model(
        meta.model_config(),
        config.parallel,
        config.engine,
        meta.vocab_size,
        attributes=len(schema.names) if meta.head == "regression" and schema else None,
        vp_stage=vp_stage,
        where="cpu",
        lora=base.lora,
    )
    source.load_state_dict(load_sharded({"model": source.sharded_state_dict()}, base.folder)["model"])
    merge(source)
    found = dict(global_names(source))
    for name, parameter in global_names(gpt):
        if name in found:
            yield parameter, found[name].detach()


def check_export(config: Config, base: Base) -> str:
    """Return what the exported adapter is of, after checking that there is one.

    Raises:
        UserError: there is no adapter, or nothing that it can be of.
    """
    told = f"export.adapter=true: {config.checkpoint}"
    if base.lora is None:
        raise UserError(f"{told} has no adapter (train.trainable=lora); leave export.adapter out")
    if base.hf is not None:
        raise UserError(f"{told} is an adapter of peft already; leave export.adapter out to have it merged")
    if base.meta.head != "lm":
        raise UserError(f"{told} is an attribute-prediction model; leave export.adapter out to have it merged")
    of = config.export.base or base.adapted
    if of is None:
        raise UserError(
            f"{told} is of a model that was no Hugging Face folder; export that one with export.format=hf, and name it "
            "with export.base"
        )
    family_for(base.meta.model_config())
    return of


def adapter_of(config: Config, base: Base, of: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the configuration of an adapter's folder; nothing but the adapter, and the tables with
    trained rows, is read.
    """
    meta, lora = base.meta, base.lora
    assert lora is not None
    model, family = meta.model_config(), family_for(meta.model_config())
    gpt = build_model(model, config.parallel, config.engine, meta.vocab_size, where="meta", lora=lora)
    first, last = lora.rows
    tables = [name for name in (EMBEDDING, OUTPUT) if first < last and (name == EMBEDDING or not model.tie_embeddings)]
    for name, parameter in list(gpt.named_parameters()):
        if is_adapter(name) or name in tables:
            module, _, leaf = name.rpartition(".")
            value = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            value.__dict__.update(parameter.__dict__)
            setattr(gpt.get_submodule(module), leaf, value)
    held = {name for name, parameter in gpt.named_parameters() if parameter.device.type != "meta"}
    state = {name: entry for name, entry in gpt.sharded_state_dict().items() if name in held}
    loaded = load_sharded({"model": state}, base.folder)["model"]
    adapters = {name: loaded[name] for name in sorted(loaded) if name.endswith((".lora_a", ".lora_b"))}
    rows = {}
    for name in tables:
        other = name.removesuffix("weight") + "rows"
        rows[name] = (loaded[name][first:last].float() + loaded[other].float()).to(loaded[name].dtype)
    tensors = adapter_tensors(family, model, adapters, rows)
    if config.export.precision != "stored":
        tensors = {name: value.to(dtype_of(config.export.precision)) for name, value in tensors.items()}
    name = HubName.of(of)
    base_name, revision = (of, None) if name is None else (name.repo, name.revision)
    return tensors, adapter_config(family, lora, base_name, tables, lora.rows, revision)
