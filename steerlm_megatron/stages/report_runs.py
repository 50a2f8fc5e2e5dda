"""What a run folder has for a report: evaluation, bootstrapping, responses, training, lineage, configuration.

Owns: which files of a folder are read, what two folders are called beside each other, and which keys of their
configurations differ. Does not own: what became of what (``report_lineage.py``), differences of figures
(``evaluate/comparison.py``), how they are shown (``steerlm_megatron/report``). Invariant: what a folder lacks is said
in a sentence; a folder without anything to report is an error.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.comparison import Side, compare
from steerlm_megatron.observe.metrics import FILE_NAME as METRICS_FILE
from steerlm_megatron.observe.metrics import read_metrics
from steerlm_megatron.stages.bootstrap_stats import STATISTICS_FILE
from steerlm_megatron.stages.evaluation_files import EVALUATION_FILE, PROMPTS_FILE, RESPONSES_FILE
from steerlm_megatron.stages.report_lineage import (
    STEP,
    RunFiles,
    distributions,
    followed,
    lineage,
    step_folders,
    text_of_prompt,
)
from steerlm_megatron.steer.records import read_records

_MOST_POINTS = 300  # of a training curve
_PLACES = frozenset(("run_dir", "overwrite", "steps", "input", "output"))  # keys that name no cause of a difference


@dataclass
class FoundRun:
    """One run as a report sees it.

    Args:
        name: what the report calls it.
        results: what ``write_report`` takes.
        config: its configuration; ``configs`` are those of the models that it evaluates, by their names.
        lacking: sentences that say what it has not; ``broken`` are those of files that are damaged.
        ap_model: what tells its attribute-prediction model from those of other runs.
    """

    name: str
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    ap_model: str | None = None

    def side(self) -> Side:
        """Return what is compared of the run."""
        results = self.results
        evaluation = {key: value for key, value in results.items() if key not in ("responses", "prompt_texts")}
        own = self.ap_model if "ap" in _judge_names(results) else None
        top = results.get("max_level") or (self.config.get("attributes") or {}).get("max_level")
        responses, prompts = results.get("responses") or (), results.get("prompt_texts") or {}
        return Side(self.name, evaluation, responses, prompts, own, top)


def _judge_names(results: Mapping[str, Any]) -> list[str]:
    """Return the judges' names in the configuration; an older evaluation says only whether the AP model was one."""
    if named := results.get("judges"):
        return list(named)
    return ["ap"] if str(results.get("judge") or "").startswith("the attribute-prediction model") else []


def names_of(paths: Sequence[str]) -> list[str]:
    """Return for each folder the end of its path that no other one has: ``a/11-evaluate`` and ``b/11-evaluate``.

    Raises:
        UserError: one folder is given twice.
    """
    absolute = [Path(path).resolve() for path in paths]
    if twice := sorted({path for path, one in zip(paths, absolute, strict=True) if absolute.count(one) > 1}):
        raise UserError(f"input names one run twice: {' '.join(twice)}; a run is compared with others")
    for length in range(1, max(len(one.parts) for one in absolute) + 1):
        names = ["/".join(one.parts[-length:]) for one in absolute]
        if len(set(names)) == len(names):
            return names
    return [str(one) for one in absolute]


def read_runs(paths: Sequence[str]) -> list[FoundRun]:
    """Read run folders: of ``steerlm run``, or of a single command; or an ``evaluation.json`` or ``bootstrap.json``.

    Raises:
        UserError: with a line for each path that does not exist, or has nothing to report; for a single run, also a
            damaged file.
    """
    problems = [f"input={path}: there is no such folder or file" for path in paths if not Path(path).exists()]
    if problems:
        raise UserError("\n".join(problems))
    found = []
    for path, name in zip(paths, names_of(paths), strict=True):
        run = _read(Path(path), name)
        if len(paths) == 1:
            problems += [f"input={path}: {line}" for line in run.broken]
        if not (run.results or run.summary or run.config or run.broken):
            problems.append(f"input={path}: no run folder: it has neither {EVALUATION_FILE} nor a summary.json")
        found.append(run)
    if not problems and not any(run.results for run in found):
        problems = [f"input={run.folder}: there is nothing to report. {' '.join(run.lacking)}" for run in found]
    if problems:
        raise UserError("\n".join(problems))
    return found


def of_pipeline(root: Path, only: Container[str]) -> dict[str, Any]:
    """Return what the folder of a ``steerlm run`` has for its report, which it is about to write: of the step folders
    in ``only``.

    Raises:
        UserError: with a line for each damaged file.
    """
    found = _read(root, root.name, only)
    if found.broken:
        raise UserError("\n".join(found.broken))
    return {key: value for key, value in found.results.items() if key not in ("ablation", "title")}


