"""Write the three files of a report: ``report.json`` for programs, ``report.html`` for people, ``report.md`` for both.

Owns: their names, and the keys of ``results``. Does not own: their content (``data.py``, ``page.py``, ``markdown.py``).
Invariant: each file is the complete old one or the complete new one.
"""

from __future__ import annotations

from pathlib import Path

from steerlm_megatron.files import write_json_atomic, write_text_atomic
from steerlm_megatron.report.data import Results, report_data
from steerlm_megatron.report.markdown import render_markdown


def write_report(run_dir: str | Path, results: Results) -> tuple[Path, Path]:
    """Write ``report.html``, ``report.json`` and ``report.md`` into ``run_dir`` and return the paths of the first two.

    ``results`` has any of these keys; a missing part is left out of the JSON and reported as missing in the HTML:
        ap: {attribute: {mse, mae, pearson, spearman, constant_mse, n}}, and length_mse, length_spearman,
            length_gain_low, length_gain_high, constant_gain_low, constant_gain_high where they were measured
            (``evaluate/headlines.py``)
        steering: {attribute: {requested: [level], measured: [mean], std: [per level], spearman, sample_spearman}};
            ``spearman`` (requested against mean measured) is computed where absent; ``low`` and ``high`` (per level,
            of the mean) and ``slope`` (a figure) where there are intervals
        quality: {sft, acsft, bootstrapped, bootstrapped_2, …} means; quality_detail: {name: {mean, sem, n}}, which
            alone is enough; ``low`` and ``high`` there, and quality_pairs: [{low, high, difference, verdict}] of each
            two models, where there are intervals
        measures: {name: section} of the measures that ran (``evaluate/protocol.py``); every table is shown
        bootstrap: per round of bootstrapping, the content of its ``bootstrap.json`` and ``round``
            (``stages/bootstrap_stats.py``); without it, nothing is said of bootstrapping
        ablation: rows that were trained and measured over several seeds (``stages/ablation_report.py``); a report of
            one leaves out the sections that it has no numbers for
        judge: what measured ``steering`` and ``quality``
        examples: [{prompt, responses: [{attributes: {name: level}, text, measured: {name: value}}]}]
        responses: the lines of ``responses.jsonl``, which the page shows in a browser in place of ``examples``
            (``report/samples.py``); prompt_texts: the prompts' texts by id; responses_file: where all of them are
        lineage, distributions: what was trained on what (``stages/report_lineage.py``); training: curves by step
            (``stages/report_runs.py``)
        comparison: several runs compared (``stages/report_runs.py``); a report of one has no checks, and no sections
            of a single run
        cost: {step: the section ``cost`` of its summary} (``observe/cost.py``); without it, nothing is said of cost
        timings: {step: seconds}; versions: {package: version} (this process's where absent)
        title, notes: [sentence], max_level, config: YAML text — HTML only
    """
    html_path, json_path = Path(run_dir) / "report.html", Path(run_dir) / "report.json"
    data = report_data(results)
    write_json_atomic(json_path, data)
    from steerlm_megatron.report.page import render_html  # imported here, since matplotlib takes half a second

    write_text_atomic(html_path, render_html(data, results))
    write_text_atomic(html_path.with_suffix(".md"), render_markdown(data, results))
    return html_path, json_path
