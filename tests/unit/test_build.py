"""Many conversations at a time give the same documents as one by one, whatever they contain."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.data.views import build_documents
from steerlm_megatron.data.write import skeletons
from steerlm_megatron.data.write.blocks import Block, join
from steerlm_megatron.data.write.builder import Builder
from steerlm_megatron.data.write.chunks import Job
from steerlm_megatron.data.write.skeletons import SkeletonCache
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import Part, Segment, SteerLMTemplate, Template
from tests.helpers import corpora

ODD = ["", " ", "\n", "\0", "\x000\0", "\x001\0", "\u2581", "<extra_id_1>", "<extra_id_2>quality:4\n", "[INST]", "</s>"]
ODD += ["<<SYS>>", "quality:4,toxicity:0", "\u200b", "é", "日本語", "🙂", "a\u0301", "User\n", "x" * 40, "０"]
TEXTS = st.lists(
    st.sampled_from(ODD) | st.sampled_from(["river", " stone", "1", ", "]) | st.text(st.characters(codec="utf-8")),
    max_size=5,
).map("".join)
NAMES = (*corpora.SCHEMA.names,)
SCHEMAS = {"three": corpora.SCHEMA, "nameless": AttributeSchema("none", (), 1), "none": None}
BUILDERS: dict[tuple[str, str, str], Builder] = {}


@st.composite
def conversations(draw: st.DrawFn, schema: AttributeSchema | None) -> Conversation:
    messages = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    for role in draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=5)):
        attributes = None
        if role == "assistant" and schema is not None and schema.names:
            value = st.floats(0, schema.max_level) | st.integers(0, schema.max_level)
            attributes = draw(st.none() | st.dictionaries(st.sampled_from(schema.names), value))
        weight = draw(st.integers(0, 1)) if role == "assistant" else 1
        messages.append(Message(role, draw(TEXTS), attributes, weight))
    return Conversation(draw(st.text()), tuple(messages))


def assert_same(one: Block, other: Block) -> None:
    for (name, a), (_, b) in zip(one.arrays().items(), other.arrays().items(), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert a.tobytes() == b.tobytes(), name


def expected(given_: list[Conversation], tok: Any, template: Template, schema: AttributeSchema | None) -> Block:
    names = len(schema.names) if schema else 0
    return join(build_documents(given_, tok, template, schema), tok.vocab_size, names, range(1, len(given_) + 1))


@pytest.mark.parametrize("schema_name", SCHEMAS)
@pytest.mark.parametrize("template_name", corpora.TEMPLATES)
@pytest.mark.parametrize("name", ["trained", "nfkc", "user_defined", "hf_byte_level", "mistral", "fairseq2"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_conversations(name: str, template_name: str, schema_name: str, data: st.DataObject) -> None:
    schema, template = SCHEMAS[schema_name], corpora.TEMPLATES[template_name]
    tok = corpora.tokenizer(name, tuple(dict.fromkeys((*template.control_strings, template.label_marker))))
    builder = BUILDERS.setdefault((name, template_name, schema_name), Builder(tok, template, schema))
    given_ = data.draw(st.lists(conversations(schema), min_size=1, max_size=5))
    block, has_target = builder.build(given_, range(1, len(given_) + 1))
    assert_same(block, expected(given_, tok, template, schema))
    labelled = [any(m.attributes and m.weight for m in c.messages) and bool(schema and schema.names) for c in given_]
    assert has_target.tolist() == [a or b > 0 for a, b in zip(labelled, block.span_counts.tolist(), strict=True)]


@pytest.mark.parametrize("template_name", corpora.TEMPLATES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_form_with_its_texts_is_what_render_gives(template_name: str, data: st.DataObject) -> None:
    template = corpora.TEMPLATES[template_name]
    known = SkeletonCache(template, corpora.SCHEMA)
    units: dict[int, tuple[str, bool]] = {}
    for conversation in data.draw(st.lists(conversations(corpora.SCHEMA), min_size=1, max_size=6)):
        skeleton, texts = known.of(conversation.messages)
        filling = iter(texts)
        units.update({unit: constant for constant, unit in known.constants.items()})
        made = []
        for segment, unit in zip(skeleton.segments, skeleton.units.tolist(), strict=True):
            text = next(filling) if unit == skeletons.GAP else units[unit][0]
            made.append(segment._replace(text=text))
            assert unit == skeletons.GAP or units[unit][1] == segment.control
        assert made == template.render(conversation, corpora.SCHEMA) and next(filling, None) is None


def talk(*contents: str, **more: Any) -> tuple[Message, ...]:
    roles = ("user", "assistant") * len(contents)
    return tuple(Message(role, text, **more) for role, text in zip(roles, contents, strict=False))


def test_one_form_serves_all_of_its_kind() -> None:
    known = SkeletonCache(corpora.STEERLM, corpora.SCHEMA)
    skeleton, texts = known.of(talk("a", "b"))
    other, texts_too = known.of(talk("longer\0", "quality:1"))
    assert skeleton is other and texts == ["a\n", "b"] and texts_too == ["longer\0\n", "quality:1"]
    assert known.of(talk("a", ""))[0] is not skeleton and known.of(talk("a", "b", weight=0))[0] is not skeleton
    labelled = (Message("user", "a"), Message("assistant", "b", {"humor": 1.2, "quality": 8.6}))
    assert known.of(labelled)[1] == ["a\n", "quality:9,humor:1\n", "b"]


@dataclass(frozen=True)
class Doubling(SteerLMTemplate):
    """A template that writes a text twice. Its skeleton cannot be derived, so every conversation is rendered."""

    def segments(self, messages: Any, schema: Any, training: bool) -> list[Segment]:
        segments = super().segments(messages, schema, training)
        return [s._replace(text=s.text * 2) if s.part == 1 else s for s in segments]


@dataclass(frozen=True)
class Bracketing(SteerLMTemplate):
    """A template that writes text before a label line. Its skeleton cannot be derived either."""

    def segments(self, messages: Any, schema: Any, training: bool) -> list[Segment]:
        segments = super().segments(messages, schema, training)
        return [s._replace(text=f"[{s.text}") if s.part is Part.LABEL and not s.control else s for s in segments]


def test_labels_that_cannot_be_told_are_rendered() -> None:
    tok, template = corpora.tokenizer("trained"), Bracketing()
    given_ = corpora.conversations(20)
    builder = Builder(tok, template, corpora.SCHEMA)
    assert_same(builder.build(given_, range(1, 21))[0], expected(given_, tok, template, corpora.SCHEMA))
    assert None in builder.skeletons.known.values()


def test_what_cannot_be_told_is_rendered() -> None:
    tok, template = corpora.tokenizer("trained"), Doubling()
    given_ = [Conversation("x", talk("river", "stone")), Conversation("y", talk("lamp", "bread"))]
    builder = Builder(tok, template, corpora.SCHEMA)
    assert_same(builder.build(given_, [1, 2])[0], expected(given_, tok, template, corpora.SCHEMA))
    assert list(builder.skeletons.known.values()) == [None]
    marked = Template.from_config({"name": "steerlm", "system": "\x000\0"})  # the text looks like a mark
    builder = Builder(tok, marked, None)
    assert_same(builder.build(given_, [1, 2])[0], expected(given_, tok, marked, None))


def test_forms_are_bounded_and_many_documents_are_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeletons, "MOST_SKELETONS", 3)
    given_ = corpora.conversations(200, seed=4)
    builder = Builder(corpora.tokenizer("trained"), corpora.STEERLM, corpora.SCHEMA)
    for start in range(0, 200, 50):
        some = given_[start : start + 50]
        block = builder.build(some, range(1, 51))[0]
        assert_same(block, expected(some, corpora.tokenizer("trained"), corpora.STEERLM, corpora.SCHEMA))
        assert len(builder.skeletons.known) <= 3
    assert_same(builder.build([], [])[0], join([], corpora.tokenizer("trained").vocab_size, 3))


def test_a_job_travels_without_its_builder() -> None:
    job = Job(corpora.tokenizer("trained"), corpora.SCHEMA, corpora.STEERLM, "error", 0.0, 1, "escape")
    job.builder.build(corpora.conversations(3), [1, 2, 3])
    copy = pickle.loads(pickle.dumps(job))
    assert "builder" in vars(job) and "builder" not in vars(copy) and copy.key == job.key
    given_ = corpora.conversations(5)
    assert_same(copy.builder.build(given_, [0] * 5)[0], job.builder.build(given_, [0] * 5)[0])
