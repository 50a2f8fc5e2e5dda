"""What Megatron-Core's sharded checkpoints hold: planned together, copied to the host, written by each rank alone.

Owns: the calls of ``dist_checkpointing``, the copies that a save in the background needs. Does not own: folders,
commit, metadata (``checkpoint.py``), what is in a state (the engines).
Invariant: after :meth:`ShardedWriter.begin` returns, training may change every tensor of the state; nothing in
``Write.run`` is collective, so it may run in a thread beside training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling

from steerlm_megatron.errors import UserError
from steerlm_megatron.runtime.device import has_cuda
from steerlm_megatron.train.safe_pickle import reading

_BACKEND = ("torch_dist", 1)


def _nothing() -> None:
    """For a rank that has nothing to write."""


@dataclass(frozen=True)
class Write:
    """A state on its way to disk.

    Args:
        run: writes this rank's part; in any thread, not collective.
        finalize: once every rank's ``run`` has ended; collective over the world, in the main thread.
        files: names of what ``run`` writes, below the folder.
    """

    run: Callable[[], None]
    finalize: Callable[[], None]
    files: Sequence[str]


class ShardedWriter:
    """Writes the states of one run. What stays the same from save to save is kept: the plan, the host buffers."""

    def __init__(self) -> None:
        self._strategy = TorchDistSaveShardedStrategy(*_BACKEND, cached_metadata=True)
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._checked = False

    def begin(self, state: dict[str, Any], folder: Path, live: Iterable[torch.Tensor] | None = None) -> Write:
        """Plan a save into an existing empty folder. Collective over the world.

        Args:
            live: tensors that training changes. Those of ``state`` that lie in them or on a GPU are copied to the host.
                None: nothing is copied, and ``run`` has to end before training goes on.
        """
        if live is not None:
            apply_factories(state)
            self._copy(state, live)
        more = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # Megatron-Core 0.19
            more["async_strategy"] = "mcore"
        request = dist_checkpointing.save(
            state,
            str(folder),
            self._strategy,
            validate_access_integrity=not self._checked,
            async_sharded_save=True,
            **more,
        )
        self._checked = True  # the same state, hence the same shards, at every save of a run

        def finalize() -> None:
            for step in request.finalize_fns:
                step()

        if request.async_fn is None:
            return Write(_nothing, finalize, ())
        rank, _, results = request.async_fn_args
        buckets = request.preload_fn()

        def run() -> None:
            request.async_fn(rank, buckets, results, **request.async_fn_kwargs)
            found = results.get()
            if isinstance(found, Exception):
                raise found
            results.put(found)  # for finalize

        return Write(run, finalize, tuple(name for _, name, _ in buckets))

    def _copy(self, state: dict[str, Any], live: Iterable[torch.Tensor]) -> None:
        """Put copies in the place of what this rank writes of the tensors that change."""
        changing = {tensor.untyped_storage().data_ptr() for tensor in live}
        copies: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}  # fp32 weights are the optimizer's as well
        used = set()
        for shard in nested_values(state):
            if not isinstance(shard, ShardedTensor) or not is_main_replica(shard.replica_id):
                continue
            data = shard.data.detach()
            if data.is_cpu and data.untyped_storage().data_ptr() not in changing:
                continue
            where = (data.data_ptr(), data.numel(), data.dtype)
            if where in copies and data.is_contiguous():
                shard.data = copies[where].view(data.shape)
                continue
            key = (shard.key, shard.global_offset, data.shape, data.dtype)
            if key not in self._buffers:
                self._buffers[key] = torch.empty(data.shape, dtype=data.dtype, pin_memory=has_cuda())
            used.add(key)
            shard.data = self._buffers[key].copy_(data, non_blocking=True)
            if data.is_contiguous():
                copies[where] = shard.data
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in used}
        if has_cuda():
            torch.cuda.synchronize()  # the copies have to be made before training goes on


def stored_dtype(folder: Path, prefix: str) -> torch.dtype:
    """The dtype of the tensors under ``prefix`` (the widest, where they differ). ``KeyError``: there are none."""
    with reading(folder):
        found = dist_checkpointing.load_tensors_metadata(str(folder))
    dtypes = {tensor.dtype for key, tensor in found.items() if key.startswith(prefix)}
    if not dtypes:
        raise KeyError(f"{folder}: no tensors named {prefix}…")
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def stored_keys(folder: Path) -> set[str]:
    """Names of the tensors that a checkpoint holds."""
    with reading(folder):
        return set(dist_checkpointing.load_tensors_metadata(str(folder)))


def common_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, the same on every rank."""
    with reading(folder):
        return dist_checkpointing.load_common_state_dict(str(folder))


def load_sharded(state: dict[str, Any], folder: Path, missing_ok: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read what ``state`` asks for. Keys that start with one of ``missing_ok`` may be absent. Collective over the
    world.
    """
    with reading(folder):
        if not missing_ok:
            return dist_checkpointing.load(state, str(folder))
        loaded, _, absent = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_UNEXPECTED)
    wrong = sorted(key for key in absent if not key.startswith(missing_ok))
    if wrong:
        raise UserError(f"{folder}: the checkpoint lacks {', '.join(wrong[:5])}: it holds another kind of model")
    return loaded
