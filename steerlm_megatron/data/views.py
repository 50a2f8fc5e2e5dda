"""Five views of a stored document: the tokens, targets and pooled positions of a sample.

A document is stored once, as the tokens of ``template.render(conversation, schema)``. From it come ``acsft`` (as
stored), ``sft`` (label lines removed), ``lm`` (label lines removed, loss on every token), ``ap`` (label lines
removed; a label marker after each scored response, whose hidden state is regressed; cut after the last marker) and
``ap_text`` (the label line of each labelled response after it instead of before it, with loss on the label string and
its newline alone; cut after the last label line that is learnt).

In ``ap_text`` a label is predicted with the labels of earlier responses in view, as in the SteerLM paper (arXiv
2310.05344, appendix A.1: response and label repeat for each pair of turns) and in its released annotator, which leaves
each predicted label in the context of later turns. So a conversation is one sample, however many labels it has.
Responses of weight 0 have their labels there as context, without loss.

Owns: ``Document``, ``Sample``, the views, and the policies for over-long samples. Does not own: storing documents
(``shards.py``), packing (``feed/packing.py``). Invariant: only complete label lines are removed, and tokens by the
stated over-long policy; nothing else is ever lost.

Over-long policy (``data.overlong``), for a sample of more than ``max_tokens``:

* ``drop``: the sample is left out.
* ``error``: ``UserError``.
* ``truncate_response``: the first ``max_tokens`` tokens stay (``ap``, ``ap_text``: up to the last marker, or the last
  complete label line, among them).
* ``truncate_left_turns`` (default): context after the last target is removed first, then the oldest turns after the
  header, so that the sample begins with a user turn, but never the last exchange (the last target response and the
  user turns that it answers). If that is still too long, the beginning of that prompt's text is removed, down to a
  quarter of ``max_tokens``; then the end of the response (with its end-of-turn, so that the model does not learn to
  stop early; ``ap`` and ``ap_text`` keep what closes the turn, and its label). The first token after such a cut is no
  target, since the text before it is gone.

A sample that has no target left is left out. The caller counts what was cut and left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.templates import Part

if TYPE_CHECKING:
    from steerlm_megatron.data.label_tokens import LabelTokens
    from steerlm_megatron.data.text.tokenizer import Tokenizer
    from steerlm_megatron.steer.attributes import AttributeSchema
    from steerlm_megatron.steer.records import Conversation, Message
    from steerlm_megatron.steer.templates import Segment, Template

View = Literal["acsft", "sft", "ap", "lm", "ap_text"]
Overlong = Literal["drop", "truncate_left_turns", "truncate_response", "error"]
Scored = Literal["labelled", "all"]  # ap: turns of weight 1 with at least one value | every assistant turn
VIEWS: tuple[str, ...] = get_args(View)
OVERLONG: tuple[str, ...] = get_args(Overlong)
PREDICTION: tuple[View, ...] = ("ap", "ap_text")  # views whose targets are the labels of responses
LABELLED: tuple[View, ...] = (*PREDICTION, "acsft")  # views from which a model learns of attributes

Array = npt.NDArray[Any]


class MessageLike(Protocol):
    """The attributes that a view needs of a message, which ``steer.records.Message`` has."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...
    @property
    def attributes(self) -> Mapping[str, float] | None: ...
    @property
    def weight(self) -> int: ...


USER, ASSISTANT = 0, 1
_HEADER, _USER, _LABEL, _RESPONSE, _END = Part.HEADER, Part.USER, Part.LABEL, Part.RESPONSE, Part.END
# Token positions within the stored document. Each message but the system's is one turn. `text` is the message's
# content, and `mark` (assistant) is where the label marker goes: after the response and the text that closes it.
TURN = np.dtype(
    [
        ("start", "<i4"),
        ("label_start", "<i4"),
        ("label_end", "<i4"),
        ("text_start", "<i4"),
        ("text_end", "<i4"),
        ("mark", "<i4"),
        ("end", "<i4"),
        ("role", "u1"),
        ("weight", "u1"),
    ]
)


