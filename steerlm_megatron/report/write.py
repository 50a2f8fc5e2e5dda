"""The two files of a report: ``report.json`` for programs, ``report.html`` for people.

Owns: their names, and what ``results`` may hold. Does not own: their content (``data.py``, ``page.py``).
Invariant: a report's file is the whole old one or the whole new one.
"""

from __future__ import annotations

from pathlib import Path

from steerlm_megatron.files import write_json_atomic, write_text_atomic
from steerlm_megatron.report.data import Results, report_data


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
    from steerlm_megatron.report.page import render_html  # matplotlib takes half a second to import

    write_text_atomic(html_path, render_html(data, results))
    return html_path, json_path
