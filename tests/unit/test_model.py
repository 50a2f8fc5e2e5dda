"""What the model is built from: vocabulary padding, the mapping to Megatron-Core, parameter counts, the CPU patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from torch.utils._python_dispatch import TorchDispatchMode

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.model import cross_entropy
from steerlm_megatron.model.arithmetic import model_flops, multiplied_parameters, padded_vocab_size
from steerlm_megatron.model.cross_entropy import vocab_parallel_cross_entropy
from steerlm_megatron.model.fused import rotate
from steerlm_megatron.model.gpt import LastLayer, LastParallelLayer, build_model, transformer_config
from steerlm_megatron.model.norm import NormedResidual, PackedNorm
from steerlm_megatron.model.packed_tokens import PackedTokens, Rotary
from steerlm_megatron.model.regression_head import RegressionHead
from steerlm_megatron.model.weights import fill, global_names, initial_weights, initialize
from steerlm_megatron.runtime import device, mcore_compat, mcore_private, parallel

SMALL = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=48)


GEMMA: dict[str, Any] = {"post_norms": True, "qk_norm": True, "norm": "rmsnorm1p", "activation": "geglu"}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank."""
    parallel.initialize(ParallelConfig(), 1)
    yield


@pytest.mark.parametrize(
    ("vocab", "multiple", "tensor", "rows"),
    [
        (32003, 128, 1, 32128),
        (32003, 128, 2, 32128),
        (32003, 128, 8, 32128),
        (32128, 128, 4, 32128),
        (1, 128, 1, 128),
        (300, 1, 1, 300),
        (300, 1, 8, 304),
        (300, 128, 3, 384),
        (300, 10, 4, 300),
    ],
)
def test_vocabulary_is_padded_to_a_multiple_that_ranks_divide(
    vocab: int, multiple: int, tensor: int, rows: int
) -> None:
    found = padded_vocab_size(vocab, multiple, tensor)
    assert found == rows >= vocab
    assert found % tensor == found % multiple == 0


def test_the_default_padding_is_the_same_for_every_power_of_two() -> None:
    for vocab in (1, 127, 128, 129, 32000, 32003, 256_003):
        assert len({padded_vocab_size(vocab, 128, tensor) for tensor in (1, 2, 4, 8, 16, 32, 64, 128)}) == 1


def test_the_configuration_reaches_megatron_core(cpu: None) -> None:
    model = replace(
        SMALL,
        num_query_groups=2,
        head_dim=16,
        dropout=0.1,
        bias=True,
        norm_epsilon=1e-6,
        init_std=0.03,
        norm="layernorm1p",
        sliding_window=100,
        full_attention_layers=[1],
        query_pre_attn_scalar=25,
    )
    found = transformer_config(
        model, ParallelConfig(tensor=2, pipeline=2, sequence=True), EngineConfig(precision="bf16")
    )
    expected: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "ffn_hidden_size": 48,
        "layernorm_epsilon": 1e-6,
        "init_method_std": 0.03,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "window_size": (99, 0),
        "window_attn_skip_freq": [1, 0],
        "softmax_scale": 0.2,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "bf16": True,
        "calculate_per_token_loss": True,
    }
    assert {key: getattr(found, key) for key in expected} == expected


def test_defaults_are_filled_in(cpu: None) -> None:
    found = transformer_config(SMALL, ParallelConfig(sequence=True), EngineConfig())
    assert found.num_query_groups == 4 and found.kv_channels == 8
    assert found.sequence_parallel is False, "there is nothing to split with one rank"
    assert found.params_dtype is torch.float32 and not found.bf16


@pytest.mark.parametrize(
    ("name", "function", "gated"),
    [("swiglu", F.silu, True), ("geglu", F.gelu, True), ("gelu", F.gelu, False), ("squared_relu", squared_relu, False)],
)
def test_activations(name: str, function: Any, gated: bool, cpu: None) -> None:
    found = transformer_config(replace(SMALL, activation=name), ParallelConfig(), EngineConfig())
    assert found.activation_func is function and found.gated_linear_unit is gated


