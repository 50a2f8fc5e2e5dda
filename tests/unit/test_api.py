"""Request bodies: each field that openai's types and vLLM's API have is accepted at null and at neutral values, and
refused by its name at others.
"""

from __future__ import annotations

import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionMessage,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_create_params

from steerlm_megatron.serve import neutral
from steerlm_megatron.serve.api import ChatBody, ChatMessage, CompletionBody, StreamOptions, TextPart, read
from steerlm_megatron.serve.errors import ApiError

USER = {"role": "user", "content": "hello"}
CHAT: dict[str, Any] = {"messages": [USER]}
COMPLETION: dict[str, Any] = {"prompt": "hello"}
# Parameters that vLLM's API has besides OpenAI's, each at its default.
VLLM: dict[str, Any] = {
    "use_beam_search": False, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "watermarking": None,
    "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False, "ignore_eos": False,
    "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None, "truncation_side": None, "prompt_logprobs": None, "logprob_token_ids": None,
    "allowed_token_ids": None, "bad_words": [], "echo": False, "response_format": None, "structured_outputs": None,
    "priority": 0, "request_id": "0123", "session_id": None, "return_tokens_as_token_ids": None,
    "return_token_ids": None, "routed_experts_prompt_start": 0, "return_token_offsets": False,
    "return_mm_kwargs": True, "cache_salt": None, "kv_transfer_params": None, "ec_transfer_params": None,
    "vllm_xargs": None, "repetition_detection": None, "thinking_token_budget": None, "stream_interval": None,
    "mm_processor_kwargs": None, "guided_json": None, "guided_regex": None, "guided_choice": None,
    "guided_grammar": None, "guided_decoding_backend": None, "guided_whitespace_pattern": None,
    "logits_processors": None,
}  # fmt: skip
VLLM_CHAT: dict[str, Any] = {
    **VLLM, "include_reasoning": True, "add_generation_prompt": True, "continue_final_message": False,
    "add_special_tokens": False, "documents": None, "chat_template": None, "chat_template_kwargs": None,
    "media_io_kwargs": None, "return_prompt_text": None,
}  # fmt: skip
VLLM_COMPLETION: dict[str, Any] = {**VLLM, "add_special_tokens": True, "prompt_embeds": None}
# Values that openai's types allow and that ask for something that this server cannot do.
ASKS: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "alloy"},
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 1},
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -1,
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "service_tier": "priority",
    "store": True,
    "suffix": "the end",
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_logprobs": 3,
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
    "echo": True,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "stop_token_ids": [5],
    "use_beam_search": True,
    "structured_outputs": {"json": {}},
    "truncate_prompt_tokens": 5,
    "chat_template": "{{ x }}",
    "continue_final_message": True,
    "documents": [{"title": "a"}],
    "allowed_token_ids": [1],
    "min_tokens": 3,
    "bad_words": ["x"],
    "prompt_logprobs": 1,
    "priority": 3,
}


def fields(*types: Any) -> list[str]:
    return sorted({name for kind in types for name in typing.get_type_hints(kind)})


CHAT_FIELDS = fields(
    chat_create_params.CompletionCreateParamsNonStreaming, chat_create_params.CompletionCreateParamsStreaming
)
COMPLETION_FIELDS = fields(
    completion_create_params.CompletionCreateParamsNonStreaming,
    completion_create_params.CompletionCreateParamsStreaming,
)
MESSAGES = {
    "assistant": ChatCompletionAssistantMessageParam,
    "user": ChatCompletionUserMessageParam,
    "system": ChatCompletionSystemMessageParam,
    "developer": ChatCompletionDeveloperMessageParam,
}


def default(kind: type[ChatBody] | type[CompletionBody]) -> Any:
    return read(ChatBody, CHAT) if kind is ChatBody else read(CompletionBody, COMPLETION)


def accepts(kind: Any, base: dict[str, Any], **more: Any) -> None:
    assert read(kind, {**base, **more}) == default(kind)


@pytest.mark.parametrize("name", CHAT_FIELDS)
def test_each_field_of_a_chat_may_be_null(name: str) -> None:
    if name == "messages":
        with pytest.raises(ApiError, match="missing parameter: messages"):
            read(ChatBody, {"messages": None})
    else:
        accepts(ChatBody, CHAT, **{name: None})
        assert name in ChatBody.model_fields or name in neutral.CHAT, "known by name"


