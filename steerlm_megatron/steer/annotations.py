"""The values of single annotators, which a response may have beside its ``attributes``.

``{"role": "assistant", "content": "…", "attributes": {"quality": 3.0}, "annotations": [{"quality": 4, "humor": 0},
{"quality": 2}]}``: one object per annotator, in any order, with values on the schema's scale; each may be partial. They
are never trained on. ``evaluate`` compares how well a model agrees with one annotator and how well annotators agree
with each other.

Owns: reading and checking the key ``annotations`` of a message. Does not own: the message (``messages.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import is_number
from steerlm_megatron.steer.messages import Message, brief

KEY = "annotations"


def annotations_of(message: Message, where: str) -> list[dict[str, float]]:
    """Return each annotator's values of a response, without nulls; an empty list if the message has none.

    Raises:
        UserError: naming ``where`` (``file:line``): it is not a list of objects of numbers.
    """
    given: Any = message.extra.get(KEY)
    if given is None:
        return []
    if not isinstance(given, list):
        raise UserError(f"{where}: {KEY}={brief(given)} must be a list with an object of numbers per annotator")
    found = []
    for index, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise UserError(f"{where}: {KEY}[{index}]={brief(item)} must be an object of numbers")
        values = {str(name): value for name, value in item.items() if value is not None}
        for name, value in values.items():
            if not is_number(value) or value != value:
                raise UserError(f"{where}: {KEY}[{index}].{name}={brief(value)} must be a number")
        if values:
            found.append({name: float(value) for name, value in values.items()})
    return found
