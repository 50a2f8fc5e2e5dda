"""One forward pass over packed rows without gradients, at any layout: values of a regression model, log-probabilities
of a language model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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

    output = _last_stage(step, model, batch)
    return None if output is None else output.squeeze(0).float().cpu()


def _last_stage(step: Callable[..., Any], model: PackedGPTModel, batch: RowBatch) -> torch.Tensor | None:
    """Return what the last pipeline stage gives for one batch, and None on the others."""
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
    output: torch.Tensor = outputs[0]
    return output


@torch.no_grad()
def sum_log_probabilities(model: PackedGPTModel, batch: RowBatch) -> torch.Tensor | None:
    """Return Σ log P(token) over the tokens with loss of each document that has some, float64 [documents] on the CPU in
    their order; None except on the last pipeline stage. Collective over the replica.

    The logits are computed for the tokens with loss alone, in the model's precision, and the sums in float64.
    """
    bounds, target_K = batch.cu_seqlens.numpy(), batch.target_K.numpy()
    documents, document_K = np.unique(np.searchsorted(bounds, target_K, side="right"), return_inverse=True)

    def step(_: object, stage: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        here, packed = on_device(batch)
        packed.output_index_K = here.target_K
        labels = here.labels_T.index_select(0, here.target_K)[None]
        output = stage(here.tokens_T[None], here.positions_T[None], None, labels=labels, packed_seq_params=packed)
        return output, lambda losses, non_loss_data=False: losses

    losses_K = _last_stage(step, model, batch)
    if losses_K is None:
        return None
    total = torch.zeros(len(documents), dtype=torch.float64)
    return total.index_add_(0, torch.from_numpy(document_K), -losses_K.squeeze(0).double().cpu())
