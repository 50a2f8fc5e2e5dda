"""The interface of sources, the context of a conversion, and checks of untrusted JSON that give file and line.

Owns: ``Converter``, ``Context``, ``Found``, small readers of untrusted JSON, turn markers written into text. Does not
own: the formats, filters (``data_tools/filters.py``), reading files (``data_tools/rows.py``).

Invariant: a row gives a list of ``Found``, each a checked conversation or the reason why there is none; or it raises a
``UserError`` that starts with ``file:line: `` and gives nothing.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.rows import Row, read_files
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema, is_number
from steerlm_megatron.steer.lines import OnError, Rejected
from steerlm_megatron.steer.messages import LOSS_WEIGHT, SWITCHES, TOOL_RULE
from steerlm_megatron.steer.records import Conversation, from_json

HELPSTEER_NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
STEERLM_NAMES = (
    "quality",
    "toxicity",
    "humor",
    "creativity",
    *HELPSTEER_NAMES,
)  # positions of the regression format's values
_RESERVED = frozenset(("id", "messages", "source"))  # an extra key must not replace these keys of a record
_RESERVED_IN_MESSAGE = frozenset(("role", "content", "attributes", "weight"))
_TRAINED_BY = frozenset(("weight", LOSS_WEIGHT, *SWITCHES))  # keys that say whether a reply is trained
_TOOLS = frozenset(
    "tool tools tool_call tool_calls tool_result tool_response tool_output function function_call function_response "
    "function_output observation environment ipython".split()
)


@dataclass(frozen=True)
class Found:
    """A conversation of a row, or None with the ``reason`` for that. ``split`` is the data set's, if any."""

    conversation: Conversation | None
    reason: str = ""
    split: str | None = None


@dataclass
class Context:
    """The options of a row converter, and ``notes``, in which it counts what it had to adapt."""

    source: str
    schema: AttributeSchema | None = None
    map: Mapping[str, str] = field(default_factory=dict)  # for messages; see chat.py
    label_max: float | None = None  # for nemo: the highest published label; None means the schema's highest level
    rows: str = "messages"  # for hf: the source that has such rows
    subset: str | None = None  # for hf: the data set's configuration
    split: str | None = None  # for hf: the split to read
    notes: Counter[str] = field(default_factory=Counter)


RowConverter = Callable[[Row, str, Context], list[Found]]
Reader = Callable[
    [Sequence[str], Context, OnError, Rejected | None], Iterator[tuple[str, Row, str | None]]
]  # ("file:line", row, the split that the data set gives the row)


def read_row_files(
    inputs: Sequence[str], context: Context, on_error: OnError, rejected: Rejected | None
) -> Iterator[tuple[str, Row, str | None]]:
    """Read rows from JSON Lines or JSON arrays, as most sources do."""
    for where, row in read_files(inputs, on_error, rejected):
        yield where, row, None


@dataclass(frozen=True)
class Converter:
    """A source of conversations.

    Args:
        summary: one line for ``--help``.
        convert: turns a row into its conversations.
        read: reads files as rows.
        repeats: whether the published form repeats shared beginnings, so that ``paths=reply`` has a meaning.
    """

    name: str
    summary: str
    convert: RowConverter
    read: Reader = read_row_files
    repeats: bool = False


# Readers of untrusted JSON


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return ``row[key]``, which must be a string."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}={brief(value)} must be a string; the row's keys: {' '.join(row) or 'none'}")
    return value


