"""Generator states of a rank, as they are kept in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from steerlm_megatron.runtime.device import has_cuda
from steerlm_megatron.runtime.parallel import Layout


def rng_state(at: Layout) -> ShardedObject:
    """This rank's states, at its place in the layout; they load at the same layout only."""
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if has_cuda() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    shape, offset = (at.pp_size, at.tp_size, at.dp_cp_size), (at.pp_rank, at.tp_rank, at.dp_cp_rank)
    return ShardedObject("rng", state, shape, offset, replica_id=0)


def take_rng_state(state: dict[str, Any]) -> None:
    """Go on from loaded states."""
    torch.set_rng_state(state["torch"])
    if has_cuda() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
