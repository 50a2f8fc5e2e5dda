"""Lay out rows of samples as one micro-batch of tensors.

Owns: concatenation, the shift of labels, positions, document boundaries, padding. Does not own: the batch
(``data/batch.py``), which samples share a row (``packing.py``) or a step (``loader.py``). Invariant: nothing crosses a
document's end: its last token predicts nothing, positions restart, and padding is further documents without loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.data.views import Sample

PAD_ID = 0  # every embedding has this id; it also fills labels where there is none, so padding needs no masking pass
PAD_DOCUMENT_TOKENS = (
    64  # padding is cut into short documents, since the cost of attention grows with the square of their length
)


def collate(rows: Sequence[Sequence[Sample]], row_tokens: int, num_attributes: int = 0) -> RowBatch:
    """Lay out ``rows`` end to end, each padded to ``row_tokens``; a row may be empty.

    ``num_attributes`` is the width of ``values_PA``. A row that does not fit is a bug of the caller and raises
    ``ValueError``.
    """
    total = len(rows) * row_tokens
    tokens = np.full(total, PAD_ID, np.int64)
    targets = np.zeros(total, np.bool_)
    starts: list[int] = []
    pool: list[np.ndarray] = [np.zeros(0, np.int64)]
    values: list[np.ndarray] = [np.zeros((0, num_attributes), np.float32)]
    useful = 0
    for number, row in enumerate(rows):
        at, end = number * row_tokens, (number + 1) * row_tokens
        for sample in row:
            size = len(sample.tokens_T)
            if at + size > end:
                raise ValueError(f"sample {sample.id!r} does not fit its row of {row_tokens} tokens")
            starts.append(at)
            tokens[at : at + size] = sample.tokens_T
            targets[at : at + size] = sample.loss_mask_T
            if len(sample.pool_P):
                pool.append(sample.pool_P.astype(np.int64) + at)
                values.append(sample.values_PA)
            useful += size
            at += size
        starts.extend(range(at, end, PAD_DOCUMENT_TOKENS))
    bounds = np.array([*starts, total], np.int64)
    labels = np.zeros(total, np.int64)
    mask = np.zeros(total, np.float32)
    labels[:-1] = tokens[1:]
    mask[:-1] = targets[1:]
    last = bounds[1:] - 1
    labels[last] = 0
    mask[last] = 0
    return RowBatch(
        tokens_T=torch.from_numpy(tokens),
        labels_T=torch.from_numpy(labels),
        loss_mask_T=torch.from_numpy(mask),
        target_K=torch.from_numpy(mask.nonzero()[0]),
        positions_T=torch.from_numpy(np.arange(total) - np.repeat(bounds[:-1], np.diff(bounds))),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        pool_P=torch.from_numpy(np.concatenate(pool)),
        values_PA=torch.from_numpy(np.concatenate(values)),
        sample_ids=[sample.id for row in rows for sample in row],
        useful_tokens=useful,
        target_tokens=int(mask.sum()),
        squared_tokens=sum(len(sample.tokens_T) ** 2 for row in rows for sample in row),
    )
