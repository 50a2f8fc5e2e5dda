"""Turn many conversations at a time into a block of documents.

Owns: ``Builder``. Does not own: a conversation's skeleton (``skeletons.py``), ids of texts (``text/tokenizer.py``),
what a block is (``blocks.py``). Invariant: the documents equal those of ``views.build_documents``. For speed it makes
no object per segment or token, and no array per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.text.word_cache import ragged
from steerlm_megatron.data.views import TURN, MessageLike, turn_positions
from steerlm_megatron.data.write.blocks import Array, Block, token_dtype
from steerlm_megatron.data.write.skeletons import GAP, Skeleton, SkeletonCache
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.templates import Template

_TURN_EDGES = (
    "start",
    "label_start",
    "label_end",
    "text_start",
    "text_end",
    "mark",
    "end",
)  # fields of TURN, in the order of Skeleton.turns


class ConversationLike(Protocol):
    """The attributes that a builder needs of a conversation, which ``steer.records.Conversation`` has."""

    @property
    def id(self) -> str: ...
    @property
    def messages(self) -> Sequence[MessageLike]: ...


class Builder:
    """Builds blocks, and caches the skeletons and constant tokens that conversations share."""

    def __init__(self, tokenizer: Tokenizer, template: Template, schema: AttributeSchema | None) -> None:
        self._tokenizer, self._schema = tokenizer, schema
        self._names = schema.names if schema else ()
        self.skeletons = SkeletonCache(template, schema)
        self._constants = _Constants(tokenizer)

    def build(self, conversations: Sequence[ConversationLike], lines: Sequence[int]) -> tuple[Block, Array]:
        """Return a block of conversations, encoded in one batch, and whether each has a target (bool [N]).

        A target is a trained token or a value of a trained response.
        """
        skeletons: list[Skeleton] = []
        numbers: dict[str, int] = {}  # number of each distinct text, which is encoded once
        fillings: list[int] = []
        for conversation in conversations:
            skeleton, texts = self.skeletons.of(conversation.messages)
            skeletons.append(skeleton)
            fillings += [numbers.setdefault(text, len(numbers)) for text in texts]
        tokens, sizes = self._tokens(skeletons, list(numbers), fillings)
        laid = _DocumentLayout(skeletons, conversations, sizes)
        values, labelled = self._values(conversations, laid.turn_counts)
        written = [conversation.id.encode("utf-8", "replace") for conversation in conversations]
        block = Block(
            tokens,
            laid.lengths,
            laid.turns,
            laid.turn_counts,
            values,
            laid.spans,
            laid.span_counts,
            laid.headers,
            np.frombuffer(b"".join(written), np.uint8),
            np.array(list(map(len, written)), np.int32),
            np.array(lines, np.int64),
        )
        return block, labelled | (laid.span_counts > 0)

    def _tokens(self, skeletons: list[Skeleton], texts: list[str], fillings: list[int]) -> tuple[Array, Array]:
        """Return all tokens, and the number of tokens of every segment."""
        ids, counts = self._tokenizer.encode_flat(texts)
        units = np.concatenate([_NOTHING, *(skeleton.units for skeleton in skeletons)])
        known_ids, known_counts = self._constants.of(self.skeletons.constants)
        units[units == GAP] = np.array(fillings, np.int64) + len(known_counts)
        counts = np.concatenate((known_counts, counts))
        sizes = counts[units]
        pool = np.concatenate((known_ids, ids)).astype(token_dtype(self._tokenizer.vocab_size))
        return pool.take(ragged((np.cumsum(counts) - counts)[units], sizes)), sizes

    def _values(self, conversations: Sequence[ConversationLike], turn_counts: Array) -> tuple[Array, Array]:
        """Return values of all turns, and whether each conversation has some on a trained turn."""
        schema, labelled = self._schema, np.zeros(len(conversations), np.bool_)
        values = np.full((int(turn_counts.sum()), len(self._names)), np.nan, np.float32)
        if schema is None or not self._names:
            return values, labelled
        rows, vectors = [], []
        firsts = (np.cumsum(turn_counts) - turn_counts).tolist()
        for index, (conversation, first) in enumerate(zip(conversations, firsts, strict=True)):
            messages = conversation.messages
            given = [message.attributes for message in messages]
            if not any(given):
                continue
            system = messages[0].role == "system"  # the system's message is no turn
            for number, attributes in enumerate(given):
                if attributes:
                    rows.append(first + number - system)
                    vectors.append(schema.vector(attributes))
                    labelled[index] |= bool(messages[number].weight)
        if rows:
            values[rows] = vectors
        return values, labelled


class _Constants:
    """The token ids of the texts and control strings that skeletons contain."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._counts: list[int] = []
        self._arrays = (np.zeros(0, np.int32), _NOTHING)

    def of(self, constants: dict[tuple[str, bool], int]) -> tuple[Array, Array]:
        """Return the ids of all constants, end to end in the order of their numbers, and the number of ids of each."""
        if len(constants) > len(self._counts):
            for text, control in list(constants)[len(self._counts) :]:
                ids = [self._tokenizer.control_id(text)] if control else self._tokenizer.encode(text)
                self._ids += ids
                self._counts.append(len(ids))
            self._arrays = np.array(self._ids, np.int32), np.array(self._counts, np.int64)
        return self._arrays


