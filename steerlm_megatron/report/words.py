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


def beside_length(ap: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return pairs of a verdict and the attributes that have it: whether the attribute-prediction model's squared error
    is below that of a predictor which knows a response's length alone, by the 95 % interval of the difference. Nothing
    where that was not measured.
    """
    found: dict[str, list[str]] = {"below": [], "not told apart": [], "above": []}
    for name, row in ap.items():
        low, high = row.get("length_gain_low"), row.get("length_gain_high")
        if is_number(low) and is_number(high):
            found["below" if low > 0 else "above" if high < 0 else "not told apart"].append(name)
    return [(verdict, names) for verdict, names in found.items() if names]


def verdict_word(check: Mapping[str, Any]) -> str:
    """Return ``yes``, ``in part`` (what was measured held, some was not measured), ``no`` or ``not measured``."""
    if check["held"] and None in check["cases"].values():
        return "in part"
    return {True: "yes", False: "no", None: "not measured"}[check["held"]]
