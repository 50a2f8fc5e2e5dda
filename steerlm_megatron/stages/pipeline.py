"""``run``: the four SteerLM steps, from a corpus to a report, from one configuration.

Owns: which steps there are, what each reads of the ones before, skipping what is complete. Does not own: what a step
does.
Invariants: each step has a run folder of its own below ``run_dir``; a step is skipped only if it completed with the
same
configuration and the same inputs, and a change anywhere runs everything that depends on it again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm_megatron.config.load import finalize, to_container, to_yaml, with_overrides
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import Interrupted, UserError
from steerlm_megatron.observe.log import console, get_logger, setup_logging
from steerlm_megatron.observe.progress import pipeline_step
from steerlm_megatron.observe.runfolder import fingerprint, is_complete, read_summary, versions
from steerlm_megatron.report.terminal import terminal_table
from steerlm_megatron.report.write import write_report
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import any_rank, broadcast_object, on_main
from steerlm_megatron.stages import annotate, bootstrap, corpus, evaluate, train
from steerlm_megatron.stages.intake import Intake, Reject, write_rejects
from steerlm_megatron.stages.preprocess import total_counts
from steerlm_megatron.stages.prompt_check import check_bootstrap_prompts, check_evaluation_prompts
from steerlm_megatron.stages.session import Session, load_model, session
from steerlm_megatron.steer.records import expand_paths
from steerlm_megatron.train.signals import asked

# The steps in order, and what each is, for its header line. A key of ``pipeline`` names the step that its overrides
# are for.
STEPS = {
    "data": "labelled conversations → shards",
    "base": "a base model from scratch (language modelling)",
    "train_ap": "attribute-prediction model",
    "annotate": "score every response",
    "annotated_data": "annotated conversations → shards",
    "sft": "plain SFT, the baseline",
    "acsft": "attribute-conditioned SFT",
    "bootstrap": "sample at the best attribute values, score",
    "bootstrapped_data": "sampled conversations → shards",
    "bootstrapped": "second round of attribute-conditioned SFT",
    "evaluate": "attribute prediction, steering, quality",
    "report": "report.html, report.json",
}


# What a step's result depends on, besides the steps before it: a change elsewhere does not run it again.
_ALWAYS = ("attributes", "template", "init_from", "checkpoint", "ap_checkpoint", "input", "output")
_TRAINING = ("model", "parallel", "engine", "optim", "train", "data")
_SAMPLING = ("sampling", "server", "parallel", "engine")
_READS: dict[str, tuple[str, ...]] = {
    "data": ("data", "tokenizer"),
    "base": _TRAINING,
    "train_ap": _TRAINING,
    "annotate": ("annotate", "parallel", "engine", "data"),
    "annotated_data": ("data", "tokenizer"),
    "sft": _TRAINING,
    "acsft": _TRAINING,
    "bootstrap": ("bootstrap", "annotate", "data", *_SAMPLING),
    "bootstrapped_data": ("data", "tokenizer"),
    "bootstrapped": _TRAINING,
    "evaluate": ("evaluate", "annotate", "data", *_SAMPLING),
    "report": (),
}


@dataclass
class _Run:
    """One ``steerlm run``: paths of what exists so far, fingerprints and times of the steps."""

    config: Config
    here: Session
    keys: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def folder(self, step: str) -> Path:
        return self.here.folder / f"{list(STEPS).index(step) + 1:02d}-{step}"

    def path(self, step: str, name: str) -> str:
        return str(self.folder(step) / name)


def run(config: Config) -> None:
    """All steps. Collective over the world."""
    if unknown := sorted(set(config.pipeline) - set(STEPS)):
        raise UserError(f"pipeline: {' '.join(unknown)} unknown; legal: {' '.join(STEPS)}")
    if config.data.source != "demo":
        for path in _input_files(config):
            if not Path(path).exists():
                raise UserError(f"data.input={path}: no such file")
        if not config.data.input:
            raise UserError("data.input is empty: name the corpus, or take experiment=quickstart")
    corpus.check_tokenizer(config)
    # A run folder that holds a complete run is looked at again, not refused: its complete steps are skipped.
    config.overwrite = False
    parallel.initialize(config.parallel, config.train.seed, config.engine.timeout_sec)
    root = broadcast_object(config.run_dir or f"runs/run/{time.strftime('%Y%m%d-%H%M%S')}")
    config.run_dir = root
    on_main(lambda: _reopen(Path(root)))
    with session(config) as here:
        _all_steps(_Run(config, here))


def _reopen(root: Path) -> None:
    summary = read_summary(root) or {}
    if summary.get("status") == "complete" and summary.get("command") == "run":
        (root / "summary.json").unlink()


def _remove_if_other(folder: Path, key: str) -> None:
    """Made from other inputs: neither complete nor to be resumed."""
    earlier = read_summary(folder)
    if earlier is not None and earlier.get("fingerprint") != key:
        shutil.rmtree(folder)


def _all_steps(state: _Run) -> None:
    steps = dict(_BODIES)
    if state.config.init_from is not None:
        del steps["base"]
        state.keys["base"] = fingerprint({"init_from": state.config.init_from}, [state.config.init_from])
    if not state.config.attributes.names:
        raise UserError("attributes=none: steerlm run conditions on attributes; choose a schema")
    for step in steps:
        _step_config(state, step)  # a wrong override of the last step is said before the first one starts
    for number, (step, (after, body)) in enumerate(steps.items(), 1):
        _one_step(state, number, len(steps), step, after, body)
    html = state.folder("report") / "report.html"
    setup_logging(state.here.folder, state.here.layout.rank)
    state.here.run.update(
        timings=state.timings, outputs={"report": str(html), "report_json": str(html.with_suffix(".json"))}
    )
    if state.here.layout.is_main:
        results = json.loads((state.folder("evaluate") / "evaluation.json").read_text(encoding="utf-8"))
        console().print(terminal_table(results, html))


Body = Callable[[_Run, Session], None]


def _one_step(state: _Run, number: int, count: int, step: str, after: tuple[str, ...], body: Body) -> None:
    """Run one step in its folder unless it is complete with the same fingerprint."""
    if any_rank(asked()):  # while the step before was about to end
        raise Interrupted("a signal")
    config = _step_config(state, step)
    folder = state.folder(step)
    read = {k: v for k, v in to_container(config).items() if k in _ALWAYS or k in _READS[step]}
    comparable = _without_root(read, str(state.here.folder))
    inputs = _input_files(config) if step == "data" else []
    key = fingerprint(
        {"step": step, "config": comparable, "after": [state.keys[a] for a in after if a in state.keys]}, inputs
    )
    state.keys[step] = key
    if broadcast_object(is_complete(folder, key)):
        summary = read_summary(folder) or {}
        state.timings[step] = float(summary.get("wall_sec", 0.0))
        get_logger(__name__).info("step %d/%d %s: complete, skipped", number, count, step)
        return
    on_main(lambda: _remove_if_other(folder, key))
    start = time.monotonic()
    with pipeline_step(number, count, f"{step}: {STEPS[step]}"), session(config, inputs=key) as here:
        body(state, here)
    state.timings[step] = round(time.monotonic() - start, 2)


def _input_files(config: Config) -> list[str]:
    """The files and folders of ``data.input``; a data set's name on the hub is none (its content is not looked at)."""
    names = config.data.input or []
    if config.data.source == "hf":
        return [name for name in names if Path(name).exists()]
    return expand_paths(names) if names else []