@pytest.mark.parametrize("name", COMPLETION_FIELDS)
def test_each_field_of_a_completion_may_be_null(name: str) -> None:
    if name == "prompt":
        with pytest.raises(ApiError, match="missing parameter: prompt"):
            read(CompletionBody, {"prompt": None})
    else:
        accepts(CompletionBody, COMPLETION, **{name: None})
        assert name in CompletionBody.model_fields or name in neutral.COMPLETION, "known by name"


def test_all_of_them_at_once_and_nulls_inside() -> None:
    accepts(ChatBody, CHAT, **{name: None for name in CHAT_FIELDS if name != "messages"})
    accepts(ChatBody, CHAT, attributes=None, response_format={"type": "text", "json_schema": None})
    assert read(ChatBody, {**CHAT, "attributes": {"humor": None, "quality": 3}}).attributes == {"quality": 3}
    assert read(ChatBody, {**CHAT, "stream_options": {"include_usage": None}}).stream_options == StreamOptions()


@pytest.mark.parametrize(
    ("kind", "base", "values"), [(ChatBody, CHAT, VLLM_CHAT), (CompletionBody, COMPLETION, VLLM_COMPLETION)]
)
def test_the_defaults_of_vllm_are_accepted(kind: Any, base: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        read(kind, {**base, name: value})
        assert name in kind.model_fields or name in (neutral.CHAT if kind is ChatBody else neutral.COMPLETION)
    accepts(kind, base, **{name: value for name, value in values.items() if name != "top_k"})


@pytest.mark.parametrize(
    ("kind", "base", "table"), [(ChatBody, CHAT, neutral.CHAT), (CompletionBody, COMPLETION, neutral.COMPLETION)]
)
def test_each_value_that_asks_for_nothing_changes_nothing(kind: Any, base: dict[str, Any], table: Any) -> None:
    for name, values in table.items():
        assert name not in kind.model_fields
        for value in ("a label", {"of": "the client"}) if isinstance(values, neutral._Label) else values:
            accepts(kind, base, **{name: value})
            if isinstance(value, int) and not isinstance(value, bool):
                accepts(kind, base, **{name: float(value)})
                with pytest.raises(ApiError, match=name):  # true is not 1
                    read(kind, {**base, name: bool(value)})


@pytest.mark.parametrize("name", ASKS)
def test_a_value_that_asks_for_something_is_refused_by_name(name: str) -> None:
    for kind, base, table in ((ChatBody, CHAT, neutral.CHAT), (CompletionBody, COMPLETION, neutral.COMPLETION)):
        if name in table:
            with pytest.raises(ApiError) as refused:
                read(kind, {**base, name: ASKS[name]})  # type: ignore[type-var]
            assert refused.value.status == 400 and refused.value.body["error"]["param"] == name
            assert f"{name}=" in str(refused.value)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
NAMES = sorted({*CHAT_FIELDS, *COMPLETION_FIELDS, *VLLM_CHAT, *VLLM_COMPLETION, "attributes", "best_of", "colour"})


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([ChatBody, CompletionBody]), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_any_json_is_understood_or_refused_by_name(kind: Any, given_: dict[str, Any]) -> None:
    """An accepted parameter is a field of the body or has a neutral value, so nothing is silently ignored."""
    table = neutral.CHAT if kind is ChatBody else neutral.COMPLETION
    try:
        body = read(kind, {**(CHAT if kind is ChatBody else COMPLETION), **given_})
    except ApiError as error:
        assert error.status == 400
        assert any(name in str(error) for name in (*given_, "prompt", "messages"))
        error.body["error"]["message"].encode()
        return
    for name, value in given_.items():
        legal = table.get(name, ())
        assert (
            value is None
            or name in body.model_fields_set
            or isinstance(legal, neutral._Label)
            or any(neutral.same_json(neutral.without_nulls(value), one) for one in legal)
        )


@pytest.mark.parametrize("role", MESSAGES)
def test_each_field_of_a_message_may_be_null(role: str) -> None:
    for name in fields(MESSAGES[role]):
        if name in ("role", "content"):
            continue
        message = {"role": role, "content": "x", name: None}
        assert read(ChatBody, {"messages": [message]}).messages[0].text() == "x"
        if role == "assistant":
            assert name in ChatMessage.model_fields or name in neutral.MESSAGE, "known by name"
    speaker = read(ChatBody, {"messages": [{"role": role, "content": "x"}]}).messages[0].speaker
    assert speaker == ("system" if role == "developer" else role)


def test_an_answer_is_a_message() -> None:
    sent = {"role": "assistant", "content": "Hi.", "refusal": None}
    answer = ChatCompletionMessage.model_validate(sent)
    others = {"tool_calls": [], "annotations": [], "reasoning_content": None, "provider_specific_fields": None}
    for message in (sent, answer.model_dump(), answer.model_dump(exclude_none=True), {**sent, **others}):
        assert read(ChatBody, {"messages": [USER, message, USER]}).messages[1].text() == "Hi."
    assert read(ChatBody, {"messages": [USER, {"role": "assistant", "content": None}, USER]}).messages[1].text() == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("refusal", "no"),
        ("tool_calls", [{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}]),
        ("function_call", {"name": "f", "arguments": ""}),
        ("audio", {"id": "1"}),
        ("annotations", [{"type": "url_citation"}]),
    ],
)
def test_what_a_message_cannot_have_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ApiError) as refused:
        read(ChatBody, {"messages": [USER, {"role": "assistant", "content": "x", key: value}, USER]})
    assert refused.value.body["error"]["param"] == f"messages.1.{key}"


