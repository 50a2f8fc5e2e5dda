"""Read and write NeMo-Aligner's SteerLM JSONL.

In: ``{"system", "mask", "type", "conversations": [{"from", "value", "label"}]}``, the turns of speaker ``mask`` being
the user's; and its regression form, ``{"text": "<extra_id_0>System\\n…<extra_id_2>", "label": [9 floats]}`` (-100:
none). ``label`` is ``name:value`` joined by commas, on the schema's scale unless ``label_max`` says otherwise;
``lang:xx`` in it becomes the record's ``lang``; names outside the schema and labels on user turns are dropped and
counted. A user turn with literal ``<extra_id_1>`` markers (NeMo's HelpSteer2 files have them) is parsed into turns.

Out: ``to_nemo``. Values become integer levels; a reply of weight 0 keeps ``"weight": 0``, which NeMo ignores (it trains
every reply) and our reader takes back. ``from_nemo(to_nemo(c))`` is ``c`` with quantised values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.rows import Row
from data_tools.sources.base import (
    STEERLM_NAMES,
    Context,
    Converter,
    Found,
    brief,
    build,
    extras,
    list_of,
    parse_markers,
    roles_of,
    scaled,
    text_of,
    trained_by,
)
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import atomic_path
from steerlm_megatron.steer.attributes import AttributeSchema, nearest
from steerlm_megatron.steer.lines import OnError, Rejected, json_line
from steerlm_megatron.steer.records import Conversation, expand_paths, read_records

_USERS = ("user", "human", "prompter")
_MISSING = -100  # NeMo's value for "no label"


def convert_row(row: Row, where: str, context: Context) -> list[Found]:
    """Convert a row of either form."""
    if "conversations" not in row and "text" in row:
        return [Found(_regression(row, where, context))]
    extra = extras(row, "id", "system", "conversations")
    messages: list[dict[str, Any]] = []
    system = row.get("system")
    if system:
        messages.append({"role": "system", "content": system})
    turns = list_of(row, "conversations", where)
    roles = _roles(turns, row.get("mask"), where)
    for index, turn in enumerate(turns):
        here, value = f"{where}: conversations[{index}]", turn["value"]
        labels, lang = _labels(turn.get("label"), here, context)
        if lang is not None:
            extra.setdefault("lang", lang)
        role = roles[turn["from"]]
        if role == "user":
            context.notes["user_labels_dropped"] += bool(labels)
            messages += parse_markers(value, where, context)
            continue
        message: dict[str, Any] = {"role": role, "content": value}
        if role == "assistant":
            message |= trained_by(turn) | ({"attributes": labels} if labels else {})
        messages.append(message)
    return [Found(build(where, messages, context, extra, row.get("id")))]


def _roles(turns: list[dict[str, Any]], mask: Any, where: str) -> dict[str, str]:
    """Return the role of each speaker; ``mask`` names the user."""
    for index, turn in enumerate(turns):
        speaker, value = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or not isinstance(value, str):
            raise UserError(
                f"{where}: conversations[{index}] needs 'from' and 'value' as strings, found {brief(speaker)} and "
                f"{brief(value)}"
            )
    speakers = dict.fromkeys(turn["from"] for turn in turns)
    if mask and mask not in speakers:
        near = nearest(str(mask), tuple(speakers))
        raise UserError(f"{where}: mask {brief(mask)} names no speaker{near}; speakers: {' '.join(speakers) or 'none'}")
    return roles_of(speakers, [name for name in speakers if (name == mask if mask else name.lower() in _USERS)], where)


def _labels(label: Any, where: str, context: Context) -> tuple[dict[str, float], str | None]:
    """Return values on the schema's scale, and the language."""
    if not label:
        return {}, None
    if not isinstance(label, str):
        raise UserError(f"{where}.label={brief(label)} must be a string of name:value joined by commas")
    found: dict[str, float] = {}
    lang = None
    for part in label.split(","):
        name, colon, text = part.strip().partition(":")
        if name == "lang":
            lang = text
            continue
        try:
            number = float(text)
        except ValueError:
            colon = ""
        if not colon:
            raise UserError(f"{where}.label={brief(label)}: {part!r} is not of the form name:number")
        if number == _MISSING:
            continue
        value = scaled(number, name, context.label_max, where, context)
        if value is not None:
            found[name] = value
    return found, lang


