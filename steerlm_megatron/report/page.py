"""The HTML page of a report: one file, light, readable without a network.

Owns: the page's structure and look. Does not own: the numbers or the checks (``data.py``, ``checks.py``).
Invariant: everything that came from outside is escaped, and the page refers to nothing outside itself.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from steerlm_megatron.observe.progress import format_seconds
from steerlm_megatron.report import plots
from steerlm_megatron.report.words import QUALITY_TITLES, number, verdict_word

_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #fafbfc; color: #1f2933; font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica
Neue", Arial,
  "Liberation Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 36px 28px 80px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 44px 0 10px; padding-bottom: 5px; border-bottom: 1px solid #dde3ea; }
p { margin: 8px 0; } .muted { color: #616e7c; } .small { font-size: 13px; }
table { border-collapse: collapse; margin: 12px 0; background: #fff; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px; border-bottom: 1px solid #e8ecf1; text-align: left; vertical-align: top; }
th { font-weight: 600; font-size: 13px; color: #52606d; background: #f3f5f8; }
td.n, th.n { text-align: right; }
.card { background: #fff; border: 1px solid #e4e8ee; border-radius: 8px; padding: 14px 18px; margin: 14px 0; }
.checks { padding: 4px 18px; } .check { display: grid; grid-template-columns: 118px 1fr; padding: 11px 0; }
.check + .check { border-top: 1px solid #eef1f5; }
.badge { justify-self: start; align-self: start;
  border-radius: 11px; padding: 1px 11px; font-size: 13px; font-weight: 600; }
.yes { background: #dff3e4; color: #14663a; } .no { background: #fde3e1; color: #9b1c1c; }
.unknown { background: #fdf2d0; color: #7a5a00; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }
.plots figure, figure.wide { margin: 0; background: #fff; border: 1px solid #e4e8ee;
  border-radius: 8px; padding: 10px; }
.plots img { width: 100%; height: auto; display: block; } figure.wide { display: inline-block; max-width: 100%; }
figure.wide img { max-width: 100%; display: block; } figcaption { font-size: 12.5px; color: #616e7c; padding: 2px 4px
0; } .prompt { white-space: pre-wrap; margin: 0 0 10px; font-weight: 600; overflow-wrap: anywhere; }
.response { border-left: 3px solid #b6cbe3; padding: 2px 0 2px 13px; margin: 12px 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.chip { display: inline-block; background: #e8f0f9; color: #1d4f8b; border-radius: 4px; padding: 0 7px;
  margin: 0 5px 4px 0;
  font-size: 12.5px; font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.chip.got { background: #f0f1f4; color: #52606d; }
details { margin: 10px 0; } summary { cursor: pointer; color: #1d4f8b; }
pre { background: #fff; border: 1px solid #e4e8ee; border-radius: 8px; padding: 12px 16px; overflow: auto; max-height:
520px;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.missing { color: #7a5a00; background: #fdf8e7; border: 1px solid #f3e6b8; border-radius: 8px; padding: 9px 15px; }
"""


