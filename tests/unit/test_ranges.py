"""Ranges of a flattened tensor as boxes (hyperrectangles) agree with numpy, for any shape and any cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory

from steerlm_megatron.train.ranges import boxes, sharded_range

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(shapes, st.data())
def test_the_boxes_of_a_range_end_to_end_are_the_range(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = np.arange(size).reshape(shape)
    found = list(boxes(shape, start, stop))
    parts = [whole[tuple(map(slice, offset, np.add(offset, box)))].reshape(-1) for offset, box in found]
    assert list(itertools.chain.from_iterable(parts)) == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def piece(data: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...], axis: int = 0) -> ShardedTensor:
    """Return a shard with ``data`` at ``offset`` of a tensor of ``shape``; its first ``axis`` dimensions are layers."""
    return ShardedTensor(
        "weight", data, data.dtype, tuple(data.shape), shape, offset, None, replica_id=(0, 0, 3), prepend_axis_num=axis
    )


def put(shards: list[ShardedTensor], whole: torch.Tensor) -> None:
    """Write every shard at its position, as a checkpoint does, and check that none overlaps another."""
    for shard in shards:
        place = tuple(slice(at, at + size) for at, size in zip(shard.global_offset, shard.local_shape, strict=True))
        assert whole[place].isnan().all() and shard.replica_id == (0, 0, 0) and shard.key == "moment"
        assert shard.data is not None and shard.global_shape == tuple(whole.shape)
        whole[place] = shard.data


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_layer_of_a_stack_cut_between_ranks(ranks: int) -> None:
    parameter = torch.arange(35.0).view(7, 5)
    template = piece(parameter, (2, 7, 0), (4, 14, 5), axis=1)
    whole = torch.full((4, 14, 5), math.nan)
    cuts = [35 * rank // ranks for rank in range(ranks + 1)]
    for start, stop in itertools.pairwise(cuts):
        values = parameter.view(-1)[start:stop]
        put(sharded_range(template, parameter.shape, "moment", values, start), whole)
    assert torch.equal(whole[2, 7:], parameter)
    assert whole[[0, 1, 3]].isnan().all() and whole[2, :7].isnan().all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_parameter_that_is_two_in_the_checkpoint(ranks: int) -> None:
    """SwiGLU's gate and input under tensor parallelism are such a parameter."""

    def build(key: str, data: torch.Tensor, replica: ReplicaId, _: slice | None) -> list[ShardedTensor]:
        gate, up = data.chunk(2)
        return [piece(gate, (4, 0), (16, 3)), piece(up, (12, 0), (16, 3))]

    parameter = torch.arange(24.0).view(8, 3)
    template = ShardedTensorFactory("weight", parameter, build, lambda state: state, (0, 0, 3))
    whole = torch.full((16, 3), math.nan)
    cuts = [24 * rank // ranks for rank in range(ranks + 1)]
    for start, stop in itertools.pairwise(cuts):
        values = parameter.view(-1)[start:stop]
        put(sharded_range(template, parameter.shape, "moment", values, start), whole)
    assert torch.equal(whole[4:8], parameter[:4]) and torch.equal(whole[12:], parameter[4:])
    assert whole[:4].isnan().all() and whole[8:12].isnan().all()
