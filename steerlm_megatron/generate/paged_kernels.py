"""Triton kernels over the blocks of the key/value cache: RoPE and storing of a step's tokens, attention of single ones.

Owns: the kernels and the sizes that they are started with. Does not own: the cache's layout and which blocks a sequence
has (``kv_cache.py``). Invariant: a sequence's attention is computed from its own blocks alone and in an order that
depends on its own length alone, so that its values are the same in every batch.

A sequence's tokens are cut into parts of a fixed number of tokens. A program takes one key/value head of a part of a
sequence and all query heads that belong to it, and keeps the running maximum and sum of softmax's online form
(Milakov & Gimelshein 2018, arXiv 1805.02867); a second kernel puts the parts together, as FlashDecoding does
(https://pytorch.org/blog/flash-decoding/). Nothing is gathered: blocks are read where they lie.
"""

# Triton finds the types of a kernel's arguments by itself.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PART_TOKENS, _MOST_PARTS = 128, 32  # a part has more tokens where sequences may need more parts
_PROGRAMS = 2048  # about so many fill a GPU; sequences of a large batch get fewer each
_TILE = 64  # tokens whose keys are in work at a time
_WARPS, _STAGES = 4, 3
_WIDE_BYTES = 1024  # keys of so many bytes are fewer at a time, and not loaded ahead: 100 KiB may be all there is
_SMALLEST_SIDE = 16  # of a matrix product in Triton


