"""One forward pass of a regression model over packed rows, without gradients, at any layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from steerlm_megatron.data.collate import RowBatch
from steerlm_megatron.model.attention import PackedTokens
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.runtime.device import device


@torch.no_grad()
def predict_values(model: PackedGPTModel, batch: RowBatch) -> torch.Tensor | None:
    """float32 [P, A] on the CPU for ``batch.pool_P``; None except on the last pipeline stage. Collective over the
    replica.
    """
    here = device()

    def step(_: object, stage: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        packed = PackedTokens.from_cu_seqlens(batch.cu_seqlens, batch.positions_T)
        packed.output_index_K = batch.pool_P
        output = stage(
            batch.tokens_T[None].to(here), batch.positions_T[None].to(here), None, packed_seq_params=packed.to(here)
        )
        return output, lambda values, non_loss_data=False: values

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=model,
        num_microbatches=1,
        seq_length=batch.tokens_T.numel(),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage():
        return None
    return outputs[0].squeeze(0).float().cpu()
