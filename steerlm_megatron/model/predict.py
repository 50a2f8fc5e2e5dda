"""One forward pass of a regression model over packed rows, without gradients, at any layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.model.inputs import on_device


@torch.no_grad()
def predict_values(model: PackedGPTModel, batch: RowBatch) -> torch.Tensor | None:
    """float32 [P, A] on the CPU for ``batch.pool_P``; None except on the last pipeline stage. Collective over the
    replica.
    """

    def step(_: object, stage: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        here, packed = on_device(batch)
        packed.output_index_K = here.pool_P
        output = stage(here.tokens_T[None], here.positions_T[None], None, packed_seq_params=packed)
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
