"""Attention over blocks equals attention over whole sequences, whatever blocks they have."""

from __future__ import annotations

import math
import random

import numpy as np
import psutil
import pytest
import torch

from steerlm_megatron.generate import kv_cache
from steerlm_megatron.generate.kv_cache import BlockTables, KVCache, Span, alike
from steerlm_megatron.model.packed_tokens import CacheShape, PackedTokens

GROUPS, SHARE, DIM, SIZE = 2, 3, 8, 4


def attention(
    q_NH: torch.Tensor, k_KGH: torch.Tensor, v_KGH: torch.Tensor, window: int | None, cap: float | None
) -> torch.Tensor:
    """Attention of the last position, by its formula: [N, H]."""
    seen = slice(None) if window is None else slice(max(0, len(k_KGH) - window), None)
    k_KNH, v_KNH = (x[seen].repeat_interleave(SHARE, 1) for x in (k_KGH, v_KGH))
    score_NK = torch.einsum("nh,knh->nk", q_NH, k_KNH) / math.sqrt(DIM)
    if cap is not None:
        score_NK = cap * torch.tanh(score_NK / cap)
    return torch.einsum("nk,knh->nh", score_NK.softmax(1), v_KNH)


def in_one_call(
    q_TNH: torch.Tensor,
    k_KGH: torch.Tensor,
    v_KGH: torch.Tensor,
    packed: PackedTokens,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """What ``attention.varlen_function`` promises, by the formula: the last query of a span is at its last key."""
    assert packed.cu_seqlens is not None and packed.cu_keys is not None and scale == DIM**-0.5
    starts, key_starts, outputs = packed.cu_seqlens.tolist(), packed.cu_keys.tolist(), []
    assert packed.max_seqlen_q == np.diff(starts).max() and packed.max_seqlen_kv == np.diff(key_starts).max()
    for start, stop, key_start, key_stop in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        for query in range(start, stop):
            keys = slice(key_start, key_stop - (stop - 1 - query))
            outputs.append(attention(q_TNH[query], k_KGH[keys], v_KGH[keys], window, None))
    assert len(outputs) == len(q_TNH)
    return torch.stack(outputs)


@pytest.mark.parametrize("way", ["products", "sdpa", "one call"])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (6, None), (None, 2.0), (9, 1.5)])
def test_equals_attention_over_the_sequence(
    way: str, window: int | None, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_CALL_KEYS", 40)  # the prompts of a step take several calls
    rng = random.Random(3)
    shape = CacheShape((1, 2), GROUPS, DIM, torch.float64)
    cache, tables = KVCache(shape, 64, SIZE, torch.device("cpu")), BlockTables(5, 12)
    cache.sdpa, cache._varlen = way == "sdpa", in_one_call if way == "one call" else None
    numbers = list(range(64))
    rng.shuffle(numbers)
    for row in range(5):
        tables.add(numbers[12 * row : 12 * row + 12])
    torch.manual_seed(1)
    keys, values = ([torch.zeros(0, GROUPS, DIM, dtype=torch.float64) for _ in range(5)] for _ in range(2))
    for counts in ([17, 1, 30, 0, 2], [1, 1, 1, 9, 1], [1, 5, 1, 1, 12], [1, 1, 1, 1, 1]):
        spans = [Span(row, len(keys[row]), count) for row, count in enumerate(counts) if count]
        singles, longer = [s for s in spans if s.count == 1], [s for s in spans if s.count > 1]
        positions_T = cache.begin(tables, singles, longer)
        packed = [*singles, *longer]
        assert positions_T.tolist() == [p for s in packed for p in range(s.start, s.start + s.count)]
        q_TNH = torch.randn(len(positions_T), GROUPS * SHARE, DIM, dtype=torch.float64)
        k_TGH, v_TGH = (torch.randn(len(positions_T), GROUPS, DIM, dtype=torch.float64) for _ in range(2))
        cache.attend(2, q_TNH, k_TGH + 1, v_TGH, DIM**-0.5)  # another layer
        out_TNH = cache.attend(1, q_TNH, k_TGH, v_TGH, DIM**-0.5, window, cap)
        at = 0
        for span in packed:
            for _ in range(span.count):
                keys[span.row] = torch.cat([keys[span.row], k_TGH[at : at + 1]])
                values[span.row] = torch.cat([values[span.row], v_TGH[at : at + 1]])
                expected = attention(q_TNH[at], keys[span.row], values[span.row], window, cap)
                torch.testing.assert_close(out_TNH[at], expected)
                at += 1


def test_copied_and_wiped_blocks() -> None:
    cache = KVCache(CacheShape((1,), 1, 2, torch.float32), 3, SIZE, torch.device("cpu"))
    tables = BlockTables(2, 1)
    tables.add([0])
    tables.add([2])
    cache.begin(tables, [], [Span(0, 0, 3)])
    k = torch.randn(3, 1, 2)
    cache.attend(1, k, k, k, 1.0)
    cache.copy([(0, 2)])
    q = torch.randn(1, 1, 2)
    outs = []
    for row in (0, 1):  # both rows hold the same tokens now
        cache.begin(tables, [Span(row, 3, 1)], [])
        outs.append(cache.attend(1, q, q, q, 1.0))
    assert torch.equal(*outs)
    cache.wipe([2])
    cache.begin(tables, [Span(1, 0, 1)], [])
    assert torch.equal(cache.attend(1, q, q, q, 1.0), q), "the only token it sees"


def test_sequences_of_like_length_share_a_call() -> None:
    groups = alike(np.array([10, 3, 9, 8, 1, 10]), None)
    assert [group.tolist() for group in groups] == [[0, 2, 3, 5], [1], [4]]
    assert [group.tolist() for group in alike(np.array([4, 4, 4]), 8)] == [[0, 1], [2]]
    assert [group.tolist() for group in alike(np.array([4, 4, 4]), None)] == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_on_a_cpu_is_taken_where_it_is_written(dtype: torch.dtype) -> None:
    blocks, process = 1 << 18, psutil.Process()
    size = 2 * GROUPS * blocks * SIZE * DIM * dtype.itemsize
    shape, before = CacheShape(tuple(range(2**30 // size)), GROUPS, DIM, dtype), process.memory_info().rss
    cache = KVCache(shape, blocks, SIZE, torch.device("cpu"))
    assert process.memory_info().rss - before < 2**26, "a GiB of blocks, none of which is used"
    cache.copy([(5, 9)])
    cache.wipe([7])
    assert process.memory_info().rss - before < 2**28, "a page or two of each layer and group"
