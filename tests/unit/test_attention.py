"""Attention over packed documents: the choice of the kernel, what it is asked for, windows and caps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model import attention
from steerlm_megatron.model.attention import attend_sdpa, attention_backend, causal_attention, flash_takes
from steerlm_megatron.model.gpt import transformer_config
from steerlm_megatron.model.inputs import on_device
from steerlm_megatron.model.packed_tokens import PackedTokens
from steerlm_megatron.runtime import parallel
from tests.helpers.engines import full_row

SMALL = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=48)


@pytest.fixture
def cpu() -> None:
    """One rank."""
    parallel.initialize(ParallelConfig(), 1)


def _packed(lengths: list[int]) -> PackedTokens:
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedTokens.from_cu_seqlens(cu, torch.cat([torch.arange(n) for n in lengths]))


def test_the_attention_backend_is_chosen_or_refused(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = transformer_config(SMALL, ParallelConfig(), EngineConfig())
    assert attention_backend("auto", config) is attend_sdpa
    assert attention_backend("sdpa", config) is attend_sdpa
    with pytest.raises(UserError, match="engine.attention=varlen.*use engine.attention=sdpa"):
        attention_backend("varlen", config)
    # On a GPU, what lacks caps or windows is passed over, and refused when it is asked for.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    windowed = replace(SMALL, sliding_window=9)
    for model, cap, version in ((SMALL, 2.0, _varlen_2_13), (windowed, None, _varlen_2_10)):
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", version)
        config = transformer_config(model, ParallelConfig(), EngineConfig(precision="bf16"))
        assert attention_backend("auto", config, cap) is attend_sdpa
        with pytest.raises(UserError, match="no model.attention_softcap.* torch >= 2.10 .2.11 with model.sliding_wi"):
            attention_backend("varlen", config, cap)


def test_flash_attention_takes_some_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's varlen attention hands heads on as they are, and its kernel has none for others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert [flash_takes(dim, torch.bfloat16) for dim in (64, 100, 256, 288)] == [True, False, True, False]
    assert not flash_takes(64, torch.float32)
    config = transformer_config(replace(SMALL, head_dim=20), ParallelConfig(), EngineConfig(precision="bf16"))
    assert attention_backend("auto", config) is attend_sdpa
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not flash_takes(64, torch.bfloat16)


def _varlen(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, **kwargs: Any) -> Any:
    """What torch documents of ``varlen_attn``, by its definition: one dense product, masked by document and order."""
    assert q.dtype is torch.bfloat16 and cu_seq_q.dtype is cu_seq_k.dtype is torch.int32
    lengths_q, lengths_k = (cu.diff().long() for cu in (cu_seq_q, cu_seq_k))
    assert (max_q, max_k) == (int(lengths_q.max()), int(lengths_k.max())) and type(max_q) is type(max_k) is int
    assert len(q) == int(cu_seq_q[-1]) and len(k) == len(v) == int(cu_seq_k[-1])
    if kwargs.pop("enable_gqa", False):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    assert q.shape[1:] == k.shape[1:] == v.shape[1:], "heads of keys that differ need enable_gqa"
    before, after = kwargs.pop("window_size", (-1, -1))
    causal = kwargs.pop("is_causal", False) or after == 0
    scale = kwargs.pop("scale", None) or q.shape[-1] ** -0.5
    assert not kwargs
    document_q, document_k = (torch.arange(len(x)).repeat_interleave(x) for x in (lengths_q, lengths_k))
    seen = document_q[:, None] == document_k
    # Flash attention aligns the last query with the last key.
    from_end_q = cu_seq_q[1:][document_q] - torch.arange(len(q))
    from_end_k = cu_seq_k[1:][document_k] - torch.arange(len(k))
    seen = seen & (from_end_q[:, None] <= from_end_k) if causal else seen
    seen = seen & (from_end_k - from_end_q[:, None] <= before) if before >= 0 else seen
    scores = torch.einsum("qnh,knh->nqk", q.float(), k.float()) * scale
    return torch.einsum("nqk,knh->qnh", scores.masked_fill(~seen, -torch.inf).softmax(-1), v.float()).to(q.dtype)


def _varlen_2_10(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool = False
) -> Any:
    # The first two versions hand grouped heads to the kernel without a word; it takes them (tests/gpu/test_cuda.py).
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=is_causal, enable_gqa=True)


def _varlen_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    return _varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
    )


def _varlen_2_13(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Any:  # fmt: skip
    return _varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=enable_gqa
    )


@pytest.mark.parametrize("version", [_varlen_2_10, _varlen_2_11, _varlen_2_13])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("part", [None, 0, 1])
@pytest.mark.parametrize("window", [None, 60])
def test_the_varlen_backend_asks_for_what_sdpa_computes(
    version: Any, groups: int, part: int | None, window: int | None, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernel has no CPU form; its documented interface, in the three forms it had, stands in for it here.

    ``part``: for the tokens of that context-parallel rank of two, whose documents may have more keys than queries.
    """
    if window is not None and version is _varlen_2_10:
        return  # it has none, see above
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", version)
    model = replace(SMALL, sliding_window=window)
    config = transformer_config(model, ParallelConfig(), EngineConfig(precision="bf16"))
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch.cuda, "is_available", lambda: True)
        on_a_gpu.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        varlen = attention_backend("auto", config)
    packed, g = _packed([5, 1, 700, 10]), torch.Generator().manual_seed(0)
    queries = keys = 716
    if part is not None:
        batch = full_row([5, 1, 700, 10]).part(part, 2)
        packed = on_device(batch)[1]
        queries, keys = 358, sum(chunk.stop - chunk.first_key for chunk in batch.chunks)
        assert part or keys > queries
    sizes = ((queries, 4), (keys, groups), (keys, groups))
    q, k, v = (torch.randn(*size, 8, generator=g).bfloat16() for size in sizes)
    weight, found = torch.randn(queries, 4, 8, generator=g), []
    for attend in (varlen, attend_sdpa):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, packed, 0.3, window=window)
        (out.float() * weight).sum().backward()
        found.append([out.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)])
    assert varlen is not attend_sdpa and len(found[0]) == len(found[1]) == 4
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02  # bf16


