"""RMSNorm, LayerNorm and their forms that store weight - 1. They run under sequence parallelism without Transformer
Engine or Apex.

Invariant: statistics are computed in float32, whatever the activations' dtype. With sequence parallelism each rank sees
its own tokens, so the weights' gradients are partial; ``weight.sequence_parallel = True`` makes Megatron-Core sum them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig

from steerlm_megatron.model.fused import rms_norm
from steerlm_megatron.runtime.device import on_gpu


class PackedNorm(torch.nn.Module):
    """One of the four norms over the last dimension; ``config.normalization`` and ``layernorm_zero_centered_gamma``
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
            # A weight near 1 loses in bf16 what one that is stored near 0 has; torch's kernel takes the type of x.
            wide = x.float() if self.one_plus and on_gpu(x) and not self.compiled else x
            return rms_norm(wide, weight, self.eps, self.compiled).to(x.dtype)
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


class NormedResidual(torch.nn.Module):
    """The bias, dropout and addition after attention or MLP, of what has passed through a norm first (sandwich norms:
    Gemma 2, arXiv 2408.00118 §2). It stands where Megatron-Core's layer has a function for the addition.
    """

    def __init__(self, config: TransformerConfig, norm: type[PackedNorm]) -> None:
        super().__init__()
        self.norm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """Return what adds (output [T, 1, D], bias or None) to the residual stream with a probability of dropout."""
        add = get_bias_dropout_add(training, fused)

        def normed(
            output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            output, bias = output_with_bias
            out: torch.Tensor = add((self.norm(output if bias is None else output + bias), None), residual, dropout)
            return out

        return normed
