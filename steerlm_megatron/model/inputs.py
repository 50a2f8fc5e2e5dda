"""A micro-batch on its way into a model: what engines and scoring do alike.

Invariant: the host never waits for the device here. What kernels read is copied from pinned memory (``RowBatch.pin``)
in their stream, and what the host needs to know (document lengths) is read before that.
"""

from __future__ import annotations

from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.model.packed_tokens import PackedTokens
from steerlm_megatron.runtime.device import device


def on_device(batch: RowBatch) -> tuple[RowBatch, PackedTokens]:
    """The batch and its document boundaries on this process's device."""
    here = batch.to(device())
    if batch.chunks:
        packed = PackedTokens.from_chunks(batch.chunks, here.positions_T)
        packed.cu_seqlens, packed.cu_keys = here.cu_queries, here.cu_keys
    else:
        packed = PackedTokens.from_cu_seqlens(batch.cu_seqlens, here.positions_T)
        packed.cu_seqlens = packed.cu_keys = here.cu_seqlens
    return here, packed
