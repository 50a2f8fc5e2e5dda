"""Write the two files of a report: ``report.json`` for programs, ``report.html`` for people.

Owns: their names, and the keys of ``results``. Does not own: their content (``data.py``, ``page.py``). Invariant: each
file is the complete old one or the complete new one.
"""

from __future__ import annotations

from pathlib import Path

from steerlm_megatron.files import write_json_atomic, write_text_atomic
from steerlm_megatron.report.data import Results, report_data


def write_report(run_dir: str | Path, results: Results) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into ``run_dir`` and return their paths, in this order.

    ``results`` has any of these keys; a missing part is left out of the JSON and reported as missing in the HTML:
        ap: {attribute: {mse, mae, pearson, spearman, constant_mse, n}}, and length_mse, length_spearman,
            length_gain_low, length_gain_high where they were measured (``stats.attribute_metrics``)
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
    from steerlm_megatron.report.page import render_html  # imported here, since matplotlib takes half a second

    write_text_atomic(html_path, render_html(data, results))
    return html_path, json_path
