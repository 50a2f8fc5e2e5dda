"""The attribute-prediction head: hidden state → one float per attribute.

HelpSteer (arXiv 2311.09528 §4.4): a linear layer with bias on the hidden state at the end of the response. It takes the
place of the output layer on the last pipeline stage, so the model around it stays Megatron-Core's ``GPTModel``. Which
positions it is applied to is said by ``PackedTokens.output_index_K``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class _Float32Linear(torch.nn.Linear):
    """Linear(D, A) in float32, whatever the weights' dtype. A module that is called: what gathers weights that an
    optimizer spread over ranks (Megatron-Core beside the forward pass, ZeRO 3) waits for them in its modules' hooks.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(hidden.float(), self.weight.float(), bias)


class RegressionHead(MegatronModule):
    """Linear(D, A), computed in float32, the same on every tensor-parallel rank.

    Training starts from zero weights and a bias at the labels' mean, the best constant (``weights.initial_weights``),
    and only has to find what the text adds. Without a bias (``model.head_bias=false``), as the classifiers of
    ``transformers`` are, the weights have to find the mean as well.
    """

    def __init__(self, config: TransformerConfig, attributes: int, bias: bool = True) -> None:
        super().__init__(config=config)
        self.regression = _Float32Linear(config.hidden_size, attributes, bias=bias)

    def forward(
        self, hidden_SBD: torch.Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[torch.Tensor, None]:
        """[K, 1, D] → ([K, 1, A] float32, no bias). The signature is that of a Megatron-Core output layer."""
        return self.regression(hidden_SBD), None
