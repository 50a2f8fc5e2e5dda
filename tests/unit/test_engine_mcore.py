"""Optimisations that the Megatron-Core engine switches on where their requirements are met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch.utils._python_dispatch import TorchDispatchMode

from steerlm_megatron.model.weights import initial_weights
from steerlm_megatron.runtime.mcore_compat import add_weight_gradient
from steerlm_megatron.runtime.mcore_private import accumulate_gradients_by
from tests.helpers.engines import VOCAB, Case, bare, make, step_batches


def test_weight_gradients_are_accumulated_by_the_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's product in the place of Apex's extension, as on GPUs, parameters are the same and every product's
    gradient goes through it.
    """

    def trained() -> dict[str, torch.Tensor]:
        engine = make(Case("sft"))
        for step in range(2):
            engine.train_step(step_batches(step))
        (part,) = [{name: p.detach().clone() for name, p in chunk.named_parameters()} for chunk in bare(engine)]
        return part

    plain, calls = trained(), []

    def accumulate(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        calls.append(main_grad.shape)
        add_weight_gradient(inputs, grad_output, main_grad)

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)  # both go back after the test
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    accumulate_gradients_by(accumulate)
    fused = trained()
    linear = [name for name in plain if "linear_" in name and "weight" in name and "norm" not in name]
    assert len(calls) == 2 * 4 * (len(linear) + 1), "steps x micro-batches x products, the output layer's too"
    for name, parameter in plain.items():
        torch.testing.assert_close(fused[name], parameter, rtol=0, atol=1e-6, msg=name)


def test_one_data_parallel_rank_has_nothing_to_overlap() -> None:
    """The setting is ignored, whatever was asked for."""
    engine = make(Case("sft", overlap=True))
    assert not engine.overlap_param_gather and engine.config.no_sync_func is None


class _NoHostReads(TorchDispatchMode):
    """Fail on operations whose result the host needs before it can go on; on a GPU each would wait for the device.

    Values that the host knows are NumPy arrays here and pass.
    """

    def __init__(self, allowed: int = 0) -> None:
        super().__init__()
        self.allowed, self.found = allowed, 0

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if any(name == read or name.startswith(f"{read}.") for read in self.READS):
            self.found += 1
            assert self.found <= self.allowed, name
        if name.startswith(("index.", "index_put")):
            assert all(i is None or i.dtype is not torch.bool for i in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["sft", "ap"])
def test_a_micro_batch_reads_nothing_back_from_the_device(objective: str) -> None:
    batches = step_batches(0)
    expected = make(Case(objective)).train_step(batches).loss
    engine = make(Case(objective))
    (chunk,) = engine.chunks
    sums = []
    for batch in batches:
        with _NoHostReads():
            output, loss = engine._forward(iter([batch]), chunk)
            total, _, found = loss(output)
            total.backward()
        sums.append(found["sums"])
    assert engine.objective.means(torch.stack(sums).sum(0).tolist())["loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoHostReads():
        float(torch.ones(1) + 1)


@pytest.mark.parametrize("objective", ["sft", "ap"])
def test_a_step_waits_for_the_norm_and_nothing_else(objective: str) -> None:
    engine = make(Case(objective))
    first, second = step_batches(0), step_batches(1)
    engine.train_step(first)
    with _NoHostReads(allowed=1) as reads:
        result = engine.train_step(second)
    assert reads.found == 1 and not result.skipped and result.grad_norm > 0


def test_main_weights_start_from_values_that_are_not_rounded() -> None:
    case = Case("sft", precision="bf16")
    engine = make(case)
    expected = [value for _, value in initial_weights(bare(engine)[0], case.model, VOCAB, seed=5)]
    parameters = list(bare(engine)[0].parameters())
    mains = [parameter.main_param.view(parameter.shape) for parameter in parameters]
    assert len(expected) == len(parameters) > 10
    for parameter, main, value in zip(parameters, mains, expected, strict=True):
        assert parameter.dtype is torch.bfloat16 and torch.equal(parameter, value.bfloat16())
        assert torch.equal(main, value)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in expected)


@pytest.mark.parametrize("objective", ["sft", "ap"])
def test_the_optimizer_can_be_stepped_alone(objective: str) -> None:
    """Benchmarks step the optimizer without losses, so the gradient norm alone decides whether the step is applied."""
    updated, norm, _ = make(Case(objective)).optimizer.step()
    assert updated and norm == 0.0