@dataclass(frozen=True)
class Document:
    """A conversation as it is stored. T tokens, N turns, A attributes.

    Args:
        tokens_T: token ids (int32, or uint16 straight from a shard).
        header: start and end of the system text's tokens, which may be inside the first turn (Llama-2's format).
        turns_N: ``TURN`` records.
        spans: int32 [spans, 2], start and end of each run of trained tokens.
        values_NA: float32 values on the schema's scale, NaN where missing.
    """

    id: str
    tokens_T: Array
    header: tuple[int, int]
    turns_N: Array
    spans: npt.NDArray[np.int32]
    values_NA: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """A conversation as a model sees it through a view.

    Args:
        tokens_T: int32.
        loss_mask_T: bool, True where the token is a training target (the first token never is).
        pool_P: int32, positions whose hidden state is regressed (``ap`` only, else empty).
        values_PA: float32 regression targets, NaN where missing.
        cut_tokens: number of tokens that the over-long policy removed.
    """

    id: str
    tokens_T: npt.NDArray[np.int32]
    loss_mask_T: npt.NDArray[np.bool_]
    pool_P: npt.NDArray[np.int32]
    values_PA: npt.NDArray[np.float32]
    cut_tokens: int = 0


def build_documents(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, template: Template, schema: AttributeSchema | None
) -> list[Document]:
    """Render conversations, encode them in one batch, and lay them out as documents."""
    rendered = [template.render(conversation, schema) for conversation in conversations]
    encoded = tokenizer.encode_documents(rendered)
    return [
        layout(conversation, segments, ids, lengths, schema)
        for conversation, segments, (ids, lengths) in zip(conversations, rendered, encoded, strict=True)
    ]


def layout(
    conversation: Conversation,
    segments: Sequence[Segment],
    ids: Array,
    lengths: Sequence[int],
    schema: AttributeSchema | None,
) -> Document:
    """Return the document of a rendered conversation: ``lengths[i]`` is the number of ids of ``segments[i]``."""
    turns, spans, header = turn_positions(conversation.messages, segments, lengths)
    values = np.full((len(turns), len(schema.names) if schema else 0), np.nan, np.float32)
    if values.size and schema:
        for row, message in zip(values, turn_messages(conversation), strict=True):
            if message.attributes:
                row[:] = schema.vector(message.attributes)
    return Document(
        conversation.id, ids, header, np.array(turns, TURN), np.array(spans, np.int32).reshape(-1, 2), values
    )


def turn_messages(conversation: Conversation) -> Sequence[Message]:
    """Return the messages that are turns: all messages but the system's."""
    messages = conversation.messages
    return messages[1:] if messages and messages[0].role == "system" else messages


def turn_positions(
    messages: Sequence[MessageLike], segments: Sequence[Segment], lengths: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[tuple[int, int]], tuple[int, int]]:
    """Return ``TURN`` rows, trained spans and header of a rendered conversation, as plain numbers."""
    turns: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    header: tuple[int, int] | None = None
    turn_index, open_mark, end, last = -1, False, 0, len(messages)
    turn: list[int] = []
    for (_, control, trained, part, index), length in zip(segments, lengths, strict=True):
        start = end
        end += length
        if trained and length:
            if spans and spans[-1][1] == start:
                spans[-1] = spans[-1][0], end
            else:
                spans.append((start, end))
        if part is _HEADER:
            header = (header[0] if header else start, end)
            continue
        if index != turn_index and index < last:
            turn_index, open_mark = index, False
            message = messages[index]
            is_assistant = message.role == "assistant"
            turn = [start, start, start, start, start, start, end, is_assistant, message.weight if is_assistant else 0]
            turns.append(turn)
        if part is _USER or part is _RESPONSE:
            turn[3], turn[4], turn[5] = start, end, end
            open_mark = True
        elif part is _LABEL:
            turn[1] = start if turn[1] == turn[2] else turn[1]
            turn[2] = end
        elif part is _END and open_mark:
            open_mark = not control and index == turn_index
            turn[5] = end if open_mark else turn[5]
        turn[6] = end
    return list(map(tuple, turns)), spans, header or (0, 0)


def scored_turns(document: Document, scored: Scored) -> npt.NDArray[np.int64]:
    """Return the indices of turns after which the ``ap`` view puts a marker: assistant turns up to the last that
    counts.

    Unlabelled turns in between get a marker too, but no target, so that a turn has the same context in training as when
    everything is scored.
    """
    turns = document.turns_N
    assistant = turns["role"] == ASSISTANT
    if scored == "labelled":
        counts = np.flatnonzero(assistant & labelled_turns(document))
        assistant[int(counts[-1]) + 1 if len(counts) else 0 :] = False
    return np.flatnonzero(assistant)


