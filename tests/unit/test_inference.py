"""The forward pass of generation equals the model's own, for every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.generate.kv_cache import BlockTables, KVCache, Span
from steerlm_megatron.model.arithmetic import kv_cache_bytes
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.inference import InferencePath, _Norm
from steerlm_megatron.model.lora import Lora
from steerlm_megatron.model.packed_tokens import PackedTokens
from steerlm_megatron.model.packed_weights import Linear, can_pack
from steerlm_megatron.model.weights import initialize
from steerlm_megatron.runtime import host_memory, parallel

VOCAB = 50
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "one key/value head each": {"num_query_groups": 4, "tie_embeddings": True},
    "biases": {"bias": True, "qkv_bias": True, "head_dim": 24},
    "qwen3": {"qk_norm": True, "norm": "rmsnorm"},
    "gemma3": {
        "activation": "geglu", "norm": "rmsnorm1p", "qk_norm": True, "post_norms": True, "scale_embeddings": True,
        "sliding_window": 4, "full_attention_layers": [1], "rotary_local_base": 100.0, "query_pre_attn_scalar": 24.0,
        "tie_embeddings": True,
    },
    "gemma2": {
        "activation": "geglu", "norm": "rmsnorm1p", "post_norms": True, "attention_softcap": 2.0, "logit_softcap": 3.0,
    },
    "nemotron": {"activation": "squared_relu", "norm": "layernorm1p", "rotary_percent": 0.5},
    "neox": {
        "activation": "gelu", "norm": "layernorm", "parallel_residual": True, "bias": True, "rotary_percent": 0.5,
    },
}  # fmt: skip


def built(lora: Lora | None = None, compiled: bool = False, **changes: Any) -> PackedGPTModel:
    parallel.initialize(ParallelConfig(), seed=1)
    shape = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
    config = ModelConfig(**{**shape, "init_std": 0.3, **changes})
    model = build_model(config, ParallelConfig(), EngineConfig(compile=compiled), VOCAB, gather_logits=True, lora=lora)
    initialize(model, config, VOCAB, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # far from where they start
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def steps(model: PackedGPTModel, forward: Any) -> list[torch.Tensor]:
    """Logits of two prompts, then of a token after each beside another prompt and the end of a known one."""
    cache = KVCache(model.cache_shape(), 16, 4, torch.device("cpu"))
    tables = BlockTables(4, 4)
    for blocks in ([3, 1, 7], [2, 5], [9, 4], [3, 10]):  # the last has the first one's first block
        tables.add(blocks)
    generator = torch.Generator().manual_seed(5)
    out = []
    for singles, longer, wanted in (
        ([], [Span(0, 0, 9), Span(1, 0, 6)], [8, 14]),
        ([Span(0, 9, 1), Span(1, 6, 1)], [Span(2, 0, 5), Span(3, 4, 3)], [0, 1, 6, 9]),
    ):
        positions_T = cache.begin(tables, singles, longer)
        packed = PackedTokens(positions_T=positions_T, kv=cache, output_index_K=torch.tensor(wanted))
        out.append(forward(torch.randint(0, VOCAB, positions_T.shape, generator=generator), packed))
    return out


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_equals_the_model(kind: str) -> None:
    model = built(**KINDS[kind])

    def theirs(ids_T: torch.Tensor, packed: PackedTokens) -> torch.Tensor:
        assert packed.positions_T is not None
        return model(ids_T[None], packed.positions_T[None], None, labels=None, packed_seq_params=packed)[0]

    for ours, expected in zip(steps(model, InferencePath(model)), steps(model, theirs), strict=True):
        assert expected.std() > 0.1 and ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_with_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' formulas stand in for them: compiling takes half a minute, and ``test_fused.py`` has it."""
    kernels: list[str] = []

    def formula_itself(formula: Any) -> Any:
        kernels.append(formula.__name__)
        return formula

    monkeypatch.setattr("steerlm_megatron.model.fused.one_kernel", formula_itself)
    for kind in ("llama", "gemma3"):
        expected, found = (built(compiled=compiled, **KINDS[kind]) for compiled in (False, True))
        kernels.clear()
        for ours, theirs in zip(
            steps(found, InferencePath(found)), steps(expected, InferencePath(expected)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        named = {"_rms_norm_formula", "_sum_and_rms_norm_formula", "_rotate_formula"}
        assert named < set(kernels) and len(set(kernels)) == 4


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_few_tokens_pass_a_norm_without_its_compiled_kernel(kind: str) -> None:
    """As on a GPU, where launching the kernel takes longer than few tokens do; bf16 and float32 in turns."""
    model = built(compiled=True, **KINDS[kind])
    norm = model.decoder.layers[0].input_layernorm
    norm.weight.copy_(torch.linspace(-1, 1, len(norm.weight)))
    ours, weight = _Norm(norm), norm.weight + 1 if norm.one_plus else norm.weight
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        x = torch.randn(5, len(weight), dtype=dtype)
        wide = x.double()
        expected = wide * (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * weight.double()
        near = 2e-2 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours(x, compiled=False).double(), expected, rtol=near, atol=near)


def test_the_cache_takes_what_the_arithmetic_says() -> None:
    changes = {"num_layers": 3, "head_dim": 24, "num_query_groups": 2}
    config = ModelConfig(hidden_size=32, num_heads=4, ffn_hidden_size=48, **changes)  # type: ignore[arg-type]
    shape = built(**changes).float().cache_shape()
    assert shape.layers == (1, 2, 3)
    assert 100 * shape.token_bytes == kv_cache_bytes(config, ParallelConfig(), 100, "fp32")


def test_a_model_with_adapters_has_its_own_forward_pass() -> None:
    assert InferencePath.takes(built())
    assert not InferencePath.takes(built(Lora(2, 4.0, ("linear_qkv",))))
    assert not InferencePath.takes(torch.nn.Linear(2, 2))


def test_weights_in_another_order_give_the_same_products() -> None:
    """The operators are torch's private ones: this fails when they move, and not only when they are wrong."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((48, 40), (48,)))
    assert can_pack(weight) and not can_pack(weight.double()) and not can_pack(weight.to("meta"))
    for given in (bias, None):
        plain, packed = Linear(weight, given), Linear(weight, given)
        packed.pack()
        for rows in (1, 2, 7, 32, 33):
            x = torch.randn(rows, 40, generator=generator)
            torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(packed(x, with_bias=False), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_weights_are_copied_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built().float()
    roomy = InferencePath(model)
    monkeypatch.setattr(host_memory, "available", lambda: 1000)
    tight = InferencePath(model)
    matrices = [(path.layers[0].qkv, path.layers[-1].fc2) for path in (roomy, tight)]
    assert [m._packed is not None for pair in matrices for m in pair] == [True, True, False, False]
    with torch.inference_mode():
        for mine, other in zip(steps(model, roomy), steps(model, tight), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