def _read(path: Path, name: str, only: Container[str] | None = None) -> FoundRun:
    single = path if path.is_file() else None
    run = FoundRun(name, path.parent if single else path)
    files = RunFiles(run.folder, run.folder.name)
    with _noting(run):
        run.config, run.summary = files.config, files.summary
    status = run.summary.get("status")
    if status not in (None, "complete"):
        error = f": {run.summary['error']}" if run.summary.get("error") else ""
        run.lacking.append(f"The run is not complete ({status}{error}).")
    if single is not None:
        _read_single(run, single)
        return run
    steps = step_folders(run.folder, only)
    evaluated = [one for one in steps if _kind(one).startswith("evaluate")] or [run.folder]
    for folder in evaluated:
        _read_evaluation(run, folder, len(evaluated) > 1)
    _read_bootstrapping(run, [one for one in steps if _kind(one).startswith("bootstrap")] or [run.folder])
    _read_ablation(run, [one for one in steps if _kind(one) == "report"])
    with _noting(run):
        chain, made = followed(run.folder, only)
        _read_training(run, chain)
        told = lineage(chain, made)
        if any(step["status"] != "unknown" for step in told["steps"]):
            run.results["lineage"] = told
        if cost := {step.name: step.summary["cost"] for step in chain if step.summary.get("cost")}:
            run.results["cost"] = cost
        if shares := distributions(chain):
            run.results["distributions"] = shares
    if run.config and run.results:
        run.results["config"] = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    if timings := run.summary.get("timings"):
        run.results.setdefault("timings", timings if steps else {})
    if "ap" not in run.results and "quality_detail" not in run.results and "ablation" not in run.results:
        run.lacking.append(f"There is no {EVALUATION_FILE} in {run.folder}: nothing was measured.")
    return run


@contextmanager
def _noting(run: FoundRun) -> Iterator[None]:
    """Turn a ``UserError`` inside the ``with`` into a sentence about a damaged file of the run."""
    try:
        yield
    except UserError as error:
        run.broken.append(str(error))


def _kind(folder: Path) -> str:
    found = STEP.fullmatch(folder.name)
    return found[1] if found else ""


def _json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file; None where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an evaluation ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read as an evaluation (it is no JSON object)")
    return found


def _read_single(run: FoundRun, path: Path) -> None:
    """Read an ``evaluation.json`` under any name, with the responses beside it, or a ``bootstrap.json``."""
    with _noting(run):
        if path.name == STATISTICS_FILE:
            run.results |= {"title": "Bootstrapping", "bootstrap": [_json(path)]}
        else:
            run.results |= _json(path) or {}
            _read_responses(run, path.parent, "")


def _read_evaluation(run: FoundRun, folder: Path, several: bool) -> None:
    """Read an evaluation. Where a run has several, of an ablation, only their responses are told of."""
    with _noting(run):
        found = _json(folder / EVALUATION_FILE)
        if found is None:
            return
        if not several:
            run.results |= found
            run.ap_model = _checkpoint(RunFiles(folder, folder.name))
            models = RunFiles(folder, folder.name)
            for name, path in ((models.config.get("evaluate") or {}).get("models") or {}).items():
                target = models.find(path) if isinstance(path, str) else None
                if target is not None and not step_folders(run.folder):
                    run.configs[name] = RunFiles(target, name).config
        _read_responses(run, folder, _kind(folder).removeprefix("evaluate_") if several else "")


def _checkpoint(files: RunFiles) -> str | None:
    """Return what tells the AP model of an evaluation from others: its last checkpoint's checksum, else its path."""
    path = files.config.get("ap_checkpoint")
    found = files.find(path) if isinstance(path, str) else None
    if found is None:
        return path
    holder = found.parent.parent if found.parent.name == "checkpoints" else found
    return str(RunFiles(holder, holder.name).meta.get("sha256") or found.resolve())


def _read_responses(run: FoundRun, folder: Path, prefix: str) -> None:
    try:
        with (folder / RESPONSES_FILE).open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RESPONSES_FILE} cannot be read ({error})") from None
    if prefix:
        lines = [line | {"model": prefix} for line in lines]
    if lines:
        run.results.setdefault("responses", []).extend(lines)
        run.results["responses_file"] = str(folder / RESPONSES_FILE) if not prefix else str(run.folder)
    if (path := folder / PROMPTS_FILE).is_file():
        texts = {one.id: text_of_prompt(one) for one in read_records(str(path), require_response=False)}
        run.results["prompt_texts"] = run.results.get("prompt_texts", {}) | texts


def _read_bootstrapping(run: FoundRun, folders: Sequence[Path]) -> None:
    with _noting(run):
        rounds = []
        for folder in folders:
            found = _json(folder / STATISTICS_FILE)
            number = _kind(folder).rpartition("_")[2]
            if found is not None and "_seed" not in folder.name:
                rounds.append({"round": int(number) if number.isdigit() else 1, **found})
        if rounds:
            run.results["bootstrap"] = rounds
            if "ap" not in run.results and "quality_detail" not in run.results:
                run.results.setdefault("title", "Bootstrapping")


def _read_ablation(run: FoundRun, folders: Sequence[Path]) -> None:
    with _noting(run):
        for folder in folders:
            found = _json(folder / "report.json") or {}
            if found.get("ablation"):
                run.results |= {"ablation": found["ablation"], "judge": found.get("judge")}