class _DocumentLayout:
    """The positions of turns, spans and headers in documents of known skeletons and sizes of segments."""

    def __init__(self, skeletons: list[Skeleton], conversations: Sequence[ConversationLike], sizes: Array) -> None:
        segments = np.array([len(skeleton.units) for skeleton in skeletons], np.int64)
        edges = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
        first = np.cumsum(segments) - segments
        origin = edges[first]
        self.lengths = (edges[first + segments] - origin).astype(np.int32)
        self.turn_counts = np.array([len(skeleton.turns) for skeleton in skeletons], np.int32)
        self.span_counts = np.array([len(skeleton.spans) for skeleton in skeletons], np.int32)

        def positions(places: list[Array], counts: Array | int, width: int) -> Array:
            """Translate edges of segments into positions in documents, int32 [edges, width]."""
            edge = np.concatenate([np.zeros((0, width), np.int64), *places])
            edge += np.repeat(first, counts)[:, None]
            return (edges[edge] - np.repeat(origin, counts)[:, None]).astype(np.int32)

        turns = positions([skeleton.turns for skeleton in skeletons], self.turn_counts, len(_TURN_EDGES))
        marks = np.concatenate([np.zeros((0, 2), np.uint8), *(skeleton.marks for skeleton in skeletons)])
        self.turns = np.empty(len(turns), TURN)
        for column, name in enumerate(_TURN_EDGES):
            self.turns[name] = turns[:, column]
        self.turns["role"], self.turns["weight"] = marks[:, 0], marks[:, 1]
        self.spans = positions([skeleton.spans for skeleton in skeletons], self.span_counts, 2)
        self.headers = positions([skeleton.header[None] for skeleton in skeletons], 1, 2)
        empty = np.flatnonzero(sizes == 0)
        if len(empty):
            odd = np.unique(np.searchsorted(first, empty, side="right") - 1)
            self._lay_out_again(odd.tolist(), skeletons, conversations, np.split(sizes, first[1:]))

    def _lay_out_again(
        self, odd: list[int], skeletons: list[Skeleton], conversations: Sequence[ConversationLike], sizes: list[Array]
    ) -> None:
        """Lay out documents with an empty segment again, since edges coincide there and an empty span must not be
        stored.
        """
        spans = np.split(self.spans, np.cumsum(self.span_counts)[:-1])
        ends = np.cumsum(self.turn_counts)
        for index in odd:
            turns, own, header = turn_positions(
                conversations[index].messages, skeletons[index].segments, sizes[index].tolist()
            )
            spans[index] = np.array(own, np.int32).reshape(-1, 2)
            self.span_counts[index] = len(own)
            self.turns[ends[index] - len(turns) : ends[index]] = np.array(turns, TURN)
            self.headers[index] = header
        self.spans = np.concatenate(spans)


_NOTHING = np.zeros(0, np.int64)