def _without_root(value: Any, root: str) -> Any:
    """Paths below the run folder relative to it: what they hold is in the fingerprints of the steps that made them, and
    a run folder that is moved stays complete.
    """
    if isinstance(value, dict):
        return {k: _without_root(v, root) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_root(v, root) for v in value]
    if isinstance(value, str) and f"{value}/".startswith(f"{root}/"):  # not "raise" below a run folder "r"
        return value[len(root) :]
    return value


def _step_config(state: _Run, step: str) -> Config:
    """The run's configuration with the step's own overrides and what it takes from earlier steps."""
    path, base = state.path, state.config
    command = {
        "train_ap": "train_ap",
        "annotate": "annotate",
        "bootstrap": "bootstrap",
        "evaluate": "evaluate",
        "report": "report",
    }
    from_base = base.init_from or str(state.folder("base"))
    no_labels: dict[str, Any] = {"label_weights": {}}  # of all the run's steps, train_ap's alone
    wired: dict[str, dict[str, Any]] = {
        "base": {
            "init_from": None,
            "attributes": {"names": []},
            "train": {"objective": "lm", **no_labels},
            "data": _shards(state, "data"),
        },
        "train_ap": {"init_from": from_base, "data": _shards(state, "data")},
        "annotate": {"checkpoint": str(state.folder("train_ap"))},
        "sft": {
            "init_from": from_base,
            "attributes": {"names": []},
            "train": no_labels,
            "data": _shards(state, "annotated_data"),
        },
        "acsft": {"init_from": from_base, "train": no_labels, "data": _shards(state, "annotated_data")},
        "bootstrap": {
            "checkpoint": str(state.folder("acsft")),
            "ap_checkpoint": str(state.folder("train_ap")),
            "input": path("annotate", "train.jsonl"),
            "output": path("bootstrap", "bootstrap.jsonl"),
        },
        "bootstrapped": {
            "init_from": str(state.folder("acsft")),
            "train": no_labels,
            "data": {
                "train": path("bootstrapped_data", "shards/train"),
                "valid": _shards(state, "annotated_data")["valid"],
            },
        },
        "evaluate": {
            "ap_checkpoint": str(state.folder("train_ap")),
            "evaluate": {"models": {name: str(state.folder(name)) for name in evaluate.MODELS}},
        },
    }
    config = with_overrides(base, wired.get(step, {}))
    try:
        config = with_overrides(config, base.pipeline.get(step) or {})
        config.pipeline = {}
        config.command = command.get(step, "train_sft")
        config.run_dir, config.overwrite = str(state.folder(step)), False
        return finalize(config, state.here.layout.world_size)
    except UserError as error:
        raise UserError("\n".join(f"pipeline.{step}: {line}" for line in str(error).splitlines())) from None


