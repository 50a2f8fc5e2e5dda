"""The steps of ``steerlm run``: the name of each, its inputs from earlier steps, and its work.

Owns: the steps, their order, and the wiring between them. Does not own: running them and skipping complete ones
(``pipeline.py``), the work itself (the modules of the commands). Invariants: all properties of a step are in its
:class:`Step`; a step reads nothing of another step but its folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm_megatron.config.commands import affects_result
from steerlm_megatron.config.load import finalize, to_yaml, value_at, with_overrides
from steerlm_megatron.config.schema import KEYS, Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.runfolder import versions
from steerlm_megatron.report.write import write_report
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages import annotate, bootstrap, evaluate, train
from steerlm_megatron.stages.collect import collect_records, split_records
from steerlm_megatron.stages.preprocess import total_counts
from steerlm_megatron.stages.prompt_check import check_bootstrap_prompts, check_evaluation_prompts
from steerlm_megatron.stages.record_reader import RecordReader, Reject, write_rejects
from steerlm_megatron.stages.session import Session, load_model
from steerlm_megatron.stages.shards import make_shards


@dataclass
class Run:
    """The state of a ``steerlm run``: configuration, folder, and the fingerprints and times of the steps so far."""

    config: Config
    here: Session
    keys: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def does(self, step: str) -> bool:
        """Return whether this process does the step; each of several jobs does some (``steps``)."""
        return not self.config.steps or step in self.config.steps

    def folder(self, step: str) -> Path:
        """Return the run folder of a step, such as ``03-train_ap``."""
        return self.here.folder / f"{list(STEPS).index(step) + 1:02d}-{step}"

    def path(self, step: str, name: str) -> str:
        return str(self.folder(step) / name)


def _no_wiring(run: Run) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Step:
    """One step of ``steerlm run``.

    Attributes:
        name: the name in its folder, and its key in ``pipeline`` for overrides of this step.
        title: a description for its header line.
        after: the steps on whose results it depends.
        body: the work of the step in its session. Collective over the world.
        wiring: inputs from earlier steps, as overrides of the configuration.
        command: the command that the step runs, whose rules hold and whose keys decide the result.
    """

    name: str
    title: str
    after: tuple[str, ...]
    body: Callable[[Run, Session], None]
    wiring: Callable[[Run], dict[str, Any]] = _no_wiring
    command: str = "train_sft"

    def depends_on(self, config: Config) -> dict[str, Any]:
        """Return the keys of ``config`` whose change runs the step again, with their values."""
        keys = [key for key in KEYS if affects_result(self.command, key)]
        if config.data.source != "demo" and self.command == "preprocess":
            keys.remove(
                "train.seed"
            )  # only the embedded corpus depends on it; others would be converted again for nothing
        return {key: value_at(config, key) for key in keys}

    def config(self, run: Run) -> Config:
        """Return the run's configuration with the step's inputs from earlier steps, and the overrides of this step."""
        config = with_overrides(run.config, self.wiring(run))
        try:
            if overrides := run.config.pipeline.get(self.name):
                config = with_overrides(config, overrides)
            config.pipeline, config.steps = {}, []
            config.command = self.command
            config.run_dir, config.overwrite = str(run.folder(self.name)), False
            return finalize(config, run.here.layout.world_size if run.does(self.name) else None)
        except UserError as error:
            lines = str(error).splitlines()
            raise UserError("\n".join(f"pipeline.{self.name}: {line}" for line in lines)) from None


# ---- wiring: overrides that name results of earlier steps


_NO_LABEL_WEIGHTS: dict[str, Any] = {"label_weights": {}}  # only train_ap uses the label weights of a run
_NO_HEAD: dict[str, Any] = {"head_lr": None}  # nor has another model a regression head


def _shards(run: Run, step: str) -> dict[str, str | None]:
    folder = run.folder(step) / "shards"
    return {"train": str(folder / "train"), "valid": str(folder / "valid") if (folder / "valid").is_dir() else None}


def _from_base(run: Run) -> str:
    return run.config.init_from or str(run.folder("base"))


def _base_wiring(run: Run) -> dict[str, Any]:
    return {
        "init_from": None,
        "attributes": {"names": []},
        "train": {"objective": "lm", "trainable": "all", **_NO_LABEL_WEIGHTS},  # there is nothing to adapt yet
        "optim": _NO_HEAD,
        "data": _shards(run, "data"),
    }


def _train_ap_wiring(run: Run) -> dict[str, Any]:
    return {"init_from": _from_base(run), "data": _shards(run, "data")}


def _annotate_wiring(run: Run) -> dict[str, Any]:
    return {"checkpoint": str(run.folder("train_ap"))}


def _acsft_wiring(run: Run) -> dict[str, Any]:
    return {
        "init_from": _from_base(run),
        "train": _NO_LABEL_WEIGHTS,
        "optim": _NO_HEAD,
        "data": _shards(run, "annotated_data"),
    }


def _sft_wiring(run: Run) -> dict[str, Any]:
    return {"attributes": {"names": []}, **_acsft_wiring(run)}


def _bootstrap_wiring(run: Run) -> dict[str, Any]:
    return {
        "checkpoint": str(run.folder("acsft")),
        "ap_checkpoint": str(run.folder("train_ap")),
        "input": run.path("annotate", "train.jsonl"),
        "output": run.path("bootstrap", "bootstrap.jsonl"),
    }


def _bootstrapped_wiring(run: Run) -> dict[str, Any]:
    return {
        "init_from": str(run.folder("acsft")),
        "train": _NO_LABEL_WEIGHTS,
        "optim": _NO_HEAD,
        "data": {
            "train": run.path("bootstrapped_data", "shards/train"),
            "valid": _shards(run, "annotated_data")["valid"],
        },
    }


def _evaluate_wiring(run: Run) -> dict[str, Any]:
    return {
        "ap_checkpoint": str(run.folder("train_ap")),
        "evaluate": {"models": {name: str(run.folder(name)) for name in evaluate.MODELS}},
    }


# ---- bodies: the work of the steps


def _data(run: Run, here: Session) -> None:
    """Convert the corpus, make or open the tokenizer, write shards with human labels, and store the paths of the
    records.
    """

    def convert() -> None:
        splits, converted = collect_records(here.config, here.folder / "records")
        rejects: list[Reject] = []
        if "valid" not in splits and here.config.data.valid_fraction > 0 and here.config.data.source == "messages":
            splits = split_records(here.config, splits["train"], here.folder / "records", rejects)
        summary = make_shards(here.config, splits, here.folder / "shards", converted=converted)
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
    _check_prompts(run, here)


def _check_prompts(run: Run, here: Session) -> None:
    """Check that the prompts, for which responses are drawn hours later, will fit. Collective over the world."""
    shards = run.folder("data") / "shards" / "train"
    to_bootstrap, to_evaluate = STEPS["bootstrap"].config(run), STEPS["evaluate"].config(run)
    files = to_evaluate.evaluate.prompts or _held_out_prompts(run)
    check_bootstrap_prompts(RecordReader(here), _records(run, "train"), to_bootstrap, shards)
    if files:
        check_evaluation_prompts(RecordReader(here), files, to_evaluate, shards)


def _held_out_prompts(run: Run) -> str | None:
    """Return the prompts to evaluate on where the user names none: the corpus's, else the validation records'."""
    own = run.folder("data") / "records" / "prompts.jsonl"
    return str(own) if own.exists() else next(iter(_records(run, "valid")), None)


def _require_labels(here: Session, summary: Mapping[str, Any]) -> None:
    if not any(counts.get("labelled_turns") for counts in summary["splits"].values()):
        raise UserError(
            f"data.input={' '.join(here.config.data.input)}: no response has a value of "
            f"attributes={here.config.attributes.name}; "
            "an attribute-prediction model cannot be trained. Give labelled data, or annotate with "
            "an existing model and train_sft"
        )


def _records(run: Run, split: str) -> list[str]:
    """Return record files of a split of the corpus."""
    splits: dict[str, list[str]] = json.loads((run.folder("data") / "splits.json").read_text(encoding="utf-8"))
    return splits.get(split, [])


def _train(run: Run, here: Session) -> None:
    train.train(here)


def _annotate(run: Run, here: Session) -> None:
    """Annotate both splits, so that validation of SFT sees predicted labels too."""
    loaded = load_model(str(here.config.checkpoint), here.config, "checkpoint", head="regression")
    reader, found = RecordReader(here), Counter[str]()
    for split in ("train", "valid"):
        if paths := _records(run, split):
            records = reader.read(split, paths, "data.input")
            found.update(annotate.annotate(here, loaded, records, paths, here.folder / f"{split}.jsonl"))
    here.run.update(counts=reader.counts() | found)
    loaded.free()


def _annotated_data(run: Run, here: Session) -> None:
    files = {
        split: [str(run.folder("annotate") / f"{split}.jsonl")] for split in ("train", "valid") if _records(run, split)
    }
    _reshard(run, here, files)


def _bootstrapped_data(run: Run, here: Session) -> None:
    _reshard(run, here, {"train": [run.path("bootstrap", "bootstrap.jsonl")]}, valid_fraction=0.0)


def _reshard(run: Run, here: Session, files: Mapping[str, list[str]], valid_fraction: float | None = None) -> None:
    """Make shards of annotated records with the tokenizer of the first shards."""

    def write() -> None:
        overrides: dict[str, Any] = {"tokenizer": {"path": run.path("data", "shards/train"), "train": False}}
        if valid_fraction is not None:
            overrides["data"] = {"valid_fraction": valid_fraction}
        config = with_overrides(here.config, overrides)
        summary = make_shards(config, files, here.folder / "shards")
        here.run.update(counts={k: summary[k] for k in ("in", "out", "skipped")})

    on_main(write)


def _bootstrap(run: Run, here: Session) -> None:
    bootstrap.bootstrap(here, str(here.config.input), Path(str(here.config.output)))


def _evaluate(run: Run, here: Session) -> None:
    """Evaluate on the labelled validation records, and on held-out prompts: those of the corpus, else of the validation
    records.
    """
    config = here.config
    valid = _records(run, "valid")
    config.input = config.input or (valid[0] if valid else None)
    config.evaluate.prompts = config.evaluate.prompts or _held_out_prompts(run) or config.input
    if config.evaluate.prompts is None:
        raise UserError(
            "there is no validation split to evaluate on; set data.valid_fraction above 0 or evaluate.prompts"
        )
    evaluate.check(config)
    results = evaluate.evaluate(here)
    on_main(lambda: evaluate.write_results(here, results))


def _report(run: Run, here: Session) -> None:
    def write() -> None:
        results = json.loads((run.folder("evaluate") / "evaluation.json").read_text(encoding="utf-8"))
        results |= {"timings": run.timings, "versions": versions(), "config": to_yaml(run.config)}
        html, data = write_report(here.folder, results)
        here.run.update(outputs={"report": str(html), "report_json": str(data)})

    on_main(write)


# ---- the steps in order


_BEFORE_REPORT = (
    Step(
        "data",
        "labelled conversations → shards",
        after=(),
        body=_data,
        command="preprocess",
    ),
    Step(
        "base",
        "a base model from scratch (language modelling)",
        after=("data",),
        wiring=_base_wiring,
        body=_train,
    ),
    Step(
        "train_ap",
        "attribute-prediction model",
        after=("data", "base"),
        wiring=_train_ap_wiring,
        body=_train,
        command="train_ap",
    ),
    Step(
        "annotate",
        "score every response",
        after=("data", "train_ap"),
        wiring=_annotate_wiring,
        body=_annotate,
        command="annotate",
    ),
    Step(
        "annotated_data",
        "annotated conversations → shards",
        after=("data", "annotate"),
        body=_annotated_data,
        command="preprocess",
    ),
    Step(
        "sft",
        "plain SFT, the baseline",
        after=("annotated_data", "base"),
        wiring=_sft_wiring,
        body=_train,
    ),
    Step(
        "acsft",
        "attribute-conditioned SFT",
        after=("annotated_data", "base"),
        wiring=_acsft_wiring,
        body=_train,
    ),
    Step(
        "bootstrap",
        "sample at the best attribute values, score",
        after=("annotate", "acsft"),
        wiring=_bootstrap_wiring,
        body=_bootstrap,
        command="bootstrap",
    ),
    Step(
        "bootstrapped_data",
        "sampled conversations → shards",
        after=("data", "bootstrap"),
        body=_bootstrapped_data,
        command="preprocess",
    ),
    Step(
        "bootstrapped",
        "second round of attribute-conditioned SFT",
        after=("bootstrapped_data", "annotated_data", "acsft"),
        wiring=_bootstrapped_wiring,
        body=_train,
    ),
    Step(
        "evaluate",
        "attribute prediction, steering, quality",
        after=("data", "train_ap", "sft", "acsft", "bootstrapped"),
        wiring=_evaluate_wiring,
        body=_evaluate,
        command="evaluate",
    ),
)
_REPORT = Step(
    "report",
    "report.html, report.json",
    after=tuple(step.name for step in _BEFORE_REPORT),
    body=_report,
    command="report",
)
STEPS = {step.name: step for step in (*_BEFORE_REPORT, _REPORT)}
