"""What a forward pass knows about the documents in its row: boundaries, positions, RoPE's tables.

Owns: :class:`PackedTokens`, which goes through Megatron-Core in the place of its ``PackedSeqParams``; what every layer
would compute again (tables, batches of documents of like length, masks) is kept there. Does not own: attention
(``attention.py``). Invariant: a position counts from the start of its own document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.data.batch import ContextChunk
from steerlm_megatron.runtime.device import to_device

# Documents of up to this many tokens share batched attention calls; longer ones are worth a call of their own.
_ALONE_FROM_TOKENS = 512

# Masks by (queries, keys, window).
Masks = dict[tuple[int, int, int | None], torch.Tensor]


@dataclass(frozen=True)
class CacheShape:
    """What the keys and values of one token take on this rank, in generation."""

    layers: tuple[int, ...]  # the numbers of this rank's layers (1-based, global)
    groups: int  # key/value heads of this tensor-parallel rank
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values over all layers."""
        return 2 * len(self.layers) * self.groups * self.head_dim * self.dtype.itemsize


class KVCacheLike(Protocol):
    """What generation puts into :class:`PackedTokens` to take attention over."""

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
        """Store this step's keys and values of a layer (1-based, global); return attention over all, or over the last
        ``window`` tokens, [T, N, H].
        """
        ...

    @property
    def takes_qkv(self) -> bool:
        """Whether :meth:`attend_qkv` can be called, which makes fewer passes over what it is given."""
        ...

    def attend_qkv(
        self,
        layer_number: int,
        qkv_TGSH: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Do the same of queries, key and value side by side in their groups, before RoPE."""
        ...


@dataclass(frozen=True)
class Rotary:
    """How RoPE turns the first ``dim`` dimensions of a head: by position · base^(-2i / dim), scaled as the model's
    ``rotary_*`` keys say. Frozen, so that tables are made once for all layers.
    """

    dim: int
    base: float
    scaling: str = "none"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original: int = 8192

    @classmethod
    def of(cls, model: ModelConfig) -> Rotary:
        """What a configuration says, with what its ``rotary_scaling`` does not read left at the defaults."""
        dim = int((model.head_dim or model.hidden_size // model.num_heads) * model.rotary_percent)
        if model.rotary_scaling == "none":
            return cls(dim, model.rotary_base)
        if model.rotary_scaling == "linear":
            return cls(dim, model.rotary_base, "linear", model.rotary_scaling_factor)
        band = model.rotary_low_frequency, model.rotary_high_frequency
        return cls(dim, model.rotary_base, "llama3", model.rotary_scaling_factor, *band, model.rotary_original)

    @classmethod
    def local(cls, model: ModelConfig) -> Rotary:
        """That of layers with a sliding window: never stretched where they have a base of their own (Gemma 3)."""
        of_all = cls.of(model)
        return of_all if model.rotary_local_base is None else cls(of_all.dim, model.rotary_local_base)

    def frequencies(self, where: torch.device) -> torch.Tensor:
        """float32 [dim / 2], in the order of operations of ``transformers``: at position 100,000 a last bit counts.

        ``llama3`` (Llama 3.1, arXiv 2407.21783 §3.4.2 has the longer context): what turns more than ``high_frequency``
        times within ``original`` positions stays, what turns less than ``low_frequency`` times is divided by
        ``factor``, and between the two it goes from the one to the other linearly in the number of turns.
        """
        plain_R = 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device=where) / self.dim))
        if self.scaling == "none":
            return plain_R
        divided_R = plain_R / self.factor
        if self.scaling == "linear":
            return divided_R
        length_R = 2 * math.pi / plain_R
        share_R = (self.original / length_R - self.low_frequency) / (self.high_frequency - self.low_frequency)
        between_R = (1 - share_R) * plain_R / self.factor + share_R * plain_R
        scaled_R = torch.where(length_R > self.original / self.low_frequency, divided_R, between_R)
        return torch.where(length_R < self.original / self.high_frequency, plain_R, scaled_R)


@dataclass
class PackedTokens(PackedSeqParams):
    """Document boundaries of T packed tokens, for every layer of one forward pass.

    ``positions_T``: int64, each token's position in its own document. ``cu_seqlens``: int32 [docs + 1], covers all T
    tokens. ``lengths``: the same on the host, so that no layer synchronises. With ``kv`` set, boundaries are the
    cache's affair. ``output_index_K`` spares the output layer the positions nobody asks about: masked tokens, prompts,
    all but a pooled one.
    """

    qkv_format: str = "packed"  # anything but "thd": Megatron-Core then leaves the layout alone
    positions_T: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    kv: KVCacheLike | None = None
    output_index_K: torch.Tensor | None = None  # int64, the tokens whose output is wanted; None: all of them
    recorded: bool = False  # the pass is recorded, so that what it takes the host to launch a kernel does not count
    max_seqlen_q: int = 0
    max_seqlen_kv: int = 0
    cu_keys: torch.Tensor | None = None  # int32 [docs + 1], the same of keys; None: as cu_seqlens
    chunks: tuple[ContextChunk, ...] = ()  # of a context-parallel rank (model/context.py)
    _buckets: Buckets | None = None
    _parts: list[tuple[tuple[int, int] | None, PackedTokens | None]] | None = None
    masks: Masks = field(default_factory=dict)  # what attention has made of them for an earlier layer
    _rotary: dict[tuple[Rotary, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, positions_T: torch.Tensor) -> PackedTokens:
        """From int32 [docs + 1] boundaries on the host and the positions they imply."""
        lengths = np.diff(cu_seqlens.numpy()).tolist()  # numpy: a tensor on a GPU would be waited for
        longest = max(lengths)
        return cls(
            positions_T=positions_T, cu_seqlens=cu_seqlens, lengths=lengths, max_seqlen_q=longest, max_seqlen_kv=longest
        )

    @classmethod
    def from_chunks(cls, chunks: tuple[ContextChunk, ...], positions_T: torch.Tensor) -> PackedTokens:
        """A context-parallel rank's tokens: those of ``chunks``, one after the other."""
        lengths = [length for chunk in chunks for length in chunk.lengths]
        longest_keys = max(max(chunk.carried + chunk.lengths[0], *chunk.lengths) for chunk in chunks)
        return cls(
            positions_T=positions_T,
            lengths=lengths,
            chunks=chunks,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=longest_keys,
        )

    def buckets(self) -> Buckets:
        """The batched calls that cover all documents; made once, used by every layer."""
        if self._buckets is None:
            assert self.positions_T is not None
            self._buckets = _make_buckets(self.lengths, self.positions_T.device)
        return self._buckets

    def parts(self) -> list[tuple[tuple[int, int] | None, PackedTokens | None]]:
        """Of each of ``chunks``: how many queries and keys its first document has if that one began before the chunk,
        and the documents that begin in it. None where there is none. Made once, used by every layer.
        """
        if self._parts is None:
            assert self.positions_T is not None
            self._parts, at = [], 0
            for chunk in self.chunks:
                first, lengths, carried = chunk.lengths[0], chunk.lengths, None
                if chunk.carried:
                    carried, lengths = (first, chunk.carried + first), lengths[1:]
                at += chunk.stop - chunk.start
                positions_T = self.positions_T[at - sum(lengths) : at]
                rest = (
                    PackedTokens(positions_T=positions_T, lengths=list(lengths), masks=self.masks) if lengths else None
                )
                self._parts.append((carried, rest))
        return self._parts

    def rotary(self, turned: Rotary, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, dim / 2] of position · frequency, in float32 until the last step; made once."""
        tables = self._rotary.get((turned, dtype))
        if tables is None:
            assert self.positions_T is not None
            frequency_R = turned.frequencies(self.positions_T.device)
            angle_T1R = torch.outer(self.positions_T.float(), frequency_R).unsqueeze(1)
            tables = self._rotary[(turned, dtype)] = (angle_T1R.cos().to(dtype), angle_T1R.sin().to(dtype))
        return tables


@dataclass
class Buckets:
    """Documents regrouped into batches of similar length, each padded at its documents' ends to one length.

    ``shapes``: (documents, length) of each batch. Their slots stand one after the other, P in all. ``index_P``: the
    token of each slot; a padding slot repeats its document's last token. ``order_T``: the slot of each token. Causality
    keeps padding out: it stands after every real token, so no real query sees it.
    """

    shapes: list[tuple[int, int]]
    index_P: torch.Tensor
    order_T: torch.Tensor


def _bucket_ceiling(length: int) -> int:
    """Lengths 1..8 → 8, then 8 steps per doubling: at most 1/8 of a bucket is padding."""
    if length <= 8:
        return 8
    step = 1 << max(0, (length - 1).bit_length() - 4)
    return -(-length // step) * step


def _make_buckets(lengths: list[int], device: torch.device) -> Buckets:
    groups: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        key = _bucket_ceiling(length) if length < _ALONE_FROM_TOKENS else -1 - document
        groups.setdefault(key, []).append(document)
    length_D = np.array(lengths, np.int64)
    start_D = length_D.cumsum() - length_D
    order_T = np.empty(length_D.sum(), np.int64)
    shapes, indices, offset = [], [], 0
    for documents in groups.values():
        size_D1 = length_D[documents, None]
        longest = int(size_D1.max())
        step_L = np.arange(longest)
        real_DL = step_L < size_D1
        index_DL = start_D[documents, None] + np.minimum(step_L, size_D1 - 1)
        slot_DL = offset + np.arange(index_DL.size).reshape(index_DL.shape)
        order_T[index_DL[real_DL]] = slot_DL[real_DL]
        offset += index_DL.size
        shapes.append((len(documents), longest))
        indices.append(index_DL.ravel())
    return Buckets(shapes, to_device(np.concatenate(indices), device), to_device(order_T, device))
