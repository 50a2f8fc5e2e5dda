"""The words and number forms that the page and the terminal's table share.

Owns: how a number, a model's name and a verdict are written for people. Does not own: the verdicts (``checks.py``).
Invariant: a missing value is written as a dash, never as a zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

QUALITY_TITLES = {"sft": "plain SFT", "acsft": "ACSFT", "bootstrapped": "bootstrapped"}


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether ``value`` is a finite number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def numbers(values: Sequence[Any]) -> list[float]:
    """Return those of ``values`` that are finite numbers."""
    return [float(value) for value in values if is_number(value)]


def number(value: Any, digits: int = 3) -> str:
    """Write a number for people, and ``–`` for a missing value."""
    if not is_number(value):
        return "–"
    return f"{value:,.{digits}f}"


def verdict_word(check: Mapping[str, Any]) -> str:
    """Return ``yes``, ``in part`` (what was measured held, some was not measured), ``no`` or ``not measured``."""
    if check["held"] and None in check["cases"].values():
        return "in part"
    return {True: "yes", False: "no", None: "not measured"}[check["held"]]
