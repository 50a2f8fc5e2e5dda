"""Declare a configuration key together with its rule and its meaning.

Owns: :func:`option`, and the rules that one value can break by itself. Does not own: rules between keys (``load.py``).
Invariant: a rule has words for a help text and words for an error, and both come from the same object.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a value has to be.

    Args:
        words: the rule in a help text, such as ``at least 1``.
        broken: what an error says after ``key=value``; None if the value is fine.
        choices: the legal values, where there are few.
    """

    words: str
    broken: Callable[[Any], str | None]
    choices: tuple[str, ...] = ()


def at_least(least: float) -> Rule:
    """Require a finite number that is not below ``least``; null passes where the key may be null."""

    def broken(value: Any) -> str | None:
        if not value >= least:  # written so that NaN breaks the rule too
            return f"must be at least {least:g}"
        return "must be finite" if value == math.inf else None

    return Rule(f"at least {least:g}", broken)


def between(low: float, high: float) -> Rule:
    """Require a number from ``low`` to ``high``, both included."""

    def broken(value: Any) -> str | None:
        return None if low <= value <= high else f"must be between {low:g} and {high:g}"

    return Rule(f"{low:g} to {high:g}", broken)


def above(low: float) -> Rule:
    """Require a finite number above ``low``."""

    def broken(value: Any) -> str | None:
        return None if low < value < math.inf else f"must be a number above {low:g}"

    return Rule(f"above {low:g}", broken)


def one_of(*choices: str) -> Rule:
    """Require one of ``choices``."""

    def broken(value: Any) -> str | None:
        return None if value in choices else f"is not one of: {' '.join(choices)}"

    return Rule(" | ".join(choices), broken, choices)


def each_of(*choices: str) -> Rule:
    """Require a list whose items are of ``choices``, none of them twice."""

    def broken(value: Any) -> str | None:
        if unknown := [str(item) for item in value if item not in choices]:
            return f"has {' '.join(unknown)}, which is not one of: {' '.join(choices)}"
        return "names one twice" if len(set(value)) < len(value) else None

    return Rule(f"each of {' | '.join(choices)}", broken)


def each_at_least(least: float) -> Rule:
    """Require a list whose numbers are not below ``least``; an empty one passes."""
    one = at_least(least)

    def broken(value: Any) -> str | None:
        return next((f"has {item}, which {words}" for item in value if (words := one.broken(item))), None)

    return Rule(f"each {one.words}", broken)


def a_path_or_several() -> Rule:
    """Require a path or a list of paths, none of them empty; null passes."""

    def broken(value: Any) -> str | None:
        several = list(value) if isinstance(value, list | tuple) else [value]
        fine = value is None or (several and all(isinstance(path, str) and path for path in several))
        return None if fine else "is not a path or a list of paths"

    return Rule("a path or a list of paths", broken)


def option(default: Any, *about: Rule | str) -> Any:
    """Declare a dataclass field by its default, its rules and, last, its meaning.

    A list or dict as ``default`` is copied for every configuration.
    """
    rules = tuple(item for item in about if isinstance(item, Rule))
    (help_text,) = [item for item in about if isinstance(item, str)]
    metadata = {"help": help_text, "rules": rules}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """One key of a configuration: dotted name, type as written, default, rules and meaning."""

    name: str
    type: str
    default: Any
    rules: tuple[Rule, ...]
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        return next((rule.choices for rule in self.rules if rule.choices), ())


def keys_of(section: Any, prefix: str = "") -> Iterator[Key]:
    """Yield all keys of a configuration class, in the order of declaration, those of nested sections included."""
    for field in dataclasses.fields(section):
        name = f"{prefix}{field.name}"
        factory = field.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            yield from keys_of(factory, f"{name}.")
            continue
        default = field.default if factory is dataclasses.MISSING else factory()
        assert "help" in field.metadata, f"{name}: say what it means with option()"
        yield Key(name, str(field.type), default, field.metadata["rules"], field.metadata["help"])


def broken_rules(keys: Sequence[Key], value_of: Callable[[str], Any]) -> list[str]:
    """Return ``key=value`` and the rule that it breaks, for every value that breaks one. A null value breaks none."""
    problems = []
    for key in keys:
        value = value_of(key.name)
        if value is None and "None" in key.type:
            continue
        broken = (rule.broken(value) for rule in key.rules)
        problems += [f"{key.name}={value} {words}" for words in broken if words is not None]
    return problems
