"""The content of ``report.json``.

Owns: which of an evaluation's numbers a report has, and their names, which programs rely on. Does not own: judging the
numbers (``checks.py``). Invariant: a number that was not measured is absent or null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm_megatron.files import to_strict_json
from steerlm_megatron.observe import stats
from steerlm_megatron.observe.runfolder import versions
from steerlm_megatron.report.checks import checks
from steerlm_megatron.report.words import numbers

_AP_KEYS = ("mse", "mae", "pearson", "spearman", "constant_mse", "n")
_LENGTH_KEYS = ("length_mse", "length_spearman", "length_gain_low", "length_gain_high")  # where it was measured
_STEERING_KEYS = ("requested", "measured", "spearman", "sample_spearman", "std")
Results = Mapping[str, Any]


def report_data(results: Results) -> dict[str, Any]:
    """Return the content of ``report.json``: the measured parts of ``results`` (their keys: ``write_report``), and
    ``checks``.

    Numbers that are not finite become None.
    """
    data: dict[str, Any] = {}
    if results.get("ap"):
        data["ap"] = {name: _ap_row(row) for name, row in results["ap"].items()}
    if results.get("steering"):
        data["steering"] = {name: _steering_row(row) for name, row in results["steering"].items()}
    detail = {name: dict(row) for name, row in (results.get("quality_detail") or {}).items()}
    means = dict(results.get("quality") or {name: row.get("mean") for name, row in detail.items()})
    if means:
        data["quality"] = means
        data["quality_detail"] = detail
    data["judge"] = results.get("judge")
    data["checks"] = checks(data)
    data["timings"] = dict(results.get("timings") or {})
    data["versions"] = dict(results.get("versions") or versions())
    data["examples"] = list(results.get("examples") or [])
    return to_strict_json(data)


def _ap_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row.get(key) for key in _AP_KEYS} | {key: row[key] for key in _LENGTH_KEYS if key in row}


def _steering_row(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row.get(key) for key in _STEERING_KEYS}
    if kept["spearman"] is None and len(numbers(row["measured"])) == len(row["requested"]):
        kept["spearman"] = stats.spearman(row["measured"], row["requested"])
    return kept
