"""Documents end to end: what travels from tokenising to shards.

Owns: ``Block``, making one of conversations or documents, choosing documents of one. Does not own: its files
(``chunks.py`` for work in progress, ``shards.py`` for good). Invariants: ``build`` gives the documents that
``views.build_documents`` gives; a block chosen from and cut anywhere has the documents it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from steerlm_megatron.data.views import TURN, Document, places, spoken

if TYPE_CHECKING:
    from steerlm_megatron.data.tokenizer import Tokenizer
    from steerlm_megatron.steer.attributes import AttributeSchema
    from steerlm_megatron.steer.records import Conversation
    from steerlm_megatron.steer.templates import Template

Array = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of stored token ids: what Megatron-Core takes for a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True)
class Block:
    """N documents. The arrays named ``…_counts`` say how much of the array before them each document has.

    Args:
        tokens: uint16 or int32, all documents' ids end to end; ``lengths`` int32 [N].
        turns: ``views.TURN``, ``turn_counts`` int32 [N]; ``values`` float32 [turns, attributes] beside them.
        spans: int32 [spans, 2], positions in their document; ``span_counts`` int32 [N].
        headers: int32 [N, 2].
        ids: uint8, the documents' ids as UTF-8; ``id_sizes`` int32 [N].
        lines: int64 [N], the line of the input file each came from.
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
        """The id of document ``index``. O(N)."""
        start = int(self.id_sizes[:index].sum())
        return bytes(self.ids[start : start + int(self.id_sizes[index])]).decode()

    def select(self, keep_N: Array) -> Block:
        """The documents for which ``keep_N`` (bool) is true."""
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
        """Documents ``start`` to ``stop``, as views."""
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
        """Its arrays by name; ``Block(**arrays)`` is the inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def build(
    conversations: Sequence[Conversation],
    lines: Sequence[int],
    tokenizer: Tokenizer,
    template: Template,
    schema: AttributeSchema | None,
) -> tuple[Block, Array]:
    """A block of conversations, rendered and encoded in one batch, and whether each has a target (bool [N]).

    A target is a trained token or a value of a trained response. No array is made for a single document.
    """
    rendered = [template.render(conversation, schema) for conversation in conversations]
    names = schema.names if schema else ()
    missing = (nan,) * len(names)
    tokens, lengths, turns, turn_counts, values, spans, span_counts, headers, has_target = (
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
    )
    for conversation, segments, (ids, sizes) in zip(
        conversations, rendered, tokenizer.encode_documents(rendered), strict=True
    ):
        own_turns, own_spans, header = places(conversation.messages, segments, sizes)
        tokens.append(ids)
        lengths.append(len(ids))
        turns += own_turns
        turn_counts.append(len(own_turns))
        spans += own_spans
        span_counts.append(len(own_spans))
        headers.append(header)
        labelled = False
        if names:
            assert schema is not None
            for message in spoken(conversation):
                values.append(schema.vector(message.attributes) if message.attributes else missing)
                labelled = labelled or bool(message.attributes and message.weight)
        has_target.append(labelled or bool(own_spans))
    written = [conversation.id.encode("utf-8", "replace") for conversation in conversations]
    block = Block(
        np.concatenate([_NO_TOKENS, *tokens]).astype(token_dtype(tokenizer.vocab_size)),
        np.array(lengths, np.int32),
        np.array(turns, TURN),
        np.array(turn_counts, np.int32),
        np.array(values, np.float32).reshape(len(turns), len(names)),
        np.array(spans, np.int32).reshape(-1, 2),
        np.array(span_counts, np.int32),
        np.array(headers, np.int32).reshape(-1, 2),
        np.frombuffer(b"".join(written), np.uint8),
        np.array([len(name) for name in written], np.int32),
        np.array(lines, np.int64),
    )
    return block, np.array(has_target, np.bool_)


def concatenate(blocks: Sequence[Block]) -> Block:
    """One block of at least one."""
    if len(blocks) == 1:
        return blocks[0]
    arrays = [block.arrays() for block in blocks]
    # Turns as bytes: joining structured arrays is slow.
    turns = np.concatenate([each.pop("turns").view(np.uint8) for each in arrays]).view(TURN)
    return Block(turns=turns, **{name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]})


def join(documents: Sequence[Document], vocab_size: int, attributes: int, lines: Sequence[int] = ()) -> Block:
    """A block of documents. ``attributes``: how many the schema has (for a block without documents)."""
    ids = [document.id.encode("utf-8", "replace") for document in documents]
    # As bytes: joining thousands of structured arrays is slow.
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
