"""Score responses with an attribute-prediction model.

Owns: turning conversations into packed rows for the regression head and its output back into values per assistant turn.
Does not own: files (``annotate.py``). Invariant: a turn's value depends on the conversation up to that turn, and not on
other conversations in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.views import Sample, build_documents, make_sample
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.runtime.collectives import broadcast_in_replica, gather_objects
from steerlm_megatron.runtime.device import has_cuda
from steerlm_megatron.runtime.independent_work import independent_work
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.stages.session import LoadedModel
from steerlm_megatron.steer.records import Conversation

Values = dict[str, float]


@dataclass
class _ScoredDocument:
    """One forward-pass document and, per pooled position, which conversation and message it scores."""

    sample: Sample
    owners: list[tuple[int, int]]


def default_batch_tokens() -> int:
    """Return the tokens of a forward pass for this device. On a CPU the activations of 2,048 tokens stay in its caches,
    and matrix products gain nothing from more (benchmarks/annotate.md); a GPU needs more to be busy.
    """
    return 16384 if has_cuda() else 2048


def rows_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group documents of similar length into rows of up to ``batch_tokens`` tokens (or one longer document).

    Rows that are scored have no fixed length, so no packing is needed; and documents of similar length share attention
    calls.
    """
    rows: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not rows or lengths[index] > room:
            rows.append([])
            room = batch_tokens
        rows[-1].append(index)
        room -= lengths[index]
    return rows


class Scorer:
    """Scores every assistant turn. ``batch_tokens`` is the number of packed tokens of a forward pass; None suits the
    device.
    """

    def __init__(self, loaded: LoadedModel, batch_tokens: int | None = None) -> None:
        assert loaded.schema is not None
        self.loaded, self.schema = loaded, loaded.schema
        self.max_tokens = loaded.model_config.max_position
        self.batch_tokens = max(batch_tokens or default_batch_tokens(), 8)
        self.truncated_turns = 0
        self.outside = 0  # values that were set to an end of the scale

    def score(
        self, conversations: Sequence[Conversation], progress: Callable[[int], None] | None = None
    ) -> list[dict[int, Values]]:
        """Return for each conversation a mapping from message index to float values, clamped to the schema's scale, of
        the attributes of which the model has seen labels. Collective over the replica.

        ``progress`` is called with the number of turns scored by each batch. Every rank of the replica gets the result.
        """
        pieces = self._documents(conversations)
        out: list[dict[int, Values]] = [{} for _ in conversations]
        for row in rows_by_length([len(piece.sample.tokens_T) for piece in pieces], self.batch_tokens):
            members = [pieces[i] for i in row]
            values_PA = self._forward([piece.sample for piece in members])
            at = 0
            for piece in members:
                for conversation, message in piece.owners:
                    out[conversation][message] = self._clamped(values_PA[at])
                    at += 1
            if progress is not None:
                progress(at)
        return out

    def _clamped(self, values_A: np.ndarray) -> Values:
        top = float(self.schema.max_level)
        self.outside += int(np.count_nonzero((values_A < 0) | (values_A > top)))
        return {
            name: round(min(max(float(v), 0.0), top), 4)
            for name, v in zip(self.schema.names, values_A, strict=True)
            if name not in self.schema.unseen
        }

    def _documents(self, conversations: Sequence[Conversation]) -> list[_ScoredDocument]:
        """Return one document per conversation that fits. An over-long one is scored turn by turn, without its oldest
        turns.
        """
        if self.loaded.scored_at_end:
            return self._documents_by_turn(conversations)
        # Weights concern training; every assistant turn is scored.
        all_turns = [replace(c, messages=tuple(replace(m, weight=1) for m in c.messages)) for c in conversations]
        pieces: list[_ScoredDocument] = []
        for index, sample in enumerate(self._samples(all_turns)):
            turns = [i for i, m in enumerate(all_turns[index].messages) if m.role == "assistant"]
            if sample is not None and len(sample.pool_P) == len(turns):
                pieces.append(_ScoredDocument(sample, [(index, turn) for turn in turns]))
                continue
            alone = [replace(all_turns[index], messages=all_turns[index].messages[: turn + 1]) for turn in turns]
            for turn, cut in zip(turns, self._samples(alone), strict=True):
                assert cut is not None and len(cut.pool_P) >= 1, "a response always keeps its mark"
                self.truncated_turns += cut.cut_tokens > 0
                last = replace(cut, pool_P=cut.pool_P[-1:], values_PA=cut.values_PA[-1:])
                pieces.append(_ScoredDocument(last, [(index, turn)]))
        return pieces

    def _documents_by_turn(self, conversations: Sequence[Conversation]) -> list[_ScoredDocument]:
        """Return one document per response, which ends with it: values are read at a conversation's last token."""
        turns = [
            (i, at) for i, c in enumerate(conversations) for at, m in enumerate(c.messages) if m.role == "assistant"
        ]
        cut = [
            replace(
                conversations[i],
                messages=tuple(replace(m, attributes=None, weight=1) for m in conversations[i].messages[: at + 1]),
            )
            for i, at in turns
        ]
        after = np.array(self.loaded.tokenizer.encode(self.loaded.after), np.int32)
        pieces = []
        documents = build_documents(cut, self.loaded.tokenizer, self.loaded.template, None)
        for owner, document in zip(turns, documents, strict=True):
            sample = make_sample(document, "lm", self.max_tokens - len(after), "truncate_left_turns")
            assert sample is not None, "a conversation of a response always has tokens"
            self.truncated_turns += sample.cut_tokens > 0
            tokens = np.concatenate((sample.tokens_T, after))
            whole = replace(
                sample,
                tokens_T=tokens,
                loss_mask_T=np.zeros(len(tokens), np.bool_),
                pool_P=np.array([len(tokens) - 1], np.int32),
                values_PA=np.full((1, len(self.schema.names)), np.nan, np.float32),
            )
            pieces.append(_ScoredDocument(whole, [owner]))
        return pieces

    def _samples(self, conversations: Sequence[Conversation]) -> list[Sample | None]:
        loaded = self.loaded
        marker = loaded.tokenizer.control_id(loaded.template.label_marker)
        bare = [replace(c, messages=tuple(replace(m, attributes=None) for m in c.messages)) for c in conversations]
        documents = build_documents(bare, loaded.tokenizer, loaded.template, self.schema)
        return [
            make_sample(d, "ap", self.max_tokens, "truncate_left_turns", marker_id=marker, scored="all")
            for d in documents
        ]

    def _forward(self, samples: list[Sample]) -> np.ndarray:
        """Return float32 [P, A] for the pooled positions of one packed row, on every rank of the replica."""
        total = sum(len(s.tokens_T) for s in samples)
        values = predict_values(self.loaded.model, collate([samples], total, len(self.schema.names)))
        result = broadcast_in_replica(None if values is None else values.numpy())
        assert result is not None
        return result


def score_all(scorer: Scorer, conversations: Sequence[Conversation]) -> list[dict[int, Values]]:
    """Do :meth:`Scorer.score` with conversations distributed to data-parallel replicas. Collective over the world."""
    at = layout()
    if at.dp_size == 1:
        return scorer.score(conversations)
    with independent_work():
        own = scorer.score(conversations[at.dp_rank :: at.dp_size])
    parts = dict(gather_objects((at.dp_rank, own)))
    return [parts[i % at.dp_size][i // at.dp_size] for i in range(len(conversations))]
