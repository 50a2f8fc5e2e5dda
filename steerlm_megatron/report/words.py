"""The words and number forms that the page and the terminal's table share.

Owns: how a number, a model's name and a verdict are written for people. Does not own: the verdicts (``checks.py``).
Invariant: a missing value is written as a dash, never as a zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

QUALITY_TITLES = {"sft": "plain SFT", "acsft": "ACSFT", "bootstrapped": "bootstrapped"}
STEERLM2_TITLE = "SteerLM 2.0"


def model_title(name: str) -> str:
    """Return what a report calls a model: ``bootstrapped_2`` is of the second round of bootstrapping,
    ``steerlm2_2`` of the second iteration of SteerLM 2.0.
    """
    kind, _, number = name.rpartition("_")
    if kind == "bootstrapped" and number.isdigit():
        return f"round {number}"
    if name == "steerlm2" or (kind == "steerlm2" and number.isdigit()):
        return STEERLM2_TITLE if kind != "steerlm2" else f"{STEERLM2_TITLE}, iteration {number}"
    return QUALITY_TITLES.get(name, name)


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


def cell(value: Any) -> str:
    """Write a cell of a table for people: a text as it is, a number with digits that suit its size, and a figure
    ``{value, low, high}`` with its interval: ``0.71 (0.68 to 0.74)``.
    """
    return " ".join(part for part in cell_parts(value) if part)


def cell_parts(value: Any) -> tuple[str, str]:
    """Return the two parts of a cell: the value, and its interval in parentheses, empty where there is none."""
    if isinstance(value, Mapping):
        places = _digits(value.get("value"))
        shown = number(value.get("value"), places)
        low, high = value.get("low"), value.get("high")
        if not (is_number(low) and is_number(high)):
            return shown, ""
        return shown, f"({number(low, places)} to {number(high, places)})"
    if isinstance(value, str):
        return value, ""
    return number(value, 0 if isinstance(value, int) else _digits(value)), ""


def _digits(value: Any) -> int:
    size = abs(value) if is_number(value) else 0.0
    return 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3


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
    """Return ``yes``, ``in part`` (what was measured held, some was not measured), ``no``, ``not told apart`` (nothing
    failed, but an interval includes zero) or ``not measured``.
    """
    if check["held"] and None in check["cases"].values():
        return "in part"
    failed = {name for name, case in check["cases"].items() if case is False}
    if failed and failed <= set(check.get("undecided") or ()):
        return "not told apart"
    return {True: "yes", False: "no", None: "not measured"}[check["held"]]