@triton.jit
def _store(
    key, value, slots, layer, token_stride_k, head_stride_k, token_stride_v, head_stride_v, slot_stride, kv_stride,
    group_stride, GROUPS: tl.constexpr, DIM: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    number = tl.arange(0, NUMBERS)
    group, dim = number // DIM, number % DIM
    inside = group < GROUPS
    k = tl.load(key + token * token_stride_k + group * head_stride_k + dim, mask=inside)
    v = tl.load(value + token * token_stride_v + group * head_stride_v + dim, mask=inside)
    target = layer + group.to(tl.int64) * group_stride + slot * DIM + dim
    tl.store(target, k, mask=inside)
    tl.store(target + kv_stride, v, mask=inside)


@triton.jit
def _turn_and_store(
    qkv, cos, sin, slots, layer, query, key, token_stride, slot_stride, kv_stride, group_stride, GROUPS: tl.constexpr,
    KEYS: tl.constexpr, SHARE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HALVES: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    source = qkv + token * token_stride + group * (SHARE + 2) * DIM
    at_query = query + (token * GROUPS + group) * SHARE * DIM
    at_key = layer + group.to(tl.int64) * group_stride + slot * DIM
    also_key = key + (token * GROUPS + group) * DIM
    # The queries of a group and its key, turned by the angle of the token's position.
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALVES)[None, :]
    inside = (head <= SHARE) & (pair < HALF)
    first = tl.load(source + head * DIM + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + head * DIM + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    low = (first * c - second * s).to(query.dtype.element_ty)
    high = (second * c + first * s).to(query.dtype.element_ty)
    is_query, is_key = inside & (head < SHARE), inside & (head == SHARE)
    tl.store(at_query + head * DIM + pair, low, mask=is_query)
    tl.store(at_query + head * DIM + HALF + pair, high, mask=is_query)
    tl.store(at_key + pair + head * 0, low, mask=is_key)
    tl.store(at_key + HALF + pair + head * 0, high, mask=is_key)
    if KEYS:
        tl.store(also_key + pair + head * 0, low, mask=is_key)
        tl.store(also_key + HALF + pair + head * 0, high, mask=is_key)
    dim = tl.arange(0, DIMS)[None, :]
    if 2 * HALF < DIM:
        passed = (dim >= 2 * HALF) & (dim < DIM)
        rest = tl.load(source + head * DIM + dim, mask=(head <= SHARE) & passed)
        tl.store(at_query + head * DIM + dim, rest, mask=(head < SHARE) & passed)
        tl.store(at_key + dim + head * 0, rest, mask=(head == SHARE) & passed)
        if KEYS:
            tl.store(also_key + dim + head * 0, rest, mask=(head == SHARE) & passed)
    dim = tl.arange(0, DIMS)
    value = tl.load(source + (SHARE + 1) * DIM + dim, mask=dim < DIM)
    tl.store(at_key + kv_stride + dim, value, mask=dim < DIM)


@triton.jit
def _attend_parts(
    query, layer, rows, sums, norms, scale, cap, row_stride_q, head_stride_q, row_width, kv_stride, group_stride, parts,
    SHARE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, SIZE: tl.constexpr,
    PART: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0), tl.program_id(1)
    position = tl.load(rows + row * row_width + 1)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    table = rows + row * row_width + 2
    head, dim = tl.arange(0, HEADS), tl.arange(0, DIMS)
    in_head, in_dim = head < SHARE, dim < DIM
    at_q = row.to(tl.int64) * row_stride_q + (group * SHARE + head) * head_stride_q
    q = tl.load(query + at_q[:, None] + dim[None, :], mask=in_head[:, None] & in_dim[None, :], other=0.0)
    # The programs of a sequence and group share its parts: one to each, or several where there are many.
    for part in range(first // PART + tl.program_id(2), position // PART + 1, tl.num_programs(2)):
        begin, end = tl.maximum(part * PART, first // TILE * TILE), tl.minimum(part * PART + PART, position + 1)
        most = tl.full([HEADS], -float("inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        out = tl.zeros([HEADS, DIMS], tl.float32)
        for start in range(begin, end, TILE):
            token = start + tl.arange(0, TILE)
            seen = (token < end) & (token >= first)
            block = tl.load(table + token // SIZE, mask=seen, other=0).to(tl.int64)
            slot = block * SIZE + token % SIZE
            source = layer + group.to(tl.int64) * group_stride + slot[:, None] * DIM + dim[None, :]
            inside = seen[:, None] & in_dim[None, :]
            k = tl.load(source, mask=inside, other=0.0)
            v = tl.load(source + kv_stride, mask=inside, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CAPPED:
                score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)  # cap · tanh(score / cap)
            score = tl.where(seen[None, :], score, -float("inf"))
            higher = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp(score - higher[:, None])
            fade = tl.exp(most - higher)
            out = out * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            total = total * fade + tl.sum(weight, 1)
            most = higher
        place = ((row * tl.num_programs(1) + group) * parts + part).to(tl.int64)
        at_sums = (place * SHARE + head[:, None]) * DIM + dim[None, :]
        tl.store(sums + at_sums, out, mask=in_head[:, None] & in_dim[None, :])
        at_norms = (place * SHARE + head) * 2
        tl.store(norms + at_norms, most, mask=in_head)
        tl.store(norms + at_norms + 1, total, mask=in_head)


@triton.jit
def _combine_parts(
    sums, norms, rows, result, row_width, parts, SHARE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0), tl.program_id(1)
    position = tl.load(rows + row * row_width + 1)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // PART
    head, dim = tl.arange(0, HEADS), tl.arange(0, DIMS)
    in_head = head < SHARE
    inside = in_head[:, None] & (dim < DIM)[None, :]
    most = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([HEADS, DIMS], tl.float32)
    for part in range(first, position // PART + 1):
        place = ((row * tl.num_programs(1) + group) * parts + part).to(tl.int64)
        at_norms = (place * SHARE + head) * 2
        part_most = tl.load(norms + at_norms, mask=in_head, other=0.0)
        part_total = tl.load(norms + at_norms + 1, mask=in_head, other=1.0)
        part_out = tl.load(sums + (place * SHARE + head[:, None]) * DIM + dim[None, :], mask=inside, other=0.0)
        higher = tl.maximum(most, part_most)
        fade, weight = tl.exp(most - higher), tl.exp(part_most - higher)
        out = out * fade[:, None] + part_out * weight[:, None]
        total = total * fade + part_total * weight
        most = higher
    at = (row * tl.num_programs(1) + group).to(tl.int64) * SHARE + head
    out = out / total[:, None]
    tl.store(result + at[:, None] * DIM + dim[None, :], out.to(result.dtype.element_ty), mask=inside)


def store(layer: torch.Tensor, slots_T: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor) -> None:
    """Put keys and values, each with its last dimension dense, into ``layer`` [2, G, blocks, block_tokens, H] at slots
    (block · block_tokens + place in the block; any integer dtype).
    """
    tokens, groups, dim = k_TGH.shape
    _store[(tokens,)](
        k_TGH, v_TGH, slots_T, layer, k_TGH.stride(0), k_TGH.stride(1), v_TGH.stride(0), v_TGH.stride(1),
        slots_T.stride(0), layer.stride(0), layer.stride(1), GROUPS=groups, DIM=dim,
        NUMBERS=triton.next_power_of_2(groups * dim),
    )  # fmt: skip


def turn_and_store(
    layer: torch.Tensor,
    slots_T: torch.Tensor,
    qkv_TGSH: torch.Tensor,
    cos_T1R: torch.Tensor,
    sin_T1R: torch.Tensor,
    keys: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return queries with RoPE applied, [T, N, H], and put keys with RoPE and values into ``layer`` as :func:`store`
    does, in one pass over ``qkv_TGSH``: of each of G groups its queries, its key and its value, dense but for tokens.
    Tables as :func:`steerlm_megatron.model.fused.rotate` takes them, dense. With ``keys``, these are returned too,
    [T, G, H].
    """
    tokens, groups, heads, dim = qkv_TGSH.shape
    share, half = heads - 2, cos_T1R.shape[-1]
    query_TNH = torch.empty((tokens, groups * share, dim), dtype=qkv_TGSH.dtype, device=qkv_TGSH.device)
    key_TGH = torch.empty((tokens, groups, dim), dtype=qkv_TGSH.dtype, device=qkv_TGSH.device) if keys else None
    _turn_and_store[(tokens, groups)](
        qkv_TGSH, cos_T1R, sin_T1R, slots_T, layer, query_TNH, query_TNH if key_TGH is None else key_TGH,
        qkv_TGSH.stride(0), slots_T.stride(0), layer.stride(0), layer.stride(1), GROUPS=groups, KEYS=keys, SHARE=share,
        HEADS=triton.next_power_of_2(share + 1), DIM=dim, HALF=half, HALVES=triton.next_power_of_2(max(1, half)),
        DIMS=triton.next_power_of_2(dim),
    )  # fmt: skip
    return query_TNH, key_TGH


def attend(
    layer: torch.Tensor,
    rows_BX: torch.Tensor,
    q_BNH: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one query a sequence over its blocks, [B, N, H].

    Args:
        layer: keys and values [2, G, blocks, block_tokens, H], the query's own among them.
        rows_BX: int32 [B, 2 + blocks of the longest sequence]: a number that is not read here, the query's position,
            the sequence's blocks.
        q_BNH: with its last dimension dense; N is a multiple of G.
        window, softcap: as in :func:`steerlm_megatron.model.attention.causal_attention`.
    """
    rows, heads, dim = q_BNH.shape
    groups, size = layer.shape[1], layer.shape[3]
    share, longest = heads // groups, (rows_BX.shape[1] - 2) * size
    part = max(_PART_TOKENS, triton.next_power_of_2(-(-longest // _MOST_PARTS)))
    parts = -(-longest // part)
    programs = min(parts, -(-_PROGRAMS // (rows * groups)))
    sums = torch.empty((rows, groups, parts, share, dim), dtype=torch.float32, device=q_BNH.device)
    norms = torch.empty((rows, groups, parts, share, 2), dtype=torch.float32, device=q_BNH.device)
    out_BNH = torch.empty((rows, heads, dim), dtype=q_BNH.dtype, device=q_BNH.device)
    sides = {
        "SHARE": share, "HEADS": max(_SMALLEST_SIDE, triton.next_power_of_2(share)),
        "DIM": dim, "DIMS": max(_SMALLEST_SIDE, triton.next_power_of_2(dim)),
        "PART": part, "WINDOW": window or 0,
    }  # fmt: skip
    wide = sides["DIMS"] * q_BNH.element_size() >= _WIDE_BYTES
    tile, stages = (_TILE // 2, 1) if wide else (_TILE, _STAGES)
    _attend_parts[(rows, groups, programs)](
        q_BNH, layer, rows_BX, sums, norms, scale, softcap or 1.0, q_BNH.stride(0), q_BNH.stride(1), rows_BX.stride(0),
        layer.stride(0), layer.stride(1), parts, SIZE=size, TILE=tile, CAPPED=softcap is not None, num_warps=_WARPS,
        num_stages=stages, **sides,
    )  # fmt: skip
    _combine_parts[(rows, groups)](sums, norms, rows_BX, out_BNH, rows_BX.stride(0), parts, **sides)
    return out_BNH