def render_html(data: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The whole page. ``data``: as in ``report.json``; ``results``: title, notes, max_level and config are taken from
    it.
    """
    title = str(results.get("title") or "SteerLM report")
    notes = "".join(f"<p class='muted'>{escape(str(note))}</p>" for note in results.get("notes") or [])
    judge = f"Measured by: {escape(str(data['judge']))}" if data.get("judge") else "No judge was named."
    sections = [
        _checks(data["checks"]),
        _ap(data.get("ap")),
        _steering(data.get("steering"), results.get("max_level")),
        _quality(data.get("quality"), data.get("quality_detail") or {}),
        _examples(data["examples"]),
        _timings(data["timings"]),
        _configuration(data["versions"], results.get("config")),
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p class='muted'>{judge}</p>{notes}{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _missing(what: str) -> str:
    return f"<p class='missing'>Not measured in this run: {escape(what)}.</p>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """First column left, the others right; all cells are escaped here."""

    def cells(tag: str, row: Sequence[str]) -> str:
        first, *others = (escape(cell) for cell in row)
        return f"<{tag}>{first}</{tag}>" + "".join(f"<{tag} class=n>{cell}</{tag}>" for cell in others)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def _image(svg: str, alt: str, wide: bool = False, caption: str = "") -> str:
    # As an <img> of base64, the plot cannot run anything and its ids cannot clash with those of the next one.
    encoded = base64.b64encode(svg.encode()).decode()
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f"<figure{' class=wide' if wide else ''}><img alt='{escape(alt, quote=True)}' "
        f"src='data:image/svg+xml;base64,{encoded}'>{text}</figure>"
    )


def _checks(checks: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for check in checks.values():
        word = verdict_word(check)
        style = {"yes": "yes", "no": "no"}.get(word, "unknown")
        rows.append(
            f"<div class='check'><span class='badge {style}'>{word}</span><div>{escape(check['statement'])}."
            f"<div class='muted small'>{escape(check['detail'])}</div></div></div>"
        )
    return _section("What was expected, and whether it held", f"<div class='card checks'>{''.join(rows)}</div>")


def _ap(ap: Mapping[str, Mapping[str, Any]] | None) -> str:
    title = "Attribute prediction"
    if not ap:
        return _section(title, _missing("the attribute-prediction model against held-out labels"))
    keys = ("mse", "constant_mse", "mae", "pearson", "spearman")
    table = _table(
        ["attribute", "MSE", "constant's MSE", "MAE", "Pearson", "Spearman", "labels"],
        [[name, *(number(row[key]) for key in keys), number(row["n"], 0)] for name, row in ap.items()],
    )
    intro = (
        "<p class='muted'>On held-out labels, on the schema's scale. The constant predictor always says the mean of "
        "the training labels. A dash: no value, as for a correlation with a constant.</p>"
    )
    return _section(title, intro + table + _image(plots.ap_plot(ap), "squared error per attribute", wide=True))


def _steering(steering: Mapping[str, Mapping[str, Any]] | None, max_level: int | None) -> str:
    title = "Steering: requested and measured level"
    if not steering:
        return _section(title, _missing("responses to held-out prompts at several requested levels"))
    intro = (
        "<p class='muted'>Responses to held-out prompts, one attribute varied at a time. Spearman over curve: "
        "requested level against mean measured level; over samples: against each response's own.</p>"
    )
    curves = "".join(
        _image(
            plots.steering_plot(name, curve, max_level),
            f"measured over requested {name}",
            caption=f"Spearman {number(curve['spearman'], 2)} over curve, "
            f"{number(curve['sample_spearman'], 2)} over samples",
        )
        for name, curve in steering.items()
    )
    rows = []
    for name, curve in steering.items():
        spread = curve.get("std") or [None] * len(curve["requested"])
        points = zip(curve["requested"], curve["measured"], spread, strict=True)
        rows += [[name, number(level, 0), number(mean, 2), number(std, 2)] for level, mean, std in points]
    table = _table(["attribute", "requested", "mean measured", "std"], rows)
    numbers = f"<details><summary>As numbers</summary>{table}</details>"
    return _section(title, f"{intro}<div class='plots'>{curves}</div>{numbers}")


def _quality(means: Mapping[str, Any] | None, detail: Mapping[str, Mapping[str, Any]]) -> str:
    title = "Quality of the models"
    if not means:
        return _section(title, _missing("the quality of plain SFT, ACSFT and bootstrapped responses"))
    titles = [QUALITY_TITLES.get(name, name) for name in means]
    rows = [
        [shown, number(mean), number(detail.get(name, {}).get("sem")), number(detail.get(name, {}).get("n"), 0)]
        for shown, (name, mean) in zip(titles, means.items(), strict=True)
    ]
    absent = [title for name, title in QUALITY_TITLES.items() if name not in means]
    note = _missing(", ".join(absent)) if absent else ""
    plot = _image(plots.quality_plot(means, detail, titles), "mean quality per model", wide=True)
    return _section(title, plot + _table(["model", "mean quality", "standard error", "responses"], rows) + note)


def _chips(values: Mapping[str, Any], style: str = "") -> str:
    texts = (escape(f"{name}:{_short(value)}") for name, value in values.items())
    return "".join(f"<span class='chip{style}'>{text}</span>" for text in texts)


def _short(value: Any) -> str:
    return number(value, 1) if isinstance(value, float) else str(value)


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    title = "Responses at different levels"
    if not examples:
        return _section(title, _missing("example responses"))
    blocks = []
    for example in examples:
        responses = []
        for response in example.get("responses", []):
            got = response.get("measured") or {}
            measured = f"<div class='small muted'>measured {_chips(got, ' got')}</div>" if got else ""
            model = f"<div class='muted small'>{escape(str(response['model']))}</div>" if "model" in response else ""
            responses.append(
                f"<div class='response'>{model}{_chips(response.get('attributes') or {})}"
                f"<div class='text'>{escape(str(response.get('text', '')))}</div>{measured}</div>"
            )
        prompt = escape(str(example.get("prompt", "")))
        blocks.append(f"<div class='card'><div class='prompt'>{prompt}</div>{''.join(responses)}</div>")
    legend = "<p class='muted small'>Blue: what was asked for. Grey: what was measured.</p>"
    return _section(title, legend + "".join(blocks))


def _timings(timings: Mapping[str, Any]) -> str:
    if not timings:
        return _section("Time", _missing("time per step"))
    rows = [[name, format_seconds(float(seconds))] for name, seconds in timings.items() if seconds is not None]
    total = sum(float(seconds) for seconds in timings.values() if seconds is not None)
    return _section("Time", _table(["step", "time"], [*rows, ["all steps", format_seconds(total)]]))


def _configuration(versions: Mapping[str, Any], config: Any) -> str:
    table = _table(["package", "version"], [[name, str(version)] for name, version in versions.items()])
    body = f"<details><summary>Versions</summary>{table}</details>"
    if config:
        body += f"<details><summary>Configuration</summary><pre>{escape(str(config))}</pre></details>"
    else:
        body += _missing("the configuration was not given to the report")
    return _section("Configuration and versions", body)
