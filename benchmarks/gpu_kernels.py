"""The part of the GPU check that measures single kernels."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_common import Findings, copy_rate, timed

MODES = ("project", "static shapes", "token dimension dynamic")


@dataclass(frozen=True)
class Settings:
    """Constants of ``generate/paged_kernels.py``: tokens of a part and of a tile, warps and stages, programs."""

    part: int = 128
    tile: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2048

    def __str__(self) -> str:
        return f"part {self.part}, tile {self.tile}, warps {self.warps}, stages {self.stages}, programs {self.programs}"


SETTINGS = (
    Settings(), Settings(part=256), Settings(warps=2), Settings(tile=32), Settings(tile=32, warps=2, stages=4),
    Settings(programs=4096), Settings(part=256, programs=1024), Settings(stages=2), Settings(tile=128, stages=2),
    Settings(part=64, warps=2, programs=4096),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """T tokens, width D, MLP width F, N query heads and G key heads of H."""

    T: int = 8192
    D: int = 2048
    F: int = 8192
    N: int = 32
    G: int = 8
    H: int = 64


@dataclass(frozen=True)
class Kernel:
    """A formula of ``model/fused.py``: what it is called with, and the numbers that it cannot but read and write."""

    name: str
    formula: Callable[..., torch.Tensor]
    eager: Callable[..., torch.Tensor]  # what runs without engine.compile
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    numbers: int


def part_kernels(findings: Findings) -> None:
    """Measure compiled kernels by how their shapes are declared, and attention by how many key heads it gets."""
    tiny = findings.tiny
    sizes = Sizes(T=64, D=32, F=48, N=4, G=2, H=8) if tiny else Sizes()
    findings.note("copy GB/s", copy_rate(tiny))
    for kernel in kernels(sizes, torch.float32 if tiny else torch.bfloat16):
        for mode in MODES:
            findings.measure(f"{kernel.name}: {mode}", partial(kernel_rate, kernel, mode, sizes.T, tiny), 6)
        findings.measure(f"{kernel.name}: without compile", partial(kernel_rate, kernel, "eager", sizes.T, tiny), 3)
    if torch.cuda.is_available() and not tiny:
        for name, heads, length in (
            ("heads repeated, documents of 512", sizes.N, 512),
            ("8 groups as they are, documents of 512", sizes.G, 512),
            ("heads repeated, documents of 4096", sizes.N, 4096),
        ):
            findings.measure(f"varlen, {name}", partial(attention_rate, sizes, heads, length), 4)
        for settings in SETTINGS:
            findings.measure(f"attention over blocks: {settings}", partial(paged_times, settings), 3)


def kernels(s: Sizes, dtype: torch.dtype) -> list[Kernel]:
    """Return the kernels of the project with inputs of sizes ``s``."""
    from steerlm_megatron.model import fused
    from steerlm_megatron.runtime.device import device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device(), dtype=dtype)

    def norm_inputs() -> tuple[torch.Tensor, ...]:
        # As a Parameter the weight has a static size to dynamo.
        return random(s.T, 1, s.D).requires_grad_(), torch.nn.Parameter(torch.ones(s.D, device=device(), dtype=dtype))

    def rotate_inputs() -> tuple[torch.Tensor, ...]:
        return random(s.T, s.N, s.H).requires_grad_(), random(s.T, 1, s.H // 2), random(s.T, 1, s.H // 2)

    return [
        Kernel(
            "rms_norm", lambda x, weight_D: fused._rms_norm_formula(x, weight_D, 1e-5),
            lambda x, weight_D: fused.rms_norm(x, weight_D, 1e-5), norm_inputs, 2 * s.T * s.D,
        ),
        Kernel("swiglu", fused._swiglu_formula, fused.SwiGLU(), lambda: (random(s.T, 1, 2 * s.F).requires_grad_(),),
               3 * s.T * s.F),
        Kernel("rotate", fused._rotate_formula, fused.rotate, rotate_inputs, 2 * s.T * s.N * s.H),
    ]  # fmt: skip


def compiled(formula: Callable[..., torch.Tensor], mode: str, tiny: bool) -> Callable[..., torch.Tensor]:
    """Return ``formula`` compiled in one of MODES; a tiny one without generating code, which takes a CPU long."""
    from steerlm_megatron.model import fused

    if mode == "project" and not tiny:
        return fused.one_kernel(formula)
    dynamic = {"project": True, "static shapes": False, "token dimension dynamic": None}[mode]
    return torch.compile(formula, dynamic=dynamic, backend="eager" if tiny else "inductor")


def kernel_rate(kernel: Kernel, mode: str, tokens: int, tiny: bool) -> dict[str, Any]:
    """Measure a kernel forward and backward, and the host's part of a call."""
    torch._dynamo.reset()
    call = kernel.eager if mode == "eager" else compiled(kernel.formula, mode, tiny)
    inputs = kernel.inputs()
    for tensor in inputs if mode == "token dimension dynamic" else ():
        if len(tensor) == tokens:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    gradient = torch.randn_like(call(*inputs))

    def forward() -> None:
        call(*inputs)

    def both() -> None:
        for tensor in inputs:
            tensor.grad = None
        call(*inputs).backward(gradient)

    one_way, both_ways = median_seconds(forward), median_seconds(both)
    starts = [time.perf_counter()]
    for _ in range(20):
        forward()
        starts.append(time.perf_counter())
    host = statistics.median(b - a for a, b in zip(starts, starts[1:], strict=False))
    moved = kernel.numbers * inputs[0].element_size()
    return {
        "forward us": round(1e6 * one_way, 1), "GB/s": round(moved / one_way / 1e9, 1),
        "fwd+bwd us": round(1e6 * both_ways, 1), "host us of a call": round(1e6 * host, 1),
    }  # fmt: skip


