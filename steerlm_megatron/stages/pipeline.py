"""``run``: the four SteerLM steps, from a corpus to a report, by one configuration.

Owns: the order of work, skipping complete steps. Does not own: the steps and what each takes from earlier ones
(``pipeline_steps.py``). Invariants: each step has its run folder below ``run_dir``; a step is skipped only if it
completed with the same configuration and the same inputs, and a change anywhere runs everything that depends on it
again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.config.schema import Config, ParallelConfig
from steerlm_megatron.errors import Interrupted, UserError
from steerlm_megatron.observe.log import console, get_logger, setup_logging
from steerlm_megatron.observe.progress import pipeline_step
from steerlm_megatron.observe.runfolder import JOURNAL, RunFolder, fingerprint, is_complete, read_summary
from steerlm_megatron.report.terminal import terminal_table
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import any_rank, broadcast_object, on_main
from steerlm_megatron.runtime.signals import asked
from steerlm_megatron.stages.pipeline_run import Run, Step, refuse_unknown
from steerlm_megatron.stages.pipeline_steps import overridable, steps_of
from steerlm_megatron.stages.session import ARRAY, Session, session
from steerlm_megatron.stages.shards import check_tokenizer
from steerlm_megatron.steer.records import expand_paths

_LAST = "report"
_WRITES_NOTHING = 1  # RunFolder's rank: only rank 0 writes


def run(config: Config) -> None:
    """Run all steps. Collective over the world."""
    steps = steps_of(config)
    refuse_unknown("pipeline", config.pipeline, overridable(config))
    refuse_unknown("steps", config.steps, list(steps))
    if config.data.source != "demo":
        for path in _input_files(config):
            if not Path(path).exists():
                raise UserError(f"data.input={path}: no such file")
        if not config.data.input:
            raise UserError("data.input is empty: name the corpus, or take experiment=quickstart")
    check_tokenizer(config)
    # A complete run is not refused: its steps are checked again, and complete ones are skipped.
    config.overwrite = False
    # A job of some steps has ranks for these steps, and each step's session lays them out.
    parallel.initialize(
        ParallelConfig() if config.steps else config.parallel, config.train.seed, config.engine.timeout_sec
    )
    root = broadcast_object(config.run_dir or f"runs/run/{time.strftime('%Y%m%d-%H%M%S')}")
    config.run_dir = root
    if config.steps and _LAST not in config.steps:
        # Other jobs may do other steps now. Each has its step's folder alone, and the last one ends the whole run.
        folder = RunFolder(root, config.command, rank=_WRITES_NOTHING)
        _all_steps(Run(config, Session(config, parallel.layout(), folder), steps))
        return
    on_main(lambda: _reopen(Path(root)))
    with session(config) as here:
        _all_steps(Run(config, here, steps))


def _reopen(root: Path) -> None:
    summary = read_summary(root) or {}
    if summary.get("status") == "complete" and summary.get("command") == "run":
        (root / "summary.json").unlink()


def _remove_if_other(folder: Path, key: str) -> None:
    """Remove a step's results if other inputs gave them: they are neither complete nor to be resumed. Journals know
    their inputs by themselves, and jobs of an array may have written them before this.
    """
    earlier = read_summary(folder)
    if earlier is None or earlier.get("fingerprint") == key:
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if not entry.name.startswith(JOURNAL) and entry.name != ARRAY:
                shutil.rmtree(entry)
        else:
            entry.unlink()


def _all_steps(state: Run) -> None:
    steps = list(state.steps.values())
    if state.config.init_from is not None:
        steps.remove(state.steps["base"])
        state.keys["base"] = fingerprint({}, [Path(state.config.init_from).resolve()])
    if not state.config.attributes.names:
        raise UserError("attributes=none: steerlm run conditions on attributes; choose a schema")
    get_logger(__name__).info("%d steps: %s", len(steps), " ".join(step.name for step in steps))
    for step in steps:
        step.config(state)  # a wrong override of the last step is an error before the first one starts
    for number, step in enumerate(steps, 1):
        if state.does(step.name):
            _require(state, step)
            _one_step(state, number, len(steps), step)
        else:
            state.keys[step.name] = _fingerprint(state, step, step.config(state))
            summary = read_summary(state.folder(step.name)) or {}
            state.timings[step.name] = float(summary.get("wall_sec", 0.0))
            _note_cost(state, step.name, summary)
    if not state.does(_LAST):
        return
    html = state.folder("report") / "report.html"
    setup_logging(state.here.folder, state.here.layout.rank)
    state.here.run.update(
        timings=state.timings, outputs={"report": str(html), "report_json": str(html.with_suffix(".json"))}
    )
    if state.here.layout.is_main:
        results = json.loads(html.with_suffix(".json").read_text(encoding="utf-8"))
        console().print(terminal_table(results, html))


def _require(state: Run, step: Step) -> None:
    """Refuse a step of several jobs whose inputs are not there. Collective over the world."""
    needed = [name for name in state.steps if name in step.after and name in state.keys and not state.does(name)]
    if state.config.init_from is not None:
        needed = [name for name in needed if name != "base"]
    lacking = [name for name in needed if not is_complete(state.folder(name), state.keys[name])]
    if broadcast_object(lacking):
        raise UserError(
            f"steps={step.name} needs {' '.join(lacking)}, not complete with this configuration in "
            f"{state.here.folder}: add the step to steps, or run it first"
        )


def _one_step(state: Run, number: int, count: int, step: Step) -> None:
    """Run one step in its folder unless it is complete with the same fingerprint."""
    if any_rank(asked()):  # a signal came while the step before was ending
        raise Interrupted("a signal")
    config = step.config(state)
    folder = state.folder(step.name)
    key = _fingerprint(state, step, config)
    state.keys[step.name] = key
    if broadcast_object(is_complete(folder, key)):
        summary = read_summary(folder) or {}
        state.timings[step.name] = float(summary.get("wall_sec", 0.0))
        _note_cost(state, step.name, summary)
        get_logger(__name__).info("step %d/%d %s: complete, skipped", number, count, step.name)
        return
    if job_of_array(config)[0] is None:
        on_main(lambda: _remove_if_other(folder, key))
    start = time.monotonic()
    with state.here.cost.away(), pipeline_step(number, count, f"{step.name}: {step.title}"):
        with session(config, inputs=key) as here:
            step.body(state, here)
    state.timings[step.name] = round(time.monotonic() - start, 2)
    if state.here.layout.is_main:
        _note_cost(state, step.name, read_summary(folder) or {})


def _note_cost(state: Run, step: str, summary: Mapping[str, Any]) -> None:
    """Note what a step cost, by its summary; a run of an earlier version has no cost."""
    if cost := summary.get("cost"):
        state.here.cost.steps[step] = cost


def _fingerprint(state: Run, step: Step, config: Config) -> str:
    """Return a hash of all that the step's result depends on: the keys it reads, the steps before it, the corpus."""
    read = what_is_read(step, config, state.config.init_from, str(state.here.folder))
    before = [state.keys[name] for name in step.after if name in state.keys]
    values = {"step": step.name, "config": read, "after": before}
    return fingerprint(values, _input_files(config) if step.name == "data" else [])


