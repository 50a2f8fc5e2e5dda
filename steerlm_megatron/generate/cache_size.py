"""How large the key/value cache is: decided once, at the start, from the memory that is left beside the model.

Owns: the arithmetic, and refusing what leaves no room. Does not own: the memory itself (``kv_cache.py``). Invariant:
all ranks of a replica get the same number of blocks, that of the rank with the least room.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch

from steerlm_megatron.config.inference import CHUNK_TOKENS
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.generate.protocol import Limits
from steerlm_megatron.model.packed_tokens import CacheShape
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime import host_memory

log = get_logger(__name__)


class GenerationLike(Protocol):
    """The keys of ``generation.*`` that decide the engine's limits (``config.inference.GenerationConfig``)."""

    max_batch: int
    max_sequence_tokens: int
    max_cache_tokens: int | None
    memory_fraction: float
    block_tokens: int
    chunk_tokens: int | None
    admission: str
    cuda_graphs: bool


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still allocate: of its GPU, or its share of what the host has left for this job."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory.available() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def chunk_tokens(wanted: GenerationLike, device: torch.device) -> int:
    """Return how many tokens of prompts a step takes."""
    return wanted.chunk_tokens or CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cpu"])


def limits_for(
    wanted: GenerationLike,
    longest: int,
    shape: CacheShape,
    device: torch.device,
    group: ModelGroup,
    still_to_load: int = 0,
) -> Limits:
    """Return the engine's limits for a model of ``longest`` positions. Collective over the replica.

    The cache has ``max_cache_tokens`` slots if that is set; else as many as ``max_batch`` sequences of full length
    need, within ``memory_fraction`` of the memory that is free. Other sequences' prefixes stay in slots that nobody
    needs. ``still_to_load``: bytes of the model's weights, if they are not in memory yet.

    Raises:
        UserError: the memory does not hold one sequence of full length.
    """
    size = wanted.block_tokens
    sequence = min(wanted.max_sequence_tokens, longest)
    block_bytes = size * shape.token_bytes
    free = max(0, free_memory(device) - still_to_load)
    needed = -(-sequence // size)
    fitting = group.least(int(free * wanted.memory_fraction) // block_bytes)
    if wanted.max_cache_tokens is not None:
        blocks = max(-(-wanted.max_cache_tokens // size), needed)
        if group.least(free // block_bytes) < blocks:
            raise UserError(
                f"generation.max_cache_tokens={wanted.max_cache_tokens}: {blocks} blocks of {size} tokens take "
                f"{_size(blocks * block_bytes)} a rank, and {_size(free)} is free beside the model; lower it, or leave "
                "it out to take what fits"
            )
    else:
        blocks = min(wanted.max_batch * needed, fitting)
    if blocks < needed:
        remedies = ["spread the model over more ranks (parallel.tensor, parallel.pipeline)"]
        if fitting:
            remedies.insert(0, f"lower generation.max_sequence_tokens (to {fitting * size} or less)")
        if group.least(free // block_bytes) >= needed:
            remedies.insert(0, "raise generation.memory_fraction")
        raise UserError(
            f"a sequence of {sequence} tokens needs {_size(needed * block_bytes)} of key/value cache a rank, and "
            f"generation.memory_fraction={wanted.memory_fraction:g} of the {_size(free)} that is free beside the "
            f"model is less: {', or '.join(remedies)}"
        )
    log.info(
        "key/value cache: %d blocks of %d tokens, %s a rank; holds %d sequences of %d tokens",
        blocks, size, _size(blocks * block_bytes), blocks // needed, sequence,
    )  # fmt: skip
    return Limits(
        max_batch=wanted.max_batch,
        max_sequence_tokens=sequence,
        max_cache_tokens=blocks * size,
        block_tokens=size,
        chunk_tokens=chunk_tokens(wanted, device),
        reserve=wanted.admission == "reserve",
        cuda_graphs=wanted.cuda_graphs,
        overlap=device.type == "cuda" and group.size == 1,  # other ranks get tokens by way of the host
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**28 else f"{count / 2**20:.3g} MiB"
