"""How much there is to train on: rows, tokens and lengths, of shards or as the configuration states them.

Owns: :class:`Workload`. Does not own: packing (``data/feed``), what it costs (``timing.py``). Invariant: importing this
module needs no torch; shards are read by whoever has opened them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.feed.packing import pack

_DRAWN = 20_000  # documents that stated lengths are repeated to, so that packing finds partners


@dataclass(frozen=True)
class Workload:
    """One epoch of packed rows, all figures means over its rows but for ``most_targets``.

    Args:
        rows: of an epoch; None: unknown.
        samples: in a row.
        tokens: in a row, without padding.
        squares: Σ s² over a row's documents.
        targets: tokens of a row with loss; ``most_targets``: of the row that has most.
        lengths: documents of a typical row, for building one.
        source: where all this is from.
    """

    rows: int | None
    row_tokens: int
    samples: float
    tokens: float
    squares: float
    targets: float
    most_targets: int
    lengths: tuple[int, ...]
    source: str

    @property
    def fill(self) -> float:
        return self.tokens / self.row_tokens

    def rows_per_step(self, global_batch_samples: int) -> int:
        """Return the rows of a step, as ``data.feed.loader.rows_per_step`` does."""
        rows = max(1, round(global_batch_samples / self.samples))
        return rows if self.rows is None else min(rows, self.rows)


def stated(config: Config, row_tokens: int | None = None) -> Workload:
    """Return the workload of ``plan.lengths``, ``plan.samples`` and ``plan.loss_share``; full rows without lengths.
    ``row_tokens``: of a row; None: ``train.row_tokens``.
    """
    row_tokens, share = row_tokens or config.train.row_tokens, config.plan.loss_share
    lengths = [min(length, row_tokens) for length in config.plan.lengths] or [row_tokens]
    many = np.resize(np.array(lengths, np.int64), max(_DRAWN, len(lengths)))
    source = "plan.lengths" if config.plan.lengths else "rows of one document each (plan.lengths is empty)"
    return packed(many, row_tokens, share, config.plan.samples, source)


def packed(
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]],
    row_tokens: int,
    loss_share: float,
    samples: int | None,
    source: str,
) -> Workload:
    """Return the workload of documents of ``lengths``, packed as training packs them; ``samples`` of them an epoch."""
    offsets, order = pack(lengths, row_tokens, 0)
    rows, count = len(offsets) - 1, len(order)
    ordered = lengths[order].astype(np.float64)
    tokens, squares = ordered.sum() / rows, (ordered**2).sum() / rows
    middle = lengths[order[offsets[rows // 2] : offsets[rows // 2 + 1]]]
    return Workload(
        rows=None if samples is None else max(1, round(samples * rows / count)),
        row_tokens=row_tokens,
        samples=count / rows,
        tokens=float(tokens),
        squares=float(squares),
        targets=float(tokens * loss_share),
        most_targets=min(row_tokens, max(1, round(row_tokens * loss_share))),
        lengths=tuple(middle.tolist()),
        source=source,
    )
