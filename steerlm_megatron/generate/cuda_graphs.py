"""Steps that decode, recorded once as CUDA graphs: one launch instead of a few hundred.

Owns: a graph for each size of batch, and the tensors that graphs read and write. Does not own: the model's pass and the
kernels (``forward.py``, ``paged_kernels.py``). Invariant: a replay computes what the pass would compute for the same
rows; the rows that fill a batch up to a graph's size use a block that belongs to no sequence.

A step of a model of a billion parameters takes a GPU one or two milliseconds, and the host that launches its kernels
one by one more than ten (``benchmarks/gpu.md``). A graph holds the addresses of its tensors, so what changes from step
to step, tokens, positions and blocks, is written into the same tensors before each replay.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch

from steerlm_megatron.generate.kv_cache import BlockTables, KVCache
from steerlm_megatron.generate.protocol import EngineDead
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)

_ROOM = 1 / 16  # of the device's memory: with less of it free, the allocator gives back what it keeps before recording

Pass = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids int64 [B], positions int32 [B] → logits [B, V]


def graph_rows(rows: int, most: int) -> int:
    """Return the number of rows of the graph for ``rows`` rows: 1, 2, 4, 8, 12, 16, 24, 32 and so on, at most ``most``.

    Graphs are few, since each takes time to record. A spare row costs little: a small batch is bound by reading the
    weights, and the row's attention sees one token.
    """
    step = 1 << (rows - 1).bit_length() if rows <= 8 else 1 << (rows - 1).bit_length() - 2
    return min(-(-rows // step) * step, most)


class DecodeGraphs:
    """The step in which every row is fed the token that it got last."""

    def __init__(self, compute: Pass, cache: KVCache, max_rows: int, max_blocks: int) -> None:
        """``compute`` is called with the cache told of its rows, and must not wait for the device. The cache must have
        kernels; ``max_blocks`` is the width of the tables that calls bring.
        """
        self._compute, self._cache, self._max_rows = compute, cache, max_rows
        self._spare_X = cache.spare_row(max_blocks)
        self._ids_B = torch.zeros(max_rows, dtype=torch.int64, device=cache.device)
        self._rows_BX = torch.zeros((max_rows, 2 + max_blocks), dtype=torch.int32, device=cache.device)
        self._logits_BV: torch.Tensor | None = None
        self._replays: dict[int, Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if cache.device.type == "cuda" else None
        self._stream: torch.cuda.Stream | None = None  # in which passes are recorded

    def __call__(
        self, ids_B: torch.Tensor, tables: BlockTables, rows_B: np.ndarray, positions_B: np.ndarray
    ) -> torch.Tensor:
        """Return logits [B, V] for the rows ``rows_B`` of ``tables``, whose next tokens ``ids_B`` stand at
        ``positions_B``. They are overwritten by the next call, or by the caller.
        """
        count = len(ids_B)
        size = graph_rows(count, self._max_rows)
        rows_BX = np.empty((size, len(self._spare_X)), np.int32)
        rows_BX[:count] = self._cache.rows(tables, rows_B, positions_B)
        rows_BX[count:] = self._spare_X
        self._ids_B[:count].copy_(ids_B)
        rows = torch.from_numpy(rows_BX)
        self._rows_BX[:size].copy_(rows.pin_memory() if self._cache.device.type == "cuda" else rows, non_blocking=True)
        replay = self._replays.get(size)
        if replay is None:
            replay = self._replays[size] = self._record(size)
        replay()
        assert self._logits_BV is not None
        return self._logits_BV[:count]

    def _pass(self, size: int) -> None:
        positions_B = self._cache.begin_rows(self._rows_BX[:size])
        logits_BV = self._compute(self._ids_B[:size], positions_B)
        if self._logits_BV is None:
            self._logits_BV = logits_BV.new_empty((self._max_rows, logits_BV.shape[1]))
        self._logits_BV[:size].copy_(logits_BV)

    def _record(self, size: int) -> Callable[[], None]:
        """Return what runs the pass for ``size`` rows. Recording computes nothing, so the passes before it, which
        compile kernels, also leave nothing behind that a replay would not.
        """
        if self._pool is None:
            return lambda: self._pass(size)
        try:
            with torch.cuda.device(self._cache.device):
                return self._record_graph(size)
        except torch.OutOfMemoryError as error:
            raise EngineDead(
                f"the GPU has no memory left to record a step of {size} sequences: lower generation.memory_fraction, "
                f"generation.max_cache_tokens or generation.max_batch, or set generation.cuda_graphs=false ({error})"
            ) from error

    def _record_graph(self, size: int) -> Callable[[], None]:
        began, here, graph = time.perf_counter(), torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                self._pass(size)
            # While it records, the allocator gives nothing back: what earlier passes have left must not be in the way.
            free, total = torch.cuda.mem_get_info()
            if free < _ROOM * total:
                torch.cuda.empty_cache()
            # Without torch.cuda.graph(), which collects all garbage and gives all kept memory back before every graph.
            with _no_collection():
                self._capture(graph, size)
        here.wait_stream(self._stream)
        log.debug("recorded the graph of a step of %d rows in %.2f s", size, time.perf_counter() - began)
        replay: Callable[[], None] = graph.replay
        return replay

    def _capture(self, graph: torch.cuda.CUDAGraph, size: int) -> None:
        # Other threads of a server may use the device meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._pass(size)
        except BaseException:
            with suppress(RuntimeError):  # which says that the capture failed, and not why
                graph.capture_end()
            raise
        graph.capture_end()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage inside the ``with``: to free a tensor or an event of the device may be forbidden there."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
