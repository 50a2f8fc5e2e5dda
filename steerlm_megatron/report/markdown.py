"""The report as Markdown: the words and tables of the page, for reviews, notebooks and terminals.

Owns: the file's structure, and what is escaped in it. Does not own: the numbers (``data.py``), the sections of runs
(``run_sections.py``). Invariant: a text from outside stays text: it begins no heading, table cell, link or tag.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steerlm_megatron.observe.progress import format_seconds
from steerlm_megatron.report import ablation, run_sections
from steerlm_megatron.report.cost import cost_table
from steerlm_megatron.report.words import cell, model_title, number, verdict_word

_MARKUP = re.compile(r"([\\`*\[\]|#~])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def render_markdown(data: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the report's Markdown. ``data`` is the content of ``report.json``; the title and the notes come from
    ``results`` (see ``write_report``). Pictures and responses are in the page alone.
    """
    lines = [f"# {escaped(results.get('title') or 'SteerLM report')}", ""]
    if data.get("judge"):
        lines += [f"Measured by: {escaped(data['judge'])}", ""]
    for note in results.get("notes") or []:
        lines += [escaped(note), ""]
    for section in _sections(data):
        lines += _section(section)
    return "\n".join(lines)


def escaped(text: Any) -> str:
    """Return a text on one line, in which nothing is markup."""
    line = " ".join(str(text).split())
    line = "".join(_ENTITIES.get(character, character) for character in line)
    return _MARKUP.sub(r"\\\1", line).encode("utf-8", "backslashreplace").decode()


def _section(section: Mapping[str, Any]) -> Iterable[str]:
    yield from (f"## {escaped(section['title'])}", "")
    for sentence in section.get("words") or ():
        yield from (escaped(sentence), "")
    for table in section.get("tables") or ():
        if table.get("title"):
            yield from (f"### {escaped(table['title'])}", "")
        for sentence in table.get("words") or ():
            yield from (escaped(sentence), "")
        yield from (*_table(table["columns"], table["rows"]), "")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterable[str]:
    """Yield a table's lines; columns without words stand right."""
    words = [any(isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    yield _row(columns)
    yield "|" + "|".join("---" if said else "---:" for said in words) + "|"
    for row in rows:
        yield _row([cell(value) for value in row])


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(escaped(one) for one in cells) + " |"


def _sections(data: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Yield the sections, in the order of the page."""
    if data["checks"]:
        rows = [[verdict_word(one), one["statement"], one["detail"]] for one in data["checks"].values()]
        yield _of_table("What was expected, and whether it held", ("held", "what", "figures"), rows)
    if data.get("comparison"):
        yield from run_sections.comparison_sections(data["comparison"])
    if data.get("ablation"):
        yield _of_table("Ablation", ablation.ROWS_HEADER, ablation.table_rows(data["ablation"]))
    if ap := data.get("ap"):
        keys = ("mse", "constant_mse", "length_mse", "mae", "pearson", "spearman", "n")
        columns = ["attribute", "MSE", "constant's MSE", "length's MSE", "MAE", "Pearson", "Spearman", "labels"]
        rows = [[name, *(row.get(key) for key in keys)] for name, row in ap.items()]
        yield _of_table("Attribute prediction", columns, rows)
    if steering := data.get("steering"):
        rows = [
            [name, level, *_with_bounds(curve, place), curve["spearman"], curve.get("slope")]
            for name, curve in steering.items()
            for place, level in enumerate(curve["requested"])
        ]
        columns = ["attribute", "requested", "mean measured", "Spearman over curve", "slope"]
        yield _of_table("Steering: requested and measured level", columns, rows)
    if quality := data.get("quality"):
        detail = data["quality_detail"]
        rows = [
            [model_title(name), {**detail.get(name, {}), "value": mean}, detail.get(name, {}).get("n")]
            for name, mean in quality.items()
        ]
        yield _of_table("Quality of the models", ("model", "mean quality", "responses"), rows)
    yield from (data.get("measures") or {}).values()
    for one in data.get("bootstrap") or ():
        counts = one["counts"]
        rows = [["drawn", counts["drawn"]], ["kept", counts["kept"]]]
        rows += [[f"left out: {reason}", count] for reason, count in counts["left_out"].items()]
        yield _of_table(f"Bootstrapped responses, round {one.get('round', 1)}", ("responses", "number"), rows)
    if not data.get("comparison"):
        yield from run_sections.run_sections(data)
    if responses := data.get("responses"):
        said = f"{responses['of']} responses were measured."
        where = f" They are in {responses['file']}, and in report.html." if responses.get("file") else ""
        yield {"title": "Responses", "words": [said + where]}
    if timings := {name: value for name, value in data["timings"].items() if value is not None}:
        rows = [[name, format_seconds(float(value))] for name, value in timings.items()]
        yield _of_table("Time", ("step", "time"), rows)
    if data.get("cost"):
        cost = cost_table(data["cost"])
        yield {"title": "Cost", "words": cost["words"], "tables": [{"columns": cost["header"], "rows": cost["rows"]}]}
    yield _of_table(
        "Versions", ("package", "version"), [[name, str(value)] for name, value in data["versions"].items()]
    )


def _of_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
    return {"title": title, "tables": [{"columns": columns, "rows": rows}]}


def _with_bounds(curve: Mapping[str, Any], place: int) -> list[Any]:
    """Return the mean at a place of a curve, with its interval where there is one."""
    bounds = {key: curve[key][place] for key in ("low", "high") if curve.get(key)}
    return [{"value": curve["measured"][place], **bounds} if bounds else number(curve["measured"][place], 2)]
