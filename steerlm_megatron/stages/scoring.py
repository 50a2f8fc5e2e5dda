"""Score responses with an attribute-prediction model of either kind.

Owns: turning conversations into packed rows for the regression head and its output back into values per assistant turn;
and into what a generative model writes labels after, and the probabilities of levels back into values. Does not own:
files (``annotate.py``), writing labels (``generate/label_writer.py``). Invariant: a turn's value depends on the
conversation up to that turn, and not on other conversations in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steerlm_megatron.config.inference import SCORED_TOKENS
from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.label_tokens import LabelTokens
from steerlm_megatron.data.views import Sample, build_documents, make_sample
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.group import model_group
from steerlm_megatron.generate.label_writer import LabelWriter, NotFinite, Probabilities
from steerlm_megatron.model.arithmetic import forward_flops, squares
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.observe.cost import CostMeter
from steerlm_megatron.runtime.collectives import broadcast_in_replica, gather_objects
from steerlm_megatron.runtime.device import has_cuda
from steerlm_megatron.runtime.independent_work import independent_work
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.stages.session import LoadedModel, OpenedCheckpoint
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
    return SCORED_TOKENS["cuda" if has_cuda() else "cpu"]


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


def kind_of(opened: OpenedCheckpoint) -> str:
    """Return the kind of an attribute-prediction model, a value of ``ap.kind``."""
    return "regression" if opened.meta.head == "regression" else "generative"


def described(opened: OpenedCheckpoint, decode: str) -> str:
    """Return in words how an attribute-prediction model gives its values; ``decode`` is ``scoring.decode``."""
    if kind_of(opened) == "regression":
        return "regression head"
    return f"generative, {'likeliest level' if decode == 'greedy' else 'expected level'}"


def check_decode(opened: OpenedCheckpoint, decode: str) -> None:
    """Refuse ``scoring.decode=expected`` for a model that has nothing to decode."""
    if decode != "greedy" and kind_of(opened) == "regression":
        raise UserError(
            f"scoring.decode={decode} is of generative attribute-prediction models; {opened.folder} has a regression "
            "head, which gives values itself: leave scoring.decode out"
        )


class Scorer:
    """Scores every assistant turn, by a model of either kind.

    A regression head takes one pass over each conversation. A generative model computes each token of a conversation
    and its labels once as well, in as many passes for a batch as there are turns times attributes (``LabelWriter``);
    it decides by ``decode`` what its value is: the likeliest level, or the mean of all levels by their probabilities.
    Either way the next attribute is predicted after the likeliest level of the one before.

    Args:
        batch_tokens: the packed tokens of a forward pass, or those of a batch of conversations with their labels; None
            suits the device.
        decode: as ``scoring.decode``.
        cost: the account of the run that scores; None for none.

    Raises:
        UserError: ``decode`` is not of this kind of model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch_tokens: int | None = None,
        decode: str = "greedy",
        cost: CostMeter | None = None,
    ) -> None:
        assert loaded.schema is not None
        self.cost = cost or CostMeter()
        check_decode(loaded, decode)
        self.loaded, self.schema = loaded, loaded.schema
        self.max_tokens = loaded.model_config.max_position
        self.batch_tokens = max(batch_tokens or default_batch_tokens(), 8)
        self.truncated_turns = 0
        self.outside = 0  # values that were set to an end of the scale
        self._labels = None if kind_of(loaded) == "regression" else _Labels(loaded, decode)

    def score(
        self, conversations: Sequence[Conversation], progress: Callable[[int], None] | None = None
    ) -> list[dict[int, Values]]:
        """Return for each conversation a mapping from message index to float values, clamped to the schema's scale, of
        the attributes of which the model has seen labels. Collective over the replica.

        ``progress`` is called with the number of turns scored by each batch. Every rank of the replica gets the result.
        """
        with self.cost.work():
            if self._labels is not None:
                return self._written(self._labels, conversations, progress)
            return self._read(conversations, progress)

    def _read(
        self, conversations: Sequence[Conversation], progress: Callable[[int], None] | None
    ) -> list[dict[int, Values]]:
        """Score by the values of a regression head."""
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

    def _written(
        self, labels: _Labels, conversations: Sequence[Conversation], progress: Callable[[int], None] | None
    ) -> list[dict[int, Values]]:
        """Score by the labels that a generative model writes. An over-long conversation is labelled turn by turn, each
        time without its oldest turns, and with the labels of the others.
        """
        out: list[dict[int, Values]] = [{} for _ in conversations]
        levels: list[dict[int, dict[str, float]]] = [{} for _ in conversations]  # the likeliest, of over-long ones
        turns = [[i for i, m in enumerate(c.messages) if m.role == "assistant"] for c in conversations]
        contexts = [
            [] if sample is None else [part.tolist() for part in np.split(sample.tokens_T, sample.pool_P + 1)[:-1]]
            for sample in self._samples(conversations, None)
        ]
        whole = [labels.writer.tokens_of(parts) <= self.max_tokens for parts in contexts]

        def write(jobs: Sequence[tuple[int, Sequence[int], Sequence[Sequence[int]]]]) -> None:
            """Label the turns of conversations after their contexts."""
            sizes = [labels.writer.tokens_of(parts) for _, _, parts in jobs]
            for members in rows_by_length(sizes, self.batch_tokens):
                batch = [jobs[number] for number in members]
                try:
                    found = labels.writer.write([parts for _, _, parts in batch])
                except NotFinite as error:
                    raise UserError(
                        f"the attribute-prediction model {self.loaded.folder} gives NaN for the conversation "
                        f"{conversations[batch[error.args[0]][0]].id!r}: its weights are damaged, or "
                        "engine.precision is not the one that it was trained in"
                    ) from None
                self._count([labels.writer.tokens_of(parts) for _, _, parts in batch], labels.levels_of(batch))
                for (index, labelled, _), by_turn in zip(batch, found, strict=True):
                    for turn, probabilities in zip(labelled, by_turn, strict=True):
                        out[index][turn], levels[index][turn] = labels.values(probabilities)
                if progress is not None:
                    progress(sum(len(labelled) for _, labelled, _ in batch))

        fitting = [i for i, fits in enumerate(whole) if fits and turns[i]]
        write([(i, turns[i], contexts[i]) for i in fitting])
        longer = [i for i, fits in enumerate(whole) if not fits]
        for number in range(max((len(turns[i]) for i in longer), default=0)):
            jobs = [(i, turns[i][number]) for i in longer if number < len(turns[i])]
            cut = self._cut_before(labels, [(conversations[i], turn, levels[i]) for i, turn in jobs])
            write([(i, [turn], [context]) for (i, turn), context in zip(jobs, cut, strict=True)])
        return out

    def _cut_before(
        self, labels: _Labels, turns: Sequence[tuple[Conversation, int, Mapping[int, Mapping[str, float]]]]
    ) -> list[list[int]]:
        """Return the tokens before the label of a turn of each conversation, with the given labels of earlier turns, so
        that there is room for the label.
        """
        alone = [
            replace(
                conversation,
                messages=tuple(
                    replace(m, attributes=dict(found[i]) if i in found else labels.widest if i == turn else None,
                            weight=1)
                    for i, m in enumerate(conversation.messages[: turn + 1])
                ),
            )
            for conversation, turn, found in turns
        ]  # fmt: skip
        out = []
        for document in build_documents(alone, self.loaded.tokenizer, self.loaded.template, self.schema):
            sample = make_sample(document, "ap_text", self.max_tokens, "truncate_left_turns", labels=labels.tokens)
            if sample is None:
                raise UserError(
                    f"the attribute-prediction model {self.loaded.folder} has {self.max_tokens} positions, in which "
                    f"the response of {document.id!r} has no place beside its label; take a longer model"
                )
            self.truncated_turns += sample.cut_tokens > 0
            size = len(sample.tokens_T) - labels.widest_tokens + 1  # the marker stays
            out.append(sample.tokens_T[:size].tolist())
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
        for index, sample in enumerate(self._samples(all_turns, self.max_tokens)):
            turns = [i for i, m in enumerate(all_turns[index].messages) if m.role == "assistant"]
            if sample is not None and len(sample.pool_P) == len(turns):
                pieces.append(_ScoredDocument(sample, [(index, turn) for turn in turns]))
                continue
            alone = [replace(all_turns[index], messages=all_turns[index].messages[: turn + 1]) for turn in turns]
            for turn, cut in zip(turns, self._samples(alone, self.max_tokens), strict=True):
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

    def _samples(self, conversations: Sequence[Conversation], max_tokens: int | None) -> list[Sample | None]:
        loaded = self.loaded
        marker = loaded.tokenizer.control_id(loaded.template.label_marker)
        bare = [replace(c, messages=tuple(replace(m, attributes=None) for m in c.messages)) for c in conversations]
        documents = build_documents(bare, loaded.tokenizer, loaded.template, self.schema)
        return [
            make_sample(d, "ap", max_tokens, "truncate_left_turns", marker_id=marker, scored="all") for d in documents
        ]

    def _forward(self, samples: list[Sample]) -> np.ndarray:
        """Return float32 [P, A] for the pooled positions of one packed row, on every rank of the replica."""
        lengths = [len(s.tokens_T) for s in samples]
        total = sum(lengths)
        self._count(lengths, 0)
        values = predict_values(self.loaded.model, collate([samples], total, len(self.schema.names)))
        result = broadcast_in_replica(None if values is None else values.numpy())
        assert result is not None
        return result

    def _count(self, lengths: Sequence[int], outputs: int) -> None:
        """Add documents of ``lengths`` tokens, ``outputs`` of which had logits, to the account of the run."""
        model, rows = self.loaded.model_config, self.loaded.meta.vocab_size
        self.cost.add(forward_flops(model, rows, sum(lengths), squares(lengths), outputs), scored=sum(lengths))


