"""Check which of a run's three expectations held.

Owns: the expectations and when each is met. Does not own: measuring (``steerlm_megatron/evaluate``).
Invariants: a check says yes or no only about numbers that exist; otherwise it says "not measured". Where there is an
interval, a difference counts only if its interval does not include zero; otherwise the check says "not told apart".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from steerlm_megatron.report.words import QUALITY_TITLES, cell, is_number, model_title, numbers

MIN_STEERING_SPEARMAN = 0.8
_NORMAL_95 = 1.96  # standard errors of half an interval of 95 %


def checks(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the three expectations, each ``{statement, measured, held, detail, cases, undecided}``.

    ``measured`` says whether the numbers exist, ``held`` is true or false, or None if not measured, ``detail`` has the
    numbers in words, and ``cases`` has per attribute (or per comparison) true, false, or None for one not measured.
    ``held`` needs every measured case to hold, and at least one. ``undecided`` names the cases that are false only
    because an interval includes zero.
    """
    return {
        "ap_beats_constant": _check_ap(data.get("ap") or {}),
        "steering_monotone": _check_steering(data.get("steering") or {}),
        "quality_order": _check_quality(data),
    }


def _sign(low: Any, high: Any) -> int | None:
    """Return whether an interval is above zero (1), below (-1), or includes it (0); None without one."""
    if not (is_number(low) and is_number(high)):
        return None
    return 1 if low > 0 else -1 if high < 0 else 0


def verdict(
    statement: str, cases: Mapping[str, bool | None], detail: str, undecided: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a check, as :func:`checks` describes it, from its cases."""
    known = [case for case in cases.values() if case is not None]
    unknown = [name for name, case in cases.items() if case is None]
    if undecided:
        detail = f"{detail}; not told apart: {', '.join(undecided)}"
    if unknown and known:
        detail = f"{detail}; not measured: {', '.join(unknown)}"
    held = all(known) if known else None
    return {
        "statement": statement,
        "measured": bool(known),
        "held": held,
        "detail": detail or "no numbers",
        "cases": dict(cases),
        "undecided": list(undecided),
    }


def _check_ap(ap: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cases: dict[str, bool | None] = {}
    undecided = []
    for name, row in ap.items():
        known = is_number(row["mse"]) and is_number(row["constant_mse"])
        sign = _sign(row.get("constant_gain_low"), row.get("constant_gain_high")) if known else None
        cases[name] = (row["mse"] < row["constant_mse"] if sign is None else sign > 0) if known else None
        if sign == 0:
            undecided.append(name)
    lost = [name for name, case in cases.items() if case is False and name not in undecided]
    losing = [f"{name} {ap[name]['mse']:.3g} ≥ {ap[name]['constant_mse']:.3g}" for name in lost]
    won = sum(case is True for case in cases.values())
    detail = f"{won} of {won + len(losing) + len(undecided)} attributes"
    detail += f"; not for {', '.join(losing)}" if losing else ""
    statement = "The attribute-prediction model's squared error is below the constant predictor's, for every attribute"
    return verdict(statement, cases, detail if won or losing or undecided else "", undecided)


def _check_steering(steering: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cases: dict[str, bool | None] = {}
    words, undecided = [], []
    for name, row in steering.items():
        measured = numbers(row["measured"])
        if len(measured) < 2 or len(measured) != len(row["requested"]):
            cases[name] = None
            continue
        # A flat curve has no rank correlation, but it was measured, and it does not rise.
        rank = row["spearman"] if is_number(row["spearman"]) else None
        slope = row.get("slope") or {}
        sign = _sign(slope.get("low"), slope.get("high"))
        cases[name] = rank is not None and rank >= MIN_STEERING_SPEARMAN and sign in (None, 1)
        if sign == 0:
            undecided.append(name)
        words.append(f"{name} {rank:.2f}" if rank is not None else f"{name} flat")
        if sign is not None:
            words[-1] += f" (slope {cell(slope)})"
    statement = (
        "Each steered attribute rises with the requested level "
        f"(Spearman ≥ {MIN_STEERING_SPEARMAN} between requested and mean measured level)"
    )
    return verdict(statement, cases, ", ".join(words), undecided)


def _check_quality(data: Mapping[str, Any]) -> dict[str, Any]:
    quality, detail = data.get("quality") or {}, data.get("quality_detail") or {}
    cases: dict[str, bool | None] = {}
    words, undecided = [], []
    second = [name for name in quality if name.startswith("steerlm2")]
    later = [name for name in quality if name not in QUALITY_TITLES and name not in second]
    models = [*QUALITY_TITLES, *later]
    second = ["acsft", *second] if second else []  # SteerLM 2.0 goes on from the conditioned model as well
    for low, high in (*pairwise(models), *pairwise(second)):
        strict = low == "sft"
        a, b = quality.get(low), quality.get(high)
        name = f"{model_title(low)} {'<' if strict else '≤'} {model_title(high)}"
        if not (is_number(a) and is_number(b)):
            cases[name] = None
            continue
        difference = _difference(data, detail, low, high, b - a)
        sign = _sign(difference.get("low"), difference.get("high"))
        cases[name] = bool(a < b if strict else a <= b) if sign is None else sign > 0
        if sign == 0:
            undecided.append(name)
        words.append(f"{model_title(low)} {a:.3f}, {model_title(high)} {b:.3f}")
        if sign is not None:
            words[-1] += f" (difference {cell(difference)})"
    statement = "Mean quality orders as plain SFT < " + " ≤ ".join(map(model_title, models[1:]))
    if second:
        statement += ", and as " + " ≤ ".join(map(model_title, second))
    return verdict(statement, cases, "; ".join(words), undecided)


def _difference(
    data: Mapping[str, Any], detail: Mapping[str, Mapping[str, Any]], low: str, high: str, value: float
) -> Mapping[str, Any]:
    """Return the difference of two models' mean quality with its interval: the paired one where it was measured, else
    the one that follows from the standard errors, which is wider; an empty mapping without either.
    """
    for pair in data.get("quality_pairs") or ():
        if (pair["low"], pair["high"]) == (low, high):
            return pair["difference"]
    errors = numbers([detail.get(side, {}).get("sem") for side in (low, high)])
    if len(errors) < 2:
        return {}
    half = _NORMAL_95 * math.hypot(*errors)
    return {"value": value, "low": value - half, "high": value + half}