def _regression(row: Row, where: str, context: Context) -> Conversation:
    """Convert the regression form, in which the last reply is labelled and earlier replies are context."""
    text, label = text_of(row, "text", where), row.get("label")
    body = text.removesuffix("<extra_id_2>").removesuffix("\n")
    messages = parse_markers(body, where, context)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: text={brief(text)} does not end with an assistant turn between <extra_id_1> markers")
    if not isinstance(label, list) or len(label) != len(STEERLM_NAMES):
        raise UserError(
            f"{where}: label={brief(label)} must be {len(STEERLM_NAMES)} numbers: {' '.join(STEERLM_NAMES)}"
        )
    values = {
        name: scaled(number, name, context.label_max, where, context)
        for name, number in zip(STEERLM_NAMES, label, strict=True)
        if number != _MISSING
    }
    messages[-1] |= {"weight": 1, "attributes": values}
    return build(where, messages, context, extras(row, "id", "text", "label"), row.get("id"))


# Out


def to_nemo(conversation: Conversation, schema: AttributeSchema) -> dict[str, Any]:
    """Return a record as NeMo-Aligner's SteerLM row. Raises ``UserError`` for attributes outside the schema."""
    system, turns = "", []
    for message in conversation.messages:
        if message.role == "system":
            system = message.content
            continue
        reply = message.role == "assistant"
        label = schema.format(schema.levels(message.attributes)) if reply else ""
        turn: dict[str, Any] = {
            "from": "Assistant" if reply else "User",
            "value": message.content,
            "label": label or None,
        }
        if message.weight == 0:
            turn["weight"] = 0
        turns.append(turn)
    keep = {key: value for key, value in conversation.extra.items() if key not in ("system", "conversations")}
    return {
        "type": "VALUE_TO_TEXT",
        **keep,
        "id": conversation.id,
        "system": system,
        "mask": "User",
        "conversations": turns,
    }


def export(
    inputs: Sequence[str], output_dir: str, schema: AttributeSchema, on_error: OnError = "error"
) -> dict[str, Any]:
    """Write ``<output_dir>/<name>.jsonl`` for every record file; each appears when it is complete.

    Returns:
        ``in``, ``out``, ``skipped`` (``rejected``), ``context_only_replies`` (weight 0, which NeMo would train), and
        ``files``; in = out + Σ skipped.
    """
    rejected: Rejected = []
    report: dict[str, Any] = {"source": "nemo", "in": 0, "out": 0, "context_only_replies": 0, "files": {}}
    for path in expand_paths(list(inputs)):
        name = os.path.basename(path)
        for suffix in (".zst", ".gz", ".jsonl", ".json"):
            name = name.removesuffix(suffix)
        target = Path(output_dir, f"{name}.jsonl")
        if str(target) in report["files"] or (target.exists() and target.samefile(path)):
            raise UserError(f"{path}: would be written to {target}, which another input needs; name another --output")
        count = 0
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            for conversation in read_records([path], schema, on_error, rejected):
                replies = [m for m in conversation.messages if m.role == "assistant"]
                report["context_only_replies"] += sum(m.weight == 0 for m in replies)
                file.write(json_line(to_nemo(conversation, schema)))
                count += 1
        report["files"][str(target)] = count
        report["out"] += count
    report["in"] = report["out"] + len(rejected)
    report["skipped"] = {"rejected": len(rejected)} if rejected else {}
    report["rejected"] = [{"where": where, "reason": reason} for where, reason in rejected[:100]]
    return report


NEMO = Converter("nemo", "NeMo-Aligner's SteerLM JSONL (--export: records to it)", convert_row, repeats=True)
