"""A chat template that opens thoughts is trained without them."""

from __future__ import annotations

from datetime import date

import pytest

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.jinja_sandbox import render_chat_template
from steerlm_megatron.steer.jinja_template import JinjaTemplate
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import join
from steerlm_megatron.steer.thoughts import opened_thoughts, without_opened_thoughts

# Of the kind of DeepSeek-R1's.
REASONS = (
    "{{ bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}{%- else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}\n"
)
# A word stands before a response of the history alone.
ANOTHER = (
    "{% for m in messages %}{{ 'GPT4 ' + m.role + ': so ' + m.content + '<|eos|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 assistant:' }}{% endif %}"
)
KNOWN = ("<s>", "<|User|>", "<|Assistant|>", "<|eos|>")
TURNS = (Message("user", "Hi."), Message("assistant", "Hello!"), Message("user", "Who?"))


def test_it_is_told_what_opens_thoughts() -> None:
    assert opened_thoughts("<|Assistant|><think>\n") == "<think>\n"
    assert opened_thoughts("<think>\n\n</think>\n\n") == opened_thoughts("Hi <think> x") == ""


def test_prompts_are_written_as_the_history_is() -> None:
    with pytest.raises(
        UserError, match=r"opens a response with '<think>\\n' where it asks for one, and with '' in the"
    ):
        JinjaTemplate.of(REASONS, {"bos_token": "<s>"}, KNOWN)
    source = without_opened_thoughts(REASONS, "<think>\n")
    template = JinjaTemplate.of(source, {"bos_token": "<s>"}, KNOWN)
    text = "<s><|User|>Hi.<|Assistant|>Hello!<|eos|><|User|>Who?<|Assistant|>"
    assert join(template.prefix(TURNS)) == text
    plain = [{"role": m.role, "content": m.content} for m in TURNS]
    for asks, wanted in ((True, text), (False, text.removesuffix("<|Assistant|>"))):
        assert render_chat_template(source, plain, {"bos_token": "<s>"}, asks, date(2025, 1, 1)) == wanted


def test_another_opening_is_refused_with_both() -> None:
    with pytest.raises(
        UserError, match="opens a response with '' where it asks for one, and with ' so ' in the history; tr"
    ):
        JinjaTemplate.of(ANOTHER, {}, KNOWN)
