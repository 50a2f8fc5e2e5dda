"""Keys and values of the sequences being generated, in blocks, and attention over them.

Owns: the cache's memory, and the attention of a generation step (``PackedTokens.kv``). Does not own: which sequence has
which blocks (``scheduler.py`` decides, every rank obeys), or RoPE (already in q and k).
Invariants: all memory is allocated at the start; a step writes all its keys and values of a layer before anything reads
them, so that sequences of one step may share blocks that the step fills; a slot that a query does not see is masked and
finite, or of the query's own sequence: it never sees another's NaN.

Layout, per layer: [2 (key, value), G, blocks, block_tokens, H] with G the key/value heads of this tensor-parallel rank.
A block and head is contiguous, so that gathering the blocks of many sequences gives batches [G, sequences, tokens, H]
without any transposition.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from steerlm_megatron.model.attention import causal_attention, flash_takes, varlen_function
from steerlm_megatron.model.cross_entropy import soft_capped
from steerlm_megatron.model.packed_tokens import CacheShape, Masks, PackedTokens
from steerlm_megatron.runtime.device import compiles_kernels, to_device

# A call gathers about this many bytes: what it gathers is still in a CPU's cache when it is used (measured for 64
# sequences of 400 tokens, 5 heads of 64, float32: 28 ms in pieces of 2 MiB, 38 of 4, 80 in one). On a GPU calls cost
# more than memory traffic, and one call takes all.
_GATHER_BYTES = 2 << 20
# A call over prompts that go on gathers at most this many keys, or those of one prompt: 128 MiB with 8 heads of 128 in
# bf16.
_CALL_KEYS = 32_768
# Sequences share a call if the shortest has at least this share of the longest's blocks.
_SHARE_OF_LONGEST = 0.7


@dataclass
class Span:
    """Tokens that a sequence is fed in a step: ``count`` of them from position ``start`` on."""

    row: int
    start: int
    count: int


@dataclass
class _Call:
    """Sequences that decode in one call of attention. ``rows`` are numbers among the step's single tokens."""

    rows_M: torch.Tensor | None  # None: all of them, in order
    count: int
    blocks_X: torch.Tensor  # [count · width], the blocks to gather
    hidden_M1L: torch.Tensor  # bool: slots that the sequence does not see
    masks: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)  # by repetitions, for all layers


@dataclass
class _Pack:
    """Longer spans that share a call of attention."""

    queries: int
    bounds: PackedTokens  # of the spans' queries and keys
    key_slots_K: torch.Tensor | None  # int64; None: every span begins its sequence, so its keys are those of the step


@dataclass
class _Step:
    """Index tensors of one step, shared by all layers."""

    singles: list[Span]  # sequences with one token, which come first
    longer: list[Span]
    slots_T: torch.Tensor  # where each token's keys and values go
    rows_BX: torch.Tensor | None = None  # of the single tokens, where kernels read blocks (KVCache.rows)
    calls: dict[int | None, list[_Call]] = field(default_factory=dict)  # of the single tokens, by window
    gathered: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)  # blocks of a longer span
    packs: list[_Pack] | None = None  # of the longer spans, where a call takes several of them
    masks: Masks = field(default_factory=dict)


