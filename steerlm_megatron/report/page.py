"""The HTML page of a report: one file, readable without a network.

Owns: which numbers the page shows, and their wording. Does not own: the numbers or the checks (``data.py``,
``checks.py``), the page's structure and style (``templates/report.html.j2``, ``templates/report.css``). Invariant: all
text from outside is escaped, and the page refers to nothing outside itself.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from steerlm_megatron.observe.progress import format_seconds
from steerlm_megatron.report import plots
from steerlm_megatron.report.words import QUALITY_TITLES, beside_length, number, verdict_word

TEMPLATES = Path(__file__).parent / "templates"
_AP_COLUMNS = ("mse", "constant_mse", "mae", "pearson", "spearman")
_BADGES = {"yes": "yes", "no": "no"}  # verdict → class of its badge; other verdicts have the class "unknown"


def render_html(data: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the page. ``data`` is the content of ``report.json``; the title, the notes, ``max_level`` and the
    configuration come from ``results`` (see ``write_report``).
    """
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            css=Markup(
                (TEMPLATES / "report.css").read_text(encoding="utf-8")
            ),  # the style sheet is ours and must not be escaped
            title=results.get("title") or "SteerLM report",
            judge=data.get("judge"),
            notes=results.get("notes") or [],
            checks=[_check(check) for check in data["checks"].values()],
            ap=_ap(data.get("ap")),
            steering=_steering(data.get("steering"), results.get("max_level")),
            quality=_quality(data.get("quality"), data.get("quality_detail") or {}),
            examples=[_example(example) for example in data["examples"]],
            timings=_timings(data["timings"]),
            versions=data["versions"],
            config=results.get("config"),
        )
    )


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
    titles = [QUALITY_TITLES.get(name, name) for name in means]
    rows = [
        [title, number(mean), number(detail.get(name, {}).get("sem")), number(detail.get(name, {}).get("n"), 0)]
        for title, (name, mean) in zip(titles, means.items(), strict=True)
    ]
    absent = ", ".join(title for name, title in QUALITY_TITLES.items() if name not in means)
    return {"rows": rows, "absent": absent, "plot": _picture(plots.quality_plot(means, detail, titles))}


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
