"""Blocks: many documents end to end in a few arrays, on their way from tokenising to shards.

Owns: ``Block``, selecting documents of a block, joining blocks. Does not own: making a block of conversations
(``builder.py``), storing it (``chunks.py`` for work in progress, ``data/shards.py`` for the result). Invariant:
selecting and cutting changes no document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from steerlm_megatron.data.views import TURN, Document

Array = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of stored token ids: what Megatron-Core takes for a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True)
class Block:
    """N documents. An array named ``…_counts`` says how many elements of the array before it each document has.

    Args:
        tokens: uint16 or int32, all documents' ids end to end; ``lengths`` int32 [N].
        turns: ``views.TURN``, ``turn_counts`` int32 [N]; ``values`` float32 [turns, attributes] beside them.
        spans: int32 [spans, 2], positions in their document; ``span_counts`` int32 [N].
        headers: int32 [N, 2].
        ids: uint8, the documents' ids as UTF-8; ``id_sizes`` int32 [N].
        lines: int64 [N], the line of the input file that each document came from.
    """

    tokens: Array
    lengths: Array
    turns: Array
    turn_counts: Array
    values: Array
    spans: Array
    span_counts: Array
    headers: Array
    ids: Array
    id_sizes: Array
    lines: Array

    def __len__(self) -> int:
        return len(self.lengths)

    def id(self, index: int) -> str:
        """Return the id of document ``index``. O(N)."""
        start = int(self.id_sizes[:index].sum())
        return bytes(self.ids[start : start + int(self.id_sizes[index])]).decode()

    def select(self, keep_N: Array) -> Block:
        """Return the documents for which ``keep_N`` (bool) is true."""
        if keep_N.all():
            return self
        turns, spans = np.repeat(keep_N, self.turn_counts), np.repeat(keep_N, self.span_counts)
        return Block(
            self.tokens[np.repeat(keep_N, self.lengths)],
            self.lengths[keep_N],
            self.turns[turns],
            self.turn_counts[keep_N],
            self.values[turns],
            self.spans[spans],
            self.span_counts[keep_N],
            self.headers[keep_N],
            self.ids[np.repeat(keep_N, self.id_sizes)],
            self.id_sizes[keep_N],
            self.lines[keep_N],
        )

    def cut(self, start: int, stop: int) -> Block:
        """Return documents ``start`` to ``stop`` as a block of views."""
        if start == 0 and stop >= len(self):
            return self
        tokens, turns = _bounds(self.lengths, start, stop), _bounds(self.turn_counts, start, stop)
        each = slice(start, stop)
        return Block(
            self.tokens[tokens],
            self.lengths[each],
            self.turns[turns],
            self.turn_counts[each],
            self.values[turns],
            self.spans[_bounds(self.span_counts, start, stop)],
            self.span_counts[each],
            self.headers[each],
            self.ids[_bounds(self.id_sizes, start, stop)],
            self.id_sizes[each],
            self.lines[each],
        )

    def arrays(self) -> dict[str, Array]:
        """Return the block's arrays by name; ``Block(**arrays)`` is the inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def concatenate(blocks: Sequence[Block]) -> Block:
    """Return one block with the documents of all ``blocks``, of which there is at least one."""
    if len(blocks) == 1:
        return blocks[0]
    arrays = [block.arrays() for block in blocks]
    # Turns are joined as bytes, because joining structured arrays is slow.
    turns = np.concatenate([each.pop("turns").view(np.uint8) for each in arrays]).view(TURN)
    return Block(turns=turns, **{name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]})


def join(documents: Sequence[Document], vocab_size: int, attributes: int, lines: Sequence[int] = ()) -> Block:
    """Return a block of documents. ``attributes`` is the number of the schema's attributes (a block without documents
    needs it).
    """
    ids = [document.id.encode("utf-8", "replace") for document in documents]
    # Turns are joined as bytes, because joining thousands of structured arrays is slow.
    turns = [document.turns_N.view(np.uint8) for document in documents]
    return Block(
        np.concatenate([_NO_TOKENS, *(d.tokens_T for d in documents)]).astype(token_dtype(vocab_size)),
        np.array([len(d.tokens_T) for d in documents], np.int32),
        np.concatenate([_NO_BYTES, *turns]).view(TURN),
        np.array([len(d.turns_N) for d in documents], np.int32),
        np.concatenate([np.zeros((0, attributes), np.float32), *(d.values_NA for d in documents)]),
        np.concatenate([_NO_SPANS, *(d.spans for d in documents)]),
        np.array([len(d.spans) for d in documents], np.int32),
        np.array([d.header for d in documents], np.int32).reshape(-1, 2),
        np.frombuffer(b"".join(ids), np.uint8),
        np.array([len(name) for name in ids], np.int32),
        np.array(lines or [0] * len(documents), np.int64),
    )


_NO_TOKENS = np.zeros(0, np.int32)
_NO_BYTES = np.zeros(0, np.uint8)
_NO_SPANS = np.zeros((0, 2), np.int32)


def _bounds(counts: Array, start: int, stop: int) -> slice:
    first = int(counts[:start].sum(dtype=np.int64))
    return slice(first, first + int(counts[start:stop].sum(dtype=np.int64)))
