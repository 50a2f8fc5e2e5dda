"""Check which of a run's three expectations held.

Owns: the expectations and when each is met. Does not own: measuring (``stages/evaluate.py``).
Invariant: a check says yes or no only about numbers that exist; otherwise it says "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steerlm_megatron.report.words import QUALITY_TITLES, is_number, numbers

MIN_STEERING_SPEARMAN = 0.8


def checks(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the three expectations, each ``{statement, measured, held, detail, cases}``.

    ``measured`` says whether the numbers exist, ``held`` is true or false, or None if not measured, ``detail`` has the
    numbers in words, and ``cases`` has per attribute (or per comparison) true, false, or None for one not measured.
    ``held`` needs every measured case to hold, and at least one.
    """
    return {
        "ap_beats_constant": _check_ap(data.get("ap") or {}),
        "steering_monotone": _check_steering(data.get("steering") or {}),
        "quality_order": _check_quality(data.get("quality") or {}, data.get("quality_detail") or {}),
    }


def _verdict(statement: str, cases: Mapping[str, bool | None], detail: str) -> dict[str, Any]:
    known = [case for case in cases.values() if case is not None]
    unknown = [name for name, case in cases.items() if case is None]
    if unknown and known:
        detail = f"{detail}; not measured: {', '.join(unknown)}"
    held = all(known) if known else None
    return {
        "statement": statement,
        "measured": bool(known),
        "held": held,
        "detail": detail or "no numbers",
        "cases": dict(cases),
    }


def _check_ap(ap: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cases: dict[str, bool | None] = {}
    for name, row in ap.items():
        known = is_number(row["mse"]) and is_number(row["constant_mse"])
        cases[name] = row["mse"] < row["constant_mse"] if known else None
    lost = [name for name, case in cases.items() if case is False]
    losing = [f"{name} {ap[name]['mse']:.3g} ≥ {ap[name]['constant_mse']:.3g}" for name in lost]
    won = sum(case is True for case in cases.values())
    detail = f"{won} of {won + len(losing)} attributes" + (f"; not for {', '.join(losing)}" if losing else "")
    statement = "The attribute-prediction model's squared error is below the constant predictor's, for every attribute"
    return _verdict(statement, cases, detail if won or losing else "")


def _check_steering(steering: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cases: dict[str, bool | None] = {}
    words = []
    for name, row in steering.items():
        measured = numbers(row["measured"])
        if len(measured) < 2 or len(measured) != len(row["requested"]):
            cases[name] = None
            continue
        # A flat curve has no rank correlation, but it was measured, and it does not rise.
        rank = row["spearman"] if is_number(row["spearman"]) else None
        cases[name] = rank is not None and rank >= MIN_STEERING_SPEARMAN
        words.append(f"{name} {rank:.2f}" if rank is not None else f"{name} flat")
    statement = (
        "Each steered attribute rises with the requested level "
        f"(Spearman ≥ {MIN_STEERING_SPEARMAN} between requested and mean measured level)"
    )
    return _verdict(statement, cases, ", ".join(words))


def _check_quality(quality: Mapping[str, Any], detail: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cases: dict[str, bool | None] = {}
    words = []
    for low, high, strict in (("sft", "acsft", True), ("acsft", "bootstrapped", False)):
        a, b = quality.get(low), quality.get(high)
        name = f"{QUALITY_TITLES[low]} {'<' if strict else '≤'} {QUALITY_TITLES[high]}"
        if not (is_number(a) and is_number(b)):
            cases[name] = None
            continue
        cases[name] = bool(a < b if strict else a <= b)
        errors = numbers([detail.get(side, {}).get("sem") for side in (low, high)])
        words.append(f"{QUALITY_TITLES[low]} {a:.3f}, {QUALITY_TITLES[high]} {b:.3f}")
        if len(errors) == 2:
            spread = math.hypot(*errors)
            words[-1] += f" (difference {b - a:+.3f}, standard error {spread:.3f})"
    statement = "Mean quality orders as plain SFT < ACSFT ≤ bootstrapped"
    return _verdict(statement, cases, "; ".join(words))
