"""RMSNorm, RoPE and SwiGLU of ours against their formulas, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from steerlm_megatron.model.attention import PackedTokens
from steerlm_megatron.model.fused import SwiGLU, rms_norm, rotate


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


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rope_turns_pairs_by_their_positions_angle(rotary_dim: int) -> None:
    positions = torch.tensor([0, 1, 2, 0, 1])
    packed = PackedTokens.from_cu_seqlens(torch.tensor([0, 3, 5], dtype=torch.int32), positions)
    cos, sin = packed.rotary(rotary_dim, 100.0, torch.float64)
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
    assert packed.rotary(8, 1e4, torch.float32)[0] is packed.rotary(8, 1e4, torch.float32)[0]