def _read_training(run: FoundRun, chain: Iterable[RunFiles]) -> None:
    """Read the training curves and the throughput of all steps that trained."""
    found = {}
    for step in chain:
        if (step.folder / METRICS_FILE).is_file() and (curve := training_curve(step.folder / METRICS_FILE)):
            found[step.name] = curve | {"seconds": step.summary.get("wall_sec")}
    if found:
        run.results["training"] = found


def training_curve(path: Path) -> dict[str, Any]:
    """Return of a ``metrics.jsonl`` the points ``loss`` and ``valid`` ([step, value]; of many steps, some spread
    evenly), the last ``step``, medians of ``step_sec`` and ``tokens_per_sec``, the most ``peak_memory_gib``; nothing
    where there is no loss.

    Raises:
        UserError: a line is no JSON object.
    """
    rows = read_metrics(path)
    curves = {
        name: [[row["step"], row[key]] for row in rows if row.get(key) is not None and "step" in row]
        for name, key in (("loss", "loss"), ("valid", "valid/loss"))
    }
    if not curves["loss"] and not curves["valid"]:
        return {}

    def over(key: str, take: Any) -> float | None:
        values = [float(row[key]) for row in rows if row.get(key) is not None]
        return take(values) if values else None

    return {
        **{name: _spread(points) for name, points in curves.items()},
        "step": max(row.get("step", 0) for row in rows),
        "step_sec": over("step_sec", median),
        "tokens_per_sec": over("tokens_per_sec", median),
        "peak_memory_gib": over("peak_memory_gib", max),
    }


def _spread(points: Sequence[list[Any]]) -> list[list[Any]]:
    if len(points) <= _MOST_POINTS:
        return list(points)
    places = sorted({round(i * (len(points) - 1) / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)})
    return [points[place] for place in places]


# ---- several runs


def compared(runs: Sequence[FoundRun]) -> dict[str, Any]:
    """Return the results of a report that compares runs; the first one is what the others are compared with."""
    sides = [run.side() for run in runs]
    found = compare(sides)
    responses = [line | {"run": run.name} for run in runs for line in run.results.get("responses") or ()]
    prompts = {(run.name, key): text for run in runs for key, text in (run.results.get("prompt_texts") or {}).items()}
    files = [run.results["responses_file"] for run in runs if run.results.get("responses_file")]
    return {
        "title": f"Comparison of {len(runs)} runs",
        "comparison": found
        | {
            "about": [
                {
                    "name": run.name,
                    "folder": str(run.folder),
                    "command": run.summary.get("command") or run.config.get("command"),
                    "status": run.summary.get("status"),
                    "ended": run.summary.get("ended"),
                    "version": (run.summary.get("versions") or {}).get("steerlm_megatron"),
                    "judge": run.results.get("judge"),
                    "lacking": run.lacking + run.broken,
                }
                for run in runs
            ],
            "config": differing_keys(runs),
            "training": {run.name: run.results["training"] for run in runs if run.results.get("training")},
            "lineage": {run.name: run.results["lineage"] for run in runs if run.results.get("lineage")},
            "distributions": {run.name: run.results["distributions"] for run in runs if "distributions" in run.results},
            "cost": {run.name: run.results["cost"] for run in runs if run.results.get("cost")},
        },
        "responses": responses,
        "prompt_texts": prompts,
        "responses_file": ", ".join(files),
    }


def differing_keys(runs: Sequence[FoundRun]) -> list[dict[str, Any]]:
    """Return the keys of the configurations, and the versions of libraries, that are not equal in all runs that have a
    configuration: ``{key, values}``, the values by run, None where a run has not the key. Paths inside a run's own
    folder are compared without the folder.
    """
    flat: list[dict[str, str]] = []
    for run in runs:
        root = run.folder.parent if STEP.fullmatch(run.folder.name) else run.folder
        own = {str(root), str(root.resolve()), *_stored_root(run.config)}
        one = dict(_flat(run.config, "", own)) if run.config else {}
        for model, config in run.configs.items():
            one |= {f"{model}: {key}": value for key, value in _flat(config, "", own)}
        one |= {f"version of {name}": str(value) for name, value in (run.summary.get("versions") or {}).items()}
        flat.append(one)
    known = [one for one in flat if one]
    keys = dict.fromkeys(key for one in known for key in one if key.rpartition(": ")[2] not in _PLACES)
    return [
        {"key": key, "values": {run.name: one.get(key) for run, one in zip(runs, flat, strict=True)}}
        for key in keys
        if len({one.get(key) for one in known}) > 1
    ]


def _stored_root(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the folder of the whole run as the configuration has it, which may be a relative path."""
    if isinstance(stored := config.get("run_dir"), str):
        yield str(Path(stored).parent) if STEP.fullmatch(Path(stored).name) else stored


def _flat(value: Any, key: str, own: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield dotted keys with their values as YAML writes them."""
    if isinstance(value, Mapping) and value:
        for name, inside in value.items():
            yield from _flat(inside, f"{key}.{name}" if key else str(name), own)
        return
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    for folder in sorted(own, key=len, reverse=True):
        if folder not in ("", ".") and folder in text:
            text = text.replace(f"{folder}/", "")
    yield key, text
