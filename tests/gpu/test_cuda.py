"""Tests that need a GPU: torch's varlen kernel, agreement with the reference, no waiting for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
from steerlm_megatron.model.attention import attend_sdpa, attention_backend
from steerlm_megatron.model.gpt import transformer_config
from steerlm_megatron.model.inputs import on_device
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.mcore_compat import add_weight_gradient
from tests.helpers.engines import (
    MODEL,
    OPTIM,
    Case,
    build,
    documents,
    full_row,
    make,
    row,
    shards,
    step_batches,
    unsplit,
)
from tests.helpers.reference import Trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("part", [None, 0, 1])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [None, 60])
def test_the_varlen_kernel_keeps_documents_apart(groups: int, part: int | None, window: int | None) -> None:
    """Outputs and gradients of the kernel are those of SDPA over each document, up to bf16's rounding.

    ``part`` selects a context-parallel rank of two, whose documents may have more keys than queries.
    """
    batch, g = full_row([5, 1, 700, 65, 9, 300]), torch.Generator().manual_seed(0)
    batch = batch if part is None else batch.part(part, 2)
    _, packed = on_device(batch)
    model = replace(MODEL, sliding_window=window)
    varlen = attention_backend("varlen", transformer_config(model, ParallelConfig(), EngineConfig(precision="bf16")))
    queries = len(batch.tokens_T)
    keys = sum(chunk.stop - chunk.first_key for chunk in batch.chunks) or queries
    sizes = ((queries, 4), (keys, groups), (keys, groups))
    q, k, v = (torch.randn(*size, 64, generator=g).cuda().bfloat16() for size in sizes)
    weight, found = torch.randn(queries, 4, 64, generator=g).cuda(), []
    for attend in (varlen, attend_sdpa):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, packed, 0.125, window=window)
        (out.float() * weight).sum().backward()
        found.append([out.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


@pytest.fixture
def exact() -> Iterator[None]:
    """Compute float32 products exactly, without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("objective", ["sft", "ap"])
def test_training_on_the_gpu_is_the_references(objective: str, exact: None) -> None:
    """The GPU must meet the bounds of tests/parity: fp32, five steps, 1e-5, with compiled kernels as by default."""
    case = Case(objective)
    parallel.initialize(case.layout, 5)
    start = {name: p.cpu().double() for name, p in unsplit([shards(build(case))]).items()}
    weights_A = torch.tensor([1.0, 2.0, 1.0])
    reference = Trainer(dict(start), case.model, OPTIM[objective], 8, weights_A)
    expected = [reference.train_step(documents([row(step, i) for i in range(4)])) for step in range(5)]
    engine = make(case)
    found = [engine.train_step(step_batches(step)) for step in range(5)]
    assert [r.loss for r in found] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    params = unsplit([shards([chunk.module for chunk in engine.chunks])])
    assert max(float((p.cpu() - reference.params[name]).abs().max()) for name, p in params.items()) <= 1e-5


def test_weight_gradients_are_added_in_float32() -> None:
    """The sum is that of exact products of bf16 inputs: each of them loses nothing by being written in bf16."""
    g = torch.Generator().manual_seed(0)
    inputs, grads = (torch.randn(4, 300, size, generator=g).cuda().bfloat16() for size in (64, 96))
    found = torch.randn(96, 64, generator=g).cuda()
    expected = found.double()
    for input_TD, grad_TF in zip(inputs, grads, strict=True):
        add_weight_gradient(input_TD, grad_TF, found)
        expected += grad_TF.double().t() @ input_TD.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)  # bf16 would be off by 1e-1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", ["sft", "ap"])
def test_a_micro_batch_never_waits_for_the_device(objective: str, precision: str) -> None:
    engine = make(Case(objective, precision=precision))
    (chunk,) = engine.chunks
    batches = [batch.pin() for batch in step_batches(0)]
    engine.train_step(batches)  # the first step compiles kernels and fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            output, loss = engine._forward(iter([batch]), chunk)
            loss(output)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", ["sft", "ap"])
def test_a_step_waits_for_the_norm_and_nothing_else(objective: str, precision: str) -> None:
    engine = make(Case(objective, precision=precision))
    batches = [batch.pin() for batch in step_batches(0)]
    engine.train_step(batches)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            engine.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in said if "synchronizing CUDA operation" in str(each.message)]
    assert len(waits) == 1, waits
