"""Convert Anthropic HH-RLHF: ``{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "…"}`` gives two
conversations per row.

The rule for transcripts, in this order:

1. A turn starts at ``\\n\\nHuman:`` or ``\\n\\nAssistant:`` only; "Human:" anywhere else is text. Texts are stripped.
2. Text before the first turn: skipped, ``leading_text``. No turn at all: ``no_turns``.
3. First turn the assistant's: ``begins_with_assistant``. Last turn the human's: ``ends_with_human``. Last turn empty:
   ``empty_response`` (the response that was compared is not there).
4. An empty turn in between is dropped (note ``empty_turns_dropped``); neighbours of the same speaker, whether they were
   so in the file or became so, are merged with a blank line (note ``turns_merged``).

The two lists that trl publishes (``chosen``/``rejected`` as messages) are taken too. Both conversations keep ``pair``
and ``preference`` (``chosen`` or ``rejected``). They share all but the last reply: ``paths=reply`` trains it once.
"""

from __future__ import annotations

import os
import re
from typing import Any

from data_tools.rows import Row
from data_tools.sources.base import Context, Converter, Found, brief, build, extras, list_of, trained_by
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.messages import has_text

SIDES = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def convert_row(row: Row, where: str, context: Context) -> list[Found]:
    """Convert both responses of a pair."""
    extra = extras(row, "id", "prompt", *SIDES)
    pair = str(row["id"]) if row.get("id") is not None else os.path.basename(where)
    found = []
    for side in SIDES:
        mine = extra | {"pair": pair, "preference": side}
        if isinstance(row.get(side), list):
            messages = [
                {"role": m.get("role"), "content": m.get("content")}
                | (trained_by(m) if m.get("role") == "assistant" else {})
                for m in list_of(row, side, where)
            ]
            made = build(where, messages, context, mine, f"{pair}:{side}")
            compared = made.messages[-1]
            empty = compared.role == "assistant" and not has_text(compared.content)
            found.append(Found(None, "empty_response") if empty else Found(made))
            continue
        if not isinstance(row.get(side), str):
            raise UserError(
                f"{where}: {side}={brief(row.get(side))} must be a transcript; the row needs chosen and rejected"
            )
        turns = parse_transcript(row[side], context)
        if isinstance(turns, str):
            found.append(Found(None, turns))
        else:
            found.append(Found(build(where, turns, context, mine, f"{pair}:{side}")))
    return found


def parse_transcript(text: str, context: Context) -> list[dict[str, Any]] | str:
    """Return messages, or the reason why a transcript is skipped (module docstring)."""
    lead, *rest = _TURN.split(text)
    turns = [(_ROLES[name], content.strip()) for name, content in zip(rest[::2], rest[1::2], strict=True)]
    if not turns:
        return "no_turns"
    if lead.strip():
        return "leading_text"
    if turns[0][0] == "assistant":
        return "begins_with_assistant"
    if turns[-1][0] == "user":
        return "ends_with_human"
    if not turns[-1][1]:
        return "empty_response"
    messages: list[dict[str, Any]] = []
    for role, content in turns:
        if not content:
            context.notes["empty_turns_dropped"] += 1
        elif messages and messages[-1]["role"] == role:
            context.notes["turns_merged"] += 1
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    # If the human's only text was empty and dropped, the assistant comes first.
    return messages if messages[0]["role"] == "user" else "begins_with_assistant"


HH_RLHF = Converter("hh_rlhf", "Anthropic HH-RLHF pairs, chosen and rejected", convert_row, repeats=True)
