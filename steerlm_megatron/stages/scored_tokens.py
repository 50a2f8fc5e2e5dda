"""Whether another system's tokenizer makes of a conversation the tokens at whose end a model reads its values.

Owns: the conversations that are tried, what of a template a classifier reads. Does not own: prompts of language models
(``prompt_tokens.py``), the view that training sees (``data/views.py``; a test compares both).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.stages.prompt_tokens import PROMPTS, first_difference
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import Part, Segment, Template, join

_ANSWER = Message("assistant", "You're welcome!\n\n1. In 1984, it was 4.")
SCORED: tuple[tuple[Message, ...], ...] = tuple((*messages, _ANSWER) for messages in PROMPTS)


def scored_for(template: Template) -> list[tuple[Message, ...]]:
    """Return the tried conversations that the template can write."""
    return [messages for messages in SCORED if template.refusal(messages) is None]


def scored_segments(template: Template, messages: Sequence[Message]) -> list[Segment]:
    """Return the segments that an attribute-prediction model reads of a conversation that ends with a response: a label
    marker after each response and the text that closes it, and nothing after the last.
    """
    segments = template.render(Conversation("", tuple(messages)))
    out: list[Segment] = []
    waits = False  # for what closes the response of `turn`
    turn = end = 0
    for segment in segments:
        if waits and not (segment.part is Part.END and not segment.control and segment.turn == turn):
            out.append(Segment(template.label_marker, True, False, Part.LABEL, turn))
            end, waits = len(out), False
        out.append(segment)
        if segment.part is Part.RESPONSE:
            waits, turn = True, segment.turn
    if waits:
        out.append(Segment(template.label_marker, True, False, Part.LABEL, turn))
        end = len(out)
    return out[:end]


def scored_ids(tokenizer: Tokenizer, template: Template, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of :func:`scored_segments`."""
    return list(tokenizer.encode_segments(scored_segments(template, messages))[0])


def scored_difference(tokenizer: Tokenizer, template: Template, theirs: Mapping[str, Any]) -> str | None:
    """Return where the tokenizer of ``theirs``, the content of a ``tokenizer.json``, makes other tokens of a scored
    conversation than ours of its pieces; None where all conversations have the same tokens.
    """
    import tokenizers

    other = tokenizers.Tokenizer.from_str(json.dumps(theirs))
    other.no_truncation()
    other.no_padding()
    for messages in scored_for(template):
        found = other.encode(join(scored_segments(template, messages)), add_special_tokens=False).ids
        if said := first_difference(found, scored_ids(tokenizer, template, messages), tokenizer):
            return said
    return None