class _Labels:
    """What a generative model's labels are written with, and what values are made of their levels' probabilities."""

    def __init__(self, loaded: LoadedModel, decode: str) -> None:
        schema = loaded.schema
        assert schema is not None
        self.names, self.decode = schema.seen, decode
        self.tokens = LabelTokens.of(schema, loaded.tokenizer, loaded.template.label_marker)
        attributes = [schema.names.index(name) for name in self.names]
        self.writer = LabelWriter(loaded.model, self.tokens, attributes, loaded.meta.vocab_size, model_group())
        longest = max(range(schema.max_level + 1), key=lambda level: len(self.tokens.levels[level]))
        self.widest = {name: float(longest) for name in self.names}  # the label of most tokens
        self.widest_tokens = self.tokens.longest(attributes)

    def levels_of(self, batch: Sequence[tuple[int, Sequence[int], object]]) -> int:
        """Return how many levels are chosen for the turns of ``batch``, (conversation, turns, context) each."""
        return len(self.names) * sum(len(labelled) for _, labelled, _ in batch)

    def values(self, found: Sequence[Probabilities]) -> tuple[Values, Values]:
        """Return the values of one label and its likeliest levels, of the probabilities [L] of each attribute."""
        levels = [float(one_L.argmax()) for one_L in found]
        values = levels
        if self.decode == "expected":
            values = [round(float(one_L @ np.arange(len(one_L))), 4) for one_L in found]
        return dict(zip(self.names, values, strict=True)), dict(zip(self.names, levels, strict=True))


def score_all(scorer: Scorer, conversations: Sequence[Conversation]) -> list[dict[int, Values]]:
    """Do :meth:`Scorer.score` with conversations distributed to data-parallel replicas. Collective over the world."""
    at = layout()
    if at.dp_size == 1:
        return scorer.score(conversations)
    with independent_work():
        own = scorer.score(conversations[at.dp_rank :: at.dp_size])
    parts = dict(gather_objects((at.dp_rank, own)))
    return [parts[i % at.dp_size][i // at.dp_size] for i in range(len(conversations))]
