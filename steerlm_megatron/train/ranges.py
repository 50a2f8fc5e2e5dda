"""Where a data-parallel rank's share of the optimizer lies in the whole tensors.

A distributed optimizer gives a rank a range of the flattened parameter, which no sharded format knows. Cut at the ends
of its rows, such a range is a few boxes of the whole tensor, and boxes are what sharded checkpoints are made of: every
rank writes and reads its own share, nothing is gathered, and any other layout reads the same tensors.

Owns: ranges to boxes, boxes to Megatron-Core's sharded tensors. Invariant: the boxes of a range, end to end, are the
range, in order and without a gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Template: TypeAlias = ShardedTensor | ShardedTensorFactory
Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # offset, size


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The range ``[start, stop)`` of a row-major array as boxes, in order; up to ``2 * len(shape) - 1`` of them."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, skipped = divmod(start, row)
    if skipped:
        end = min(stop - first * row, row)
        for offset, size in boxes(shape[1:], skipped, end):
            yield (first, *offset), (1, *size)
        first += 1
    last, rest = divmod(stop, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if rest and first <= last:
        for offset, size in boxes(shape[1:], 0, rest):
            yield (last, *offset), (1, *size)


def sharded_range(
    template: Template, shape: Sequence[int], key: str, values: torch.Tensor, start: int
) -> list[ShardedTensor]:
    """Sharded tensors over views of ``values``.

    Args:
        template: what the model says of this rank's parameter: where it stands in the whole tensor, or how it is cut.
        shape: of this rank's parameter.
        key: of the whole tensor, in the place of the template's.
        values: flat: ``[start, start + len(values))`` of the flattened parameter, or of a state like it.
    """
    out, stop = [], start + values.numel()
    for at, piece in _pieces(template, shape):
        low, high = max(start, at), min(stop, at + math.prod(piece.local_shape))
        whole, prepended = tuple(piece.global_offset), (0,) * piece.prepend_axis_num
        assert isinstance(piece.replica_id, tuple) and len(piece.replica_id) == 3, piece
        for offset, size in boxes(piece.local_shape, low - at, high - at):
            count = math.prod(size)
            size = (1,) * len(prepended) + size
            out.append(
                replace(
                    piece,
                    key=key,
                    data=values[low - start : low - start + count].view(size),
                    dtype=values.dtype,
                    local_shape=size,
                    global_offset=tuple(map(sum, zip(whole, prepended + offset, strict=True))),
                    axis_fragmentations=None,
                    replica_id=(*piece.replica_id[:2], 0),  # the third is the data-parallel rank's: no other has these
                    prepend_axis_num=0,
                )
            )
            low += count
    return out


def _pieces(template: Template, shape: Sequence[int]) -> Iterator[tuple[int, ShardedTensor]]:
    """The sharded tensors that the parameter is cut into, each with its place in the flattened parameter."""
    if isinstance(template, ShardedTensor):
        yield 0, replace(template, data=None)
        return
    built = replace(template, data=torch.empty(shape, device="meta")).build()
    assert isinstance(built, list), template
    for piece in built:
        assert isinstance(piece, ShardedTensor) and piece.data is not None and piece.data.is_contiguous(), template
        yield int(piece.data.storage_offset()), replace(piece, data=None)