@pytest.mark.parametrize(
    ("kind", "granularity", "modules"),
    [("none", None, []), ("selective", "selective", ["core_attn"]), ("full", "full", [])],
)
def test_recomputation(kind: str, granularity: str | None, modules: list[str], cpu: None) -> None:
    found = transformer_config(SMALL, ParallelConfig(), EngineConfig(recompute=kind))
    assert found.recompute_granularity == granularity
    if modules:
        assert found.recompute_modules == modules
    assert found.recompute_method == ("uniform" if kind == "full" else None)


@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm1p", "layernorm", "layernorm1p"])
def test_norms(norm: str, cpu: None) -> None:
    config = transformer_config(replace(SMALL, norm=norm), ParallelConfig(), EngineConfig())
    layer = PackedNorm(config, 32, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((5, 32), (32,), (32,)))
    layer.weight.data.copy_(weight)
    scale = weight + 1 if norm.endswith("1p") else weight
    if norm.startswith("rmsnorm"):
        assert not hasattr(layer, "bias")
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    else:
        layer.bias.data.copy_(bias)
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale + bias
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert layer(x.bfloat16()).dtype is torch.bfloat16
    fresh = PackedNorm(config, 32)
    assert fresh.weight.eq(0.0 if norm.endswith("1p") else 1.0).all(), "every norm starts as the identity's scale"


def test_initial_weights_depend_on_seed_and_name_alone(cpu: None) -> None:
    def built(seed: int, attributes: int | None = None, layers: int = 2) -> dict[str, torch.Tensor]:
        model = replace(SMALL, num_layers=layers, init_std=0.5)
        torch.manual_seed(seed * 7 + layers)  # must not matter
        gpt = initialize(build_model(model, ParallelConfig(), EngineConfig(), 300, attributes), model, 300, seed)
        return {name: p.detach() for name, p in global_names(gpt)}

    first, again, other, scorer = built(1), built(1), built(2), built(1, attributes=3)
    deeper = built(1, layers=3)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.ndim == 2:
            assert not torch.equal(weight, other[name])
        if not name.startswith("output_layer"):
            assert torch.equal(weight, scorer[name])
        if not name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            assert torch.equal(weight, deeper[name]), "of a deeper model, the same layers"
    name = "decoder.layers.{}.mlp.linear_fc1.weight"
    assert not torch.equal(first[name.format(0)], first[name.format(1)])
    assert first[name.format(0)].std() == pytest.approx(0.5, rel=0.05)
    assert first["decoder.layers.0.mlp.linear_fc2.weight"].std() == pytest.approx(0.5 / 2, rel=0.05)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert first[name].shape == (384, 32) and first[name][300:].eq(0).all() and first[name][:300].ne(0).all()


def test_a_model_on_meta_has_names_shapes_and_sharding_and_no_memory(cpu: None) -> None:
    for model, attributes in ((SMALL, None), (SMALL, 3), (replace(SMALL, **GEMMA), None)):
        real = build_model(model, ParallelConfig(), EngineConfig(), 300, attributes)
        meta = build_model(model, ParallelConfig(), EngineConfig(), 300, attributes, where="meta")
        assert all(p.is_meta for p in meta.parameters()) and not any(p.is_meta for p in real.parameters())
        assert [(n, p.shape, p.dtype) for n, p in meta.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in real.named_parameters()
        ]
        marks = [{k: v for k, v in vars(p).items() if k != "main_grad"} for p in real.parameters()]
        assert marks == [vars(p) for p in meta.parameters()] and any(m.get("tensor_model_parallel") for m in marks)
        assert meta.sharded_state_dict().keys() == real.sharded_state_dict().keys()
        assert {name for name, _ in real.named_parameters()} <= real.sharded_state_dict().keys()


