"""Batches of a training run: the rows of each global step, and the share of this data-parallel rank.

Owns: distributing rows to ranks and micro-batches, prefetch, the position to resume from. Does not own: the order of
rows (``blend.py``), packing (``packing.py``), tensors (``collate.py``). Invariants: the rows of a step are a function
of (plans, seed, step) and not of the layout; the order is a function of (seed, epoch, consumed rows), so that resuming
replays nothing; all ranks get the same number of micro-batches.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from steerlm_megatron.config.schema import TrainConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.data.feed.blend import Rows
from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.views import Sample
from steerlm_megatron.runtime.device import has_cuda

_POLL_SEC = 0.1  # a waiting prefetch thread checks this often whether it is to end


class StepLoader:
    """Iterator over global steps: each item is this rank's list of micro-batches.

    A step takes the next ``rows_per_step`` rows in the sequence of all epochs (so it may span two epochs), or those
    that are left before ``end_row``. They are distributed round robin to the data-parallel ranks, then cut into
    micro-batches of ``train.micro_batch_rows`` rows; where the division leaves a remainder, empty rows fill it. A
    thread prepares steps ahead; ``close`` (or leaving the ``with``) ends it.

    Args:
        rows: from ``Corpora.rows(view, train.row_tokens, …)``.
        start_row: rows consumed by the run so far (``consumed_rows`` of an earlier loader).
        end_row: where the run ends, with a smaller step if need be. With None the loader is endless.
        prefetch_steps: steps prepared ahead; 0: none, and no thread.
        cp_rank, cp_size: each of the ``cp_size`` context-parallel ranks gets its part of the same micro-batches.
    """

    def __init__(
        self,
        rows: Rows,
        train: TrainConfig,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_row: int = 0,
        end_row: int | None = None,
        prefetch_steps: int = 2,
        cp_rank: int = 0,
        cp_size: int = 1,
    ) -> None:
        assert train.row_tokens == rows.row_tokens, "the rows are of another length"
        assert 0 <= dp_rank < dp_size and start_row >= 0 and len(rows) > 0
        self.rows = rows
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._cp_rank, self._cp_size = cp_rank, cp_size
        self.rows_per_step = rows_per_step(rows, train.global_batch_samples)
        # A micro-batch has no more rows than a rank's share of a step, since rows of padding would be computed for
        # nothing.
        self._micro_rows = min(train.micro_batch_rows, -(-self.rows_per_step // dp_size))
        self._num_attributes = rows.corpora.num_attributes
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self.consumed_rows = start_row
        self.consumed_samples = self._samples_before(start_row)
        self._next_row = start_row  # next row of the producer, which runs ahead of the consumer
        self._end_row = math.inf if end_row is None else end_row
        self._prefetch_steps = prefetch_steps
        self._queue: queue.Queue[tuple[list[RowBatch], int, int] | BaseException] = queue.Queue(max(1, prefetch_steps))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # -- position -----------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Epoch of the next row, counted from 0."""
        return self.consumed_rows // len(self.rows)

    def steps_to(self, row: int) -> int:
        """Return the number of steps from here to ``row``, the last of which may be smaller; negative if ``row`` has
        passed.
        """
        return -((self.consumed_rows - row) // self.rows_per_step)

    def state(self) -> dict[str, int]:
        """Return the state to store, so that ``start_row=state["consumed_rows"]`` goes on from here."""
        return {
            "consumed_rows": self.consumed_rows,
            "consumed_samples": self.consumed_samples,
            "epoch": self.epoch,
        }

    # -- training -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[list[RowBatch]]:
        return self

    def __next__(self) -> list[RowBatch]:
        if self._failure is not None:
            raise self._failure
        batches, rows, samples = self._from_thread() if self._prefetch_steps else self._produce()
        self.consumed_rows += rows
        self.consumed_samples += samples
        return batches

    def close(self) -> None:
        """End the prefetch thread; the loader cannot be used afterwards."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._failure = self._failure or StopIteration()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- validation ---------------------------------------------------------------------------------------------------

    def eval_batches(self, limit_rows: int | None = None) -> Iterator[list[RowBatch]]:
        """Yield the first ``limit_rows`` rows (None: all) once, in order, in groups of ``rows_per_step``.

        Each item has this rank's micro-batches of one group, the same number on all ranks. The position in training
        does not matter.
        """
        rows = np.arange(len(self.rows) if limit_rows is None else min(limit_rows, len(self.rows)))
        for start in range(0, len(rows), self.rows_per_step):
            yield self._micro_batches(rows[start : start + self.rows_per_step])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _from_thread(self) -> tuple[list[RowBatch], int, int]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="steerlm-loader", daemon=True)
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def _run(self) -> None:
        while not self._stop.is_set():
            item: Any
            try:
                item = self._produce()
            except BaseException as error:  # noqa: B036 (re-raised in the consumer)
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=_POLL_SEC)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def _produce(self) -> tuple[list[RowBatch], int, int]:
        """Return the next step, and its numbers of rows and samples over all ranks."""
        end = int(min(self._next_row + self.rows_per_step, self._end_row))
        if end <= self._next_row:
            raise StopIteration
        rows = self._sequence(self._next_row, end)
        self._next_row = end
        return self._micro_batches(rows), len(rows), int(self.rows.sample_counts(rows).sum())

    def _sequence(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return rows ``start … stop`` of the sequence of all epochs."""
        size = len(self.rows)
        parts = []
        for epoch in range(start // size, -(-stop // size)):
            order = self._order(epoch)
            parts.append(order[max(0, start - epoch * size) : stop - epoch * size])
        return np.concatenate(parts)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = self.rows.order(epoch)
        return self._orders[epoch]

    def _samples_before(self, row: int) -> int:
        epochs, rest = divmod(row, len(self.rows))
        whole = (self.rows.order(epoch) for epoch in range(epochs))
        before = (
            sum(int(self.rows.sample_counts(order).sum()) for order in whole)
            if self.rows.weights
            else (epochs * self.rows.samples)
        )
        return before + (int(self.rows.sample_counts(self._order(epochs)[:rest]).sum()) if rest else 0)

    def _micro_batches(self, rows: npt.NDArray[np.int64]) -> list[RowBatch]:
        """Return this rank's share of the rows of one step as micro-batches."""
        mine = rows[self._dp_rank :: self._dp_size].tolist()
        count = -(-len(rows) // (self._dp_size * self._micro_rows))
        batches = []
        for number in range(count):
            chosen = mine[number * self._micro_rows : (number + 1) * self._micro_rows]
            content: list[Sequence[Sample]] = [self.rows.samples_of(row) for row in chosen]
            content += [()] * (self._micro_rows - len(content))
            batch = collate(content, self.rows.row_tokens, self._num_attributes)
            if self.rows.groups is not None:
                batch = self.rows.groups.attach(batch)
            batch = batch.part(self._cp_rank, self._cp_size)
            batches.append(batch.pin() if has_cuda() else batch)
        return batches


def rows_per_step(rows: Rows, global_batch_samples: int) -> int:
    """Return the number of rows whose expected number of samples is ``global_batch_samples``, the same for every
    layout.

    It is at least one, and at most the rows of an epoch, since a step that repeats the corpus would compute one epoch's
    gradient at the price of several epochs.
    """
    return min(max(1, round(global_batch_samples / rows.samples_per_row)), len(rows))


def end_row(rows: Rows, epochs: float) -> int:
    """Return the row at which ``epochs`` passes over ``rows`` end; at least one row is passed."""
    return max(1, round(epochs * len(rows)))
