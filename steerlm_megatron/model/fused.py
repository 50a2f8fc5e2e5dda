"""RMSNorm, RoPE, SwiGLU and GeGLU in few passes over memory, forward and backward.

Composed of torch's elementary operations these take more time on a CPU than half the matrix products they
surround; Megatron-Core's fused kernels need Transformer Engine or Apex. Each is one autograd function that keeps only
its inputs (and one number per token) and recomputes the rest. With ``engine.compile``, torch.compile makes one kernel
of the formula instead (Triton on a GPU, C++ on a CPU), at the price of compiling it once. Invariant: the same values
and gradients as the formula, to rounding; tests compare both in float64.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from steerlm_megatron.runtime.device import on_gpu

_silu_backward = torch.ops.aten.silu_backward.grad_input
_gelu_backward = torch.ops.aten.gelu_backward.grad_input

_MOST_KERNELS = 64  # of one formula, by inner sizes


class _RMSNorm(torch.autograd.Function):
    """y = x · r · w with r = (mean(x²) + eps)^-1/2 over the last dimension (Zhang & Sennrich 2019, eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        scale_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return (x_TD * scale_T1).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        unit_TD = x_TD * scale_T1
        product_TD = grad_TD * unit_TD
        mean_T1 = (product_TD @ weight_D).div_(x_TD.shape[-1]).unsqueeze(-1)
        grad_x_TD = (grad_TD * weight_D).addcmul_(unit_TD, mean_T1, value=-1.0).mul_(scale_T1)
        return grad_x_TD, product_TD.flatten(0, -2).sum(0), None


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float, compiled: bool = False) -> torch.Tensor:
    """RMSNorm of x [..., D] in x's dtype, computed in float32 at least. CUDA has a kernel of torch's own."""
    if compiled:
        return one_kernel(_rms_norm_formula)(x, weight_D, eps)
    if x.is_cuda:
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    if on_gpu(x):  # its stand-in: that kernel keeps what this function keeps
        planned: torch.Tensor = _RMSNorm.apply(x, weight_D.to(x.dtype), eps)
        return planned
    wide = torch.promote_types(x.dtype, torch.float32)
    out: torch.Tensor = _RMSNorm.apply(x.to(wide), weight_D.to(wide), eps)
    return out.to(x.dtype)


def _rms_norm_formula(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide.dtype)).to(x.dtype)


def _sum_and_rms_norm_formula(
    x: torch.Tensor, more: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + more
    return total, _rms_norm_formula(total, weight_D, eps)


def sum_and_rms_norm(
    x: torch.Tensor, more: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + more and its RMSNorm, each [..., D] in x's dtype, by one compiled kernel."""
    total, normed = one_kernel(_sum_and_rms_norm_formula)(x, more, weight_D, eps)
    return total, normed


@functools.cache
def one_kernel(formula: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for any number of tokens, in which rows differ, and for each size of the other dimensions.

    A kernel that knows the inner sizes reads memory in wide pieces and needs no division to find a number's place: with
    inner sizes that it learnt when called, SwiGLU's backward pass ran at a fifth of an H200's memory rate
    (``benchmarks/gpu.md``).
    """
    kernel = torch.compile(formula, dynamic=False)
    dynamo = importlib.import_module("torch._dynamo")

    def call(*inputs: Any) -> Any:
        # A kernel for widths of the model and of heads, for one token, with gradients and without: more than torch's
        # limit, which every thread has for itself.
        if dynamo.config.recompile_limit < _MOST_KERNELS:
            dynamo.config.recompile_limit = _MOST_KERNELS
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.ndim > 1:
                dynamo.maybe_mark_dynamic(x, 0)
        return kernel(*inputs)

    return call


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNH: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_T1R, sin_T1R)
        return rotated(x_TNH, cos_T1R, sin_T1R, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_TNH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos_T1R, sin_T1R = ctx.saved_tensors
        return rotated(grad_TNH, cos_T1R, sin_T1R, -1.0), None, None


def rotated(x_TNH: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
    """:func:`rotate` without gradients: [T, ..., H] with tables that have as many dimensions; sign -1 turns back."""
    half = cos_T1R.shape[-1]
    out_TNH = torch.empty_like(x_TNH, memory_format=torch.contiguous_format)
    first, second = x_TNH[..., :half], x_TNH[..., half : 2 * half]
    torch.mul(first, cos_T1R, out=out_TNH[..., :half]).addcmul_(second, sin_T1R, value=-sign)
    torch.mul(second, cos_T1R, out=out_TNH[..., half : 2 * half]).addcmul_(first, sin_T1R, value=sign)
    if 2 * half < x_TNH.shape[-1]:
        out_TNH[..., 2 * half :] = x_TNH[..., 2 * half :]
    return out_TNH


def _rotate_formula(x_TNH: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> torch.Tensor:
    half = cos_T1R.shape[-1]
    first, second, rest = x_TNH.split((half, half, x_TNH.shape[-1] - 2 * half), -1)
    return torch.cat([first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R, rest], -1)


def rotate(x_TNH: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor, compiled: bool = False) -> torch.Tensor:
    """RoPE (Su et al. 2021, eq. 34) in the half-split layout of Llama and Megatron: the first R dimensions are paired
    with the next R, the rest pass unchanged. Tables [T, 1, R] in x's dtype. Returns [T, N, H].
    """
    if compiled:
        return one_kernel(_rotate_formula)(x_TNH, cos_T1R, sin_T1R)
    out: torch.Tensor = _Rotate.apply(x_TNH, cos_T1R, sin_T1R)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        to_gate, to_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=to_up)
        _silu_backward(grad * up, gate, grad_input=to_gate)
        return out


def _swiglu_formula(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        to_gate, to_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate, approximate="tanh"), out=to_up)
        _gelu_backward(grad * up, gate, approximate="tanh", grad_input=to_gate)
        return out


def _geglu_formula(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


class SwiGLU(torch.nn.Module):
    """silu(gate) · up of [..., gate; up] (Shazeer 2020), as Megatron-Core's MLP builds an activation module."""

    compiled = False
    function: type[torch.autograd.Function] = _SwiGLU
    formula = staticmethod(_swiglu_formula)

    def __init__(self, config: object = None) -> None:
        super().__init__()

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        """[..., 2F] → [..., F]."""
        if self.compiled:
            return one_kernel(self.formula)(both)
        out: torch.Tensor = self.function.apply(both)
        return out

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing to save; Megatron-Core's MLP asks every child."""
        return {}


class CompiledSwiGLU(SwiGLU):
    """The same with ``engine.compile``: Megatron-Core's specs take classes."""

    compiled = True


class GeGLU(SwiGLU):
    """gelu(gate) · up (Shazeer 2020) with gelu in its tanh form, as Gemma has it."""

    function = _GeGLU
    formula = staticmethod(_geglu_formula)


class CompiledGeGLU(GeGLU):
    """The same with ``engine.compile``."""

    compiled = True