def test_every_parameter_has_an_initial_value(cpu: None) -> None:
    """Megatron-Core draws none, and what memory held before must not become a weight."""
    for change in ({}, {"norm": "layernorm1p", "bias": True}, {"tie_embeddings": True}, {"activation": "gelu"}, GEMMA):
        model = replace(SMALL, **change)
        gpt = build_model(model, ParallelConfig(), EngineConfig(), 300)
        fill((parameter, torch.full(parameter.shape, torch.nan)) for parameter in gpt.parameters())
        initialize(gpt, model, 300, seed=1)
        assert all(parameter.isfinite().all() for parameter in gpt.parameters())


def test_a_new_regression_head_predicts_its_bias(cpu: None) -> None:
    gpt = build_model(SMALL, ParallelConfig(), EngineConfig(), 300, attributes=3)
    assert isinstance(gpt.output_layer, RegressionHead)
    fill(initial_weights(gpt, SMALL, 300, 0, head_bias_A=torch.tensor([1.0, 2.5, 0.0])))
    positions = torch.arange(6)
    packed = PackedTokens.from_cu_seqlens(torch.tensor([0, 6], dtype=torch.int32), positions)
    packed.output_index_K = torch.tensor([2, 5])
    out = gpt(torch.arange(6)[None], positions[None], None, packed_seq_params=packed)
    assert out.shape == (1, 2, 3) and out.dtype is torch.float32
    assert torch.equal(out[0], torch.tensor([[1.0, 2.5, 0.0]] * 2))


@pytest.mark.parametrize("change", [{}, {"num_query_groups": 2}, {"activation": "gelu"}, {"head_dim": 16}, GEMMA])
@pytest.mark.parametrize("view", ["sft", "ap"])
def test_flops_count_the_parameters_that_tokens_meet(change: dict[str, Any], view: str, cpu: None) -> None:
    """All matrices but the input embedding, without norms and padding rows; the head of a scoring model is left out."""
    model, vocab = replace(SMALL, **change), 300
    gpt = build_model(model, ParallelConfig(), EngineConfig(), vocab, 3 if view == "ap" else None)
    matrices = {
        name: p.numel()
        for name, p in gpt.named_parameters()
        if p.ndim == 2 and not name.startswith(("embedding.", "output_layer."))
    }
    expected = sum(matrices.values()) + (0 if view == "ap" else vocab * model.hidden_size)
    assert multiplied_parameters(model, vocab, head=view == "ap") == expected
    # 2 multiply-adds forward and 4 backward per parameter and token; causal attention sees half of each square.
    assert model_flops(expected, 2, 32, tokens=10, sum_squared_lengths=58.0) == 6 * expected * 10 + 6 * 2 * 32 * 58
    assert model_flops(expected, 2, 32, 10, 58.0, training=False) * 3 == model_flops(expected, 2, 32, 10, 58.0)


def _packed(lengths: list[int], wanted: list[int] | None) -> PackedTokens:
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = PackedTokens.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), positions)
    packed.output_index_K = None if wanted is None else torch.tensor(wanted)
    return packed