def _shards(state: _Run, step: str) -> dict[str, str | None]:
    folder = state.folder(step) / "shards"
    return {"train": str(folder / "train"), "valid": str(folder / "valid") if (folder / "valid").is_dir() else None}


# ---- steps


def _data(state: _Run, here: Session) -> None:
    """Convert the corpus, make or open the tokenizer, write shards with human labels; note where the records are."""

    def convert() -> None:
        splits, converted = corpus.collect_records(here.config, here.folder / "records")
        rejects: list[Reject] = []
        if "valid" not in splits and here.config.data.valid_fraction > 0 and here.config.data.source == "messages":
            splits = corpus.split_records(here.config, splits["train"], here.folder / "records", rejects)
        summary = corpus.make_shards(here.config, splits, here.folder / "shards", converted=converted)
        files = {split: [str(p) for p in paths] for split, paths in splits.items()}
        (here.folder / "splits.json").write_text(json.dumps(files), encoding="utf-8")
        counts = total_counts(converted, summary)
        if rejects:
            write_rejects(here.folder, rejects)
            counts["in"] += len(rejects)
            counts["skipped"]["rejected"] = counts["skipped"].get("rejected", 0) + len(rejects)
        here.run.update(counts=counts | {"source": converted})
        _require_labels(here, summary)

    on_main(convert)
    _check_prompts(state, here)


def _check_prompts(state: _Run, here: Session) -> None:
    """Prompts that responses will be drawn for hours later fit. Collective over the world."""
    shards = state.folder("data") / "shards" / "train"
    to_bootstrap, to_evaluate = _step_config(state, "bootstrap"), _step_config(state, "evaluate")
    files = to_evaluate.evaluate.prompts or _held_out_prompts(state)
    check_bootstrap_prompts(Intake(here), _records(state, "train"), to_bootstrap, shards)
    if files:
        check_evaluation_prompts(Intake(here), files, to_evaluate, shards)


def _held_out_prompts(state: _Run) -> str | None:
    """The prompts to evaluate on where the user names none: a corpus's own, else those of the validation records."""
    own = state.folder("data") / "records" / "prompts.jsonl"
    return str(own) if own.exists() else next(iter(_records(state, "valid")), None)


def _require_labels(here: Session, summary: Mapping[str, Any]) -> None:
    if not any(counts.get("labelled_turns") for counts in summary["splits"].values()):
        raise UserError(
            f"data.input={' '.join(here.config.data.input)}: no response has a value of "
            f"attributes={here.config.attributes.name}; "
            "an attribute-prediction model cannot be trained. Give labelled data, or annotate with "
            "an existing model and train_sft"
        )


