"""A chat template that writes the blanks which a tokenizer puts before texts."""

from __future__ import annotations

from datetime import date

import pytest

from steerlm_megatron.data.text.hugging_face import prefix_rule
from steerlm_megatron.steer.jinja_sandbox import render_chat_template
from steerlm_megatron.steer.prefix_blanks import ALWAYS, FIRST, UNLESS_BLANK, are_apart, with_blanks

CONTROLS = ("<s>", "</s>", "<|user|>")
WRITES = "{% for m in messages %}{{ m.content }}{% endfor %}\n"


@pytest.mark.parametrize(
    ("text", "always", "unless_blank", "first"),
    [
        ("a<s>b</s>", " a<s> b</s>", " a<s> b</s>", " a<s>b</s>"),
        ("<s><|user|>\nb</s>", "<s><|user|> \nb</s>", "<s><|user|> \nb</s>", "<s><|user|>\nb</s>"),
        (" a<s> b", "  a<s>  b", " a<s> b", " a<s> b"),
        ("<s>\n\n", "<s> \n\n", "<s> \n\n", "<s>\n\n"),
        ("", "", "", ""),
    ],
)
def test_blanks_stand_before_each_stretch_of_text(text: str, always: str, unless_blank: str, first: str) -> None:
    for rule, wanted in ((ALWAYS, always), (UNLESS_BLANK, unless_blank), (FIRST, first)):
        source = with_blanks(WRITES, CONTROLS, rule)
        messages = [{"role": "user", "content": text}]
        assert render_chat_template(source, messages, {}, False, date(2025, 1, 1)) == wanted, rule


def test_strings_that_hold_each_other_are_told() -> None:
    assert are_apart(CONTROLS) and not are_apart(("<s>", "<s>x"))


def test_the_rule_is_read_of_the_tokenizer() -> None:
    def raw(normalizer: object = None, pre: object = None) -> dict[str, object]:
        return {"normalizer": normalizer, "pre_tokenizer": pre}

    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}
    assert prefix_rule(raw(prepend)) == ALWAYS
    for scheme, rule in (("always", UNLESS_BLANK), ("first", FIRST), ("never", None)):
        assert prefix_rule(raw(pre={"type": "Metaspace", "prepend_scheme": scheme})) == rule
    assert prefix_rule(raw(pre={"type": "Metaspace", "add_prefix_space": True})) == UNLESS_BLANK
    assert prefix_rule(raw(pre={"type": "ByteLevel", "add_prefix_space": True})) == UNLESS_BLANK
    assert prefix_rule(raw(pre={"type": "ByteLevel", "add_prefix_space": False})) is None and prefix_rule({}) is None
