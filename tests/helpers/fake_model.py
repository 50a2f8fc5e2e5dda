"""A model, tokenizer and template that are small enough to check generation by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from steerlm_megatron.generate.protocol import Limits
from steerlm_megatron.model.packed_tokens import CacheShape, PackedTokens

VOCAB = 64
TURN, LABEL = 62, 63  # ids of control tokens; text has the ids 0..61


class FakeTokenizer:
    """A tokenizer with one id per character of a small alphabet, plus two control ids."""

    vocab_size = VOCAB
    alphabet = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:;-'"

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[i] if i < 62 else f"<{i}>" for i in ids)

    @property
    def controls(self) -> dict[str, int]:
        return {text: self.control_id(text) for text in ("<turn>", "<label>")}

    def control_id(self, text: str) -> int:
        return {"<turn>": TURN, "<label>": LABEL}[text]


@dataclass(frozen=True)
class FakeTemplate:
    control_strings: tuple[str, ...] = ("<turn>", "<label>")
    stop_strings: tuple[str, ...] = ("<turn>",)
    response_suffix: str = "\n"


class FakeModel(torch.nn.Module):
    """Two layers of grouped-query attention whose logits depend on every token and its position.

    It computes in float64, and the sampler reads float32, so the batch of a request changes none of its logits, and a
    test of the server may expect exactly the tokens that another batch gave."""

    def __init__(
        self, vocab_size: int = VOCAB, stop_id: int = TURN, heads: int = 4, groups: int = 2, head_dim: int = 8
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        dim = heads * head_dim

        def weight(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator).double() / shape[-1] ** 0.5 * 1.5)

        self.embedding = torch.nn.Parameter(torch.randn(vocab_size, dim, generator=generator).double())
        self.positions = torch.nn.Parameter(torch.randn(512, dim, generator=generator).double())
        self.qkv = torch.nn.ParameterList([weight((heads + 2 * groups) * head_dim, dim) for _ in range(2)])
        self.out = weight(vocab_size + 8, dim)  # 8 rows of padding
        self.stop_id, self.stop_bias = stop_id, 0.0
        self.step_sec = 0.0
        self.go = threading.Event()  # while it is cleared, steps wait
        self.go.set()
        self.calls: list[int] = []
        self.fail_at: int | None = None

    def cache_shape(self) -> CacheShape:
        return CacheShape(tuple(range(1, len(self.qkv) + 1)), self.groups, self.head_dim, torch.float64)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: None,
        labels: None = None,
        packed_seq_params: PackedTokens | None = None,
    ) -> torch.Tensor:
        assert self.go.wait(120)
        time.sleep(self.step_sec)
        self.calls.append(input_ids.shape[1])
        if self.fail_at is not None and len(self.calls) >= self.fail_at:
            raise RuntimeError("the model broke")
        x = self.embedding[input_ids[0]] + self.positions[position_ids[0]]
        for number, qkv in enumerate(self.qkv, 1):
            parts = (x @ qkv.T).split([n * self.head_dim for n in (self.heads, self.groups, self.groups)], dim=1)
            q, k, v = (part.unflatten(1, (-1, self.head_dim)) for part in parts)
            scale = self.head_dim**-0.5
            if packed_seq_params is None:
                q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
                x = x + out[0].transpose(0, 1).flatten(1)
            else:
                assert packed_seq_params.kv is not None
                x = x + packed_seq_params.kv.attend(number, q, k, v, scale).flatten(1)
        if packed_seq_params is not None and packed_seq_params.output_index_K is not None:
            x = x[packed_seq_params.output_index_K]
        logits = x @ self.out.T
        logits[:, self.stop_id] += self.stop_bias
        return logits[None]


def limits(**changes: Any) -> Limits:
    values: dict[str, Any] = {"max_queue": 1000, "max_batch": 8, "max_sequence_tokens": 128, "max_cache_tokens": 1024}
    return Limits(**{**values, **changes})
