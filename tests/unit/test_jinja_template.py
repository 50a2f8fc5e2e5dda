"""A model's own chat template as a prompt template: its text, its segments, and its way out again."""

from __future__ import annotations

import dataclasses
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.data.views import turn_positions
from steerlm_megatron.data.write.skeletons import SkeletonCache
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.chat_template import chat_template, variable
from steerlm_megatron.steer.jinja_template import JinjaTemplate, render_chat_template
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import ChatMLTemplate, Part, Template, join

SCHEMA = AttributeSchema("own", ("quality", "not-toxic", "humor"), 9, "quality", {"quality": 9, "humor": 2})
DAY = date(2026, 2, 1)

# The published formats, as their tokenizers have them or shortened; what differs between kinds is kept.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set today = '26 Jul 2024' %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{{- 'Today Date: ' + today + '\\n\\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
QWEN3 = (  # thoughts of answers before the last question are left out, and the last answer has empty ones
    "{%- set ns = namespace(last=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' else message.content }}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
PLAIN = {"bos_token": "<s>", "eos_token": "</s>"}
KNOWN = [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "<s>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>",
]  # fmt: skip
# name: source, special tokens, stop string, whether there are system texts, whether a label may follow a user's text
KINDS: dict[str, tuple[str, dict[str, str], str, bool, bool]] = {
    "llama3": (LLAMA3, HEADERS, "<|eot_id|>", True, True),
    "llama3.1": (LLAMA31, HEADERS, "<|eot_id|>", True, True),
    "mistral": (MISTRAL, PLAIN, "</s>", False, False),
    "gemma": (GEMMA, {"bos_token": "<bos>"}, "<end_of_turn>", False, True),
    "zephyr": (ZEPHYR, PLAIN, "</s>", True, True),
    "qwen3": (QWEN3, {}, "<|im_end|>", True, True),
    "vicuna": (VICUNA, PLAIN, "</s>", True, False),
    "chatml": (CHATML, {}, "<|im_end|>", True, True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **more: Any) -> JinjaTemplate:
    source, tokens, *_ = KINDS[kind]
    return JinjaTemplate.of(source, tokens, KNOWN, day=DAY, **more)


def conversation(kind: str, turns: int, system: bool = True, labels: bool = False) -> list[Message]:
    found = [Message("system", "Be brief.")] if system and KINDS[kind][3] else []
    for turn in range(turns):
        found.append(Message("user", f" Question {turn}?\nIn two lines.\n"))
        attributes = {"humor": 2.5, "quality": float(turn)} if labels and turn % 2 == 0 else None
        found.append(Message("assistant", f"Answer {turn}.", attributes))
    return found


def rendered(source: str, kind: str, messages: list[Message], generate: bool = True, **levels: Any) -> str:
    plain = [{"role": m.role, "content": m.content} | ({"attributes": m.attributes} if m.attributes else {})
             for m in messages]  # fmt: skip
    return render_chat_template(source, plain, KINDS[kind][1] | levels, generate, DAY)


@each_kind
@pytest.mark.parametrize("turns", [1, 2, 4])
@pytest.mark.parametrize("system", [False, True])
def test_prompts_are_what_the_chat_template_renders(kind: str, turns: int, system: bool) -> None:
    template, messages = make(kind), conversation(kind, turns, system)[:-1]
    assert join(template.prefix(messages)) == rendered(KINDS[kind][0], kind, messages)
    assert template.stop_strings == (KINDS[kind][2],) and template.response_suffix == ""
    again = Template.from_dict(template.to_dict())
    assert again == template and again.prefix(messages) == template.prefix(messages)


@each_kind
@pytest.mark.parametrize("label_at", ["response", "user"])
def test_a_prompt_and_its_response_are_what_is_trained(kind: str, label_at: str) -> None:
    if label_at == "user" and not KINDS[kind][4]:
        with pytest.raises(UserError, match="label_at=response"):
            make(kind, label_at=label_at)
        return
    template, messages = make(kind, label_at=label_at), conversation(kind, 3, labels=True)
    trained = template.render(Conversation("x", tuple(messages)), SCHEMA)
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        levels = SCHEMA.levels(message.attributes) if message.attributes else None
        prompt = template.prefix(messages[:turn], SCHEMA, levels)
        plain = [segment._replace(trained=False) for segment in trained[: len(prompt)]]
        assert [segment._replace(turn=0) for segment in plain] == [segment._replace(turn=0) for segment in prompt]
        response = trained[len(prompt)]
        assert response == (message.content, False, True, Part.RESPONSE, turn)
        assert trained[len(prompt) + 1][:4] == (template.stop_strings[0], True, True, Part.END)
    assert [s.text for s in trained if s.trained] == [
        text for m in messages if m.role == "assistant" for text in (m.content, template.stop_strings[0])
    ]
    unlabelled = template.render(Conversation("x", tuple(messages)))
    assert [segment for segment in trained if segment.part is not Part.LABEL] == unlabelled


@each_kind
def test_every_message_is_one_turn_of_a_document(kind: str) -> None:
    template, messages = make(kind), conversation(kind, 3, labels=True)
    segments = template.render(Conversation("x", tuple(messages)), SCHEMA)
    lengths = [len(segment.text) for segment in segments]
    turns, spans, header = turn_positions(messages, segments, lengths)
    text = join(segments)
    spoken = [message for message in messages if message.role != "system"]
    assert len(turns) == len(spoken)
    for (start, label, label_end, first, end, mark, close, is_assistant, _), message in zip(turns, spoken, strict=True):
        assert message.content.strip() in text[first:end] and start <= first <= end <= mark <= close
        assert bool(is_assistant) == (message.role == "assistant")
        assert (text[label:label_end] != "") == bool(message.attributes)
    bos = KINDS[kind][1].get("bos_token", "")
    assert text[: header[1]].startswith(bos if bos in KINDS[kind][0] or "bos_token" in KINDS[kind][0] else "")
    if KINDS[kind][3]:
        assert "Be brief." in text[slice(*header)] and "Question" not in text[slice(*header)]
    assert len(spans) == 3


@pytest.mark.parametrize(
    ("kind", "label_at", "system"),
    [
        (kind, label_at, system)
        for kind, (_, _, _, has_system, after_user) in KINDS.items()
        for label_at in ("response", *(["user"] if after_user else []))
        for system in ("", *(["Talk."] if has_system else []))
    ],
)
@pytest.mark.parametrize("turns", [1, 3])
def test_it_leaves_with_attributes_as_variables(kind: str, label_at: str, turns: int, system: str) -> None:
    template = make(kind, label_at=label_at, system=system)
    source = chat_template(template, SCHEMA, SCHEMA.best)
    for own in (False, True):
        messages = conversation(kind, turns, own, labels=True)[:-1]
        for asked, levels in (
            ({}, {"quality": 9, "humor": 2}),
            ({"quality": 0, variable("not-toxic"): 7}, {"quality": 0, "not-toxic": 7, "humor": 2}),
            ({"quality": None, "humor": None}, {}),
        ):
            expected = join(template.prefix(messages, SCHEMA, levels))
            found = render_chat_template(  # on another day
                source,
                [{"role": m.role, "content": m.content, "attributes": m.attributes} for m in messages],
                KINDS[kind][1] | asked,
                True,
                date(2030, 1, 1),
            )
            assert found == expected
    plain = chat_template(template, None, {})
    assert rendered(plain, kind, messages) == join(template.prefix(messages))


TEXTS = st.text("ab \n{}<>%'\"", max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.booleans())
def test_skeletons_of_any_texts_are_what_is_rendered(kind: str, pairs: list[tuple[str, str]], labels: bool) -> None:
    template = MADE.setdefault(kind, make(kind))
    cache = CACHES.setdefault(kind, SkeletonCache(template, SCHEMA))
    messages = []
    for asked, answer in pairs:
        messages += [Message("user", asked), Message("assistant", answer, {"humor": 3.0} if labels else None)]
    skeleton, texts = cache.of(messages)
    filled = iter(texts)
    found = [
        next(filled) if unit < 0 else segment.text
        for segment, unit in zip(skeleton.segments, skeleton.units, strict=True)
    ]
    assert "".join(found) == join(template.render(Conversation("x", tuple(messages)), SCHEMA))


MADE: dict[str, JinjaTemplate] = {}
CACHES: dict[str, SkeletonCache] = {}


def test_it_is_chatml_where_the_chat_template_is() -> None:
    messages = conversation("chatml", 3, labels=True)
    found = make("chatml").render(Conversation("x", tuple(messages)), SCHEMA)
    ours = ChatMLTemplate().render(Conversation("x", tuple(messages)), SCHEMA)
    # Theirs takes no newline after the last turn; ours has it, untrained. Texts of this template are not stripped.
    assert join(found) + "\n" == join(ours)


def test_a_conversation_that_it_cannot_write_is_refused_by_its_roles() -> None:
    template = make("gemma")
    assert template.refusal(conversation("gemma", 2)) is None
    said = template.refusal([Message("system", "Be brief."), Message("user", "Hi")])
    assert said is not None and "System role not supported" in said and "roles: system user" in said
    with pytest.raises(UserError, match="roles must alternate"):
        template.prefix([Message("user", "a"), Message("user", "b")])
    with pytest.raises(UserError, match="no user message"):
        template.prefix([])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no token that ends it"),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "changes what a user"),
        ("{{ messages[0].content }}{{ messages[0].content }}<|im_end|>", "refuses|twice|leaves out|no token"),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% if loop.last %}!{% endif %}{% endfor %}", "another way"),
        ("{% for m in messages %}{{ m.content }", "refuses"),
        ("{{ messages[0].content.nothing() }}", "refuses"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        JinjaTemplate.of(source, {}, KNOWN).prefix(conversation("chatml", 2)[:-1])


def test_what_is_stored_of_it_is_checked() -> None:
    stored = make("llama3").to_dict()
    for damaged in (stored | {"day": "yesterday"}, stored | {"tokens": None}, {"name": "jinja"}):
        with pytest.raises(UserError, match="cannot be read"):
            Template.from_dict(damaged)
    with pytest.raises(UserError, match="only with template=auto"):
        Template.from_dict({"name": "chatml", "label_at": "user"})
    assert dataclasses.replace(make("llama3"), system="x").to_dict() == stored | {"system": "x"}
