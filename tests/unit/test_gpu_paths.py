"""Generation as it is on a GPU, on tensors without values: what is on the wrong device, or read by the host, fails.

``device.standing_in("cuda")`` makes ``meta`` the device: an operation that takes a tensor of the CPU beside one of the
device raises, as does every read of a value. tests/gpu has the values.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.generate import kv_cache, runner
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import Request, SamplingParams
from steerlm_megatron.model.attention import varlen_function
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.runtime import device, parallel
from tests.helpers.fake_model import VOCAB, FakeTemplate, FakeTokenizer, limits

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "windows": {"sliding_window": 9},
    "norms of heads": {"qk_norm": True},
    "caps": {"attention_softcap": 2.0},
}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "everything": {
        "top_k": 8, "top_p": 0.9, "min_p": 0.01, "logprobs": True, "repetition_penalty": 1.2, "logit_bias": ((3, 1.0),),
    },
    "prompts": {"prompt_logprobs": 2, "top_logprobs": 3, "min_tokens": 3},
}  # fmt: skip


class Kernels:
    """What the kernels take and give, by operations that see devices and shapes."""

    @staticmethod
    def store(layer: torch.Tensor, slots_T: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor) -> None:
        new_2GTH = torch.stack([k_TGH, v_TGH]).transpose(1, 2)
        layer.flatten(2, 3).index_copy_(2, slots_T.long(), new_2GTH)

    @staticmethod
    def turn_and_store(
        layer: torch.Tensor,
        slots_T: torch.Tensor,
        qkv_TGSH: torch.Tensor,
        cos_T1R: torch.Tensor,
        sin_T1R: torch.Tensor,
        keys: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        turned_TGSH = qkv_TGSH[:, :, :-1] * cos_T1R[:, :, None, :1] * sin_T1R[:, :, None, :1]
        Kernels.store(layer, slots_T, turned_TGSH[:, :, -1], qkv_TGSH[:, :, -1])
        return turned_TGSH[:, :, :-1].flatten(1, 2), turned_TGSH[:, :, -1] if keys else None

    @staticmethod
    def attend(
        layer: torch.Tensor,
        rows_BX: torch.Tensor,
        q_BNH: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        assert rows_BX.dtype is torch.int32 and len(rows_BX) == len(q_BNH)
        return q_BNH + layer[0, 0].index_select(0, rows_BX[:, 2].long())[:, :1]


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Take what torch's kernel takes, and give as much as it gives."""
    assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32 and type(max_q) is type(max_k) is int
    return query + (key[:1, :1] + value[:1, :1]) * (cu_seq_q + cu_seq_k)[:1, None, None]


class Copied:
    """A copy for the host, which gets zeros."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.is_meta or not tensor.numel(), "the device's tensors are copied, nothing else"
        self.shape = tensor.shape

    def tolist(self) -> Any:
        return torch.zeros(self.shape).tolist()


@pytest.mark.parametrize(
    ("kind", "params"),
    [*((kind, "plain") for kind in KINDS), *(("llama", params) for params in PARAMS if params != "plain")],
)
def test_generation_stays_on_the_device(kind: str, params: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whole and in parts, beside sequences that decode by graphs, twins, preemption."""
    monkeypatch.setattr(runner, "HostCopy", Copied)
    monkeypatch.setattr(kv_cache, "_kernels", lambda _: Kernels)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    parallel.initialize(ParallelConfig(), seed=1)
    config = ModelConfig(
        num_layers=2, hidden_size=64, num_heads=4, num_query_groups=2, ffn_hidden_size=96, **KINDS[kind]
    )
    with device.standing_in("cuda"):
        engine = EngineConfig(precision="bf16", compile=False)
        model = build_model(config, ParallelConfig(), engine, VOCAB, gather_logits=True).eval().requires_grad_(False)
        few = limits(max_batch=6, chunk_tokens=32, overlap=True, max_cache_tokens=256)
        generator = Generator(model, FakeTokenizer(), FakeTemplate(), few)
        cache = generator.runner.cache
        cache._varlen, cache.sdpa = varlen_function(windowed=True), True
        rng, asked = random.Random(1), []
        for i in range(20):
            prompt = tuple(rng.randrange(60) for _ in range(rng.randint(1, 50))) if i % 4 else (1, 2, 3) * 7
            drawn = SamplingParams(max_tokens=25 + i % 9, seed=i, ignore_eos=True, **PARAMS[params])
            asked.append(Request(f"r{i}", prompt, drawn))
        results = generator.generate(asked)
    assert [len(result.token_ids) for result in results] == [25 + i % 9 for i in range(20)]
    assert generator.runner._graphs is not None and len(generator.runner._graphs._replays) > 2
    assert generator.counters()["preemptions_total"] > 0
