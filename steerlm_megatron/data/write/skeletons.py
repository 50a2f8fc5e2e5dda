"""Skeletons of conversations: the segments of a rendered conversation with gaps in the place of texts.

The segments around the texts depend on roles, weights and label lines alone (``Template.render`` promises that), and a
corpus has many conversations and few such combinations. A ``Skeleton`` is found by rendering marks in the place of
texts; the positions of turns and spans in it (``views.turn_positions``) are computed once, as numbers of segments. So
no segment objects are made per conversation, and the template remains the only definition of the format.

Owns: deriving skeletons, caching them. Does not own: the format (``steer.templates``), the layout of a document
(``data/views.py``). Invariant: for each conversation that gets a skeleton, its segments with the texts in its gaps are
what ``render`` gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerlm_megatron.data.views import MessageLike, turn_positions
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import Part, Segment, Template

MOST_SKELETONS = 1024
_MARK = re.compile("\0([0-9]+)\0")
GAP = -1


@dataclass(frozen=True)
class Skeleton:
    """A skeleton of S segments and N turns. Positions are edges of segments: segment k starts at k, the last ends at S.

    Args:
        segments: as ``render`` gives them; the text of those with a gap means nothing.
        gaps: per gap, in the order of segments: the number of its text (of a message's content or, after all contents,
            of a message's label), and the text before and after it in the segment.
        units: int64 [S]: ``GAP``, or the number of the segment's text or control string among
            ``SkeletonCache.constants``.
        turns: int64 [N, 7], the positions of ``views.TURN``; ``marks``: uint8 [N, 2], role and weight.
        spans, header: int64 [spans, 2] and [2].
    """

    segments: tuple[Segment, ...]
    gaps: tuple[tuple[int, str, str], ...]
    units: npt.NDArray[np.int64]
    turns: npt.NDArray[np.int64]
    marks: npt.NDArray[np.uint8]
    spans: npt.NDArray[np.int64]
    header: npt.NDArray[np.int64]

    def texts(self, fillings: Sequence[str]) -> list[str]:
        """Return the texts of segments with gaps. ``fillings`` are the contents of all messages, then their labels."""
        return [before + fillings[number] + after for number, before, after in self.gaps]


class SkeletonCache:
    """Finds and caches the skeletons of a template's conversations."""

    def __init__(self, template: Template, schema: AttributeSchema | None) -> None:
        self._template, self._schema = template, schema
        self.known: dict[tuple[tuple[str, ...], tuple[int, ...], tuple[bool, ...]], Skeleton | None] = {}
        self.constants: dict[tuple[str, bool], int] = {}  # (text, whether it is a control string) → unit

    def of(self, messages: Sequence[MessageLike]) -> tuple[Skeleton, list[str]]:
        """Return the skeleton of a conversation, and the texts that fill its gaps. ``UserError`` as of
        ``Template.render``.
        """
        contents = self._template.written(messages)
        attributes = [message.attributes for message in messages]
        labels: list[str] = []
        if any(attributes):
            labels = [self._template.label(message, self._schema) for message in messages]
        if not all(contents):  # a template may leave out the segments around an empty text
            return self._for_one(messages)
        key = (
            tuple([message.role for message in messages]),
            tuple([message.weight for message in messages]),
            tuple([bool(label) for label in labels]),
        )
        skeleton = self.known.get(key)
        if skeleton is None:
            if key not in self.known:
                if len(self.known) >= MOST_SKELETONS:
                    self.known.clear()
                skeleton = self.known[key] = self._derive(messages, labels or [""] * len(messages))
            if skeleton is None:
                return self._for_one(messages)
        return skeleton, skeleton.texts(contents + labels)

    def _derive(self, messages: Sequence[MessageLike], labels: list[str]) -> Skeleton | None:
        """Return the skeleton of ``messages``; None if it cannot be derived from rendered marks."""
        marked = self._render(messages, [f"\0{number}\0" for number in range(len(messages))])
        gaps: list[tuple[int, str, str]] = []
        filled = []
        for text, control, _, part, turn in marked:
            found = [] if control else _MARK.findall(text)
            label = labels[turn] if part is Part.LABEL and not control else ""
            if len(found) == 1 and int(found[0]) < len(messages):
                before, after = text.split(f"\0{found[0]}\0")
                gaps.append((int(found[0]), before, after))
            elif not found and label and text.startswith(label):
                gaps.append((len(messages) + turn, "", text[len(label) :]))
            elif found or label:  # a text occurs twice or changed, so its part in the segments is unknown
                return None
            filled.append(bool(found or label))
        skeleton = self._skeleton(messages, marked, gaps, filled)
        texts = iter(skeleton.texts(self._template.written(messages) + labels))
        again = [s._replace(text=next(texts)) if gap else s for s, gap in zip(marked, filled, strict=True)]
        return skeleton if again == self._render(messages, [message.content for message in messages]) else None

    def _for_one(self, messages: Sequence[MessageLike]) -> tuple[Skeleton, list[str]]:
        """Return a skeleton for this conversation alone, in which every text segment is a gap."""
        segments = self._render(messages, [message.content for message in messages])
        texts = [segment.text for segment in segments if not segment.control]
        gaps = [(number, "", "") for number in range(len(texts))]
        return self._skeleton(messages, segments, gaps, [not segment.control for segment in segments]), texts

    def _render(self, messages: Sequence[MessageLike], contents: Sequence[str]) -> list[Segment]:
        made = [Message(m.role, text, m.attributes, m.weight) for m, text in zip(messages, contents, strict=True)]
        return self._template.render(Conversation("", tuple(made)), self._schema)

    def _skeleton(
        self,
        messages: Sequence[MessageLike],
        segments: list[Segment],
        gaps: list[tuple[int, str, str]],
        filled: list[bool],
    ) -> Skeleton:
        constants = self.constants
        units = [
            GAP if gap else constants.setdefault((text, control), len(constants))
            for (text, control, _, _, _), gap in zip(segments, filled, strict=True)
        ]
        # With one token per segment, a token position is the number of an edge.
        turns, spans, header = turn_positions(messages, segments, [1] * len(segments))
        rows = np.array(turns, np.int64).reshape(-1, 9)
        return Skeleton(
            tuple(segments),
            tuple(gaps),
            np.array(units, np.int64),
            rows[:, :7],
            rows[:, 7:].astype(np.uint8),
            np.array(spans, np.int64).reshape(-1, 2),
            np.array(header, np.int64),
        )