class BlockTables:
    """Which blocks each row has, on the host: int64 [rows, longest]. Beyond a row's last block, that one repeats."""

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        self.blocks = np.zeros((max_rows, max_blocks), np.int64)
        self.counts = np.zeros(max_rows, np.int64)
        self.rows = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Let only ``rows`` stay, in this order."""
        self.blocks[: len(rows)], self.counts[: len(rows)] = self.blocks[list(rows)], self.counts[list(rows)]
        self.rows = len(rows)

    def add(self, blocks: Sequence[int]) -> None:
        """Append a row that has ``blocks``."""
        row, count = self.rows, len(blocks)
        self.blocks[row, :count], self.blocks[row, count:], self.counts[row] = blocks, blocks[-1], count
        self.rows += 1

    def append(self, row: int, block: int) -> None:
        """Give a row one block more."""
        self.blocks[row, self.counts[row] :] = block
        self.counts[row] += 1


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of zeros. On a CPU the operating system gives it memory where it is first written, zeroed page by
    page: ``torch.zeros`` writes all of it, which takes a second or more per GiB, though most blocks may never be used.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    length, aligned_to = math.prod(size) * dtype.itemsize, 64  # bytes; PyTorch aligns its own tensors to 64 as well
    raw = torch.from_numpy(np.zeros(length + aligned_to, np.uint8))
    first = -raw.data_ptr() % aligned_to
    return raw[first : first + length].view(dtype).view(size)


def _kernels(device: torch.device) -> ModuleType | None:
    """The module of kernels that read blocks where they lie; None where Triton has none for the device, or no way to
    make them.
    """
    if device.type != "cuda" or not compiles_kernels() or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return importlib.import_module("steerlm_megatron.generate.paged_kernels")


class KVCache:
    """The blocks of all layers of this rank. Per step: :meth:`begin`, then one :meth:`attend` per layer."""

    def __init__(self, shape: CacheShape, blocks: int, block_tokens: int, device: torch.device) -> None:
        """Allocate ``blocks`` blocks of ``block_tokens`` tokens. Zeros, not garbage: a masked slot still meets a weight
        of 0, and 0 × NaN is NaN.
        """
        self.shape, self.blocks, self.block_tokens, self.device = shape, blocks, block_tokens, device
        self.kernels: Any = _kernels(device)
        # One block more than sequences have, for the rows that fill a batch up (cuda_graphs.py).
        size = (2, shape.groups, blocks + (self.kernels is not None), block_tokens, shape.head_dim)
        self._layers = {n: _zeros(size, shape.dtype, device) for n in shape.layers}
        self._slots = {n: layer.flatten(2, 3).unbind(0) for n, layer in self._layers.items()}  # views: [G, slots, H]
        # On CPU two batched products beat SDPA several times at one query per head (measured: 0.8 against 2.2 ms, 64 ×
        # 4 × 256).
        self.sdpa = device.type == "cuda"
        # It takes spans of all lengths in one call.
        flash = device.type == "cuda" and flash_takes(shape.head_dim, shape.dtype)
        self._varlen: Any = varlen_function(windowed=True) if flash else None
        self._step: _Step | None = None
        self._tables = np.zeros((0, 0), np.int64)

    def wipe(self, blocks: Sequence[int]) -> None:
        """Fill ``blocks`` with zeros: what they hold may be NaN, which would reach the next sequence there through
        masked slots.
        """
        index_X = to_device(np.asarray(blocks, np.int64), self.device)
        for layer in self._layers.values():
            layer.index_fill_(2, index_X, 0)

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy what blocks hold into others: (from, to) each."""
        source_X, target_X = to_device(np.array(blocks, np.int64).T.copy(), self.device)
        for layer in self._layers.values():
            layer.index_copy_(2, target_X, layer.index_select(2, source_X))

    def begin(self, tables: BlockTables, singles: Sequence[Span], longer: Sequence[Span]) -> torch.Tensor:
        """Announce a step: the sequences that are fed one token, then those that are fed more, in packed order.

        Returns positions_T, int64, on the device. Must precede the step's :meth:`attend` calls.
        """
        self._tables = tables.blocks
        rows_T, positions_T = _tokens([*singles, *longer])
        slots_T = self._tables[rows_T, positions_T // self.block_tokens] * self.block_tokens
        slots_T += positions_T % self.block_tokens
        both_2T = to_device(np.stack([slots_T, positions_T]), self.device)
        self._step = _Step(list(singles), list(longer), both_2T[0])
        if self.kernels is not None and singles:
            rows = self.rows(tables, rows_T[: len(singles)], positions_T[: len(singles)])
            self._step.rows_BX = to_device(rows, self.device)
        return both_2T[1]

    def rows(self, tables: BlockTables, rows_B: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
        """Return what kernels are told of sequences that are fed one token, int32 [B, 2 + blocks]: the slot of its keys
        and values, its position, and the sequence's blocks. ``rows_B``: the sequences' rows in ``tables``.
        """
        size = self.block_tokens
        rows = np.empty((len(rows_B), 2 + tables.blocks.shape[1]), np.int32)
        rows[:, 2:] = tables.blocks[rows_B]
        rows[:, 0] = tables.blocks[rows_B, positions_B // size] * size + positions_B % size
        rows[:, 1] = positions_B
        return rows

    def spare_row(self, longest: int) -> np.ndarray:
        """Return the same, int32 [2 + longest], of a sequence of one token that is in no sequence's blocks."""
        row = np.full(2 + longest, self.blocks, np.int32)
        row[0], row[1] = self.blocks * self.block_tokens, 0
        return row

    def begin_rows(self, rows_BX: torch.Tensor) -> torch.Tensor:
        """Do what :meth:`begin` does for sequences that are fed one token each, of which :meth:`rows` are on the device
        already: the tensor may get other values before what reads it is run once more. Returns positions, int32 [B].
        """
        self._step = _Step([], [], rows_BX[:, 0], rows_BX)
        return rows_BX[:, 1]

    def attend(
        self,
        layer_number: int,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Store this step's keys and values of one layer and attend.

        q [T, N, H], k and v [T, G, H], N a multiple of G, RoPE applied; T as announced by :meth:`begin`; ``window`` and
        ``softcap`` as in :func:`steerlm_megatron.model.attention.causal_attention`. Returns [T, N, H].
        """
        step = self._step
        assert step is not None, "begin() before attend()"
        layer = self._layers[layer_number]
        if self.kernels is not None:
            self.kernels.store(layer, step.slots_T, k_TGH, v_TGH)
        else:
            for slots_GSH, new_TGH in zip(self._slots[layer_number], (k_TGH, v_TGH), strict=True):
                slots_GSH.index_copy_(1, step.slots_T, new_TGH.transpose(0, 1))
        return self._attend(step, layer, q_TNH, k_TGH, v_TGH, scale, window, softcap)

    @property
    def takes_qkv(self) -> bool:
        """Whether :meth:`attend_qkv` can be called: it makes fewer passes over what it is given."""
        return self.kernels is not None

    def attend_qkv(
        self,
        layer_number: int,
        qkv_TGSH: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Do what :meth:`attend` does of queries, key and value side by side, before RoPE, of which ``tables`` are the
        cosines and sines [T, 1, R]. Only where :attr:`takes_qkv`. Returns [T, N, H].
        """
        step, layer = self._step, self._layers[layer_number]
        assert step is not None, "begin() before attend_qkv()"
        q_TNH, k_TGH = self.kernels.turn_and_store(layer, step.slots_T, qkv_TGSH, *tables, keys=bool(step.longer))
        return self._attend(step, layer, q_TNH, k_TGH, qkv_TGSH[:, :, -1], scale, window, softcap)

    def _attend(
        self,
        step: _Step,
        layer: torch.Tensor,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor | None,
        v_TGH: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of a step whose keys and values are stored; ``k_TGH`` is needed for longer spans alone."""
        n = len(step.singles) if step.rows_BX is None else len(step.rows_BX)
        outputs = [self._decode(step, layer, q_TNH[:n], scale, window, softcap)] if n else []
        if step.longer:
            assert k_TGH is not None
            if self._varlen is not None and softcap is None:
                outputs.append(self._longer(step, layer, q_TNH[n:], k_TGH[n:], v_TGH[n:], scale, window))
            else:
                outputs += self._each_longer(step, layer, q_TNH[n:], k_TGH[n:], v_TGH[n:], scale, window, softcap)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _longer(
        self,
        step: _Step,
        layer: torch.Tensor,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention of all longer spans, as many in a call as ``_CALL_KEYS`` allows."""
        if step.packs is None:
            step.packs = [self._pack(spans) for spans in _few_keys(step.longer)]
        outputs, start = [], 0
        for pack in step.packs:
            part = slice(start, start + pack.queries)
            k_KGH, v_KGH, start = k_TGH[part], v_TGH[part], part.stop
            if pack.key_slots_K is not None:  # what earlier steps have stored belongs to them as well
                k_KGH, v_KGH = layer.flatten(2, 3).index_select(2, pack.key_slots_K).transpose(1, 2)
            outputs.append(self._varlen(q_TNH[part], k_KGH, v_KGH, pack.bounds, scale, window=window))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _pack(self, spans: Sequence[Span]) -> _Pack:
        """Return what a call of attention is told of ``spans``."""
        size, counts = self.block_tokens, [span.count for span in spans]
        ends = [span.start + span.count for span in spans]
        cu, cu_keys = (np.cumsum([0, *lengths]).astype(np.int32) for lengths in (counts, ends))
        packed = PackedTokens(
            cu_seqlens=to_device(cu, self.device), cu_keys=to_device(cu_keys, self.device),
            max_seqlen_q=max(counts), max_seqlen_kv=max(ends),
        )  # fmt: skip
        if not any(span.start for span in spans):
            return _Pack(sum(counts), packed, None)
        whole = [Span(span.row, 0, end) for span, end in zip(spans, ends, strict=True)]
        rows_K, positions_K = _tokens(whole)
        slots_K = self._tables[rows_K, positions_K // size] * size + positions_K % size
        return _Pack(sum(counts), packed, to_device(slots_K, self.device))

    def _each_longer(
        self,
        step: _Step,
        layer: torch.Tensor,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> list[torch.Tensor]:
        """Attention of longer spans, a call for each."""
        outputs: list[torch.Tensor] = []
        start = 0
        for i, span in enumerate(step.longer):
            part = slice(start, start + span.count)
            k_GKH, v_GKH = k_TGH[part].transpose(0, 1), v_TGH[part].transpose(0, 1)
            if span.start:
                k_GKH, v_GKH = self._prefix(step, layer, i, window)
            q_1NQH, k_1GKH, v_1GKH = q_TNH[part].transpose(0, 1)[None], k_GKH[None], v_GKH[None]
            out = causal_attention(q_1NQH, k_1GKH, v_1GKH, scale, step.masks, window=window, softcap=softcap)
            outputs.append(out[0].transpose(0, 1))
            start += span.count
        return outputs

    def _prefix(
        self, step: _Step, layer: torch.Tensor, number: int, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [G, K, H] of all that the queries of a longer span see."""
        span, size = step.longer[number], self.block_tokens
        end = span.start + span.count
        first = 0 if window is None else max(0, span.start - window + 1) // size
        blocks_X = step.gathered.get((number, window))
        if blocks_X is None:
            blocks_X = to_device(self._tables[span.row, first : -(-end // size)], self.device)
            step.gathered[number, window] = blocks_X
        found_2GKH = layer.index_select(2, blocks_X).flatten(2, 3)[:, :, : end - first * size]
        return found_2GKH[0], found_2GKH[1]

    def _decode(
        self,
        step: _Step,
        layer: torch.Tensor,
        q_BNH: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of single tokens, each over its own sequence's blocks."""
        if step.rows_BX is not None:
            found_BNH: torch.Tensor = self.kernels.attend(layer, step.rows_BX, q_BNH, scale, window, softcap)
            return found_BNH
        calls = step.calls.get(window)
        if calls is None:
            calls = step.calls[window] = self._plan_calls(step.singles, layer, window)
        if len(calls) == 1:
            return self._call(calls[0], layer, q_BNH, scale, softcap)
        out_BNH = torch.empty_like(q_BNH)
        for call in calls:
            assert call.rows_M is not None
            q_MNH = q_BNH.index_select(0, call.rows_M)
            out_BNH.index_copy_(0, call.rows_M, self._call(call, layer, q_MNH, scale, softcap))
        return out_BNH

    def _call(
        self, call: _Call, layer: torch.Tensor, q_MNH: torch.Tensor, scale: float, softcap: float | None
    ) -> torch.Tensor:
        """One query per sequence. The N / G query heads of a key/value head stand as queries side by side: all are at
        the same position, so no head has to be repeated."""
        groups, dim, count = layer.shape[1], layer.shape[4], call.count
        kv_2GMLH = layer.index_select(2, call.blocks_X).view(2, groups, count, -1, dim)
        q_GMSH = q_MNH.unflatten(1, (groups, -1)).transpose(0, 1)
        if self.sdpa and softcap is None:  # SDPA has no soft cap
            seen_MSL = ~call.hidden_M1L.expand(-1, q_GMSH.shape[2], -1)
            out_GMSH = F.scaled_dot_product_attention(q_GMSH, kv_2GMLH[0], kv_2GMLH[1], attn_mask=seen_MSL, scale=scale)
            return out_GMSH.transpose(0, 1).reshape(q_MNH.shape)
        q_XSH, (k_XLH, v_XLH) = q_GMSH.flatten(0, 1), kv_2GMLH.flatten(1, 2)
        mask_X1L = call.masks.get((groups, q_MNH.dtype))
        if mask_X1L is None:
            mask_M1L = torch.zeros(call.hidden_M1L.shape, dtype=q_MNH.dtype, device=self.device)
            mask_X1L = mask_M1L.masked_fill_(call.hidden_M1L, float("-inf")).repeat(groups, 1, 1)
            call.masks[groups, q_MNH.dtype] = mask_X1L
        if softcap is None:
            scores_XSL = torch.baddbmm(mask_X1L, q_XSH, k_XLH.transpose(1, 2), alpha=scale)
        else:
            scores_XSL = soft_capped(torch.bmm(q_XSH, k_XLH.transpose(1, 2)) * scale, softcap) + mask_X1L
        softmax_dtype = torch.promote_types(q_MNH.dtype, torch.float32)
        weights_XSL = torch.softmax(scores_XSL, -1, dtype=softmax_dtype).to(q_MNH.dtype)
        out_XSH = torch.bmm(weights_XSL, v_XLH)
        return out_XSH.view(groups, count, -1, dim).transpose(0, 1).reshape(q_MNH.shape)

    def _plan_calls(self, singles: Sequence[Span], layer: torch.Tensor, window: int | None) -> list[_Call]:
        """Part the sequences into calls, by the number of blocks that they see."""
        size = self.block_tokens
        rows_B = np.array([span.row for span in singles])
        position_B = np.array([span.start for span in singles])
        first_B = np.zeros_like(position_B) if window is None else np.maximum(0, position_B - window + 1) // size
        width_B = position_B // size + 1 - first_B
        block_bytes = layer.element_size() * layer[:, :, 0].numel()
        calls: list[_Call] = []
        for members in alike(width_B, None if self.sdpa else max(1, _GATHER_BYTES // block_bytes)):
            width = int(width_B[members].max())
            column_MW = first_B[members, None] + np.arange(width)
            # Beyond a row's blocks its last one is read again: all that it has is masked there.
            last = self._tables.shape[1] - 1
            blocks_MW = self._tables[rows_B[members, None], np.minimum(column_MW, last)]
            slot_ML = (column_MW[:, :, None] * size + np.arange(size)).reshape(len(members), -1)
            hidden_ML = slot_ML > position_B[members, None]
            if window is not None:
                hidden_ML |= slot_ML <= position_B[members, None] - window
            every = len(members) == len(singles)
            calls.append(
                _Call(
                    rows_M=None if every else to_device(members, self.device),
                    count=len(members),
                    blocks_X=to_device(blocks_MW.reshape(-1), self.device),
                    hidden_M1L=to_device(hidden_ML[:, None], self.device),
                )
            )
        return calls


def _tokens(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Row and position of every token of ``spans``, int64 each."""
    count_S = np.array([span.count for span in spans])
    row_T = np.repeat(np.array([span.row for span in spans]), count_S)
    before_S = np.array([span.start for span in spans]) - (count_S.cumsum() - count_S)
    return row_T, np.repeat(before_S, count_S) + np.arange(len(row_T))


def _few_keys(spans: Sequence[Span]) -> list[list[Span]]:
    """Part spans, in order, into groups of at most ``_CALL_KEYS`` keys, where a single one does not have more."""
    groups: list[list[Span]] = []
    keys = 0
    for span in spans:
        own = span.start + span.count
        if not groups or keys + own > _CALL_KEYS:
            groups.append([])
            keys = 0
        groups[-1].append(span)
        keys += own
    return groups


def alike(width_B: np.ndarray, most_blocks: int | None) -> list[np.ndarray]:
    """Part numbers 0..B-1 into groups of like width, each of about ``most_blocks`` blocks with its padding. The numbers
    of a group are in order; a single group holds all of them.
    """
    order_B = np.argsort(-width_B, kind="stable")
    groups: list[np.ndarray] = []
    start = 0
    for i in range(1, len(order_B) + 1):
        longest = int(width_B[order_B[start]])
        if i < len(order_B):
            alike = width_B[order_B[i]] >= _SHARE_OF_LONGEST * longest
            if alike and (most_blocks is None or (i + 1 - start) * longest <= most_blocks):
                continue
        groups.append(np.sort(order_B[start:i]))
        start = i
    return groups