def list_of(row: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """Return ``row[key]``, which must be a list of objects."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{where}: {key}={brief(value)} must be a list of objects; the row's keys: {' '.join(row)}")
    return value


def extras(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """Return the row's other keys, to be kept. One with the name of a record's key becomes ``original_<key>``; nulls
    are dropped.
    """
    return {
        f"original_{key}" if key in _RESERVED else key: value
        for key, value in row.items()
        if key not in used and value is not None
    }


def trained_by(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an assistant's turn that say whether it is trained, by the rule of ``steer.messages``."""
    return {key: turn[key] for key in _TRAINED_BY if turn.get(key) is not None}


def turn_extras(turn: Mapping[str, Any], is_reply: bool, *used: str) -> dict[str, Any]:
    """Return the turn's other keys, to be kept. One with the name of a message's key becomes ``original_<key>``; nulls
    are dropped.

    A reply's ``weight`` of 0 or 1 is that of the message; any other number under this name has another meaning.
    """
    own = {"weight"} if is_reply and is_number(turn.get("weight")) and turn["weight"] in (0, 1) else set()
    return {
        f"original_{key}" if key in _RESERVED_IN_MESSAGE - own else key: value
        for key, value in turn.items()
        if key not in used and value is not None
    }


def is_tool(speaker: str) -> bool:
    """Return whether a speaker's name is a tool's, in any of the published formats."""
    return speaker.strip().lower() in _TOOLS


def roles_of(speakers: Iterable[str], users: Collection[str], where: str) -> dict[str, str]:
    """Return the role of every speaker: ``user`` for ``users``, ``system`` for that name, ``assistant`` for the other
    one.

    Raises:
        UserError: a tool, or several other speakers, whose texts would be trained as the assistant's.
    """
    roles = {name: "user" if name in users else "system" if name.lower() == "system" else "" for name in speakers}
    others = [name for name, role in roles.items() if not role]
    for name in others:
        if is_tool(name):
            raise UserError(f"{where}: speaker {name!r} {TOOL_RULE}")
    if len({name.lower() for name in others}) > 1:
        raise UserError(
            f"{where}: {' '.join(map(repr, others))} all speak beside the user ({' '.join(users) or 'none'}); one of "
            "them can be the assistant that is trained"
        )
    return {name: role or "assistant" for name, role in roles.items()}


def build(
    where: str,
    messages: list[dict[str, Any]],
    context: Context,
    extra: Mapping[str, Any],
    name: Any = None,
    suffix: str = "",
) -> Conversation:
    """Return a checked record. Its id is ``name``, or without one ``<file name>:<line><suffix>``."""
    identity = name if name is not None else os.path.basename(where) + suffix
    data = {**extra, "id": identity, "messages": messages, "source": context.source}
    return from_json(data, where, context.schema)


def scaled(value: Any, name: str, highest: float | None, where: str, context: Context) -> float | None:
    """Return a published label on the schema's scale; None if it is absent or not in the schema (which is counted).

    The published scale is 0..highest; with None it is that of the schema. A list of ratings becomes its mean.
    """
    if value is None:
        return None
    ratings = value if isinstance(value, list) and value else [value]
    schema = context.schema
    if schema is not None and schema.names and name not in schema.names:
        context.notes[f"label_not_in_schema:{name}"] += 1
        return None
    top = highest if highest is not None else (float(schema.max_level) if schema is not None else float("inf"))
    for rating in ratings:
        if not is_number(rating) or not 0 <= rating <= top:
            raise UserError(f"{where}: label {name}={brief(value)} must be a number in 0..{top:g}")
    mean = sum(ratings) / len(ratings)
    if highest is None or schema is None or not schema.names or schema.max_level == highest:
        return float(mean)
    return mean * schema.max_level / highest


# Turns written into text with literal control strings: HelpSteer2's prompts, NeMo's regression format

_MARKER = re.compile(r"(?:\A|\n)(?:<extra_id_1>(User|Assistant)|<extra_id_0>(System))\n")
_LABEL_LINE = re.compile(r"\A<extra_id_2>[^\n]*\n")


def parse_markers(text: str, where: str, context: Context) -> list[dict[str, Any]]:
    """Parse ``{user}\\n<extra_id_1>Assistant\\n{reply}\\n<extra_id_1>User\\n{user}`` into messages.

    Text without markers is one user message. A marker counts only at the start of a line, followed by its role and a
    newline; anything else is text. Assistant turns get weight 0: they are context, not the data set's responses. A
    label line in such a turn is removed and counted. Empty turns are dropped and counted.

    Raises:
        UserError: a ``System`` marker that is not at the very start.
    """
    pieces = _MARKER.split(text)
    turns: list[tuple[str, str]] = [("user", pieces[0])] if pieces[0] or len(pieces) == 1 else []
    for user_or_assistant, system, content in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if system and turns:
            raise UserError(f"{where}: a <extra_id_0>System marker stands inside the prompt; it belongs at its start")
        turns.append(((user_or_assistant or system).lower(), content))
    if len(turns) == 1 and turns[0][0] == "user":
        return [{"role": "user", "content": turns[0][1]}]
    context.notes["marked_prompts_parsed"] += 1
    messages: list[dict[str, Any]] = []
    for role, content in turns:
        message: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant":
            stripped = _LABEL_LINE.sub("", content)
            context.notes["label_lines_removed"] += stripped != content
            message |= {"content": stripped, "weight": 0}
        if not message["content"].strip():
            context.notes["empty_turns_dropped"] += 1
            continue
        messages.append(message)
    return messages
