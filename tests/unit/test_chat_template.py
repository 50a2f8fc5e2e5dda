"""A chat template renders what our template does, by Jinja alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.chat_template import chat_template
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import TEMPLATES, Template, join

SCHEMA = AttributeSchema("own", ("quality", "not-toxic", "humor"), 9, "quality", {"quality": 9, "humor": 2})
SYSTEMS = ("", "Be kind.", 'Say "no" to {{ braces }}.')


def refuse(message: str) -> None:
    raise TemplateError(message)


def rendered(source: str, messages: list[Message], **more: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    plain = [{"role": m.role, "content": m.content} | ({"attributes": m.attributes} if m.attributes else {})
             for m in messages]  # fmt: skip
    return environment.from_string(source).render(messages=plain, **more)


def conversation(turns: int, system: str | None) -> list[Message]:
    found = [Message("system", system)] if system is not None else []
    for turn in range(turns):
        found.append(Message("user", f"Question {turn}?\nIn two lines."))
        found.append(
            Message("assistant", f"Answer {turn}.", {"humor": 2.5, "quality": float(turn)} if turn % 2 else None)
        )
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("own", [None, "Talk."])
@pytest.mark.parametrize("default", SYSTEMS)
def test_prompts_are_ours(name: str, turns: int, own: str | None, default: str) -> None:
    template = Template.from_config({"name": name, "system": default})
    messages = conversation(turns, own)
    source = chat_template(template, SCHEMA, SCHEMA.best)
    for asked, levels in (
        ({}, {"quality": 9, "humor": 2}),
        ({"quality": 0, "not_toxic": 7}, {"quality": 0, "not-toxic": 7, "humor": 2}),
        ({"quality": None, "humor": None}, {}),
    ):
        expected = join(template.prefix(messages[:-1], SCHEMA, levels))
        assert rendered(source, messages[:-1], add_generation_prompt=True, **asked) == expected
    assert rendered(source, messages) == join(template.render(Conversation("id", tuple(messages)), SCHEMA))
    plain = chat_template(template, None, {})
    assert rendered(plain, messages[:-1], add_generation_prompt=True) == join(template.prefix(messages[:-1]))


def test_every_attribute_has_a_variable_of_its_own() -> None:
    for names in (("a-b", "a.b"), ("messages", "b"), ("not", "b"), ("None", "b"), ("tokenize", "b")):
        with pytest.raises(UserError, match="a variable of its own"):
            chat_template(Template.from_config({"name": "steerlm"}), AttributeSchema("own", names, 4, names[0]), {})


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_no_prompt_has_is_refused(name: str) -> None:
    source = chat_template(Template.from_config({"name": name}), SCHEMA, SCHEMA.best)
    user = Message("user", "Hi.")
    for level in (10, -1, "much"):
        with pytest.raises(TemplateError, match="quality must be a number from 0 to 9"):
            rendered(source, [user], add_generation_prompt=True, quality=level)
    assert "quality:3" in rendered(source, [user], add_generation_prompt=True, quality="3")
    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = refuse
    with pytest.raises(TemplateError, match="user or assistant"):
        environment.from_string(source).render(messages=[{"role": "tool", "content": "42"}])


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_asks_little_of_a_jinja(name: str) -> None:
    """Programs in other languages have a Jinja of their own: llama.cpp's has no filter ``round``."""
    source = chat_template(Template.from_config({"name": name}), SCHEMA, {})
    assert set(re.findall(r" \| (\w+)", source)) == {"float", "int", "string"}
    asked = conversation(1, None)[:1]
    levels = {0: 0, 0.5: 0, 1.5: 2, 2.5: 2, 2.51: 3, 3.5: 4, -0.5: 0, 9.4: 9, "7": 7}
    for value, level in levels.items():
        found = rendered(source, asked, add_generation_prompt=True, quality=value)
        assert f"quality:{level}\n" in found, value
        assert isinstance(value, str) or value < 0 or SCHEMA.levels({"quality": value}) == {"quality": level}
    for value in (-0.51, 9.51, -1, 10, "x"):
        with pytest.raises(TemplateError, match="quality must be a number from 0 to 9"):
            rendered(source, asked, add_generation_prompt=True, quality=value)