@pytest.mark.parametrize("parallel_residual", [False, True])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_last_layer_computes_what_is_wanted_and_nothing_else(
    recompute: str, parallel_residual: bool, cpu: None
) -> None:
    """Outputs and gradients are those of a layer that computes everything."""
    small = replace(SMALL, parallel_residual=parallel_residual)
    gpt = build_model(small, ParallelConfig(), EngineConfig(recompute=recompute), 300)
    initialize(gpt, small, 300, seed=2).train()
    lengths, wanted = [5, 1, 9], [0, 4, 5, 13]
    tokens, weight = torch.arange(15) * 7 % 300, torch.randn(4, 384, generator=torch.Generator().manual_seed(0))
    layer = gpt.decoder.layers[-1]
    last = LastParallelLayer if parallel_residual else LastLayer
    assert isinstance(layer, last) and not isinstance(gpt.decoder.layers[0], last)
    seen: list[int] = []
    layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = {}
    for name, index in {"part": wanted, "all": None}.items():
        gpt.zero_grad()
        packed = _packed(lengths, index)
        out = gpt(tokens[None], packed.positions_T[None], None, packed_seq_params=packed)[0]
        out = out if index else out[wanted]
        (out * weight).sum().backward()
        found[name] = [out.detach(), *(p.grad.clone() for p in gpt.parameters() if p.grad is not None)]
    assert set(seen) == {4, 15} and len(found["part"]) == len(list(gpt.parameters())) + 1
    for part, whole in zip(found["part"], found["all"], strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_norms_of_heads_and_parallel_residuals_are_what_they_say(recompute: str, cpu: None) -> None:
    """One layer against its formula in plain torch, with gradients."""
    model = replace(
        SMALL, num_layers=1, num_query_groups=2, qk_norm=True, qkv_bias=True, parallel_residual=True, init_std=0.3
    )
    gpt = build_model(model, ParallelConfig(), EngineConfig(recompute=recompute), 300)
    initialize(gpt, model, 300, seed=2).train()
    layer = gpt.decoder.layers[0]
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    p = {name: value.detach().clone().requires_grad_() for name, value in gpt.named_parameters()}
    tokens, packed = torch.arange(7) * 11 % 300, _packed([7], None)
    out = gpt(tokens[None], packed.positions_T[None], None, packed_seq_params=packed)[0]

    def of(name: str) -> torch.Tensor:
        return p[f"decoder.layers.0.{name}"]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.norm_epsilon) * weight

    x = p["embedding.word_embeddings.weight"][tokens]
    inner = norm(x, of("input_layernorm.weight"))
    qkv = inner @ of("self_attention.linear_qkv.weight").T + of("self_attention.linear_qkv.bias")
    q, k, v = qkv.view(7, 2, 4, 8).split([2, 1, 1], 2)
    q, k = (norm(a, of(f"self_attention.{n}_layernorm.weight")) for a, n in ((q, "q"), (k, "k")))
    tables = packed.rotary(Rotary.of(model), torch.float32)
    q, k = (rotate(a.reshape(7, -1, 8), *tables) for a in (q, k))
    heads = (a.reshape(7, -1, 8).transpose(0, 1) for a in (q, k, v))
    attended = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1).reshape(7, -1)
    gate, up = (norm(x, of("pre_mlp_layernorm.weight")) @ of("mlp.linear_fc1.weight").T).chunk(2, -1)
    added = attended @ of("self_attention.linear_proj.weight").T + (F.silu(gate) * up) @ of("mlp.linear_fc2.weight").T
    expected = norm(x + added, p["decoder.final_layernorm.weight"]) @ p["output_layer.weight"].T
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    for result in (out, expected):
        (result * weight).sum().backward()
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=1e-4, atol=1e-4, msg=name)