def test_parts_and_stream_options() -> None:
    for kind, table, model in (
        (ChatCompletionContentPartTextParam, neutral.TEXT_PART, TextPart),
        (ChatCompletionStreamOptionsParam, neutral.STREAM_OPTIONS, StreamOptions),
    ):
        assert set(fields(kind)) <= {*table, *model.model_fields}
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert read(ChatBody, {"messages": [{"role": "user", "content": parts}]}).messages[0].text() == "ab"
    image = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(ApiError, match=r"messages\.0\.content\.1"):
        read(ChatBody, {"messages": [{"role": "user", "content": image}]})
    with pytest.raises(ApiError, match=r"stream_options\.include_obfuscation=True"):
        read(ChatBody, {**CHAT, "stream": True, "stream_options": {"include_obfuscation": True}})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"stop": ["x"] * 17}, "has 17 strings; at most 16"),
        ({"stop": ["x", ""]}, "non-empty"),
        ({"stop": "x" * 2000}, "string of 2000 characters"),
        ({"stop": ["x", 3]}, "must be a string or a list of strings"),
        ({"stop": [None]}, "must be a string or a list of strings"),
        ({"prompt": []}, "prompt=[]: is empty"),
        ({"prompt": 3}, "must be a string"),
        ({"prompt": ["a", 3]}, "all strings"),
        ({"prompt": [[1], "a"]}, "all lists of token ids"),
        ({"prompt": [True]}, "all token ids"),
        ({"prompt": [1.5]}, "all token ids"),
        ({"logprobs": False}, "logprobs=False: must be a number"),
        ({"n": True}, "n=True: must be a number"),
        ({"n": 129}, "n=129"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 10**400}, "temperature="),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"seed": 2**63}, "seed="),
        ({"max_tokens": 2**63}, "max_tokens="),
        ({"max_tokens": 10**4000}, "max_tokens="),
    ],
)
def test_messages_name_their_own_rule(body: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError) as refused:
        read(CompletionBody, {**COMPLETION, **body})
    assert words in str(refused.value) and len(str(refused.value)) < 400


def test_seeds_of_the_whole_range() -> None:
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        assert 0 <= read(ChatBody, {**CHAT, "seed": seed}).seed_from(5) < 2**63
    assert read(ChatBody, {**CHAT, "seed": 7}).seed_from(5) == 7 and read(ChatBody, CHAT).seed_from(5) == 5


def test_a_lone_surrogate_is_told_in_utf8() -> None:
    for body in ({"\ud800": 1}, {"model": 5, "prompt": "\ud800"}):
        with pytest.raises(ApiError) as refused:
            read(CompletionBody, {**COMPLETION, **body})
        str(refused.value.body["error"]).encode()