def labels_shown(document: Document) -> npt.NDArray[np.int64]:
    """Return the indices of turns after which the ``ap_text`` view puts a label line: assistant turns with a value, of
    any weight, up to the last one that is learnt.
    """
    shown = (document.turns_N["role"] == ASSISTANT) & ~np.isnan(document.values_NA).all(axis=1)
    learnt = np.flatnonzero(shown & labelled_turns(document))
    shown[int(learnt[-1]) + 1 if len(learnt) else 0 :] = False
    return np.flatnonzero(shown)


def labelled_turns(document: Document) -> npt.NDArray[np.bool_]:
    """Return bool [N]: turns of weight 1 with at least one value."""
    return (document.turns_N["weight"] > 0) & ~np.isnan(document.values_NA).all(axis=1)


def make_sample(
    document: Document,
    view: View,
    max_tokens: int | None = None,
    overlong: Overlong = "truncate_left_turns",
    marker_id: int | None = None,
    scored: Scored = "labelled",
    labels: LabelTokens | None = None,
) -> Sample | None:
    """Return a document seen through a view, at most ``max_tokens`` long; None if it is dropped or has no target left.

    ``marker_id`` (the id of ``template.label_marker``) is needed for ``ap``, ``labels`` for ``ap_text``. ``scored`` is
    of ``ap``. ``UserError`` under ``overlong="error"``.
    """
    cut = _Cut(document, view, scored, labels)
    if not cut.has_target():
        return None
    before = cut.length()
    if max_tokens is not None and before > max_tokens:
        if overlong == "drop":
            return None
        if overlong == "error":
            raise UserError(
                f"sample {document.id!r} has {before} tokens, more than train.row_tokens={max_tokens}; raise it, or "
                "set data.overlong to drop, truncate_left_turns or truncate_response"
            )
        if overlong == "truncate_response":
            cut.right(max_tokens)
        else:
            cut.left_turns(max_tokens)
        if cut.length() > max_tokens or not cut.has_target():
            return None
    kept = np.flatnonzero(cut.keep)
    tokens, mask = document.tokens_T[kept].astype(np.int32), cut.mask[kept]
    pool = np.zeros(0, np.int32)
    at = np.searchsorted(kept, document.turns_N["mark"][cut.marks])
    if view == "ap":
        assert marker_id is not None, "the ap view needs marker_id"
        tokens, mask = np.insert(tokens, at, marker_id), np.insert(mask, at, False)
        pool = (at + np.arange(len(at))).astype(np.int32)
    elif view == "ap_text":
        assert labels is not None, "the ap_text view needs labels"
        lines = [labels.line(document.values_NA[turn]) for turn in cut.marks]
        learnt = document.turns_N["weight"][cut.marks] > 0
        where = np.repeat(at, [len(line) for line in lines])
        tokens = np.insert(tokens, where, [token for line in lines for token in line])
        trained = [on and number > 0 for on, line in zip(learnt, lines, strict=True) for number in range(len(line))]
        mask = np.insert(mask, where, trained)
    mask[0] = False
    return Sample(
        document.id,
        tokens,
        mask,
        pool,
        np.where((document.turns_N["weight"] > 0)[:, None], document.values_NA, np.nan)[
            cut.marks if view == "ap" else cut.marks[:0]
        ].astype(np.float32),
        before - len(tokens),
    )


