"""A model of ours as a Hugging Face folder.

Owns: our parameters under their names, safetensors files in shards. Does not own: gathering a model that is split over
ranks, tokenizer files, the model card. Invariant: no file stands under its final name before all are written, and
``config.json``, without which the folder is nothing, comes last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import move_into_place, write_json_atomic
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.model.hf.files import INDEX, SINGLE
from steerlm_megatron.model.hf.tables import EMBEDDING, HEAD_BIAS, OUTPUT, Family, in_their_order, pieces
from steerlm_megatron.model.weights import global_names

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def hf_tensors(
    gpt: PackedGPTModel,
    model: ModelConfig,
    family: Family,
    vocab_size: int,
    instead: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of a model that is whole on this rank, as and in the order in which ``transformers`` has them.

    Tables are cut to ``vocab_size`` rows. A tied output layer is left out, and so is the bias of a regression head,
    which no class for sequence classification has (``classifier.place_bias``). What is a tensor of ours as it is comes
    as that tensor, not as a copy.

    Args:
        instead: values that are written in the place of parameters', by our names.
    """
    ours = {name: p.detach() for name, p in global_names(gpt) if name != HEAD_BIAS} | dict(instead or {})
    if model.tie_embeddings:
        ours.pop(OUTPUT, None)
    for name, value in in_their_order(family, ours):
        value = value[:vocab_size] if name in (EMBEDDING, OUTPUT) else value
        found: dict[str, list[torch.Tensor]] = {}
        at = 0
        for tensor, start, stop in pieces(family, model, name, value.shape[0]):
            assert start == sum(len(rows) for rows in found.get(tensor, [])), "a layout names a tensor's rows in order"
            found.setdefault(tensor, []).append(value[at : at + stop - start])
            at += stop - start
        assert at == value.shape[0]
        for tensor, rows in found.items():
            yield tensor, rows[0] if len(rows) == 1 else torch.cat(rows)


def write_hf(
    target: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> list[str]:
    """Write tensors in ``dtype`` and ``config.json`` into a folder; at most one shard is in memory.

    Files have the names that ``transformers`` gives them. How many shards there are is known only at the end, so they
    are written under temporary names and renamed together; an exception leaves nothing behind.

    Returns:
        The names of the files, ``config.json`` last.

    Raises:
        UserError: if the folder holds weights already, which a reader could take for these, or cannot be written.
    """
    target = Path(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if there := sorted(path.name for path in target.glob("*.safetensors*")):
            raise UserError(f"{target} holds weights already ({' '.join(there[:3])}); write to another folder")
        return _write(target, tensors, config, dtype, max_shard_bytes)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: could not be written, and nothing was left there: {error}") from error


def _write(
    target: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    max_shard_bytes: float,
) -> list[str]:
    temporary: list[Path] = []
    placed: list[Path] = []
    names: list[list[str]] = []
    size = parameters = 0
    try:
        for shard in _shards(tensors, dtype, max_shard_bytes):
            path = target / f".model-{len(temporary) + 1:05d}.{os.getpid()}.tmp"
            temporary.append(path)
            save_file(shard, path, metadata={"format": "pt"})
            names.append(list(shard))
            size += sum(value.nbytes for value in shard.values())
            parameters += sum(value.numel() for value in shard.values())
            shard.clear()  # before the next one is gathered
        count = len(temporary)
        files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for path, file in zip(temporary, files, strict=True):
            placed.append(target / file)
            move_into_place(path, target / file)
        if count > 1:
            places = {name: file for file, held in zip(files, names, strict=True) for name in held}
            index = {
                "metadata": {"total_parameters": parameters, "total_size": size},
                "weight_map": dict(sorted(places.items())),
            }
            placed.append(target / INDEX)
            write_json_atomic(target / INDEX, index)
        out = dict(config)
        for key in ("dtype", "torch_dtype"):
            if key in config or not config.keys() & {"dtype", "torch_dtype"}:
                out[key] = _DTYPE_NAMES[dtype]
        write_json_atomic(target / "config.json", out)
        return [*(path.name for path in placed), "config.json"]
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, max_bytes: float
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors on the CPU in ``dtype``, as many at a time as fit; a tensor that is larger by itself stands alone."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, value in tensors:
        # A copy of its own: the file library refuses tensors that share memory, as parts of one of ours do.
        value = value.to("cpu", dtype, copy=True).contiguous()
        if shard and size + value.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
    yield shard
