"""Parse and check well-formed record lines by msgspec in one step, several times faster than ``steer.records``.

Owns: ``FastRecords``. Does not own: the definition of a record, errors (``steer.records``). Invariant: a line is either
accepted, and then ``from_json`` would give the same conversation (except for unknown keys and ``source``, which
preprocessing never reads), or it is left to ``steer.records``. Everything doubtful is left, so that all errors are
worded there. Without msgspec all lines are left.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from functools import reduce
from operator import or_
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Literal

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.messages import LOSS_WEIGHT, SWITCHES, has_text
from steerlm_megatron.steer.records import from_json

if TYPE_CHECKING:
    from steerlm_megatron.data.write.builder import ConversationLike
    from steerlm_megatron.steer.attributes import AttributeSchema

try:
    import msgspec as _msgspec

    msgspec: Any = _msgspec
except ImportError:  # an old environment without msgspec is slower and gives the same result
    msgspec = None

# json refuses an integer of more than 4,300 digits, and msgspec does not. A line with such an integer has digits at two
# neighbouring sample positions.
_MOST_DIGITS = 4300
_SAMPLE_BYTES = 2048
_DIGITS = re.compile(rb"[0-9][0-9]")
MOST_KINDS = 4096
_LARGEST = sys.float_info.max
_LEFT = (
    "tool_calls",
    "function_call",
    LOSS_WEIGHT,
    *SWITCHES,
)  # a message with any of these keys is left to steer.records


def _kind(role: str, fields: list[Any], **fixed: Any) -> Any:
    """Make the msgspec type for messages of a role. It has the attributes of ``views.MessageLike``."""
    given = {"role": role, **fixed}
    fields = [("content", str), *fields, *((key, None, None) for key in _LEFT)]
    return msgspec.defstruct(role, fields, tag_field="role", tag=role, gc=False, namespace=given)


if msgspec is not None:
    _NONE = [(f"no_{key}", None, msgspec.field(name=key, default=None)) for key in ("attributes", "weight")]
    _ASSISTANT = _kind(
        "assistant", [("attributes", dict[str, int | float | None] | None, None), ("weight", Literal[0, 1], 1)]
    )
    _OTHERS = [_kind(role, _NONE, attributes=None, weight=1) for role in ("system", "user")]
    _MESSAGES = GenericAlias(list, (reduce(or_, _OTHERS, _ASSISTANT),))
    _RECORD = msgspec.defstruct(
        "record",
        [("messages", _MESSAGES), ("id", str | int | None, None), ("source", str | None, None)],
        gc=False,
    )


class FastRecords:
    """Parses the lines of one file."""

    def __init__(self, path: str, schema: AttributeSchema | None) -> None:
        self._name = os.path.basename(path)
        self._names = frozenset(schema.names) if schema else frozenset()
        self._most = schema.max_level if schema else 0
        self._decode: Any = None if msgspec is None else msgspec.json.Decoder(_RECORD).decode
        self.orders: dict[tuple[type, ...], bool] = {}  # sequence of message types → whether this order is legal

    def parse(self, line: bytes, number: int) -> ConversationLike | None:
        """Return the conversation in line ``number`` of the file; None if the line is left to ``steer.records``."""
        if self._decode is None:
            return None
        if len(line) > _MOST_DIGITS and _DIGITS.search(line[::_SAMPLE_BYTES]):
            return None
        try:
            if not line.isascii():
                line.decode()  # msgspec skips keys that it does not need without checking their encoding
            record = self._decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        messages = record.messages
        if not self._in_order(tuple(map(type, messages))):
            return None
        for message in messages:
            if type(message) is _ASSISTANT and not has_text(message.content):
                return None
            if message.attributes and not self._right(message):
                return None
        if type(record.id) is not str:
            record.id = f"{self._name}:{number}" if record.id is None else str(record.id)
        return record

    def _in_order(self, kinds: tuple[type, ...]) -> bool:
        found = self.orders.get(kinds)
        if found is None:
            messages = [{"role": kind.role, "content": "x"} for kind in kinds]  # type: ignore[attr-defined]
            try:
                from_json({"messages": messages}, "")
                found = True
            except UserError:
                found = False
            if len(self.orders) >= MOST_KINDS:
                self.orders.clear()
            self.orders[kinds] = found
        return found

    def _right(self, message: Any) -> bool:
        """Return whether all values are on the schema's scale; null values are removed."""
        attributes: Mapping[str, int | float | None] = message.attributes
        if None in attributes.values():
            attributes = message.attributes = {k: v for k, v in attributes.items() if v is not None}
        names, most = self._names, self._most
        if not names:
            return all(v is not None and -_LARGEST <= v <= _LARGEST for v in attributes.values())
        return all(n in names and v is not None and 0 <= v <= most for n, v in attributes.items())
