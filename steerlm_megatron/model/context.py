"""Context parallelism: a rank computes a part of the sequence, and attends to keys and values of all of it.

Owns: gathering them. Does not own: which tokens are whose (``RowBatch.part``), attention (``attention.py``).
Invariant: what a rank computes for its tokens equals what one rank alone computes for them.

Keys and values are gathered in every layer, as Llama 3 does (arXiv 2407.21783 §3.3.2): documents of a packed sequence
begin and end anywhere, so that who needs whose keys differs from batch to batch, and with grouped queries keys are
small beside queries. The gradient takes the way back, summed. Megatron-Core's own way is Transformer Engine's ring.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from steerlm_megatron.data.batch import ContextChunk


def keys_of_chunks(
    k_TGH: torch.Tensor, v_TGH: torch.Tensor, chunks: tuple[ContextChunk, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's keys and values → those that its ``chunks`` attend to, chunk after chunk, each from ``first_key`` on.

    Collective over the context-parallel group, in the backward pass as well.
    """
    group = parallel_state.get_context_parallel_group()
    size = chunks[0].stop - chunks[0].start
    both = gather_from_sequence_parallel_region(torch.stack((k_TGH, v_TGH), 1), group=group)
    gathered = both.split(size)  # the two chunks of rank 0, then of rank 1, …
    last = len(gathered) - 1
    pieces: list[torch.Tensor] = []
    for chunk in chunks:
        for number in range(chunk.first_key // size, chunk.stop // size):
            place = 2 * number if number <= last // 2 else 2 * (last - number) + 1
            pieces.append(gathered[place][max(0, chunk.first_key - number * size) :])
    k_KGH, v_KGH = torch.cat(pieces).unbind(1)
    return k_KGH, v_KGH
