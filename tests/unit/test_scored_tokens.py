"""The chat template of a classifier writes what the attribute-prediction view has, and ends where values are read."""

from __future__ import annotations

import json

import pytest

from steerlm_megatron.data.views import build_documents, make_sample
from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.scored_tokens import (
    SCORED,
    scored_difference,
    scored_for,
    scored_ids,
    scored_segments,
)
from steerlm_megatron.steer.chat_template import scored_template
from steerlm_megatron.steer.jinja_sandbox import render_chat_template
from steerlm_megatron.steer.jinja_template import JinjaTemplate
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import TEMPLATES, Template, join
from tests.helpers import corpora
from tests.unit.test_jinja_template import DAY, GEMMA, HEADERS, LLAMA3, LLAMA31, MISTRAL

KNOWN = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>")
OWN = {
    name: JinjaTemplate.of(source, HEADERS, (*KNOWN, "<end_of_turn>"), day=DAY)
    for name, source in (("llama3", LLAMA3), ("llama3.1", LLAMA31), ("mistral", MISTRAL), ("gemma", GEMMA))
}
ALL: dict[str, Template] = {
    **{name: Template.from_config({"name": name, "system": "Be kind."}) for name in TEMPLATES},
    "steerlm, no system": Template.from_config({"name": "steerlm"}),
    **OWN,
}


def conversation(turns: int, system: str | None) -> list[Message]:
    found = [Message("system", system)] if system is not None else []
    for turn in range(turns):
        found.append(Message("user", f"Question {turn}?\nIn two lines."))
        found.append(
            Message("assistant", f"Answer {turn}.\n\n1. {{{{ braces }}}}", {"humor": 1.0} if turn % 2 else None)
        )
    return found


def rendered(template: Template, messages: list[Message]) -> str:
    tokens = template.tokens if isinstance(template, JinjaTemplate) else {}
    plain = [{"role": m.role, "content": m.content, "attributes": m.attributes} for m in messages]
    return render_chat_template(scored_template(template), plain, tokens, False, DAY)


@pytest.mark.parametrize("name", ALL)
def test_a_chat_template_writes_what_is_scored(name: str) -> None:
    template, tried = ALL[name], 0
    for turns in range(1, 8):
        for system in (None, "Talk."):
            messages = conversation(turns, system)
            if template.refusal(messages) is not None:
                continue
            text = rendered(template, messages)
            tried += 1
            assert text == join(scored_segments(template, messages))
            assert text.endswith(template.label_marker) and text.count(template.label_marker) == turns
    assert tried >= 7 and len(scored_for(template)) >= 2
    for wrong in (conversation(2, None)[:-1], []):
        with pytest.raises(UserError, match="the last message is the one that is scored"):
            rendered(template, wrong)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_the_view(name: str) -> None:
    """The view from which the model learns is the judge: markers after every response, and an end at the last."""
    template = ALL[name]
    tokenizer = corpora.tokenizer("trained", template.control_strings)
    marker = tokenizer.control_id(template.label_marker)
    for turns in (1, 3):
        for system in (None, "Talk."):
            messages = tuple(conversation(turns, system))
            (document,) = build_documents([Conversation("", messages)], tokenizer, template, None)
            sample = make_sample(document, "ap", marker_id=marker, scored="all")
            assert sample is not None and sample.pool_P[-1] == len(sample.tokens_T) - 1
            assert scored_ids(tokenizer, template, messages) == sample.tokens_T.tolist()
    open_end = (*conversation(1, None), Message("user", "And?"))
    (document,) = build_documents([Conversation("", open_end)], tokenizer, template, None)
    sample = make_sample(document, "ap", marker_id=marker, scored="all")
    assert sample is not None and scored_ids(tokenizer, template, open_end) == sample.tokens_T.tolist()


def test_other_tokens_are_seen() -> None:
    import tokenizers

    template = ALL["chatml"]
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = list(template.control_strings)
    raw.train_from_iterator(
        [message.content for messages in SCORED for message in messages],
        tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet),
    )
    from steerlm_megatron.data.text.hugging_face import HuggingFaceModel
    from steerlm_megatron.data.text.tokenizer import Tokenizer

    content = json.loads(raw.to_str())
    tokenizer = Tokenizer(HuggingFaceModel(raw.to_str().encode()), template.control_strings)
    assert scored_difference(tokenizer, template, content) is None
    assert scored_difference(tokenizer, template, {**content, "normalizer": {"type": "Lowercase"}}) is not None


def test_a_chat_template_that_closes_with_text_has_no_such_form() -> None:
    source = LLAMA3.replace("| trim +", "| trim + ' ~ ' +")
    template = JinjaTemplate.of(source, HEADERS, KNOWN, day=DAY)
    with pytest.raises(UserError, match="between a response and what closes it"):
        scored_template(template)
