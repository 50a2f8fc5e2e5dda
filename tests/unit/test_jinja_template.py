"""A model's own chat template as a prompt template: its text, its segments, and its way out again."""

from __future__ import annotations

import dataclasses
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.data.views import View, build_documents, make_sample, turn_positions
from steerlm_megatron.data.write.skeletons import SkeletonCache
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer import jinja_rendering
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.chat_template import chat_template, variable
from steerlm_megatron.steer.jinja_sandbox import render_chat_template
from steerlm_megatron.steer.jinja_template import JinjaTemplate
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import ChatMLTemplate, Part, Template, join
from tests.helpers import corpora

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
GEMMA3 = (  # a system text stands in the first user's text, with its blanks; a user's text has none around it
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set loop_messages = messages -%}"
    "{%- endif -%}{%- for message in loop_messages -%}{{ '<start_of_turn>' + ('model' if message['role'] == "
    "'assistant' else message['role']) + '\n' + (prefix if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
HALVES = (  # a system text loses the blanks behind it, a user's text those before it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{{ message['content'].rstrip() if "
    "message['role'] == 'system' else message['content'].lstrip() if message['role'] == 'user' else "
    "message['content'] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
LLAMA2 = (  # a blank stands before a response of the history, and not where one is asked for
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + "
    "'\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OPENCHAT = (
    "{{ bos_token }}{% for message in messages %}{{ 'GPT4 Correct ' + message['role'].title() + ': ' + "
    "message['content'] + '<|end_of_turn|>'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
MISTRAL2 = (  # a system text stands before the last question, which changes a history
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + "
    "'[/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content']|trim + eos_token }}{%- endif %}{%- endfor %}"
)
EMPTY = (  # an empty system text counts as none
    "{% for m in messages %}{% if loop.first and m.role == 'system' and m.content %}{{ '<s>' + (m.content + '\n' + "
    "messages[1].content) | trim + '<|im_end|>' }}{% elif m.role == 'user' and (loop.index0 != 1 or "
    "messages[0].role != 'system' or not messages[0].content) %}{{ '<s>' + m.content | trim + '<|im_end|>' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
HELD = (  # the prefix follows a control string
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>' + m.content + '<|im_end|>' }}{% else %}"
    "{{ '\n  ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
PLAIN = {"bos_token": "<s>", "eos_token": "</s>"}
KNOWN = [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "<s>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|end_of_turn|>",
]  # fmt: skip
# name: source, special tokens, stop string, whether there are system texts, whether a label may follow a user's text
KINDS: dict[str, tuple[str, dict[str, str], str, bool, bool]] = {
    "llama3": (LLAMA3, HEADERS, "<|eot_id|>", True, True),
    "llama3.1": (LLAMA31, HEADERS, "<|eot_id|>", True, True),
    "mistral": (MISTRAL, PLAIN, "</s>", False, False),
    "gemma": (GEMMA, {"bos_token": "<bos>"}, "<end_of_turn>", False, True),
    "zephyr": (ZEPHYR, PLAIN, "</s>", True, True),
    "qwen3": (QWEN3, {}, "<|im_end|>", True, True),
    "gemma3": (GEMMA3, {"bos_token": "<bos>"}, "<end_of_turn>", True, True),
    "halves": (HALVES, {}, "<|im_end|>", True, True),
    "vicuna": (VICUNA, PLAIN, "</s>", True, False),
    "chatml": (CHATML, {}, "<|im_end|>", True, True),
    "llama2": (LLAMA2, PLAIN, "</s>", True, False),
    "openchat": (OPENCHAT, PLAIN, "<|end_of_turn|>", True, True),
    "held": (HELD, {}, "</s>", False, True),
    "mistral2": (MISTRAL2, PLAIN, "</s>", False, False),
    "empty": (EMPTY, {}, "</s>", True, False),
}
PREFIXES = {"llama2": " ", "openchat": " ", "held": "\n  ", "mistral2": " "}
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
    assert template.stop_strings == (KINDS[kind][2],)
    assert template.response_suffix == (" " if kind == "llama2" else "")
    assert template.response_prefix == PREFIXES.get(kind, "")
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
    closed = [text for text in (template.response_suffix, template.stop_strings[0]) if text]
    texts: list[str] = []
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        levels = SCHEMA.levels(message.attributes) if message.attributes else None
        prompt = template.prefix(messages[:turn], SCHEMA, levels)
        plain = [segment._replace(trained=False) for segment in trained[: len(prompt)]]
        assert [segment._replace(turn=0) for segment in plain] == [segment._replace(turn=0) for segment in prompt]
        before = template.response_prefix  # a part of the response's first token
        closing = [(text, text == template.stop_strings[0], True, Part.END) for text in closed]
        assert trained[len(prompt)] == (before + message.content, False, True, Part.RESPONSE, turn)
        assert [segment[:4] for segment in trained[len(prompt) + 1 :][: len(closed)]] == closing
        texts += [before + message.content, *closed]
    assert [s.text for s in trained if s.trained] == texts
    unlabelled = template.render(Conversation("x", tuple(messages)))
    assert [segment for segment in trained if segment.part is not Part.LABEL] == unlabelled


@pytest.mark.parametrize("view", ["sft", "lm", "ap"])
@pytest.mark.parametrize("kind", [*PREFIXES, "llama3", "chatml"])
def test_labels_that_a_view_leaves_out_leave_the_unlabelled_document(kind: str, view: View) -> None:
    """The blank before a response is a part of its first token, with a label line and without."""
    template, messages = make(kind), conversation(kind, 3, labels=True)
    bare = [Message(message.role, message.content) for message in messages]
    tokenizer = corpora.tokenizer("hf_byte_level", template.control_strings)
    documents = build_documents(
        [Conversation("x", tuple(messages)), Conversation("x", tuple(bare))], tokenizer, template, SCHEMA
    )
    marker = tokenizer.control_id(template.label_marker)
    found, expected = (make_sample(one, view, marker_id=marker, scored="all") for one in documents)
    assert found is not None and expected is not None
    assert found.tokens_T.tolist() == expected.tokens_T.tolist()
    assert found.loss_mask_T.tolist() == expected.loss_mask_T.tolist()


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
    if kind in ("gemma3", "llama2", "empty"):
        assert "Be brief." in text[turns[0][3] : turns[0][4]]
    elif KINDS[kind][3]:
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


ASKED = st.text(" \n\tab", max_size=6).map(lambda text: text + "x" + text[::-1]) | st.sampled_from(
    [
        "<|im_end|>\n<|im_start|>system\nx",
        "</think> <think>",
        "\ue0000\ue001",
        " {{ 1 }} {% endfor %} ",
        "\0" + "1\0",
        "<b>",
    ]
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.none() | st.just("") | ASKED, st.lists(ASKED, min_size=1, max_size=3))
def test_any_texts_of_users_and_systems_are_as_the_chat_template_writes_them(
    kind: str, system: str | None, asked: list[str]
) -> None:
    template = MADE.setdefault(kind, make(kind))
    messages = [Message("system", system)] if system is not None and KINDS[kind][3] else []
    for text in asked:
        messages += [Message("user", text), Message("assistant", "Yes.")]
    segments = template.prefix(messages[:-1])
    assert join(segments) == rendered(KINDS[kind][0], kind, messages[:-1])
    assert all(segment.text in template.control_strings for segment in segments if segment.control)


MADE: dict[str, JinjaTemplate] = {}
CACHES: dict[str, SkeletonCache] = {}


@pytest.mark.parametrize(
    "answer", ["<think>\nHm.\n</think>\n\nYes.", "<think>\n\n</think>\n\nYes.", "No </think> Yes."]
)
def test_prompts_leave_out_earlier_thoughts_and_training_keeps_them(answer: str) -> None:
    template = make("qwen3")
    messages = [Message("user", "One?"), Message("assistant", answer), Message("user", "Two?")]
    prompt = join(template.prefix(messages))
    assert prompt == rendered(QWEN3, "qwen3", messages) and "Yes." in prompt and answer not in prompt
    trained = template.render(Conversation("x", (*messages, Message("assistant", answer))))
    assert [s.text for s in trained if s.part is Part.RESPONSE and s.trained] == [answer, answer]


@each_kind
@pytest.mark.parametrize("answer", ["Yes.", " Yes.\n", "", "{{ x }} <|im_end|>", "<b>"])
def test_an_earlier_response_stays_as_it_was_generated(kind: str, answer: str) -> None:
    template = make(kind)
    messages = [Message("user", "One?"), Message("assistant", answer), Message("user", "Two?")]
    trained = template.render(Conversation("x", tuple(messages)))
    prompt = template.prefix(messages)
    assert [s.text for s in prompt if s.part is Part.RESPONSE] == [PREFIXES.get(kind, "") + answer]
    ends = 1 + max(at for at, s in enumerate(trained) if s.part is Part.END)
    assert [s._replace(trained=False) for s in trained[:ends]] == prompt[:ends]


def test_tokens_of_a_text_are_no_control_strings_of_a_format() -> None:
    """The tokenizers of some models have tokens for pieces of HTML, which a user may write."""
    template = JinjaTemplate.of(GEMMA, {"bos_token": "<bos>"}, [*KNOWN, "<b>", "</b>", "2", "\n\n"], day=DAY)
    assert set(template.control_strings) == {"<bos>", "<start_of_turn>", "<end_of_turn>", "<extra_id_2>"}


def test_a_system_text_is_refused_at_once_where_there_is_none() -> None:
    with pytest.raises(UserError, match=r"template.system='Talk.' cannot be used.*System role not supported"):
        make("gemma", system="Talk.")


def test_a_long_conversation_is_rendered_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    template = make("llama3")
    messages = [Message(("user", "assistant")[turn % 2], "x") for turn in range(501)]
    sizes: list[int] = []

    def counted(source: str, found: list[Any], *rest: Any) -> str:
        sizes.append(len(found))
        return render_chat_template(source, found, *rest)

    monkeypatch.setattr(jinja_rendering, "render_chat_template", counted)
    assert join(template.prefix(messages)) == rendered(LLAMA3, "llama3", messages)
    assert sum(sizes) < 20 * len(messages)
    with pytest.raises(UserError, match=r"roles: system user .* and \d+ more"):
        make("gemma").prefix([Message("system", "x"), *messages])


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
