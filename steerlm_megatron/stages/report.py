"""``steerlm report``: the report of a run that was made earlier, or of several compared.

Owns: which report is made of ``input``. Does not own: reading run folders (``report_runs.py``), the content and style
of a report (``steerlm_megatron/report``). Invariant: an input without anything to report is refused before anything is
written.
"""

from __future__ import annotations

from steerlm_megatron.config.load import paths_of
from steerlm_megatron.config.schema import Config
from steerlm_megatron.observe.log import console
from steerlm_megatron.observe.runfolder import RunFolder, default_run_dir
from steerlm_megatron.report.terminal import terminal_table
from steerlm_megatron.report.write import write_report
from steerlm_megatron.stages.report_runs import compared, read_runs


def run(config: Config) -> None:
    """Report a run again, whole or in part: ``steerlm report input=RUN_FOLDER``; or compare runs:
    ``steerlm report 'input=[runs/a,runs/b]'``.
    """
    runs = read_runs(paths_of(config.input))
    results = compared(runs) if len(runs) > 1 else runs[0].results
    with RunFolder(config.run_dir or default_run_dir("report"), "report", overwrite=config.overwrite) as here:
        html, data = write_report(here.path, results)
        text = html.with_suffix(".md")
        here.update(outputs={"report": str(html), "report_json": str(data), "report_text": str(text)})
        console().print(terminal_table(results, html))
