"""The label line of a generative predictor: its tokens, its place after the response, and what of it is learnt."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from steerlm_megatron.data.label_tokens import LabelTokens
from steerlm_megatron.data.views import Sample, build_documents, labels_shown, make_sample
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import Part, Template
from tests.helpers import corpora

WIDE = AttributeSchema("wide", ("quality", "toxicity", "humor"), 12)  # two digits
MARKER = "<extra_id_2>"


def labels_of(schema: AttributeSchema, name: str = "trained", template: Template = corpora.STEERLM) -> LabelTokens:
    return LabelTokens.of(schema, corpora.tokenizer(name, template.control_strings), template.label_marker)


@pytest.mark.parametrize("name", ["trained", "hf_metaspace", "hf_byte_level", "bytes"])
@pytest.mark.parametrize("schema", [corpora.SCHEMA, WIDE], ids=lambda schema: schema.name)
def test_the_tokens_are_those_of_the_label_line(name: str, schema: AttributeSchema) -> None:
    """What stands before a response in conditioned SFT stands after it here, token for token."""
    tokenizer, labels = corpora.tokenizer(name), labels_of(schema, name)
    tried = [
        {"quality": 6.0, "toxicity": 0.0, "humor": float(schema.max_level)},
        {"humor": 4.5, "toxicity": 3.5},  # half to even
        {"toxicity": 8.49},
        {},
    ]
    rows = np.array([schema.vector(values) for values in tried], np.float32)
    wanted = []
    for values, row in zip(tried, rows, strict=True):
        (line,) = [corpora.STEERLM._label(corpora.STEERLM.label(Message("assistant", "", values or None), schema), 0)]
        ids = tokenizer.encode_segments(line)[0]
        wanted.append(len(ids))
        if values:
            assert list(labels.line(row)) == ids
    assert labels.sizes(rows).tolist() == wanted
    longest = labels.line(np.full(3, max(range(len(labels.levels)), key=lambda i: len(labels.levels[i])), np.float32))
    assert labels.longest([0, 1, 2]) == len(longest)


def test_sizes_of_random_labels() -> None:
    labels, rng = labels_of(WIDE, "bytes"), np.random.default_rng(1)
    values_NA = rng.uniform(-1, 13, (200, 3)).astype(np.float32)
    values_NA[rng.random((200, 3)) < 0.4] = np.nan
    wanted = [0 if np.isnan(row).all() else len(labels.line(row)) for row in values_NA]
    assert labels.sizes(values_NA).tolist() == wanted and 0 in wanted


def test_levels_that_a_tokenizer_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(UserError, match=r"same tokens of the levels 7 and 8 of attributes=test.*ap\.kind=regression"):
        labels_of(corpora.SCHEMA, "nfkc")


# The view


def seen(conversation: Conversation, template: Template = corpora.STEERLM, limit: int | None = None) -> Sample | None:
    tokenizer = corpora.tokenizer("trained", template.control_strings)
    (document,) = build_documents([conversation], tokenizer, template, corpora.SCHEMA)
    labels = LabelTokens.of(corpora.SCHEMA, tokenizer, template.label_marker)
    return make_sample(document, "ap_text", limit, labels=labels)


def by_hand(conversation: Conversation, template: Template) -> tuple[list[int], list[bool]]:
    """Return the tokens and the loss mask, from the segments of the conversation without labels."""
    tokenizer = corpora.tokenizer("trained", template.control_strings)
    spoken = [number for number, m in enumerate(conversation.messages) if m.role == "assistant" and m.attributes]
    learnt = [number for number in spoken if conversation.messages[number].weight]
    ids: list[int] = []
    mask: list[bool] = []

    def put(segments: list, trained: bool) -> None:
        found = tokenizer.encode_segments(segments)[0]
        ids.extend(found)
        mask.extend([trained] * len(found))

    def put_label(turn: int) -> None:
        message = conversation.messages[turn]
        marker, text = template._label(template.label(message, corpora.SCHEMA), turn)
        put([marker], False)
        put([text], message.weight > 0)

    waits = None  # the response whose label is to come
    for segment in template.render(conversation, None):
        closes = segment.part is Part.END and not segment.control and segment.turn == waits
        if waits is not None and not closes:
            put_label(waits)
            if waits == learnt[-1]:
                return ids, mask
            waits = None
        put([segment], False)
        if segment.part is Part.RESPONSE and segment.turn in spoken:
            waits = segment.turn
    assert waits is not None
    put_label(waits)
    return ids, mask


@pytest.mark.parametrize("template_name", corpora.TEMPLATES)
def test_a_label_follows_its_response_and_is_all_that_is_learnt(template_name: str) -> None:
    template, kinds = corpora.TEMPLATES[template_name], set()
    for conversation in corpora.conversations(30, seed=3):
        sample = seen(conversation, template)
        labelled = [m for m in conversation.messages if m.role == "assistant" and m.attributes]
        if not any(m.weight for m in labelled):
            assert sample is None
            continue
        assert sample is not None
        ids, mask = by_hand(conversation, template)
        assert sample.tokens_T.tolist() == ids and sample.loss_mask_T.tolist() == mask
        assert len(sample.pool_P) == 0 and sample.values_PA.shape == (0, 3)
        kinds.add((len(labelled) > 1, any(not m.weight for m in labelled)))
    assert kinds == {(False, False), (True, False), (True, True)}, "one label and several, and weights of 0"


def test_text_and_mask_of_a_conversation() -> None:
    tokenizer = corpora.tokenizer("trained")
    conversation = Conversation(
        "x",
        (
            Message("user", "river"),
            Message("assistant", "stone", {"quality": 2.0}, 0),
            Message("user", "bread"),
            Message("assistant", "lamp"),
            Message("user", "green"),
            Message("assistant", "water", {"humor": 9.0, "quality": 6.4}),
            Message("user", "not seen"),
        ),
    )
    sample = seen(conversation)
    assert sample is not None
    assert tokenizer.decode(sample.tokens_T.tolist()) == (
        "<extra_id_0>System\nYou are kind.\n\n<extra_id_1>User\nriver\n<extra_id_1>Assistant\nstone\n"
        f"{MARKER}quality:2\n<extra_id_1>User\nbread\n<extra_id_1>Assistant\nlamp\n"
        f"<extra_id_1>User\ngreen\n<extra_id_1>Assistant\nwater\n{MARKER}quality:6,humor:9\n"
    )
    assert tokenizer.decode(sample.tokens_T[sample.loss_mask_T].tolist()) == "quality:6,humor:9\n"


def test_what_is_cut_leaves_labels_whole() -> None:
    """The oldest turns go first, and then the response's end; the last label stays until there is no room for it."""
    tokenizer = corpora.tokenizer("trained")
    messages = [
        message
        for number in range(3)
        for message in (
            Message("user", f"question {number}"),
            Message("assistant", f"answer {number} river stone bread lamp quiet", {"quality": float(number)}),
        )
    ]
    conversation = Conversation("three", tuple(messages))
    full = seen(conversation)
    assert full is not None
    kept = set()
    for limit in range(len(full.tokens_T) - 1, 0, -1):
        sample = seen(conversation, limit=limit)
        if sample is None:
            break
        text = tokenizer.decode(sample.tokens_T.tolist())
        labels = [int(part.split("\n")[0]) for part in text.split(f"{MARKER}quality:")[1:]]
        assert labels in ([1, 2], [2]) and text.endswith(f"\n{MARKER}quality:2\n") and len(sample.tokens_T) <= limit
        assert sample.cut_tokens == len(full.tokens_T) - len(sample.tokens_T)
        kept.add((len(labels), "answer 2 river" in text))
    assert kept == {(2, True), (1, True), (1, False)}


def test_labels_after_the_last_that_is_learnt_are_not_shown() -> None:
    messages = (
        Message("user", "a"),
        Message("assistant", "b", {"quality": 1.0}, 0),
        Message("user", "c"),
        Message("assistant", "d", {"quality": math.pi}),
        Message("user", "e"),
        Message("assistant", "f", {"quality": 1.0}, 0),
    )
    tokenizer = corpora.tokenizer("trained")
    (document,) = build_documents([Conversation("", messages)], tokenizer, corpora.STEERLM, corpora.SCHEMA)
    assert labels_shown(document).tolist() == [1, 3]


def test_shards_without_attributes_have_no_labels(tmp_path: Path) -> None:
    from steerlm_megatron.data.feed.dataset import ShardDataset
    from tests.unit.test_shards import write

    write(tmp_path / "s", schema=None)
    with pytest.raises(UserError, match="these shards have no attributes"):
        ShardDataset.open(tmp_path / "s").plan("ap_text", 256, 0)
