"""One message of a record: its fields, and the one rule for whether it is trained.

A reply is trained if it has text and nothing says otherwise: ``weight`` or ``loss_weight`` = 0, ``train``, ``training``
or ``loss`` = false, ``mask`` = true. A reply that is not trained is context: it has no loss, and its labels are no
targets. Users' and system messages are never trained.

Owns: ``Message`` and its checks, which values count as absent. Does not own: the record around it (``records.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema, is_number

# Corpora use these other names to say whether a reply is trained. The value is the one that means "trained".
SWITCHES: Mapping[str, bool] = {"train": True, "training": True, "loss": True, "mask": False}
LOSS_WEIGHT = "loss_weight"
TOOL_RULE = "calls or is a tool; only system, user and assistant text can be trained on"
_ROLES = ("system", "user", "assistant")
_KEYS = frozenset(("role", "content", "attributes", "weight"))


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Args:
        role: ``system``, ``user`` or ``assistant``.
        content: its text.
        attributes: values on the schema's scale (assistant only); None if there are none.
        weight: of assistant messages: 1 is trained and a label target, 0 is context (as is a reply without text).
        extra: the other keys of the message, as read.
    """

    role: str
    content: str
    attributes: Mapping[str, float] | None = None
    weight: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


def message_from_json(item: Any, where: str, index: int, schema: AttributeSchema | None) -> Message:
    """Check message ``index`` of a parsed record and return it. A ``UserError`` names ``where``, its ``file:line``."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: messages[{index}]={brief(item)} must be an object with role and content")
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        role = _other_role(role, f"{where}: messages[{index}]")
    if not isinstance(content, str):
        content = _joined_parts(item, f"{where}: messages[{index}]")
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: messages[{index}].content has half a surrogate pair at character {error.start}; mend it"
            ) from error
    attributes = item.get("attributes")
    extra = {} if item.keys() <= _KEYS else {k: v for k, v in item.items() if k not in _KEYS}
    if extra and _calls(extra):
        raise UserError(f"{where}: messages[{index}] {TOOL_RULE}")
    if role != "assistant":  # other messages are context anyway, so switches change nothing there
        if attributes or item.get("weight") is not None:
            key = "attributes" if attributes else "weight"
            raise UserError(f"{where}: messages[{index}].{key} is on a {role} message; only assistant messages have it")
        return Message(role, content, None, 1, extra)
    weight, extra = _weight(item, extra, f"{where}: messages[{index}]")
    if attributes is not None:
        attributes = _attributes(attributes, f"{where}: messages[{index}].attributes", schema)
    return Message(role, content, attributes, weight if has_text(content) else 0, extra)


def has_text(content: str) -> bool:
    """Return whether a reply has text. A reply without text is never trained, and its labels are no targets."""
    return bool(content) and not content.isspace()


def count_empty_replies(messages: Iterable[Message]) -> int:
    """Count the replies that have no text."""
    return sum(message.role == "assistant" and not has_text(message.content) for message in messages)


def _weight(item: Mapping[str, Any], extra: dict[str, Any], where: str) -> tuple[int, dict[str, Any]]:
    """Return the weight of an assistant message from whichever keys give it, and ``extra`` without these keys.

    Raises:
        UserError: a weight other than 0 and 1; two keys that contradict each other.
    """
    said = {key: item[key] for key in ("weight", LOSS_WEIGHT) if item.get(key) is not None}
    for key, value in said.items():
        if not is_number(value) or value not in (0, 1):
            raise UserError(f"{where}.{key}={brief(value)} must be 0 (context only) or 1")
    weights = {key: int(value) for key, value in said.items()}
    if extra:
        switches = {key: value for key, value in extra.items() if key in SWITCHES and isinstance(value, bool)}
        said |= switches
        weights |= {key: int(value is SWITCHES[key]) for key, value in switches.items()}
        extra = {key: value for key, value in extra.items() if key not in weights}
    if len(set(weights.values())) > 1:
        both = " and ".join(f"{key}={brief(said[key])}" for key in weights)
        raise UserError(f"{where}: {both} contradict each other; keep one of them")
    return next(iter(weights.values()), 1), extra


def without_null_objects(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``data`` with every object that holds nothing but nulls replaced by null, or removed from its list.

    Raises ``UserError`` if ``data`` is nested too deeply.
    """
    try:
        return _present(data) or {}
    except RecursionError as error:
        raise UserError(f"{where}: the record is nested too deep") from error


def _present(data: Mapping[str, Any]) -> dict[str, Any] | None:
    made: dict[str, Any] = {}
    found = not data  # an empty object has no nulls, and stays
    for key, value in data.items():
        if isinstance(value, dict):
            value = _present(value)
        elif isinstance(value, list):
            value = _present_items(value)
        found = found or value is not None
        made[key] = value
    return made if found else None


def _present_items(items: list[Any]) -> list[Any]:
    made = []
    for item in items:
        if isinstance(item, dict):
            item = _present(item)
            if item is None:
                continue
        elif isinstance(item, list):
            item = _present_items(item)
        made.append(item)
    return made


def _calls(item: Mapping[str, Any]) -> bool:
    return bool(item.get("tool_calls") or item.get("function_call"))  # function_call is OpenAI's older name


def _other_role(role: Any, where: str) -> str:
    """Translate OpenAI's other roles: ``developer`` becomes ``system``; tools are refused."""
    if role == "developer":
        return "system"
    if role in ("tool", "function"):
        raise UserError(f"{where} {TOOL_RULE}")
    raise UserError(f"{where}.role={brief(role)}; legal: {' '.join(_ROLES)}")


def _joined_parts(item: Mapping[str, Any], where: str) -> str:
    """Return the text of OpenAI's content in parts (``[{"type": "text", "text": "…"}]``)."""
    parts = item.get("content")
    if parts is None and _calls(item):
        raise UserError(f"{where} {TOOL_RULE}")
    if not isinstance(parts, list) or not parts:
        raise UserError(f"{where}.content={brief(parts)} must be a string of text")
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise UserError(f"{where}.content={brief(parts)} has a part that is no text; only text can be trained on")
    return "".join(part["text"] for part in parts)


def _attributes(data: Any, where: str, schema: AttributeSchema | None) -> dict[str, float] | None:
    if not isinstance(data, dict):
        raise UserError(f"{where}={brief(data)} must be an object of numbers")
    values = {name: value for name, value in data.items() if value is not None} if None in data.values() else data
    try:
        (schema or _ANY).check_values(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return values or None


_ANY = AttributeSchema("any", (), 1)  # a schema without names checks only that values are numbers


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
