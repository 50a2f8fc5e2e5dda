"""The HTML page of a report: one file, readable without a network.

Owns: which numbers the page shows, and their wording. Does not own: the numbers or the checks (``data.py``,
``checks.py``), the page's structure and style (``templates/report.html.j2``, ``templates/report.css``). Invariant: all
text from outside is escaped, and the page refers to nothing outside itself.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from steerlm_megatron.observe.progress import format_seconds
from steerlm_megatron.report import ablation, plots, run_sections, samples
from steerlm_megatron.report.cost import cost_table
from steerlm_megatron.report.words import (
    QUALITY_TITLES,
    beside_length,
    cell,
    cell_parts,
    model_title,
    number,
    verdict_word,
)

TEMPLATES = Path(__file__).parent / "templates"
_AP_COLUMNS = ("mse", "constant_mse", "mae", "pearson", "spearman")
_BADGES = {"yes": "yes", "no": "no"}  # verdict → class of its badge; other verdicts have the class "unknown"


def render_html(data: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the page. ``data`` is the content of ``report.json``; the title, the notes, ``max_level`` and the
    configuration come from ``results`` (see ``write_report``).
    """
    style, script = (f"\n{(TEMPLATES / name).read_text(encoding='utf-8')}" for name in ("report.css", "samples.js"))
    browsed = samples.samples(results.get("responses") or (), results.get("prompt_texts") or {})
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            css=Markup(style),  # the style sheet, the script and the policy are ours and must not be escaped
            script=Markup(script) if browsed else None,
            policy=Markup(policy(style, script if browsed else None)),
            compared=data.get("comparison") is not None,
            run_sections=[_run_section(one) for one in _of_runs(data)],
            samples=_samples(browsed, data.get("responses") or {}),
            title=results.get("title") or "SteerLM report",
            judge=data.get("judge"),
            notes=results.get("notes") or [],
            checks=[_check(check) for check in data["checks"].values()],
            ap=_ap(data.get("ap")),
            ap_model=data.get("ap_model"),
            sections=_sections(data.get("measures") or {}, results.get("max_level")),
            steering=_steering(data.get("steering"), results.get("max_level")),
            quality=_quality(data.get("quality"), data.get("quality_detail") or {}),
            ablation=_ablation(data.get("ablation")),
            rounds=[_round(one) for one in data.get("bootstrap", [])],
            examples=[_example(example) for example in data["examples"]],
            timings=_timings(data["timings"]),
            cost=cost_table(data["cost"]) if data.get("cost") else None,
            versions=data["versions"],
            config=results.get("config"),
        )
    )


