"""RMSNorm, LayerNorm and LayerNorm-1p that may run under sequence parallelism without Transformer Engine or Apex.

Invariant: statistics are computed in float32, whatever the activations' dtype. With sequence parallelism each rank sees
its own tokens, so the weights' gradients are partial; ``weight.sequence_parallel = True`` makes Megatron-Core sum them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from steerlm_megatron.model.fused import rms_norm
from steerlm_megatron.runtime.device import on_gpu


class PackedNorm(torch.nn.Module):
    """One of the three norms over the last dimension; ``config.normalization`` and ``layernorm_zero_centered_gamma``
    say which.
    """

    compiled = False

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.one_plus = config.layernorm_zero_centered_gamma
        self.eps = eps
        self.shape = (hidden_size,)
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size) if self.one_plus else torch.ones(hidden_size))
        if not self.rms:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] → [..., D], same dtype."""
        weight = self.weight + 1 if self.one_plus else self.weight
        if self.rms:
            return rms_norm(x, weight, self.eps, self.compiled)
        if on_gpu(x):  # its kernel accumulates in float32
            return F.layer_norm(x, self.shape, weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return F.layer_norm(x.float(), self.shape, weight.float(), self.bias.float(), self.eps).to(x.dtype)


class CompiledNorm(PackedNorm):
    """The same with ``engine.compile``: Megatron-Core's specs take classes."""

    compiled = True


class HeadNorm(PackedNorm):
    """The norm of queries or keys over the dimensions of a head, [T, 1, N, H].

    A tensor-parallel rank sees its own heads alone, with sequence parallelism and without, so the gradient of the one
    weight that all heads share is always partial. Megatron-Core sums it by the module's name; the mark is for what goes
    by marks (``train/engine_deepspeed.py``).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]


class CompiledHeadNorm(HeadNorm):
    """The same with ``engine.compile``."""

    compiled = True
