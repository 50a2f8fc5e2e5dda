"""Whether another system's tokenizer makes of a prompt the tokens that ours makes.

Owns: the prompts that are tried. Does not own: formats (``steer``), tokenizers (``data/text``). Our tokens are those of
pieces that are encoded one by one; another system renders a chat template and encodes the text at once. The two differ
where a token would span two pieces, or where a tokenizer puts something before a text that ours takes away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steerlm_megatron.data.text.text_losses import SAMPLE
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import Template, join

_SYSTEM = Message("system", "Answer briefly.")
_TURNS = (
    Message("user", "What is 2 + 2?\nShow your work."),
    Message("assistant", "It is 4."),
    Message("user", "Thanks! And in 1984?"),
)
PROMPTS: tuple[tuple[Message, ...], ...] = (_TURNS[:1], _TURNS, (_SYSTEM, *_TURNS))


def prompts_for(template: Template) -> list[tuple[Message, ...]]:
    """Return the tried prompts that the template can write."""
    return [messages for messages in PROMPTS if template.refusal(messages) is None]


def levels_to_try(schema: AttributeSchema | None) -> list[dict[str, int]]:
    """Return what the label lines of the tried prompts ask for: the best levels, and the lowest."""
    if schema is None or not schema.seen:
        return [{}]
    return [dict(schema.complete({})), dict.fromkeys(schema.seen, 0)]


def prompt_ids(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    schema: AttributeSchema | None,
    levels: Mapping[str, int],
) -> list[int]:
    """Return the token ids of a prompt, as training and ``generate`` make them."""
    return list(tokenizer.encode_segments(template.prefix(messages, schema, levels))[0])


def exported_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` that encodes as ours does: without what would be put before or after a
    text, and with the tokens that we added at the ids that the model knows them by.
    """
    content = tokenizer.plain_json()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    controls = tokenizer.controls
    added = [{"id": i, "content": text, **flags, "special": text in controls} for text, i in tokenizer.added.items()]
    content["added_tokens"] = sorted([*(content.get("added_tokens") or []), *added], key=lambda token: int(token["id"]))
    content["truncation"] = content["padding"] = None
    return content


def difference(
    tokenizer: Tokenizer,
    template: Template,
    schema: AttributeSchema | None,
    theirs: Mapping[str, Any],
    written: Callable[[Sequence[Message]], str | None] | None = None,
) -> str | None:
    """Return where the tokenizer of ``theirs``, the content of a ``tokenizer.json``, makes other tokens of a prompt
    than ours of its pieces; None where all prompts have the same tokens.

    Args:
        written: what the other system writes for messages, where it is not the text of our pieces.
    """
    import tokenizers

    other = tokenizers.Tokenizer.from_str(json.dumps(theirs))
    other.no_truncation()
    other.no_padding()
    for messages in prompts_for(template):
        for levels in levels_to_try(schema):
            text = join(template.prefix(messages, schema, levels)) if written is None else written(messages) or ""
            found = other.encode(text, add_special_tokens=False).ids
            if said := first_difference(found, prompt_ids(tokenizer, template, messages, schema, levels), tokenizer):
                return said
    return None


def text_difference(tokenizer: Tokenizer, theirs: Mapping[str, Any]) -> str | None:
    """Return where the tokenizer of ``theirs`` makes other tokens of a text than ours; None where both are equal on
    what texts are made of. The sign for a blank is left out, of which ``tokenizers`` always makes a blank.
    """
    import tokenizers

    other = tokenizers.Tokenizer.from_str(json.dumps(theirs))
    text = SAMPLE.replace("\u2581", "")
    return first_difference(other.encode(text, add_special_tokens=False).ids, tokenizer.encode(text), tokenizer)


def first_difference(found: Sequence[int], expected: Sequence[int], tokenizer: Tokenizer) -> str | None:
    """Return the first tokens that differ, in words; None for equal ones."""
    if list(found) == list(expected):
        return None
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
    before = tokenizer.decode(list(expected[max(0, at - 4) : at]))
    return f"after {before!r} {list(found[at : at + 3])} in the place of {list(expected[at : at + 3])}"
