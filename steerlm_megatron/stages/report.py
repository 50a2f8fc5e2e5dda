"""``steerlm report``: the report of an evaluation that was made earlier.

Owns: reading ``evaluation.json``. Does not own: the content and style of a report (``steerlm_megatron/report``).
Invariant: an input that is no evaluation is refused before anything is written.
"""

from __future__ import annotations

import json
from pathlib import Path

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import console
from steerlm_megatron.observe.runfolder import RunFolder, default_run_dir
from steerlm_megatron.report.terminal import terminal_table
from steerlm_megatron.report.write import write_report


def run(config: Config) -> None:
    """Render the ``evaluation.json`` of an earlier evaluation again: ``steerlm report input=RUN_FOLDER``."""
    path = Path(str(config.input))
    path = path / "evaluation.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"input={config.input}: {path} cannot be read as an evaluation ({error})") from None
    with RunFolder(config.run_dir or default_run_dir("report"), "report", overwrite=config.overwrite) as here:
        html, data = write_report(here.path, results)
        here.update(outputs={"report": str(html), "report_json": str(data)})
        console().print(terminal_table(results, html))
