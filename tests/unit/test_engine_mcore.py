"""What the Megatron-Core engine switches on, where what it needs is there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.engines import Case, bare, make, step_batches
from megatron.core.tensor_parallel import layers


def test_weight_gradients_are_accumulated_by_the_matrix_product_where_apex_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apex's extension, played by torch: the same parameters, and every product's gradient went that way."""

    def trained() -> dict[str, torch.Tensor]:
        engine = make(Case("sft"))
        for step in range(2):
            engine.train_step(step_batches(step))
        (part,) = [{name: p.detach().clone() for name, p in chunk.named_parameters()} for chunk in bare(engine)]
        return part

    plain, calls = trained(), []

    def accumulate(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        calls.append(main_grad.shape)
        main_grad.add_(grad_output.t() @ inputs)

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    extension = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", extension, raising=False)
    fused = trained()
    linear = [name for name in plain if "linear_" in name and "weight" in name and "norm" not in name]
    assert len(calls) == 2 * 4 * (len(linear) + 1), "steps x micro-batches x products, the output layer's too"
    for name, parameter in plain.items():
        torch.testing.assert_close(fused[name], parameter, rtol=0, atol=1e-6, msg=name)


def test_one_data_parallel_rank_has_nothing_to_overlap() -> None:
    """Whatever was asked for."""
    engine = make(Case("sft", overlap=True))
    assert not engine.overlap_param_gather and engine.config.no_sync_func is None
