"""Packing: the samples that share a row.

Owns: best-fit-decreasing over lengths, the resulting plan, and the plan's file. Does not own: lengths (``dataset.py``),
the order of rows in training (``loader.py``). Invariants: each sample is completely in exactly one row; no row exceeds
``row_tokens``; a plan is a function of (lengths, row length, seed) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steerlm_megatron.files import atomic_path

_PLAN_FORMAT = 1
# The file of a plan has these counts after (format, row_tokens, rows, samples).
_COUNTS = ("useful_tokens", "total", "truncated", "cut_tokens", "overlong_dropped", "masked_dropped")

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackPlan:
    """A plan of rows. Row r has the samples ``samples[offsets[r]:offsets[r + 1]]``.

    Args:
        row_tokens: capacity of a row.
        view, overlong: the arguments with which ``dataset.sample`` gives these samples.
        useful_tokens: tokens of all samples in the plan.
        total: samples in the data set. ``truncated`` of them were shortened (losing ``cut_tokens``),
            ``overlong_dropped`` were left out by the over-long policy, and ``masked_dropped`` because they have no
            target.
    """

    offsets: Int64
    samples: Int64
    row_tokens: int
    view: str = "acsft"
    overlong: str = "truncate_left_turns"
    useful_tokens: int = 0
    total: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    overlong_dropped: int = 0
    masked_dropped: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Int64:
        """Return the numbers of the samples in row ``index``."""
        return self.samples[self.offsets[index] : self.offsets[index + 1]]

    @property
    def samples_per_row(self) -> float:
        return len(self.samples) / max(1, len(self))

    def report(self) -> dict[str, Any]:
        """Return plain numbers for the run's summary."""
        return {
            "rows": len(self),
            "row_tokens": self.row_tokens,
            "fill": round(self.useful_tokens / max(1, len(self) * self.row_tokens), 6),
            "samples": len(self.samples),
            "samples_per_row": round(self.samples_per_row, 3),
            "samples_total": self.total,
            "truncated": self.truncated,
            "cut_tokens": self.cut_tokens,
            "dropped_overlong": self.overlong_dropped,
            "dropped_masked": self.masked_dropped,
        }


def pack(lengths: npt.NDArray[np.integer], row_tokens: int, seed: int) -> tuple[Int64, Int64]:
    """Pack by best-fit-decreasing. Returns ``offsets`` [rows + 1] and ``samples``; samples of length 0 are in no row.

    Samples are placed longest first, each into the fullest row that has room for it. Rows with equal room are
    interchangeable, and so are samples of equal length, so groups are placed at once: a step uses up a class of rows or
    finishes a length, which makes it O(n log n) for the sort plus O(row_tokens · classes) for the rest. ``seed``
    decides which of the samples of equal length go together. A length above ``row_tokens`` is a bug of the caller and
    raises ``ValueError``.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and int(lengths.max()) > row_tokens:
        raise ValueError(f"a length of {int(lengths.max())} exceeds row_tokens={row_tokens}")
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled].astype(np.int64), kind="stable")]
    sizes, starts, counts = np.unique(-lengths[order].astype(np.int64), return_index=True, return_counts=True)

    room: list[list[Int64]] = [[] for _ in range(row_tokens + 1)]  # room[r]: arrays of rows with r tokens left
    has_room = np.zeros(row_tokens + 2, np.bool_)
    row_of = np.full(len(order), -1, np.int64)  # indexed like `order`
    rows = 0

    def put(rows_: Int64, left: int) -> None:
        if left > 0 and len(rows_):
            room[left].append(rows_)
            has_room[left] = True

    for size, start, count in zip((-sizes).tolist(), starts.tolist(), counts.tolist(), strict=True):
        if size == 0:
            continue
        at, stop = start, start + count
        while at < stop:
            left = size + int(has_room[size:].argmax())
            if has_room[left]:
                candidates = room[left].pop()
                has_room[left] = bool(room[left])
            else:
                left = row_tokens
                fresh = -(-(stop - at) // (row_tokens // size))
                candidates = np.arange(rows, rows + fresh)
                rows += fresh
            # Best fit: a row that has just got a sample is the fullest of all, so it gets as many as fit before the
            # next row.
            each = left // size
            full, rest = divmod(stop - at, each)
            full = min(full, len(candidates))
            row_of[at : at + full * each] = np.repeat(candidates[:full], each)
            at += full * each
            put(candidates[:full], left - each * size)
            if full < len(candidates):
                if at < stop:
                    row_of[at:stop] = candidates[full]
                    at = stop
                    put(candidates[full : full + 1], left - rest * size)
                    full += 1
                put(candidates[full:], left)

    placed = row_of >= 0
    row_of, order = row_of[placed], order[placed]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=rows)))).astype(np.int64)
    return offsets, order[np.argsort(row_of, kind="stable")].astype(np.int64)


def pack_groups(
    lengths: npt.NDArray[np.integer], group_N: Int64, row_tokens: int, seed: int
) -> tuple[Int64, Int64, Int64]:
    """Pack so that the samples of a group share a row. Returns ``offsets`` [rows + 1] and ``samples``, as :func:`pack`
    does, and the groups that are longer than a row, which are in none.

    ``group_N`` is the group of each sample. Samples of length 0 are in no row, nor is a group of one sample, which has
    nothing to be compared with.
    """
    present = np.flatnonzero(np.asarray(lengths) > 0)
    groups, member = np.unique(group_N[present], return_inverse=True)
    total = np.bincount(member, lengths[present], len(groups)).astype(np.int64)
    several = np.bincount(member, minlength=len(groups)) > 1
    fits = several & (total <= row_tokens)
    row_offsets, units = pack(np.where(fits, total, 0), row_tokens, seed)
    by_group = present[np.argsort(member, kind="stable")]
    ends = np.cumsum(np.bincount(member, minlength=len(groups)))
    parts = [by_group[end - size : end] for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]
    sizes = np.array([len(parts[unit]) for unit in units], np.int64)
    offsets = np.concatenate(([0], np.cumsum(sizes)))[row_offsets]
    samples = np.concatenate([parts[unit] for unit in units]) if len(units) else np.zeros(0, np.int64)
    return offsets.astype(np.int64), samples.astype(np.int64), groups[several & ~fits]


def save_plan(path: Path, plan: PackPlan) -> bool:
    """Store a plan as one ``.npy`` array, atomically. Return False if it cannot be written, as it is only a cache."""
    header = [_PLAN_FORMAT, plan.row_tokens, len(plan), len(plan.samples), *(getattr(plan, name) for name in _COUNTS)]
    words = np.concatenate((np.array(header, np.int64), plan.offsets, plan.samples))
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, words)
    except OSError:
        return False
    return True


def load_plan(path: Path, row_tokens: int, view: str, overlong: str) -> PackPlan | None:
    """Return a stored plan, memory-mapped; None if there is none or the file is not one that ``save_plan`` wrote."""
    try:
        words = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    first = 4 + len(_COUNTS)
    if words.ndim != 1 or words.dtype != np.int64 or len(words) < first or words[0] != _PLAN_FORMAT:
        return None
    rows, samples = int(words[2]), int(words[3])
    if words[1] != row_tokens or len(words) != first + rows + 1 + samples:
        return None
    counts = dict(zip(_COUNTS, words[4:first].tolist(), strict=True))
    offsets = words[first : first + rows + 1]
    return PackPlan(offsets, words[first + rows + 1 :], row_tokens, view, overlong, **counts)
