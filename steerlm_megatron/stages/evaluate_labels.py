"""What ``evaluate`` compares the attribute-prediction model with: labels, single annotations, chosen responses.

Owns: which responses count, and scoring them. Does not own: the figures (``steerlm_megatron/evaluate``), the form of
the files (``steer/records.py``, ``steer/preferences.py``). Invariant: turns of weight 0 are repeats and do not count,
nor do empty turns, which have no text to score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.protocol import Labelled, Preferences, Scored
from steerlm_megatron.stages.record_reader import Record
from steerlm_megatron.stages.session import LoadedModel
from steerlm_megatron.steer.annotations import annotations_of
from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.preferences import Pair
from steerlm_megatron.steer.records import Conversation


def counts(message: Message) -> bool:
    """Return whether a message is a response whose labels are compared."""
    return message.role == "assistant" and bool(message.attributes and message.weight and message.content.strip())


def annotated(records: Sequence[Record]) -> int:
    """Return the number of responses that have the values of two annotators or more.

    Raises:
        UserError: annotations of a wrong form, naming ``file:line``.
    """
    return sum(
        len(annotations_of(message, record.where)) > 1
        for record in records
        for message in record.conversation.messages
        if counts(message)
    )


def first_user_message(conversation: Conversation) -> str:
    """Return what conversations of one tree have in common."""
    return next(message.content for message in conversation.messages if message.role == "user")


def labelled(ap: LoadedModel, score: Scored, records: Sequence[Record]) -> tuple[Labelled, int]:
    """Return the labelled responses with the values that the model ``ap`` predicts (by ``score``), and the number of
    records without any. Collective over the world.

    Attributes of which the model never saw a label are left out.
    """
    schema = ap.schema
    assert schema is not None
    scores = score([record.conversation for record in records])
    predicted: list[list[float]] = []
    wanted: list[list[float]] = []
    responses: list[tuple[Record, int]] = []
    unlabelled = 0
    for record, values in zip(records, scores, strict=True):
        before = len(wanted)
        for index, message in enumerate(record.conversation.messages):
            if counts(message):
                attributes = cast(Mapping[str, float], message.attributes)
                predicted.append([values[index][name] for name in schema.seen])
                wanted.append([float(attributes.get(name, math.nan)) for name in schema.seen])
                responses.append((record, index))
        unlabelled += len(wanted) == before
    if not wanted:
        raise UserError("input holds no labelled response to evaluate the attribute-prediction model on")
    means = dict(zip(schema.names, ap.meta.label_mean, strict=True))
    messages = [record.conversation.messages[index] for record, index in responses]
    return (
        Labelled(
            schema,
            schema.seen,
            np.array(predicted),
            np.array(wanted),
            np.array([cast(float, means[name]) for name in schema.seen]),  # every attribute that was seen has a mean
            np.array([len(message.content) for message in messages], dtype=np.float64),
            [first_user_message(record.conversation) for record, _ in responses],
            _facets(responses),
            [annotations_of(message, record.where) for message, (record, _) in zip(messages, responses, strict=True)],
        ),
        unlabelled,
    )


def _facets(responses: Sequence[tuple[Record, int]]) -> dict[str, list[str]]:
    """Return language, source and turn of each response, as far as records say them."""
    facets: dict[str, list[str]] = {"language": [], "source": [], "turn": []}
    for record, index in responses:
        conversation = record.conversation
        extra = conversation.extra
        facets["language"].append(str(extra.get("lang") or extra.get("language") or ""))
        facets["source"].append(conversation.source)
        turn = sum(message.role == "assistant" for message in conversation.messages[: index + 1])
        facets["turn"].append(str(turn) if turn < 4 else "4 or later")
    return {name: values for name, values in facets.items() if any(values)}


def preferences(ap: LoadedModel, score: Scored, pairs: Sequence[Pair]) -> Preferences:
    """Return the pairs with the values that the model ``ap`` predicts (by ``score``) of both responses. Collective over
    the world.
    """
    schema = ap.schema
    assert schema is not None
    both = [
        Conversation(f"{number}:{side}", (*pair.messages, Message("assistant", text)))
        for number, pair in enumerate(pairs)
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    scores = score(both)
    values = np.array(
        [
            [found[len(conversation.messages) - 1][name] for name in schema.seen]
            for conversation, found in zip(both, scores, strict=True)
        ]
    )
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs], dtype=np.float64)
    groups = [first_user_message(conversation) for conversation in both[::2]]
    return Preferences(schema, schema.seen, values[::2], values[1::2], lengths, groups)