def median_seconds(function: Callable[[], None]) -> float:
    """Return a call's seconds on the device; on a GPU, without what the host takes to launch it."""
    for _ in range(3):
        function()
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(function, warmup=20, rep=60, return_mode="median") / 1e3
    return statistics.median(timed(function, 3))


def attention_rate(s: Sizes, heads_kv: int, length: int) -> dict[str, Any]:
    """Measure torch's varlen kernel on documents of ``length`` tokens with ``heads_kv`` key and value heads."""
    varlen, names = varlen_attention()
    total = 4 * s.T
    q, k, v = (
        torch.randn(total, heads, s.H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (s.N, heads_kv, heads_kv)
    )
    cu = torch.arange(0, total + 1, length, dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    if heads_kv < s.N and "enable_gqa" in names:
        options["enable_gqa"] = True
    call = partial(varlen, q, k, v, cu, cu, length, length, **options)
    gradient = torch.randn_like(q)
    for _ in range(3):
        call().backward(gradient)
    one_way = statistics.median(timed(call, 10))
    both_ways = statistics.median(timed(lambda: call().backward(gradient), 10))
    flops = 4 * total * length / 2 * s.N * s.H
    return {
        "forward ms": round(1e3 * one_way, 3), "TFLOP/s": round(flops / one_way / 1e12, 1),
        "fwd+bwd ms": round(1e3 * both_ways, 3), "fwd+bwd TFLOP/s": round(3.5 * flops / both_ways / 1e12, 1),
    }  # fmt: skip


def varlen_attention() -> tuple[Callable[..., Any], Sequence[str]]:
    """Return torch's varlen attention and the names of its parameters, which differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, list(inspect.signature(varlen_attn).parameters)


def paged_times(settings: Settings) -> dict[str, float]:
    """Measure attention of single tokens over blocks, in µs a layer: sequences of 560 tokens at the shapes of 1B and of
    7B, 64 at a time, and one of 3,000. Layers take turns, so that none is in the card's cache.
    """
    from steerlm_megatron.generate import paged_kernels as kernels

    names = ("_PART_TOKENS", "_TILE", "_WARPS", "_STAGES", "_PROGRAMS")
    before = {name: getattr(kernels, name) for name in names}
    values = (settings.part, settings.tile, settings.warps, settings.stages, settings.programs)
    for name, value in zip(names, values, strict=True):
        setattr(kernels, name, value)
    try:
        return {
            "1b us": paged_time(8, 4, 64, 64, 560),
            "7b us": paged_time(32, 1, 128, 64, 560),
            "1b, one of 3,000, us": paged_time(8, 4, 64, 1, 3000),
        }
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)


def paged_time(groups: int, share: int, dim: int, batch: int, length: int) -> float:
    """Return the µs of a layer's attention, as a graph runs it, for ``batch`` sequences of ``length`` tokens."""
    from triton.testing import do_bench

    from steerlm_megatron.generate import paged_kernels as kernels

    size, longest, count = 16, 4096, -(-length // 16)
    shape = (2, groups, batch * count, size, dim)
    layers = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(8 if batch > 1 and dim == 64 else 2)
    ]
    rows = torch.zeros(batch, 2 + longest // size, dtype=torch.int32)
    rows[:, 1] = length - 1
    rows[:, 2 : 2 + count] = torch.randperm(batch * count).view(batch, count)
    rows_BX, q_BNH = rows.cuda(), torch.randn(batch, groups * share, dim, device="cuda", dtype=torch.bfloat16)
    kernels.attend(layers[0], rows_BX, q_BNH, dim**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            kernels.attend(layer, rows_BX, q_BNH, dim**-0.5)
    return round(1e3 * do_bench(graph.replay, warmup=10, rep=40, return_mode="median") / len(layers), 1)
