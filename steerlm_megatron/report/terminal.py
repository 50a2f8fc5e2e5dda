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

from steerlm_megatron.report.data import Results, report_data
from steerlm_megatron.report.words import QUALITY_TITLES, beside_length, number, verdict_word


def terminal_table(results: Results, html_path: str | Path | None = None) -> RenderableType:
    """Return the short closing table of a run, for ``rich``: attributes, quality, checks, and where the report is.

    ``results`` as for ``write_report``, or the content of a ``report.json``.
    """
    data = report_data(results)
    parts: list[RenderableType] = []
    ap, steering = data.get("ap", {}), data.get("steering", {})
    if ap or steering:
        parts.append(_attribute_table(ap, steering))
    if verdicts := beside_length(ap):
        said = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts)
        parts.append(Text(f"AP's MSE against that of the response's length (95 % intervals): {said}"))
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


def _check_table(verdicts: Mapping[str, Mapping[str, Any]]) -> Table:
    styles = {"yes": "green", "in part": "yellow", "no": "bold red", "not measured": "yellow"}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for check in verdicts.values():
        word = verdict_word(check)
        table.add_row(Text(word, styles[word]), Text.assemble(check["statement"], (f" — {check['detail']}", "dim")))
    return table
