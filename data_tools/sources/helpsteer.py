"""Convert HelpSteer, HelpSteer2 (ratings, disagreements, preference) and HelpSteer3 (preference).

* ratings: ``prompt``, ``response`` and the five labels on 0–4 (a list of ratings, as in ``disagreements``, becomes its
  mean, and the single ratings are kept as ``annotations``); scaled to the schema's ``max_level``.
* preference: ``response_1``/``response_2`` + ``preference_strength`` (HelpSteer2) or ``response1``/``response2`` +
  ``overall_preference`` (HelpSteer3, ``context`` a list of messages): two conversations, one per response. Both keep
  ``pair`` and ``preference`` (``strength`` −3…3, negative: response 1 is better; ``response``: 1 or 2; ``preferred``).
  A strength outside −3…3 (−100: invalid) is null and counted.

Assistant turns of a prompt are context (weight 0); only the published response is trained and labelled. A prompt with
literal ``<extra_id_1>`` markers is parsed into turns. A response without text is skipped as ``empty_response``. Rows of
HelpSteer2's preference file have a ``split``, which is kept.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any

from data_tools.rows import Row
from data_tools.sources.base import (
    HELPSTEER_NAMES,
    Context,
    Converter,
    Found,
    brief,
    build,
    extras,
    list_of,
    parse_markers,
    scaled,
    text_of,
)
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.annotations import KEY as ANNOTATIONS
from steerlm_megatron.steer.attributes import is_number

_SPLITS = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid"}


def convert_row(row: Row, where: str, context: Context) -> list[Found]:
    """Convert a row of any HelpSteer file."""
    if row.get("response1") is not None or row.get("response2") is not None:
        return _pair(row, where, context, _context(row, where), ("response1", "response2"), "overall_preference")
    if row.get("response_1") is not None or row.get("response_2") is not None:
        prompt = parse_markers(text_of(row, "prompt", where), where, context)
        return _pair(row, where, context, prompt, ("response_1", "response_2"), "preference_strength")
    prompt = parse_markers(text_of(row, "prompt", where), where, context)
    response = text_of(row, "response", where)
    labels = {name: scaled(row.get(name), name, 4, where, context) for name in HELPSTEER_NAMES}
    reply = {"role": "assistant", "content": response, "attributes": labels, **_annotations(row, where, context)}
    extra = extras(row, "id", "prompt", "response", "split", *HELPSTEER_NAMES)
    return [_found(row, where, context, [*prompt, reply], extra, row.get("id"), "")]


def _annotations(row: Row, where: str, context: Context) -> dict[str, Any]:
    """Return the values of single annotators, as ``steer/annotations.py`` has them, of a row whose labels are lists."""
    lists = {name: row[name] for name in HELPSTEER_NAMES if isinstance(row.get(name), list)}
    silent = replace(context, notes=Counter())  # what is not in the schema is counted once, with the means
    made = [
        {name: scaled(ratings[i], name, 4, where, silent) for name, ratings in lists.items() if i < len(ratings)}
        for i in range(max(map(len, lists.values()), default=0))
    ]
    kept = [{name: value for name, value in one.items() if value is not None} for one in made]
    kept = [one for one in kept if one]
    return {ANNOTATIONS: kept} if kept else {}


def _context(row: Row, where: str) -> list[dict[str, Any]]:
    """Return HelpSteer3's ``context`` as messages, in which assistant messages get weight 0."""
    messages = []
    for item in list_of(row, "context", where):
        role = item.get("role")
        messages.append({"role": role, "content": item.get("content")} | ({"weight": 0} if role == "assistant" else {}))
    return messages


def _pair(
    row: Row, where: str, context: Context, prompt: list[dict[str, Any]], keys: tuple[str, str], strength_key: str
) -> list[Found]:
    strength = row.get(strength_key)
    if strength is not None and not is_number(strength):
        raise UserError(f"{where}: {strength_key}={brief(strength)} must be a number in -3..3")
    if strength is not None and not -3 <= strength <= 3:
        context.notes["invalid_preferences"] += 1
        strength = None
    extra = extras(row, "id", "prompt", "context", "split", strength_key, *keys)
    pair = str(row["id"]) if row.get("id") is not None else os.path.basename(where)
    found = []
    for number, key in enumerate(keys, 1):
        preferred = None if not strength else (strength < 0) == (number == 1)
        preference = {"strength": strength, "response": number, "preferred": preferred}
        reply = {"role": "assistant", "content": text_of(row, key, where)}
        mine = extra | {"pair": pair, "preference": preference}
        found.append(_found(row, where, context, [*prompt, reply], mine, f"{pair}:{key}", ""))
    return found


def _found(
    row: Row,
    where: str,
    context: Context,
    messages: list[dict[str, Any]],
    extra: dict[str, Any],
    name: Any,
    suffix: str,
) -> Found:
    split = row.get("split")
    if split is not None and (not isinstance(split, str) or split not in _SPLITS):
        raise UserError(f"{where}: split={brief(split)}; legal: {' '.join(_SPLITS)}")
    own = _SPLITS[split] if split is not None else None
    if not messages[-1]["content"].strip():
        return Found(None, "empty_response", own)
    return Found(build(where, messages, context, extra, name, suffix), split=own)


HELPSTEER = Converter("helpsteer", "HelpSteer, HelpSteer2 and HelpSteer3, ratings and preferences", convert_row)
