"""A micro-batch: the tensors that a training step or a scoring pass takes.

Owns: their names, layouts and dtypes, a context-parallel rank's part of them, moving them to a device. Does not own:
laying samples out (``feed/collate.py``). Invariant: nothing crosses a document's end: its last token predicts nothing,
and positions restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class ContextChunk:
    """Consecutive tokens ``start … stop`` of a packed sequence; documents may begin and end anywhere in them.

    ``first_key``: where the document of token ``start`` begins; the chunk's attention needs keys from there on.
    ``lengths``: how many of the chunk's tokens each of its documents has.
    """

    start: int
    stop: int
    first_key: int
    lengths: tuple[int, ...]

    @property
    def carried(self) -> int:
        """Number of tokens of the first document that come before the chunk."""
        return self.start - self.first_key


@dataclass
class RowBatch:
    """One micro-batch of packed rows. T = rows · row_tokens, K tokens with loss, P pooled positions, A attributes.

    After :meth:`part`, T, K and P are those of one context-parallel rank, and indices count its tokens; ``cu_seqlens``,
    ``sample_ids`` and the counts remain those of the complete sequence.

    Args:
        tokens_T: int64 [T].
        labels_T: int64 [T]: the next token of the same document; 0 elsewhere.
        loss_mask_T: float32 [T]: weight of predicting ``labels_T``.
        target_K: int64 [K]: where that weight is not 0.
        positions_T: int64 [T]: position within the document.
        cu_seqlens: int32 [documents + 1]: where documents begin and end; covers all T, padding included.
        pool_P: int64 [P]: positions in T whose hidden state is regressed.
        values_PA: float32 [P, A]: regression targets, NaN where missing.
        sample_ids: ids of the samples, in the order of their documents.
        useful_tokens: tokens that are not padding.
        target_tokens: tokens with loss.
        squared_tokens: Σ s² over the lengths of the samples, with which the work of attention grows. Padding is not
            counted.
        chunks: the chunks of the complete sequence that this context-parallel rank holds; empty without context
            parallelism.
        sample_K: int64 [K], of groups of responses (``data/groups.py``): which of the S samples each target is of.
        group_S: int64 [S], which of ``groups`` groups each sample is of.
        weight_S, logprob_S, scale_S: float64 [S]: target share in the group, log-probability under the model that
            drew the response, what the group's loss is multiplied by.
        cu_queries, cu_keys: int32 [documents in chunks + 1]: their boundaries among the rank's T tokens, and among the
            keys of all its chunks.
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    loss_mask_T: torch.Tensor
    target_K: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    pool_P: torch.Tensor
    values_PA: torch.Tensor
    sample_ids: list[str]
    useful_tokens: int
    target_tokens: int
    squared_tokens: int = 0
    chunks: tuple[ContextChunk, ...] = ()
    cu_queries: torch.Tensor | None = None
    cu_keys: torch.Tensor | None = None
    sample_K: torch.Tensor | None = None
    group_S: torch.Tensor | None = None
    weight_S: torch.Tensor | None = None
    logprob_S: torch.Tensor | None = None
    scale_S: torch.Tensor | None = None
    groups: int = 0

    @property
    def row_tokens(self) -> int:
        """Number of tokens of the complete sequence, padding included."""
        return int(self.cu_seqlens.numpy()[-1])

    def part(self, rank: int, ranks: int) -> RowBatch:
        """Return the part that context-parallel rank ``rank`` of ``ranks`` computes. ``ranks`` · 2 must divide T.

        The sequence is cut into 2 · ``ranks`` equal chunks. A rank holds one of the first half and its mirror image, so
        that causal attention inside a long document is about the same work for all ranks.
        """
        if ranks == 1:
            return self
        size, rest = divmod(self.row_tokens, 2 * ranks)
        assert not rest and not self.chunks, "refused by config.load"
        bounds = self.cu_seqlens.numpy()
        chunks = tuple(_chunk(bounds, number * size, size) for number in (rank, 2 * ranks - 1 - rank))
        index_T = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])
        here = np.full(self.row_tokens, -1, np.int64)  # index in this part of each token of the complete sequence
        here[index_T] = np.arange(len(index_T))
        pool_P = here[self.pool_P.numpy()]
        mask_T = self.loss_mask_T.numpy()[index_T]
        index = torch.from_numpy(index_T)
        sample_K = None
        if self.sample_K is not None:
            sample_T = torch.zeros(self.row_tokens, dtype=torch.int64)
            sample_T[self.target_K] = self.sample_K
            sample_K = sample_T[index][torch.from_numpy(mask_T != 0)]
        return replace(
            self,
            tokens_T=self.tokens_T[index],
            labels_T=self.labels_T[index],
            loss_mask_T=torch.from_numpy(mask_T),
            target_K=torch.from_numpy(mask_T.nonzero()[0]),
            positions_T=self.positions_T[index],
            pool_P=torch.from_numpy(pool_P[pool_P >= 0]),
            values_PA=self.values_PA[torch.from_numpy(pool_P >= 0)],
            sample_K=sample_K,
            chunks=chunks,
            cu_queries=_boundaries([n for c in chunks for n in c.lengths]),
            cu_keys=_boundaries([n for c in chunks for n in (c.carried + c.lengths[0], *c.lengths[1:])]),
        )

    def pin(self) -> RowBatch:
        """Return the batch in page-locked memory, from which a GPU copies while the host goes on."""
        return self._each(torch.Tensor.pin_memory)

    def to(self, where: torch.device) -> RowBatch:
        """Return the batch on ``where``; the host does not wait for copies from pinned memory."""
        return self._each(lambda tensor: tensor.to(where, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RowBatch:
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = change(value) if isinstance(value, torch.Tensor) else value
        return RowBatch(**values)


def _chunk(bounds: npt.NDArray[np.int32], start: int, size: int) -> ContextChunk:
    """Return the chunk of ``size`` tokens from ``start`` of a sequence with documents between ``bounds``."""
    inner = bounds[(bounds > start) & (bounds < start + size)]
    lengths = np.diff(np.concatenate([[start], inner, [start + size]]))
    first_key = int(bounds[bounds <= start][-1])
    return ContextChunk(start, start + size, first_key, tuple(lengths.tolist()))


def _boundaries(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