def policy(style: str, script: str | None) -> str:
    """Return the page's Content-Security-Policy: this style sheet and this script alone, by their hashes, and pictures
    in the page itself. Nothing is asked of any server, and no script can make markup of text
    (https://www.w3.org/TR/CSP3/, https://www.w3.org/TR/trusted-types/).
    """

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return "; ".join(
        (
            "default-src 'none'",
            f"style-src {source(style)}",
            *([] if script is None else [f"script-src {source(script)}"]),
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _of_runs(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is told of runs: of one, or of several compared."""
    found = data.get("comparison")
    return run_sections.run_sections(data) if found is None else run_sections.comparison_sections(found)


def _run_section(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "title": section["title"],
        "words": section["words"],
        "plots": [(words, _picture(draw()), wide) for words, draw, wide in section["plots"]],
        "tables": [_table(table) for table in section["tables"]],
    }


def _samples(found: Mapping[str, Any] | None, told: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the browser of responses: its JSON, what can be chosen, and the first groups for readers without a
    script.
    """
    if found is None:
        return None
    measured = [name for judge in found["judges"] for name in judge["measured"]]
    return {
        "json": Markup(samples.embedded_json(found)),
        "models": found["models"],
        "attributes": found["attributes"],
        "judges": [judge["name"] for judge in found["judges"]],
        "compared_judges": len(set(measured)) < len(measured),
        "first": samples.first_page(found),
        "groups": len(found["groups"]),
        "shown": found["shown"],
        "of": found["of"],
        "cut": found["cut"],
        "file": told.get("file"),
    }


def _environment() -> Environment:
    """Return the template environment. It escapes every value, and an undefined name is an error instead of nothing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["short"] = _short
    return environment


def _short(value: Any) -> str:
    return number(value, 1) if isinstance(value, float) else str(value)


def _picture(svg: str) -> str:
    """Return a ``data:`` address that embeds an image in the page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _check(check: Mapping[str, Any]) -> dict[str, str]:
    word = verdict_word(check)
    badge = _BADGES.get(word, "unknown")
    return {"word": word, "style": badge, "statement": check["statement"], "detail": check["detail"]}


def _ap(ap: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any] | None:
    if not ap:
        return None
    rows = [[name, *(number(row[key]) for key in _AP_COLUMNS), number(row["n"], 0)] for name, row in ap.items()]
    return {"rows": rows, "plot": _picture(plots.ap_plot(ap)), "length": _length(ap)}


def _length(ap: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the comparison with a predictor that knows a response's length alone, None where it was not measured."""
    verdicts = {name: verdict for verdict, names in beside_length(ap) for name in names}
    if not verdicts:
        return None
    rows = []
    for name, row in ap.items():
        bounds = " to ".join(number(row.get(key)) for key in ("length_gain_low", "length_gain_high"))
        values = [number(row.get(key)) for key in ("mse", "length_mse")]
        ranks = [number(row.get(key)) for key in ("spearman", "length_spearman")]
        rows.append([name, *values, bounds, *ranks, verdicts.get(name, number(None))])
    return {"rows": rows}


def _steering(steering: Mapping[str, Mapping[str, Any]] | None, max_level: int | None) -> dict[str, Any] | None:
    if not steering:
        return None
    curves, rows = [], []
    for name, curve in steering.items():
        curves.append(
            {
                "name": name,
                "plot": _picture(plots.steering_plot(name, curve, max_level)),
                "spearman": number(curve["spearman"], 2),
                "sample_spearman": number(curve["sample_spearman"], 2),
            }
        )
        spread = curve.get("std") or [None] * len(curve["requested"])
        points = zip(curve["requested"], curve["measured"], spread, strict=True)
        rows += [[name, number(level, 0), number(mean, 2), number(std, 2)] for level, mean, std in points]
    return {"curves": curves, "rows": rows}


def _quality(means: Mapping[str, Any] | None, detail: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    if not means:
        return None
    titles = [model_title(name) for name in means]
    rows = [
        [
            title,
            cell({**detail.get(name, {}), "value": mean}),
            number(detail.get(name, {}).get("sem")),
            number(detail.get(name, {}).get("n"), 0),
        ]
        for title, (name, mean) in zip(titles, means.items(), strict=True)
    ]
    absent = ", ".join(title for name, title in QUALITY_TITLES.items() if name not in means)
    return {"rows": rows, "absent": absent, "plot": _picture(plots.quality_plot(means, detail, titles))}


def _ablation(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found:
        return None
    return {
        "header": ablation.ROWS_HEADER,
        "rows": ablation.table_rows(found),
        "steering_header": ablation.STEERING_HEADER,
        "steering": ablation.steering_rows(found),
        "prediction_header": ablation.PREDICTION_HEADER,
        "prediction": ablation.prediction_rows(found),
        "prompts": found["prompts"],
        "seeds": " ".join(map(str, found["seeds"])),
        "quality": found["quality"],
    }


# Measure → the part of the page in which its section stands; the sections of others stand by themselves.
_PARTS = {
    "prediction": "ap", "preferences": "ap", "annotators": "ap", "steering": "steering", "quality": "quality",
    "diversity": "quality", "best_of": "quality", "shift": "quality",
}  # fmt: skip


def _sections(measures: Mapping[str, Mapping[str, Any]], max_level: int | None) -> dict[str, list[dict[str, Any]]]:
    """Return the sections of measures by the part of the page: ``ap``, ``steering``, ``quality``, ``other``."""
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in (*_PARTS.values(), "other")}
    for name, section in measures.items():
        parts[_PARTS.get(name, "other")].append(
            {
                "title": section.get("title") or name,
                "words": section.get("words") or [],
                "plots": _section_plots(name, section, max_level),
                "tables": [_table(table) for table in section.get("tables") or []],
            }
        )
    return parts


def _section_plots(name: str, section: Mapping[str, Any], max_level: int | None) -> list[tuple[str, str, bool]]:
    """Return the plots of a section: what each shows in words, the picture, and whether it is a wide one."""
    if name == "prediction":
        found = section["attributes"]
        top = max([max_level or 0, *(len(row["confusion"]) - 1 for row in found.values())])
        return [
            (
                f"calibration of {key}: labels over predictions, means of bins and single responses",
                _picture(plots.calibration_plot(key, row["calibration"], top, row.get("points") or ())),
                False,
            )
            for key, row in found.items()
        ]
    if name == "steering":
        return [
            (
                f"cross-talk measured by {judge}; the table below has its numbers",
                _picture(plots.cross_talk_plot(judge, found["cross_talk"])),
                True,
            )
            for judge, found in section["judges"].items()
            if found["cross_talk"]
        ]
    return []


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of a section as the template shows it; ``numeric`` says of each column that it has no words."""
    rows = list(table["rows"])
    return {
        "title": table.get("title") or "",
        "words": table.get("words") or [],
        "columns": table["columns"],
        "rows": [[cell_parts(value) for value in row] for row in rows],
        "numeric": [not any(isinstance(row[i], str) for row in rows) for i in range(len(table["columns"]))],
        "folded": bool(table.get("folded")),
    }


_TEXT_MEASURES = {
    "distinct_1": ("distinct-1", 3), "distinct_2": ("distinct-2", 3), "distinct_3": ("distinct-3", 3),
    "self_bleu": ("self-BLEU", 1), "vocabulary": ("different words", 0), "words_mean": ("words, mean", 1),
    "words_p10": ("words, 10 %", 0), "words_median": ("words, median", 0), "words_p90": ("words, 90 %", 0),
}  # fmt: skip
_HOW = {"uniform": "drawn uniformly", "frequency": "drawn by their frequency", "best": "the same for all"}


def _round(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return one round of bootstrapping: what was left out, and both sides of each measure."""
    counts, text, attributes = found["counts"], found["text"], found["attributes"]
    rows = []
    for name, one in attributes.items():
        asked = one["asked"]
        means = [one["before"]["mean"], asked["mean"], asked["measured_mean"], one["after"]["mean"]]
        rows.append([name, *(number(mean, 2) for mean in means), number(asked["mae"], 2), number(asked["pearson"], 2)])
    combined = found["combinations"]
    return {
        "round": found.get("round"),
        "combinations": f"{combined['number']} best combinations, {_HOW.get(combined['drawn'], combined['drawn'])}",
        "counts": [["drawn", number(counts["drawn"], 0)], ["kept", number(counts["kept"], 0)]]
        + [[f"left out: {reason}", number(count, 0)] for reason, count in counts["left_out"].items()],
        "texts": found["sample"]["texts"],
        "texts_for_self_bleu": found["sample"]["texts_for_self_bleu"],
        "text": [
            [title, *(number(text[side].get(key), digits) for side in ("before", "after"))]
            for key, (title, digits) in _TEXT_MEASURES.items()
        ],
        "attributes": rows,
        "plots": [("words of a response", _picture(plots.lengths_plot(found["lengths"])))]
        + [(name, _picture(plots.levels_plot(name, one))) for name, one in attributes.items()],
    }


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example with all fields that the template needs."""
    responses = [{"attributes": {}, "text": "", "measured": {}} | response for response in example.get("responses", [])]
    return {"prompt": example.get("prompt", ""), "responses": responses}


def _timings(timings: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of step and time, with the sum last; no rows if no time was measured."""
    seconds = {name: float(value) for name, value in timings.items() if value is not None}
    if not timings:
        return []
    rows = [[name, format_seconds(value)] for name, value in seconds.items()]
    return [*rows, ["all steps", format_seconds(sum(seconds.values()))]]
