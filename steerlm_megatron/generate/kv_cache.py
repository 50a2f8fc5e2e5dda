"""Keys and values of the sequences being generated, and attention over them.

Owns: the cache's memory, and the attention of a generation step (``PackedTokens.kv``). Does not own: which sequence
sits in which row, or when the cache grows (``scheduler.py`` decides, every rank obeys), or RoPE (already in q and k).
Invariant: rows 0..n-1 are the sequences being decoded, without holes, so that decoding is a batched product over one
slab of memory, with no gather; what lies beyond a row's length is finite and masked.

Layout, per layer: [2 (key, value), rows, G, capacity, H] with G the key/value heads of this tensor-parallel rank. A row
and head is one contiguous slab [capacity, H].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from steerlm_megatron.model.attention import causal_attention
from steerlm_megatron.model.cross_entropy import soft_capped
from steerlm_megatron.model.packed_tokens import Masks

# The decoded length is rounded up to this many tokens: aligned masks for CUDA's memory-efficient kernel, few distinct
# shapes.
_LENGTH_STEP = 16


@dataclass
class _Step:
    """Index tensors of one step, shared by all layers; flat indices count [capacity] slots of a layer's (row, head)
    slabs."""

    decode_rows: int
    length: int  # longest decoded sequence, this step's token included, rounded up
    shortest: int  # shortest decoded sequence, this step's token included
    positions_B: torch.Tensor  # of the decoded tokens
    slots_TG: torch.Tensor | None  # where each token's keys and values go
    prefill: list[tuple[int, int]]  # [start, end) of each new sequence in the packed tokens
    # Masks of decoding in the shape and dtype that attention takes, by heads, dtype and window; those of prompts.
    cached: dict[tuple[int, torch.dtype, int | None], torch.Tensor]
    masks: Masks


class KVCache:
    """Slot-based cache. Per step: :meth:`resize`, :meth:`move` as needed, :meth:`begin`, then one :meth:`attend` per
    layer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows = 0
        self.capacity = 0
        self._layers: dict[int, torch.Tensor] = {}
        self._step: _Step | None = None

    def resize(self, rows: int, capacity: int, lengths: Sequence[int]) -> None:
        """Have ``rows`` × ``capacity`` slots, keeping the first ``lengths[i]`` tokens of row i."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        keep_rows, keep = len(lengths), max(lengths, default=0)
        assert keep_rows <= rows and keep <= capacity
        for number, old in self._layers.items():
            new = old.new_zeros((2, rows, old.shape[2], capacity, old.shape[4]))
            if keep:
                new[:, :keep_rows, :, :keep] = old[:, :keep_rows, :, :keep]
            self._layers[number] = new
        self.rows, self.capacity = rows, capacity

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` to row ``target``."""
        for layer in self._layers.values():
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def wipe(self, row: int) -> None:
        """Make all of ``row`` zeros: what it holds may be NaN, which would reach the next sequence there through masked
        slots, as 0 × NaN is NaN."""
        for layer in self._layers.values():
            layer[:, row] = 0

    def begin(self, decode_lengths: Sequence[int], prefill: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Announce a step: one token for each of rows 0..n-1, then whole prompts.

        ``decode_lengths``: tokens already cached in rows 0..n-1. ``prefill``: (row, tokens) of each new sequence, in
        packed order. Returns positions_T, int64, on the device. Must precede the step's :meth:`attend` calls.
        """
        rows, positions, spans = list(range(len(decode_lengths))), list(decode_lengths), []
        longest = max(decode_lengths, default=0) + 1
        assert longest <= self.capacity and len(rows) <= self.rows
        for row, tokens in prefill:
            assert row < self.rows and tokens <= self.capacity
            spans.append((len(positions), len(positions) + tokens))
            rows.extend([row] * tokens)
            positions.extend(range(tokens))
        both_2T = torch.tensor([rows, positions], dtype=torch.int64).to(self.device, non_blocking=True)
        length = min(self.capacity, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
        n = len(decode_lengths)
        self._rows_T, self._positions_T = both_2T[0], both_2T[1]
        shortest = min(decode_lengths, default=0) + 1
        self._step = _Step(n, length, shortest, self._positions_T[:n], None, spans, {}, {})
        return self._positions_T

    def _layer(self, number: int, k_TGH: torch.Tensor) -> torch.Tensor:
        layer = self._layers.get(number)
        if layer is None:
            # Zeros, not garbage: a masked slot still meets a weight of 0, and 0 × NaN is NaN.
            shape = (2, self.rows, k_TGH.shape[1], self.capacity, k_TGH.shape[2])
            layer = self._layers[number] = torch.zeros(shape, dtype=k_TGH.dtype, device=k_TGH.device)
        return layer

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
        layer = self._layer(layer_number, k_TGH)
        heads, dim = k_TGH.shape[1], k_TGH.shape[2]
        if step.slots_TG is None:
            head_G = torch.arange(heads, device=self.device)
            slabs_TG = self._rows_T[:, None] * heads + head_G
            step.slots_TG = (slabs_TG * self.capacity + self._positions_T[:, None]).reshape(-1)
        layer[0].view(-1, dim).index_copy_(0, step.slots_TG, k_TGH.reshape(-1, dim))
        layer[1].view(-1, dim).index_copy_(0, step.slots_TG, v_TGH.reshape(-1, dim))
        n = step.decode_rows
        outputs = [self._decode(step, layer, q_TNH[:n], scale, window, softcap)] if n else []
        for start, end in step.prefill:
            q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TGH, v_TGH))
            out = causal_attention(q, k, v, scale, step.masks, window=window, softcap=softcap)
            outputs.append(out.squeeze(0).transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(
        self,
        step: _Step,
        layer: torch.Tensor,
        q_BNH: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """One query per row against the row's cache. The N / G query heads of a key/value head stand as queries side by
        side: all are at the same position, so no head has to be repeated."""
        n, (first, length) = step.decode_rows, _span(step, window)
        heads, dim = layer.shape[2], layer.shape[4]
        share = q_BNH.shape[1] // heads
        if q_BNH.is_cuda and softcap is None:  # SDPA has no soft cap
            q_BGMH = q_BNH.reshape(n, heads, share, dim)
            mask_B11L = self._mask(step, 1, q_BNH.dtype, window)[:, None].expand(n, heads, share, length - first)
            out = F.scaled_dot_product_attention(
                q_BGMH, layer[0, :n, :, first:length], layer[1, :n, :, first:length], attn_mask=mask_B11L, scale=scale
            )
            return out.reshape(n, -1, dim)
        # On CPU two batched products beat SDPA several times at one query per head (measured: 0.8 against 2.2 ms, 64 ×
        # 4 × 256).
        slabs = layer.view(2, -1, self.capacity, dim)[:, : n * heads, first:length]
        mask_X1L = self._mask(step, heads, q_BNH.dtype, window)
        q_XMH = q_BNH.reshape(n * heads, share, dim)
        if softcap is None:
            scores_XML = torch.baddbmm(mask_X1L, q_XMH, slabs[0].transpose(1, 2), alpha=scale)
        else:
            scores_XML = soft_capped(torch.bmm(q_XMH, slabs[0].transpose(1, 2)) * scale, softcap) + mask_X1L
        softmax_dtype = torch.promote_types(q_BNH.dtype, torch.float32)
        weights_XML = torch.softmax(scores_XML, -1, dtype=softmax_dtype).to(q_BNH.dtype)
        return torch.bmm(weights_XML, slabs[1]).view(n, -1, dim)

    def _mask(self, step: _Step, heads: int, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """[rows · heads, 1, tokens of the span]: 0 where a row has a token in its window, -inf elsewhere."""
        mask = step.cached.get((heads, dtype, window))
        if mask is None:
            first, length = _span(step, window)
            position_B1, token_L = step.positions_B[:, None], torch.arange(first, length, device=self.device)
            hidden_BL = token_L > position_B1
            if window is not None:
                hidden_BL |= token_L <= position_B1 - window
            mask_BL = torch.zeros(hidden_BL.shape, dtype=dtype, device=self.device)
            mask = mask_BL.masked_fill_(hidden_BL, float("-inf")).repeat_interleave(heads, 0).unsqueeze(1)
            step.cached[heads, dtype, window] = mask
        return mask


def _span(step: _Step, window: int | None) -> tuple[int, int]:
    """From which slot up to which one some decoded row sees tokens; the first is rounded down as the last is up."""
    first = 0 if window is None else max(0, step.shortest - window)
    return first // _LENGTH_STEP * _LENGTH_STEP, step.length
