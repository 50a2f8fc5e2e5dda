"""The short table that a run prints at its end.

Owns: the choice of numbers that fit there, and their layout. Does not own: the numbers (``data.py``).
Invariant: the table of attributes fits into 80 columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from steerlm_megatron.report import ablation
from steerlm_megatron.report.cost import cost_line
from steerlm_megatron.report.data import Results, report_data
from steerlm_megatron.report.words import beside_length, cell, is_number, model_title, number, verdict_word


def terminal_table(results: Results, html_path: str | Path | None = None) -> RenderableType:
    """Return the short closing table of a run, for ``rich``: attributes, quality, checks, and where the report is.

    ``results`` as for ``write_report``, or the content of a ``report.json``.
    """
    data = report_data(results)
    parts: list[RenderableType] = []
    ap, steering = data.get("ap", {}), data.get("steering", {})
    if ap or steering:
        parts.append(_attribute_table(ap, steering))
    if data.get("ap_model"):
        parts.append(Text(f"AP, the attribute-prediction model: {data['ap_model']}"))
    if verdicts := beside_length(ap):
        said = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts)
        parts.append(Text(f"AP's MSE against that of the response's length (95 % intervals): {said}"))
    if data.get("quality"):
        judge = f" (judge: {data['judge']})" if data["judge"] else ""
        detail = data["quality_detail"]
        line = " · ".join(
            f"{model_title(name)} {number(value, 2)}{_bounds(detail.get(name, {}))}"
            for name, value in data["quality"].items()
        )
        parts.append(Text(f"Mean quality{judge}: {line}"))
    for section in data.get("measures", {}).values():
        if section.get("summary"):
            said = " · ".join(f"{words} {cell(value)}" for words, value in section["summary"])
            parts.append(Text(f"{section['title']}: {said}"))
    for one in data.get("bootstrap", []):
        parts.append(Text(_bootstrapping(one)))
    if data.get("ablation"):
        parts.append(_ablation_table(data["ablation"]))
    if data.get("comparison"):
        parts += _comparison(data["comparison"])
    if data.get("cost"):
        parts.append(Text(cost_line(data["cost"])))
    parts.append(_check_table(data["checks"]))
    if html_path is not None:
        parts.append(Text(f"Report: {html_path}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def _comparison(found: Mapping[str, Any]) -> list[RenderableType]:
    """Return what a comparison of runs found in short: what each run lacks, how many keys differ, the differences."""
    lines = [f"{one['name']}: {line}" for one in found["about"] for line in one["lacking"]]
    keys = sum(not one["key"].startswith("version of ") for one in found["config"])
    lines.append(f"{len(found['runs'])} runs; {keys} keys of their configurations differ")
    for section in found["sections"]:
        if section["summary"]:
            said = " · ".join(f"{words} {cell(value)}" for words, value in section["summary"])
            lines.append(f"{section['title']}: {said}")
    return [Text(line) for line in lines]


def _attribute_table(ap: Mapping[str, Any], steering: Mapping[str, Any]) -> Table:
    table = Table(title="SteerLM", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
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


def _ablation_table(found: Mapping[str, Any]) -> Table:
    """Return the rows of an ablation beside the paper's; what does not fit there is in the report."""
    said = f"Ablation: mean {found['quality']}, {found['prompts']} prompts, seeds: {' '.join(map(str, found['seeds']))}"
    table = Table(title=said, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("\nmodel", no_wrap=True)
    for column in (found["quality"], "gain (95 %)", "steer-\ning", "paper,\n%"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        gain, steering, paper = row.get("gain"), row.get("steering"), row.get("paper")
        table.add_row(
            ablation.row_title(row["name"]),
            number(row["quality"]["mean"], 2),
            "" if gain is None else f"{gain['mean']:+.2f} ({ablation.between(gain)})",
            "" if steering is None else number(steering["mean"], 2),
            "" if paper is None else number(paper["percent"], 1),
        )
    return table


def _bounds(row: Mapping[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return f" ({number(low, 2)} to {number(high, 2)})" if is_number(low) and is_number(high) else ""


def _bootstrapping(found: Mapping[str, Any]) -> str:
    """Return a round of bootstrapping in one line: what was kept, and how varied that is."""
    counts, text = found["counts"], found["text"]
    left_out = ", ".join(f"{reason} {count}" for reason, count in counts["left_out"].items())
    shift = " → ".join(number(text[side]["distinct_2"]) for side in ("before", "after"))
    said = f"Bootstrapping, round {found.get('round', 1)}: {counts['kept']} of {counts['drawn']} responses kept"
    return f"{said}{f' (left out: {left_out})' if left_out else ''}; distinct-2 {shift}"


def _check_table(verdicts: Mapping[str, Mapping[str, Any]]) -> Table:
    styles = {"yes": "green", "in part": "yellow", "no": "bold red"}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for check in verdicts.values():
        word = verdict_word(check)
        table.add_row(
            Text(word, styles.get(word, "yellow")), Text.assemble(check["statement"], (f" — {check['detail']}", "dim"))
        )
    return table