def test_rope_scaling_of_llama_3_is_told_by_turns() -> None:
    """Within the original length: many turns stay, few are divided, and in between it is monotonous."""
    where, base = torch.device("cpu"), Rotary(64, 5e5)
    plain_R = base.frequencies(where)
    scaled_R = Rotary(64, 5e5, "llama3", 8.0, 1.0, 4.0, 8192).frequencies(where)
    turns_R, share_R = 8192 * plain_R / (2 * torch.pi), plain_R / scaled_R
    assert torch.equal(share_R[turns_R > 4], torch.ones(int((turns_R > 4).sum())))
    assert torch.equal(scaled_R[turns_R < 1], plain_R[turns_R < 1] / 8)
    assert ((turns_R >= 1) & (turns_R <= 4)).any() and (share_R.diff() >= 0).all()
    torch.testing.assert_close(Rotary(64, 5e5, "linear", 4.0).frequencies(where), plain_R / 4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_torchs_without_a_float32_copy(
    dtype: torch.dtype, cap: float | None, compiled: bool, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formulas of compiled kernels stand in for these, since compiling takes long; a GPU has them
    (tests/gpu/test_cuda.py).
    """
    monkeypatch.setattr(cross_entropy, "one_kernel", lambda formula: formula)
    monkeypatch.setattr(cross_entropy, "_CPU_BYTES", 4 * 53 * 3)  # three rows at a time, and the last ones two
    g = torch.Generator().manual_seed(0)
    weight_KV = (torch.randn(17, 50, generator=g) * 5).to(dtype)
    weight_KV[3] = torch.tensor([-1e4] * 49 + [1e4])  # exp of neither is finite without taking out the largest
    labels_K, scale_K = torch.randint(0, 50, (17,), generator=g), torch.rand(17, generator=g)
    wide = weight_KV.clone().float().requires_grad_()
    capped = wide if cap is None else cap * torch.tanh(wide / cap)
    expected_K = F.cross_entropy(capped, labels_K, reduction="none")
    (expected_K * scale_K).sum().backward()
    padding_K3 = torch.full((17, 3), 1e4, dtype=dtype)  # three columns that only pad have no part in it
    leaf = torch.cat([weight_KV, padding_K3], 1).requires_grad_()
    with _Largest() as largest:
        losses_K = vocab_parallel_cross_entropy(leaf * 1, labels_K, 50, cap, compiled)
        (losses_K * scale_K).sum().backward()
    assert losses_K.dtype is torch.float32
    torch.testing.assert_close(losses_K, expected_K, rtol=1e-6, atol=1e-5)
    assert wide.grad is not None and leaf.grad is not None
    close = {"rtol": 1e-5, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 2**-8, "atol": 1e-7}
    torch.testing.assert_close(leaf.grad[:, :50].float(), wide.grad, **close)
    assert not leaf.grad[:, 50:].any()
    if dtype is torch.bfloat16 and not compiled:
        assert largest.float32 <= 3 * 53


class _Largest(TorchDispatchMode):
    """The elements of the largest float32 tensor that an operation gives."""

    float32 = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype is torch.float32:
            self.float32 = max(self.float32, out.numel())
        return out


def test_a_norm_before_the_residual_stream_takes_the_bias_too(cpu: None) -> None:
    config = transformer_config(replace(SMALL, norm="rmsnorm1p"), ParallelConfig(), EngineConfig())
    add = NormedResidual(config, PackedNorm)
    torch.nn.init.normal_(add.norm.weight)
    output, bias, residual = torch.randn(5, 1, 32), torch.randn(32), torch.randn(5, 1, 32)
    expected = residual + add.norm(output + bias)
    torch.testing.assert_close(add(False, False)((output, bias), residual, 0.5), expected)
    torch.testing.assert_close(add(False, False)((output + bias, None), residual, 0.5), expected)
    dropped = add(True, False)((output, bias), residual, 0.5) - residual
    assert 30 < (dropped == 0).sum() < 130


def test_the_embedding_has_its_scale_in_the_weights_type(cpu: None) -> None:
    """As Gemma was trained: √3072 is 55.5 in bf16."""
    tokens, found = torch.arange(4)[None], {}
    for precision in ("fp32", "bf16"):
        model = replace(SMALL, hidden_size=3072, ffn_hidden_size=8, head_dim=2, num_layers=1, scale_embeddings=True)
        gpt = build_model(model, ParallelConfig(), EngineConfig(precision=precision), 128)
        torch.nn.init.ones_(gpt.embedding.word_embeddings.weight)
        found[precision] = float(gpt.embedding(tokens, tokens)[0, 0, 0].detach())
    assert found == {"fp32": pytest.approx(3072**0.5), "bf16": 55.5}


def test_megatron_core_is_patched_once(cpu: None) -> None:
    from megatron.core.pipeline_parallel import schedules

    def patched() -> list[object]:
        names = [name.get() for name in mcore_private.NAMES]
        functions = [getattr(found, "__func__", found) for found in names]  # a bound method is another at every look
        return [torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type, *functions]

    before = patched()
    mcore_compat.apply()
    mcore_compat.apply()
    assert all(a is b for a, b in zip(before, patched(), strict=True))
    assert torch.zeros(1).type() == "torch.FloatTensor", "type names are changed around a few functions only"
    if not device.has_cuda():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
