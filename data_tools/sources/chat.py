"""Chat records: OpenAI ``messages``, ShareGPT / FastChat ``conversations``, and other rows through a mapping.

The mapping (``--map``, ``data.map``) is ``name=key path`` joined by commas; a key path is keys and list indices joined
by dots. Two forms::

    prompt=instruction,context=context,response=response                            dolly (databricks)
    turns=content,text=message,speaker=agent                                        Topical-Chat

* ``prompt``, ``response`` (both needed), ``context`` (set below the prompt after a blank line, if it has text).
* ``turns``: the list of turns. ``text``: the text's key in a turn (without it a turn is the text itself). ``speaker``:
  the speaker's key. ``user``: the user's names there, joined by ``|``; without it the first speaker is the user. One
  other speaker is the assistant; ``system`` is the system's, a tool or a third speaker is an error. Without ``speaker``
  the turns alternate, user first.
* in both: ``id``, ``system``, ``lang``, ``attributes`` (an object of values on the schema's scale, for the last reply).

Keys that the mapping does not name are kept in the record, those of a turn in its message. A reply's ``weight`` and
equivalent keys (``steer/messages.py``) decide whether it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.rows import Row
from data_tools.sources.base import (
    Context,
    Converter,
    Found,
    brief,
    build,
    extras,
    is_tool,
    list_of,
    roles_of,
    turn_extras,
)
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import nearest
from steerlm_megatron.steer.records import from_json

MAP_KEYS = ("prompt", "context", "response", "turns", "text", "speaker", "user", "id", "system", "lang", "attributes")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bing": "assistant", "bard": "assistant", "claude": "assistant",
}  # fmt: skip


def parse_map(text: str) -> dict[str, str]:
    """Parse a mapping such as ``"prompt=instruction,response=output"``; ``""`` gives ``{}``. Raises ``UserError``."""
    mapping: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = (piece.strip() for piece in part.partition("="))
        if not equals or not path:
            raise UserError(f"data.map: {part!r} is not of the form name=key; names: {' '.join(MAP_KEYS)}")
        if name not in MAP_KEYS:
            raise UserError(f"data.map: unknown name {name!r}{nearest(name, MAP_KEYS)}; legal: {' '.join(MAP_KEYS)}")
        if name in mapping:
            raise UserError(f"data.map: {name} occurs twice")
        mapping[name] = path
    if not mapping:
        return {}
    form = {"prompt", "response"} if "turns" not in mapping else {"turns"}
    missing = sorted(form - mapping.keys())
    if missing:
        raise UserError(f"data.map={text!r} lacks {' '.join(missing)}; give prompt= and response=, or turns=")
    other = {"turns": ("prompt", "response", "context"), "prompt": ("text", "speaker", "user")}
    wrong = [name for name in other["turns" if "turns" in mapping else "prompt"] if name in mapping]
    if wrong:
        raise UserError(
            f"data.map={text!r} mixes the two forms: {' '.join(wrong)} does not go with {' '.join(sorted(form))}"
        )
    if "user" in mapping and "speaker" not in mapping:
        raise UserError(f"data.map={text!r}: user= names speakers, and so needs speaker=")
    return mapping


def look_up(data: Any, path: str) -> Any:
    """Return the value at a key path; None if there is none."""
    for key in path.split("."):
        if isinstance(data, Mapping):
            data = data.get(key)
        elif isinstance(data, list) and key.isdigit() and int(key) < len(data):
            data = data[int(key)]
        else:
            return None
    return data


def convert_messages(row: Row, where: str, context: Context) -> list[Found]:
    """Convert a record of ``messages``, or any row if there is a mapping."""
    if context.map:
        return [Found(_turns(row, where, context) if "turns" in context.map else _single(row, where, context))]
    data: dict[str, Any] = {key: value for key, value in row.items() if value is not None}
    if isinstance(row.get("messages"), list):
        data["messages"] = [_without_nulls(item) for item in row["messages"]]
    return [Found(from_json(data, where, context.schema))]


def _without_nulls(item: Any) -> Any:
    if not isinstance(item, dict):
        return item  # from_json reports the error
    return {key: value for key, value in item.items() if value is not None or key in ("role", "content")}


def convert_sharegpt(row: Row, where: str, context: Context) -> list[Found]:
    """Convert ``{"id": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}``."""
    messages = []
    for index, turn in enumerate(list_of(row, "conversations", where)):
        speaker = turn.get("from")
        role = _SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            legal = " ".join(_SHAREGPT_ROLES)
            raise UserError(f"{where}: conversations[{index}].from={brief(speaker)}; legal: {legal}")
        extra = turn_extras(turn, role == "assistant", "from", "value")
        messages.append({**extra, "role": role, "content": turn.get("value")})
    return [Found(build(where, messages, context, extras(row, "id", "conversations"), row.get("id")))]


def _mapped(row: Row, where: str, context: Context, messages: list[dict[str, Any]]) -> Any:
    """Return the record of a mapped row, from its messages and the other keys that the mapping names."""
    paths = context.map
    system = look_up(row, paths["system"]) if "system" in paths else None
    if system:
        messages.insert(0, {"role": "system", "content": system})
    attributes = look_up(row, paths["attributes"]) if "attributes" in paths else None
    if attributes is not None and messages and messages[-1]["role"] == "assistant":
        messages[-1]["attributes"] = attributes
    lang = look_up(row, paths["lang"]) if "lang" in paths else None
    used = {path.split(".")[0] for name, path in paths.items() if name not in ("text", "speaker", "user")}
    extra = extras(row, *used) | ({"lang": lang} if lang is not None else {})
    return build(where, messages, context, extra, look_up(row, paths["id"]) if "id" in paths else None)


def _single(row: Row, where: str, context: Context) -> Any:
    """Return the record of a row with a prompt and a response."""
    paths = context.map
    texts: dict[str, str] = {}
    for name in ("prompt", "context", "response"):
        value = look_up(row, paths[name]) if name in paths else None
        if value is None and name == "context":
            value = ""
        if not isinstance(value, str):
            keys = " ".join(row) or "none"
            raise UserError(
                f"{where}: data.map has {name}={paths[name]}, which is {brief(value)} here; its keys: {keys}"
            )
        texts[name] = value
    prompt = texts["prompt"] + (f"\n\n{texts['context']}" if texts["context"].strip() else "")
    if not prompt.strip():
        raise UserError(f"{where}: the prompt ({paths['prompt']}) is empty")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": texts["response"]}]
    return _mapped(row, where, context, messages)


def _turns(row: Row, where: str, context: Context) -> Any:
    """Return the record of a row with a list of turns."""
    paths = context.map
    turns = look_up(row, paths["turns"])
    if not isinstance(turns, list):
        keys = " ".join(row) or "none"
        raise UserError(f"{where}: data.map has turns={paths['turns']}, which is {brief(turns)} here; its keys: {keys}")
    speakers = [str(look_up(turn, paths["speaker"])) for turn in turns] if "speaker" in paths else []
    roles = _speakers(speakers, paths.get("user"), where) if speakers else {}
    used = [paths[name].split(".")[0] for name in ("text", "speaker") if name in paths]
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        text = look_up(turn, paths["text"]) if "text" in paths else turn
        if not isinstance(text, str):
            raise UserError(f"{where}: {paths['turns']}[{index}] has no text: {brief(text)}; see text= in data.map")
        role = roles[speakers[index]] if speakers else ("user", "assistant")[index % 2]
        extra = turn_extras(turn, role == "assistant", *used) if isinstance(turn, Mapping) else {}
        messages.append({**extra, "role": role, "content": text})
    return _mapped(row, where, context, messages)


def _speakers(speakers: list[str], user: str | None, where: str) -> dict[str, str]:
    """Return the role of each speaker."""
    if user is not None:
        return roles_of(speakers, user.split("|"), where)
    names = [name for name in dict.fromkeys(speakers) if name.lower() != "system"]
    if len(names) > 2 and not any(map(is_tool, names)):
        raise UserError(f"{where}: more than two speakers ({', '.join(names)}); say which are the user: user=a|b")
    return roles_of(speakers, names[:1], where)


MESSAGES = Converter("messages", "OpenAI messages; with --map any JSON row", convert_messages)
SHAREGPT = Converter("sharegpt", "ShareGPT conversations (JSON array or lines)", convert_sharegpt)
MSID = Converter("msid", "M-SID: FastChat's dummy.json, 'Who are you?'", convert_sharegpt)
