"""Attribute schemas: the names, order and scale of the values that steer a response, and their one written form.

Owns: quantisation (float *value* on the schema's scale → integer *level*), clamping, checking, writing and parsing the
label string (``quality:6,toxicity:0``), and the vector that a regression head is trained on. Does not own: the place of
the label string in a prompt (``templates.py``), how values are stored (``records.py``).

Invariant: ``parse(format(levels)) == levels`` for all levels of the schema, and the string is always in schema order.
Rounding is half to even, as in the released SteerLM scripts. A schema without names conditions on nothing.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerlm_megatron.errors import UserError

_NAME = re.compile(r"[\w.-]+")
_FIELDS = ("name", "names", "max_level", "quality", "best")  # the fields of the configuration group
_UNSEEN = "unseen"


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a float, or an int that a float can hold, and not a bool."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


@dataclass(frozen=True)
class AttributeSchema:
    """The attributes of a model or corpus: their names in order, on a scale 0..max_level.

    Args:
        name: what the schema is called (``oasst``, ``helpsteer``, …).
        names: attributes in the order of the label string; empty: no conditioning.
        max_level: the highest level; the lowest is 0.
        quality: the attribute that bootstrapping maximises; one of ``names`` (unless there are none).
        best: levels that are requested when a user names none. An attribute left out here is not requested, except
            ``quality``, which is then requested at ``max_level``.
        unseen: those of ``names`` of which the model's training data had no value. They are never requested by default,
            and requesting one is an error, since the model has learned nothing of it.

    Raises:
        UserError: a malformed or repeated name, a scale below 1, ``quality`` or ``best`` outside the schema.
    """

    name: str
    names: tuple[str, ...]
    max_level: int
    quality: str = "quality"
    best: Mapping[str, int] = field(default_factory=dict, hash=False)
    unseen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        where = f"attributes (schema {self.name!r})"
        for name in self.names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise UserError(f"{where}: names contains {name!r}; a name is letters, digits, '_', '-' or '.'")
        if len(set(self.names)) != len(self.names):
            raise UserError(f"{where}: names={list(self.names)} repeats a name; name each attribute once")
        if not isinstance(self.max_level, int) or isinstance(self.max_level, bool) or self.max_level < 1:
            raise UserError(f"{where}: max_level={self.max_level!r} must be an integer of at least 1")
        if self.names and self.quality not in self.names:
            raise UserError(f"{where}: quality={self.quality!r} must be one of names={list(self.names)}")
        for name, level in self.best.items():
            if name not in self.names:
                raise UserError(f"{where}: best.{name}: {self._unknown(name)}")
            self._check_level(name, level, where=f"{where}: best.")
        object.__setattr__(self, "best", {name: self.best[name] for name in self.names if name in self.best})
        object.__setattr__(self, _UNSEEN, tuple(name for name in self.names if name in self.unseen))

    @property
    def seen(self) -> tuple[str, ...]:
        """The attributes of which the model has seen values: all but ``unseen``."""
        return tuple(name for name in self.names if name not in self.unseen)

    @classmethod
    def from_config(cls, cfg: Any) -> AttributeSchema:
        """Make a schema from a mapping or an object with the fields of ``config.schema.AttributesConfig``."""
        if isinstance(cfg, Mapping):
            return cls.from_dict(cfg)
        return cls.from_dict({key: getattr(cfg, key) for key in _FIELDS})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttributeSchema:
        """Make a schema from what ``to_dict`` gives. ``names`` and ``max_level`` are required; an unknown key is
        refused.
        """
        for key in data:
            if key not in (*_FIELDS, _UNSEEN):
                raise UserError(f"attributes.{key}: unknown key; legal keys: {' '.join(_FIELDS)}")
        for key in ("names", "max_level"):
            if key not in data:
                raise UserError(f"attributes.{key} is missing; set it")
        return cls(
            name=str(data.get("name", "custom")),
            names=tuple(data["names"] or ()),
            max_level=data["max_level"],
            quality=str(data.get("quality", "quality")),
            best=dict(data.get("best") or {}),
            unseen=tuple(data.get(_UNSEEN) or ()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with the keys of the config group, and ``unseen`` if there are such attributes."""
        data = {
            "name": self.name,
            "names": list(self.names),
            "max_level": self.max_level,
            "quality": self.quality,
            "best": dict(self.best),
        }
        return data | {_UNSEEN: list(self.unseen)} if self.unseen else data

    def level(self, value: float) -> int:
        """Return the level of a value on the schema's scale: rounded half to even, clamped to 0..max_level.

        Raises:
            UserError: ``value`` is NaN or no number.
        """
        if value != value or not is_number(value):
            raise UserError(f"attribute value {value!r} is not a number; its scale is 0..{self.max_level}")
        return round(min(max(value, 0), self.max_level))

    def check_values(self, values: Mapping[str, Any]) -> None:
        """Refuse an unknown attribute and a value that is no number, NaN, or outside 0..max_level (``UserError``).

        A schema without names knows no attribute, and so checks only that the values are numbers.
        """
        for name, value in values.items():
            if type(value) is float and name in self.names and 0 <= value <= self.max_level:
                continue  # the common case, fast
            if self.names and name not in self.names:
                raise UserError(self._unknown(name))
            if not is_number(value) or math.isnan(value):
                raise UserError(f"attribute {name}={value!r} is not a number; leave an unknown value out")
            if self.names and not 0 <= value <= self.max_level:
                raise UserError(
                    f"attribute {name}={value!r} is outside 0..{self.max_level}, the scale of schema {self.name!r}; "
                    "rescale the labels or set attributes.max_level"
                )

    def levels(self, values: Mapping[str, float] | None) -> dict[str, int]:
        """Return levels of the values that are present, in schema order; ``{}`` if the schema has no names.

        Raises:
            UserError: an attribute that the schema lacks, or NaN.
        """
        if not values or not self.names:
            return {}
        found: dict[str, int] = {}
        for name in self.names:
            if name in values:
                value = values[name]
                inside = type(value) is float and 0 <= value <= self.max_level  # the common case, fast
                found[name] = round(value) if inside else self.level(value)
        if len(found) != len(values):
            raise UserError(next(self._unknown(name) for name in values if name not in found))
        return found

    def format(self, levels: Mapping[str, int]) -> str:
        """Return the label string, ``name:level`` joined by commas in schema order; missing attributes are omitted.

        Raises:
            UserError: an unknown attribute, or a level that is no integer in 0..max_level.
        """
        parts: list[str] = []
        for name in self.names:
            if name in levels:
                level = levels[name]
                if type(level) is not int or not 0 <= level <= self.max_level:
                    self._check_level(name, level)
                parts.append(f"{name}:{level}")
        if len(parts) != len(levels):
            raise UserError(next(self._unknown(name) for name in levels if name not in self.names))
        return ",".join(parts)

    def parse(self, text: str) -> dict[str, int]:
        """Return levels from a label string, in schema order; the inverse of ``format``. ``""`` gives ``{}``.

        Raises:
            UserError: not ``name:level`` pairs joined by commas, an unknown or repeated name, a level out of scale.
        """
        found: dict[str, int] = {}
        for part in text.split(",") if text else ():
            name, colon, digits = part.partition(":")
            if not colon or not (digits.isascii() and digits.isdigit()) or (digits[0] == "0" and digits != "0"):
                raise UserError(f"label {text!r}: {part!r} is not of the form name:level")
            if name not in self.names:
                raise UserError(f"label {text!r}: {self._unknown(name)}")
            if name in found:
                raise UserError(f"label {text!r}: {name} occurs twice")
            found[name] = self._check_level(name, int(digits), where=f"label {text!r}: ")
        return {name: found[name] for name in self.names if name in found}

    def vector(self, values: Mapping[str, float] | None) -> list[float]:
        """Return ``len(names)`` floats in schema order, NaN where a value is missing (a regression target)."""
        values = values or {}
        return [float(values.get(name, math.nan)) for name in self.names]

    def complete(self, levels: Mapping[str, int] | None) -> dict[str, int]:
        """Return the levels to use at inference: ``best``, overridden by the requested ``levels``, in schema order.

        Raises:
            UserError: an unknown or unseen attribute, or a level that is no integer in 0..max_level.
        """
        wanted: dict[str, int] = {self.quality: self.max_level, **self.best} if self.names else {}
        for name, level in (levels or {}).items():
            if name not in self.names:
                raise UserError(self._unknown(name))
            if name in self.unseen:
                raise UserError(
                    f"attribute {name!r} had no label in what the model was trained on; it knows: {' '.join(self.seen)}"
                )
            wanted[name] = self._check_level(name, level)
        return {name: wanted[name] for name in self.seen if name in wanted}

    def _check_level(self, name: str, level: Any, where: str = "") -> int:
        if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level <= self.max_level:
            raise UserError(f"{where}{name}={level!r} must be an integer in 0..{self.max_level}")
        return level

    def _unknown(self, name: object) -> str:
        """Return the message for an attribute that the schema lacks, with the nearest right name."""
        if not self.names:
            return f"unknown attribute {name!r}: schema {self.name!r} has no attributes"
        near = nearest(str(name), self.names)
        return f"unknown attribute {name!r}{near}; schema {self.name!r} has: {' '.join(self.names)}"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word nearest to ``word``, or ``""``."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