def what_is_read(step: Step, config: Config, base: str | None, root: str) -> dict[str, Any]:
    """Return the keys that a step reads with their values, paths below the run folder ``root`` relative to it.

    A model that the run starts from (``base``) is left out: its content is the key of the step "base", and its path may
    be spelt in several ways.
    """
    read = step.depends_on(config)
    if base is not None and read.get("init_from") == base:
        del read["init_from"]
    return cast(dict[str, Any], relative_to_run(read, root))


def _input_files(config: Config) -> list[str]:
    """Return the files and folders of ``data.input``. A data set's name on the hub is no file and is left out."""
    names = config.data.input or []
    if config.data.source == "hf":
        return [name for name in names if Path(name).exists()]
    return expand_paths(names) if names else []


def relative_to_run(value: Any, root: str) -> Any:
    """Make paths below the run folder relative to it in ``value``, so that a run folder that is moved stays complete.

    The content of these paths is in the fingerprints of the steps that made them.
    """
    if isinstance(value, dict):
        return {k: relative_to_run(v, root) for k, v in value.items()}
    if isinstance(value, list):
        return [relative_to_run(v, root) for v in value]
    if isinstance(value, str) and f"{value}/".startswith(
        f"{root}/"
    ):  # with the slash, so that "raise" is not taken for a path below a run folder "r"
        return value[len(root) :]
    return value
