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
from steerlm_megatron.report import ablation
from steerlm_megatron.report.checks import checks
from steerlm_megatron.report.cost import cost_data
from steerlm_megatron.report.words import numbers

_AP_KEYS = ("mse", "mae", "pearson", "spearman", "constant_mse", "n")
# These are there where they were measured.
_LENGTH_KEYS = ("length_mse", "length_spearman", "length_gain_low", "length_gain_high")
_CONSTANT_KEYS = ("constant_gain_low", "constant_gain_high")
_INTERVAL_KEYS = ("low", "high", "slope")
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
    if results.get("ap_model"):
        data["ap_model"] = results["ap_model"]
    if results.get("steering"):
        data["steering"] = {name: _steering_row(row) for name, row in results["steering"].items()}
    detail = {name: dict(row) for name, row in (results.get("quality_detail") or {}).items()}
    means = dict(results.get("quality") or {name: row.get("mean") for name, row in detail.items()})
    if means:
        data["quality"] = means
        data["quality_detail"] = detail
    if results.get("quality_pairs"):
        data["quality_pairs"] = list(results["quality_pairs"])
    if results.get("measures"):
        data["measures"] = dict(results["measures"])
    if results.get("bootstrap"):
        data["bootstrap"] = list(results["bootstrap"])
    data["judge"] = results.get("judge")
    data["checks"] = checks(data)
    if results.get("comparison"):
        data["checks"] = {}  # what was expected of each run is in its own report
    if results.get("ablation"):
        data["ablation"] = dict(results["ablation"])
        measured = {name: check for name, check in data["checks"].items() if check["measured"]}
        data["checks"] = ablation.checks(data["ablation"]) | measured
    for name in ("lineage", "distributions", "training", "comparison"):
        if results.get(name):
            data[name] = dict(results[name])
    if results.get("responses"):
        data["responses"] = {"of": len(results["responses"]), "file": results.get("responses_file")}
    data["timings"] = dict(results.get("timings") or {})
    if results.get("cost"):
        cost = results["cost"]  # the steps' costs; in the content of a report.json, the section
        data["cost"] = dict(cost) if {"steps", "total"} == set(cost) else cost_data(cost)
    data["versions"] = dict(results.get("versions") or versions())
    data["examples"] = list(results.get("examples") or [])
    return to_strict_json(data)


def _ap_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row.get(key) for key in _AP_KEYS} | {
        key: row[key] for key in (*_LENGTH_KEYS, *_CONSTANT_KEYS) if key in row
    }


def _steering_row(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row.get(key) for key in _STEERING_KEYS}
    if kept["spearman"] is None and len(numbers(row["measured"])) == len(row["requested"]):
        kept["spearman"] = stats.spearman(row["measured"], row["requested"])
    return kept | {key: row[key] for key in _INTERVAL_KEYS if key in row}
