"""The report of a run: ``report.json`` for programs, ``report.html`` for people, a short table for the terminal.

Owns: what is reported and which expectations are checked. Does not own: how numbers are measured (``evaluate.py``) or
how the page looks (``report_html.py``). Invariant: a check says yes or no only about numbers that are there; anything
else is "not measured".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe import stats
from steerlm_megatron.observe.log import console
from steerlm_megatron.observe.runfolder import (
    RunFolder,
    default_run_dir,
    to_strict_json,
    versions,
    write_json_atomic,
    write_text_atomic,
)

MIN_STEERING_SPEARMAN = 0.8
QUALITY_ORDER = ("sft", "acsft", "bootstrapped")
QUALITY_TITLES = {"sft": "plain SFT", "acsft": "ACSFT", "bootstrapped": "bootstrapped"}
_AP_KEYS = ("mse", "mae", "pearson", "spearman", "constant_mse", "n")
_STEERING_KEYS = ("requested", "measured", "spearman", "sample_spearman", "std")
Results = Mapping[str, Any]


def write_report(run_dir: str | Path, results: Results) -> tuple[Path, Path]:
    """Writes ``report.html`` and ``report.json`` into ``run_dir`` and returns their paths, in this order.

    ``results`` has any of these; a part that is missing is left out of the JSON and said to be missing in the HTML:
        ap: {attribute: {mse, mae, pearson, spearman, constant_mse, n}}
        steering: {attribute: {requested: [level], measured: [mean], std: [per level], spearman, sample_spearman}};
            ``spearman`` (requested against mean measured) is computed where absent
        quality: {sft, acsft, bootstrapped} means; quality_detail: {name: {mean, sem, n}}, which alone is enough
        judge: what measured ``steering`` and ``quality``
        examples: [{prompt, responses: [{attributes: {name: level}, text, measured: {name: value}}]}]
        timings: {step: seconds}; versions: {package: version} (this process's where absent)
        title, notes: [sentence], max_level, config: YAML text — HTML only
    """
    html_path, json_path = Path(run_dir) / "report.html", Path(run_dir) / "report.json"
    data = report_data(results)
    write_json_atomic(json_path, data)
    from steerlm_megatron.stages.report_html import render_html  # matplotlib takes half a second to import

    write_text_atomic(html_path, render_html(data, results))
    return html_path, json_path


def report_data(results: Results) -> dict[str, Any]:
    """The content of ``report.json``: the measured parts of ``results``, and ``checks``. Non-finite numbers are
    None.
    """
    data: dict[str, Any] = {}
    if results.get("ap"):
        data["ap"] = {name: {key: row.get(key) for key in _AP_KEYS} for name, row in results["ap"].items()}
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


def _steering_row(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row.get(key) for key in _STEERING_KEYS}
    if kept["spearman"] is None and len(_numbers(row["measured"])) == len(row["requested"]):
        kept["spearman"] = stats.spearman(row["measured"], row["requested"])
    return kept


def _numbers(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values if _is_number(value)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def checks(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The three expectations, each ``{statement, measured, held, detail, cases}``.

    ``measured``: the numbers are there. ``held``: true or false, None if not measured. ``detail``: the numbers in
    words. ``cases``: per attribute (or per comparison) true, false, or None for one not measured; ``held`` needs
    every measured case, and at least one.
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
        known = _is_number(row["mse"]) and _is_number(row["constant_mse"])
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
        measured = _numbers(row["measured"])
        if len(measured) < 2 or len(measured) != len(row["requested"]):
            cases[name] = None
            continue
        # A flat curve has no rank correlation: it was measured, and it does not rise.
        rank = row["spearman"] if _is_number(row["spearman"]) else None
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
        if not (_is_number(a) and _is_number(b)):
            cases[name] = None
            continue
        cases[name] = bool(a < b if strict else a <= b)
        errors = _numbers([detail.get(side, {}).get("sem") for side in (low, high)])
        words.append(f"{QUALITY_TITLES[low]} {a:.3f}, {QUALITY_TITLES[high]} {b:.3f}")
        if len(errors) == 2:
            spread = math.hypot(*errors)
            words[-1] += f" (difference {b - a:+.3f}, standard error {spread:.3f})"
    statement = "Mean quality orders as plain SFT < ACSFT ≤ bootstrapped"
    return _verdict(statement, cases, "; ".join(words))


def verdict_word(check: Mapping[str, Any]) -> str:
    """``yes``, ``in part`` (what was measured held, some was not measured), ``no`` or ``not measured``."""
    if check["held"] and None in check["cases"].values():
        return "in part"
    return {True: "yes", False: "no", None: "not measured"}[check["held"]]


def number(value: Any, digits: int = 3) -> str:
    """A number for people; ``–`` for what has no value."""
    if not _is_number(value):
        return "–"
    return f"{value:,.{digits}f}"


def terminal_table(results: Results, html_path: str | Path | None = None) -> RenderableType:
    """The short closing table of a run, for ``rich``: attributes, quality, checks, and where the report is.

    ``results`` as for ``write_report``, or the content of a ``report.json``.
    """
    data = report_data(results)
    parts: list[RenderableType] = []
    ap, steering = data.get("ap", {}), data.get("steering", {})
    if ap or steering:
        parts.append(_attribute_table(ap, steering))
    if data.get("quality"):
        judge = f" (judge: {data['judge']})" if data["judge"] else ""
        line = " · ".join(
            f"{QUALITY_TITLES.get(name, name)} {number(value, 2)}" for name, value in data["quality"].items()
        )
        parts.append(Text(f"Mean quality{judge}: {line}"))
    parts.append(_check_table(data["checks"]))
    if html_path is not None:
        parts.append(Text(f"Report: {html_path}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def _attribute_table(ap: Mapping[str, Any], steering: Mapping[str, Any]) -> Table:
    table = Table(
        title="SteerLM", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )  # 80 columns hold it
    table.add_column("\nattribute", no_wrap=True)
    ends = ("level\nasked", "level\nmeasured", "steering\nSpearman")
    for column in ("AP\nMSE", "constant\nMSE", "AP\nSpearman", *ends):
        table.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys([*ap, *steering]):
        row, curve = ap.get(name, {}), steering.get(name)
        curve_cells = ["–", "–", "–"]
        if curve is not None and curve["requested"]:
            levels, measured = curve["requested"], curve["measured"]
            curve_cells = [
                f"{number(levels[0], 0)} → {number(levels[-1], 0)}",
                f"{number(measured[0], 2)} → {number(measured[-1], 2)}",
                number(curve["spearman"], 2),
            ]
        table.add_row(
            name, number(row.get("mse")), number(row.get("constant_mse")), number(row.get("spearman"), 2), *curve_cells
        )
    return table


def _check_table(verdicts: Mapping[str, Mapping[str, Any]]) -> Table:
    styles = {"yes": "green", "in part": "yellow", "no": "bold red", "not measured": "yellow"}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for check in verdicts.values():
        word = verdict_word(check)
        table.add_row(Text(word, styles[word]), Text.assemble(check["statement"], (f" — {check['detail']}", "dim")))
    return table


def run(config: Config) -> None:
    """``steerlm report input=RUN_FOLDER``: render the ``evaluation.json`` of an evaluation again."""
    if config.input is None:
        raise UserError("input is not set: name the run folder of steerlm evaluate, or its evaluation.json")
    path = Path(config.input)
    path = path / "evaluation.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"input={config.input}: {path} cannot be read as an evaluation ({error})") from None
    with RunFolder(config.run_dir or default_run_dir("report"), "report", overwrite=config.overwrite) as here:
        html, data = write_report(here.path, results)
        here.update(outputs={"report": str(html), "report_json": str(data)})
        console().print(terminal_table(results, html))