class _Cut:
    """A sample in the making: tokens to keep (``keep``), targets (``mask``), turns with a marker or a label line after
    them (``marks``), and the tokens of it for each turn (``added_N``).
    """

    def __init__(self, document: Document, view: View, scored: Scored, labels: LabelTokens | None = None) -> None:
        size, turns = len(document.tokens_T), document.turns_N
        self.document, self.turns, self.view = document, turns, view
        self.keep = np.ones(size, np.bool_)
        self.mask = np.zeros(size, np.bool_)
        self.marks = np.zeros(0, np.int64)
        self.added_N = np.ones(len(turns), np.int64)
        self.counts = labelled_turns(document) if scored == "labelled" else turns["role"] == ASSISTANT
        if view != "acsft":
            for turn in turns[turns["label_end"] > turns["label_start"]]:
                self.keep[turn["label_start"] : turn["label_end"]] = False
        if view == "lm":
            self.mask[1:] = True
        elif view == "ap":
            self.marks = scored_turns(document, scored)
            self._end_at_last_mark()
        elif view == "ap_text":
            assert labels is not None, "the ap_text view needs labels"
            self.marks, self.added_N = labels_shown(document), labels.sizes(document.values_NA)
            self._end_at_last_mark()
        else:
            for start, end in document.spans:
                self.mask[start:end] = True

    def length(self) -> int:
        return int(np.count_nonzero(self.keep)) + int(self.added_N[self.marks].sum())

    def has_target(self) -> bool:
        if self.view in PREDICTION:
            return bool(self.counts[self.marks].any())
        return bool((self.mask & self.keep)[1:].any())

    def right(self, max_tokens: int) -> None:
        """Keep the first ``max_tokens`` (``ap`` and ``ap_text``: as many markers or label lines as fit, and everything
        before them).
        """
        if self.view in PREDICTION:
            before = np.concatenate(([0], np.cumsum(self.keep)))[self.turns["mark"][self.marks]]
            self.marks = self.marks[before + np.cumsum(self.added_N[self.marks]) <= max_tokens]
            self._end_at_last_mark()
        else:
            self.keep[np.flatnonzero(self.keep)[max_tokens:]] = False

    def left_turns(self, max_tokens: int) -> None:
        """Apply the policy ``truncate_left_turns`` (see the module's docstring)."""
        turns = self.turns
        if self.view in ("sft", "acsft"):
            self.keep[np.flatnonzero(self.mask)[-1] + 1 :] = False
        final = self._final_turn()
        first = final  # the last exchange begins with the run of user turns before the last target
        while first > 0 and turns["role"][first] == ASSISTANT:
            first -= 1
        while first > 0 and turns["role"][first - 1] == USER:
            first -= 1
        if self.length() > max_tokens:
            candidates = [k for k in range(1, first + 1) if turns["role"][k] == USER]
            chosen = next((k for k in candidates if self._length_from(k) <= max_tokens), first)
            if chosen > 0:
                self._drop_before(chosen)
        if self.length() > max_tokens:
            self._shorten_prompt(first, final, max_tokens)
        if self.length() > max_tokens:
            self._shorten_response(final, max_tokens)

    def _final_turn(self) -> int:
        if self.view in PREDICTION:
            return int(self.marks[-1])
        wanted = self.turns["role"] == ASSISTANT
        if self.view != "lm":
            wanted = wanted & (self.turns["weight"] > 0)
        found = np.flatnonzero(wanted)
        return int(found[-1]) if len(found) else len(self.turns) - 1

    def _gap(self, turn: int) -> tuple[int, int]:
        """Return the range of stored tokens to remove so that ``turn`` follows the header."""
        header_start, header_end = self.document.header
        first = int(self.turns["start"][0])
        if header_end > header_start > first:  # the header is inside the first turn, whose opening tokens stay too
            return header_end, int(self.turns["text_start"][turn])
        return first, int(self.turns["start"][turn])

    def _length_from(self, turn: int) -> int:
        start, end = self._gap(turn)
        return (
            self.length()
            - int(np.count_nonzero(self.keep[start:end]))
            - int(self.added_N[self.marks[self.marks < turn]].sum())
        )

    def _drop_before(self, turn: int) -> None:
        start, end = self._gap(turn)
        self.keep[start:end] = False
        self.mask[end] = False
        self.marks = self.marks[self.marks >= turn]

    def _shorten_prompt(self, first: int, final: int, max_tokens: int) -> None:
        inside = np.zeros_like(self.keep)
        for turn in self.turns[first:final]:
            if turn["role"] == USER:
                inside[turn["text_start"] : turn["text_end"]] = True
        text = np.flatnonzero(inside & self.keep)
        excess = min(self.length() - max_tokens, len(text) - max_tokens // 4)
        if excess > 0:
            self.keep[text[:excess]] = False
            self.mask[text[excess] if excess < len(text) else text[-1]] = False

    def _shorten_response(self, final: int, max_tokens: int) -> None:
        if self.view not in PREDICTION:
            self.right(max_tokens)
            return
        turn = self.turns[final]
        text = turn["text_start"] + np.flatnonzero(self.keep[turn["text_start"] : turn["text_end"]])
        excess = self.length() - max_tokens
        if excess < len(text):  # otherwise nothing of the response would be left, and the sample is dropped
            self.keep[text[len(text) - excess :]] = False

    def _end_at_last_mark(self) -> None:
        if len(self.marks):
            self.keep[self.turns["mark"][self.marks[-1]] :] = False
