"""Our RMSNorm, RoPE, SwiGLU and GeGLU equal their formulas in float64, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from steerlm_megatron.model.fused import CompiledGeGLU, CompiledSwiGLU, GeGLU, SwiGLU, rms_norm, rotate
from steerlm_megatron.model.packed_tokens import PackedTokens, Rotary


def grown(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)


def test_rms_norm_is_the_formula() -> None:
    x, weight = grown(5, 1, 8), grown(8, seed=1)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * weight
    assert torch.allclose(rms_norm(x, weight, 1e-3), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, weight))


def test_rms_norm_of_zeros_is_zero_with_finite_gradients() -> None:
    x, weight = torch.zeros(3, 4, requires_grad=True), torch.ones(4)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_swiglu_is_the_formula() -> None:
    both = grown(6, 1, 10)
    gate, up = both.chunk(2, -1)
    assert torch.allclose(SwiGLU()(both), F.silu(gate) * up, atol=1e-12)
    assert torch.autograd.gradcheck(SwiGLU(), (both,))


def test_geglu_is_the_formula() -> None:
    both = grown(6, 1, 10)
    gate, up = both.chunk(2, -1)
    assert torch.allclose(GeGLU()(both), F.gelu(gate, approximate="tanh") * up, atol=1e-12)
    assert torch.autograd.gradcheck(GeGLU(), (both,))


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rope_turns_pairs_by_their_positions_angle(rotary_dim: int) -> None:
    positions = torch.tensor([0, 1, 2, 0, 1])
    packed = PackedTokens.from_cu_seqlens(torch.tensor([0, 3, 5], dtype=torch.int32), positions)
    cos, sin = packed.rotary(Rotary(rotary_dim, 100.0), torch.float64)
    x = grown(5, 2, 8)
    half = rotary_dim // 2
    pairs = torch.complex(x[..., :half], x[..., half:rotary_dim])
    turn = torch.exp(1j * positions[:, None] * 100.0 ** -(torch.arange(half) / half))[:, None]
    turned = pairs * turn.to(pairs.dtype)
    expected = torch.cat([turned.real, turned.imag, x[..., rotary_dim:]], -1)
    assert torch.allclose(rotate(x, cos, sin), expected, atol=1e-6)  # angles are float32
    assert torch.autograd.gradcheck(lambda a: rotate(a, cos, sin), (x,))


def test_rope_tables_are_made_once_a_row() -> None:
    packed = PackedTokens.from_cu_seqlens(torch.tensor([0, 3], dtype=torch.int32), torch.arange(3))
    assert packed.rotary(Rotary(8, 1e4), torch.float32)[0] is packed.rotary(Rotary(8, 1e4), torch.float32)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_are_the_same_functions(dtype: torch.dtype) -> None:
    """Compiled and plain functions have equal values and gradients, for a first and another number of tokens."""
    for tokens in (6, 11):
        x, both, heads = (grown(tokens, 1, 8), grown(tokens, 1, 12), grown(tokens, 2, 8))
        angle = grown(tokens, 1, 3).detach()
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for function, argument in (
            (lambda a, compiled: rms_norm(a, torch.linspace(1, 2, 8).to(dtype), 1e-5, compiled), x),
            (lambda a, compiled: (CompiledSwiGLU() if compiled else SwiGLU())(a), both),
            (lambda a, compiled: (CompiledGeGLU() if compiled else GeGLU())(a), both),
            (lambda a, compiled, c=cos, s=sin: rotate(a, c, s, compiled), heads),
        ):
            found = []
            for compiled in (False, True):
                leaf = argument.detach().to(dtype).requires_grad_()
                out = function(leaf, compiled)
                (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
                assert leaf.grad is not None and out.dtype is dtype
                found.append((out.detach(), leaf.grad))
            tolerance = 1e-5 if dtype is torch.float32 else 2e-2
            for plain, kernel in zip(*found, strict=True):
                torch.testing.assert_close(kernel, plain, rtol=tolerance, atol=tolerance)