def _dense(
    q_DNQH: torch.Tensor, k_DGKH: torch.Tensor, v_DGKH: torch.Tensor, window: int | None, cap: float | None
) -> torch.Tensor:
    """Attention by its definition, scores divided by 2."""
    k, v = (x.repeat_interleave(q_DNQH.shape[1] // x.shape[1], 1) for x in (k_DGKH, v_DGKH))
    score = q_DNQH @ k.transpose(-1, -2) / 2
    score = score if cap is None else cap * torch.tanh(score / cap)
    before = torch.arange(score.shape[-2])[:, None] + score.shape[-1] - score.shape[-2] - torch.arange(score.shape[-1])
    seen = (before >= 0) & (before < (window or score.shape[-1]))
    return score.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 20, 40])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (17, 17), (7, 23), (40, 40)])
def test_windows_and_caps_are_what_they_say(
    queries: int, keys: int, window: int | None, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients in blocks of queries, also where documents have more keys than queries."""
    monkeypatch.setattr(attention, "_BLOCK_QUERIES", 6)
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]
    masks: attention.Masks = {}
    out = causal_attention(*leaves, 0.5, masks, window=window, softcap=cap)
    expected = _dense(*leaves, window, cap)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), leaves), torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(*leaves, 0.5, masks, window=window, softcap=cap), expected)


def test_a_window_takes_time_by_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,000 keys a call gets those that a block of queries sees, and blocks share their masks."""
    calls: list[tuple[int, int]] = []

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append((q.shape[2], k.shape[2]))
        return q

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counted)
    q, masks = torch.zeros(1, 2, 2000, 4), {}
    assert causal_attention(q, q, q, 1.0, masks, window=300).shape == q.shape
    assert calls == [(300, 300), *[(300, 599)] * 5, (200, 499)] and len(masks) == 3


def test_capped_attention_draws_the_same_dropout_in_the_backward_pass() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(1, 2, 9, 9, generator=g, dtype=torch.float64) for _ in range(4))

    def attend(values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return causal_attention(q, k, values, 1.0, {}, dropout=0.5, softcap=2.0)

    drawn = attend(torch.eye(9, dtype=torch.float64).expand(1, 2, 9, 9))  # the weights of values themselves
    assert 10 < (drawn == 0).sum() - 2 * 36 < 80, "some are dropped"
    leaf = v.clone().requires_grad_()
    out = attend(leaf)
    torch.manual_seed(4)
    (out * weight).sum().backward()
    torch.testing.assert_close(out, drawn @ v)
    torch.testing.assert_close(leaf.grad, drawn.transpose(-1, -2) @ weight)
