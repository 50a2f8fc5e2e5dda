"""What a report says of an ablation: its tables, and which expectations held.

Owns: the wording and the columns, for the page and the terminal. Does not own: the numbers
(``stages/ablation_report.py``, whose result is ``ablation`` in ``report.json``). Invariant: a row is called better than
another only where the interval of their difference lies above zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm_megatron.report.checks import verdict
from steerlm_megatron.report.words import number

TITLES = {
    "sft": "plain SFT",
    "human": "+ labels by people",
    "predicted": "+ labels by prediction",
    "bootstrapped": "+ bootstrapping",
    "generative": "labels by generative AP",
    "shuffled": "control: shuffled labels",
    "partial": "a part of the labels",
}
PAPER_ORDER = ("human", "predicted", "bootstrapped")
ROWS_HEADER = (
    "model",
    "quality",
    "95 % interval",
    "by seed",
    "gain",
    "over",
    "is",
    "steering",
    "paper",
    "paper's gain",
)
STEERING_HEADER = ("model", "attribute", "slope", "95 % interval", "verdict")
PREDICTION_HEADER = ("kind", "attribute", "MSE", "by seed", "constant's MSE", "labels")


def row_title(name: str) -> str:
    """Return what a report calls a row: ``bootstrapped_2`` is the second round of bootstrapping."""
    kind, _, number_of_round = name.partition("_")
    title = TITLES.get(kind, kind)
    return f"{title}, round {number_of_round}" if number_of_round else title


def between(interval: Mapping[str, Any], digits: int = 2) -> str:
    """Write the bounds of an interval."""
    return f"{number(interval['low'], digits)} to {number(interval['high'], digits)}"


def table_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of the main table, under ``ROWS_HEADER``."""
    rows = []
    for row in found["rows"]:
        quality, gain, steering, paper = row["quality"], row.get("gain"), row.get("steering"), row.get("paper")
        seeds = " ".join(number(value, 2) for value in quality["by_seed"])
        cells = [row_title(row["name"]), number(quality["mean"], 2), between(quality), seeds]
        if gain is None:
            cells += ["", "", ""]
        else:
            cells += [f"{gain['mean']:+.2f} ({between(gain)})", row_title(row["over"]), gain["verdict"]]
        cells.append("" if steering is None else f"{number(steering['mean'], 2)} ({between(steering)})")
        cells.append("" if paper is None else number(paper["percent"], 1))
        cells.append("" if paper is None or paper["gain"] is None else f"{paper['gain']:+.1f}")
        rows.append(cells)
    return rows


def steering_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of the table of steering, under ``STEERING_HEADER``."""
    return [
        [row_title(row["name"]), name, number(one["mean"], 3), between(one, 3), one["verdict"]]
        for row in found["rows"]
        for name, one in (row.get("steering") or {}).get("attributes", {}).items()
    ]


def prediction_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of the table of attribute prediction, under ``PREDICTION_HEADER``."""
    return [
        [
            kind, name, number(row["mse"]), " ".join(number(value, 2) for value in row["mse_by_seed"]),
            number(row["constant_mse"]), number(row["n"], 0),
        ]
        for kind, table in found.get("ap", {}).items()
        for name, row in table.items()
    ]  # fmt: skip


def checks(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the expectations of an ablation, each like those of ``report/checks.py``."""
    by_name = {row["name"]: row for row in found["rows"]}
    order = [row for row in found["rows"] if row["name"].partition("_")[0] in PAPER_ORDER and row.get("gain")]
    return {
        "ablation_order": verdict(
            "Each row of the paper's order is better than the one before, its interval above zero",
            {row_title(row["name"]): row["gain"]["verdict"] == "higher" for row in order},
            ", ".join(f"{row_title(row['name'])}: {row['gain']['verdict']} ({between(row['gain'])})" for row in order),
            [row_title(row["name"]) for row in order if row["gain"]["verdict"] == "not told apart"],
        ),
        "control_flat": _steers(by_name.get("shuffled"), "flat", "The control with shuffled labels is not steered"),
        "conditioned_steers": _steers(by_name.get("predicted"), "steers", "The model with predicted labels is steered"),
        "kinds_beat_constant": _beat_constant(found.get("ap", {})),
    }


def _steers(row: Mapping[str, Any] | None, wanted: str, statement: str) -> dict[str, Any]:
    steering = (row or {}).get("steering")
    if steering is None:
        return verdict(statement, {}, "")
    detail = f"{number(steering['mean'])} per level asked, {between(steering, 3)}"
    return verdict(statement, {"steering": steering["verdict"] == wanted}, detail)


def _beat_constant(ap: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cases: dict[str, bool | None] = {
        f"{kind} {name}": row["mse"] < row["constant_mse"] for kind, table in ap.items() for name, row in table.items()
    }
    lost = ", ".join(name for name, held in cases.items() if not held)
    return verdict(
        "Each kind of attribute prediction has a squared error below the constant's, for every attribute",
        cases,
        ", ".join(ap) + (f"; not for: {lost}" if lost else ""),
    )