def _records(state: _Run, split: str) -> list[str]:
    """Record files of a split of the corpus."""
    splits: dict[str, list[str]] = json.loads((state.folder("data") / "splits.json").read_text(encoding="utf-8"))
    return splits.get(split, [])


def _train(state: _Run, here: Session) -> None:
    train.train(here)


def _annotate(state: _Run, here: Session) -> None:
    """Both splits, so that validation of SFT sees predicted labels too."""
    loaded = load_model(str(here.config.checkpoint), here.config, "checkpoint", head="regression")
    intake, found = Intake(here), Counter[str]()
    for split in ("train", "valid"):
        if paths := _records(state, split):
            records = intake.read(split, paths, "data.input")
            found.update(annotate.annotate(here, loaded, records, paths, here.folder / f"{split}.jsonl"))
    here.run.update(counts=intake.counts() | found)
    loaded.free()


def _annotated_data(state: _Run, here: Session) -> None:
    files = {
        split: [str(state.folder("annotate") / f"{split}.jsonl")]
        for split in ("train", "valid")
        if _records(state, split)
    }
    _reshard(state, here, files)


def _bootstrapped_data(state: _Run, here: Session) -> None:
    _reshard(state, here, {"train": [state.path("bootstrap", "bootstrap.jsonl")]}, valid_fraction=0.0)


def _reshard(state: _Run, here: Session, files: Mapping[str, list[str]], valid_fraction: float | None = None) -> None:
    """Shards of annotated records with the tokenizer of the first shards."""

    def write() -> None:
        overrides: dict[str, Any] = {"tokenizer": {"path": state.path("data", "shards/train"), "train": False}}
        if valid_fraction is not None:
            overrides["data"] = {"valid_fraction": valid_fraction}
        config = with_overrides(here.config, overrides)
        summary = corpus.make_shards(config, files, here.folder / "shards")
        here.run.update(counts={k: summary[k] for k in ("in", "out", "skipped")})

    on_main(write)


def _bootstrap(state: _Run, here: Session) -> None:
    bootstrap.bootstrap(here, str(here.config.input), Path(str(here.config.output)))


def _evaluate(state: _Run, here: Session) -> None:
    """On the labelled validation records, and on held-out prompts: a corpus's own, else those of the validation
    records.
    """
    config = here.config
    valid = _records(state, "valid")
    config.input = config.input or (valid[0] if valid else None)
    config.evaluate.prompts = config.evaluate.prompts or _held_out_prompts(state) or config.input
    if config.evaluate.prompts is None:
        raise UserError(
            "there is no validation split to evaluate on; set data.valid_fraction above 0 or evaluate.prompts"
        )
    evaluate.check(config)
    results = evaluate.evaluate(here)
    on_main(lambda: evaluate.write_results(here, results))


def _report(state: _Run, here: Session) -> None:
    def write() -> None:
        results = json.loads((state.folder("evaluate") / "evaluation.json").read_text(encoding="utf-8"))
        results |= {"timings": state.timings, "versions": versions(), "config": to_yaml(state.config)}
        html, data = write_report(here.folder, results)
        here.run.update(outputs={"report": str(html), "report_json": str(data)})

    on_main(write)


# step → (the steps whose result it depends on, what it does)
_BODIES: dict[str, tuple[tuple[str, ...], Body]] = {
    "data": ((), _data),
    "base": (("data",), _train),
    "train_ap": (("data", "base"), _train),
    "annotate": (("data", "train_ap"), _annotate),
    "annotated_data": (("data", "annotate"), _annotated_data),
    "sft": (("annotated_data", "base"), _train),
    "acsft": (("annotated_data", "base"), _train),
    "bootstrap": (("annotate", "acsft"), _bootstrap),
    "bootstrapped_data": (("data", "bootstrap"), _bootstrapped_data),
    "bootstrapped": (("bootstrapped_data", "annotated_data", "acsft"), _train),
    "evaluate": (("data", "train_ap", "sft", "acsft", "bootstrapped"), _evaluate),
    "report": (tuple(s for s in STEPS if s != "report"), _report),
}
