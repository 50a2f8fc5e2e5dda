"""What the steps of ``steerlm run`` do, and what each takes from earlier ones.

Owns: the wiring of a step (overrides of the configuration that name results of earlier steps) and its body. Does not
own: which steps there are and in what order (``pipeline_steps.py``, ``ablation_steps.py``), the work itself (the
modules of the commands). Invariant: a function here is told the names of the steps whose results it takes, so that each
fits any run in which some step has these results.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlm_megatron.config.load import to_yaml, with_overrides
from steerlm_megatron.config.schema import BootstrapConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.needs import steerlm2_name
from steerlm_megatron.observe.runfolder import versions
from steerlm_megatron.report.write import write_report
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages import annotate, bootstrap, evaluate, train, weigh
from steerlm_megatron.stages.collect import collect_records, split_records
from steerlm_megatron.stages.pipeline_run import Run
from steerlm_megatron.stages.preprocess import total_counts
from steerlm_megatron.stages.prompt_check import check_bootstrap_prompts, check_evaluation_prompts
from steerlm_megatron.stages.record_reader import RecordReader, Reject, write_rejects
from steerlm_megatron.stages.report_runs import of_pipeline
from steerlm_megatron.stages.session import Session, load_model
from steerlm_megatron.stages.shards import make_shards

SPLITS = ("train", "valid")
Overrides = dict[str, Any]

# ---- wiring

_NO_LABEL_WEIGHTS: Overrides = {"label_weights": {}}  # only train_ap uses the label weights of a run
_NO_HEAD: Overrides = {"head_lr": None}  # nor has another model a regression head


def shards(run: Run, step: str) -> dict[str, str | None]:
    """Return ``data.train`` and ``data.valid``: the shards of a step."""
    folder = run.folder(step) / "shards"
    return {"train": str(folder / "train"), "valid": str(folder / "valid") if (folder / "valid").is_dir() else None}


def _from_base(run: Run) -> str:
    return run.config.init_from or str(run.folder("base"))


def base(run: Run) -> Overrides:
    """The language model that all others start from."""
    return {
        "init_from": None,
        "attributes": {"names": []},
        "train": {"objective": "lm", "trainable": "all", **_NO_LABEL_WEIGHTS},  # there is nothing to adapt yet
        "optim": _NO_HEAD,
        "data": shards(run, "data"),
    }


def train_ap(run: Run) -> Overrides:
    """The attribute-prediction model."""
    return {"init_from": _from_base(run), "data": shards(run, "data")}


def annotating(run: Run, ap: str) -> Overrides:
    """Annotation by the model of the step ``ap``."""
    return {"checkpoint": str(run.folder(ap))}


def acsft(run: Run, data: str) -> Overrides:
    """Attribute-conditioned SFT on the shards of the step ``data``."""
    return {
        "init_from": _from_base(run),
        "train": _NO_LABEL_WEIGHTS,
        "optim": _NO_HEAD,
        "data": shards(run, data),
    }


def sft(run: Run, data: str) -> Overrides:
    """SFT without attributes on the shards of the step ``data``."""
    return {"attributes": {"names": []}, **acsft(run, data)}


def bootstrapping(run: Run, step: str, model: str, ap: str, annotated: str, number: int) -> Overrides:
    """Round ``number`` of bootstrapping, in ``step``: sampling from ``model`` for the prompts of ``annotated``."""
    return {
        "checkpoint": str(run.folder(model)),
        "ap_checkpoint": str(run.folder(ap)),
        "input": run.path(annotated, "train.jsonl"),
        "output": run.path(step, "bootstrap.jsonl"),
        # Another seed in each round: other prompts, where not all are taken, and other combinations for them.
        "sampling": {"seed": run.config.sampling.seed + number - 1},
    }


def bootstrapped(run: Run, model: str, sampled: str, annotated: str) -> Overrides:
    """Training ``model`` on the shards of ``sampled``. A share ``bootstrap.mix`` of the rows of an epoch is of the
    shards of ``annotated``.
    """
    other, mix = shards(run, annotated), run.config.bootstrap.mix
    drawn = run.path(sampled, "shards/train")
    blend = {"train": [drawn, other["train"]], "weights": [1.0 - mix, mix]} if mix else {"train": drawn}
    return {
        "init_from": str(run.folder(model)),
        "train": _NO_LABEL_WEIGHTS,
        "optim": _NO_HEAD,
        "data": {**blend, "valid": other["valid"]},
    }


def sampling_groups(run: Run, step: str, model: str, ap: str, annotated: str, number: int) -> Overrides:
    """Drawing ``steerlm2.responses`` responses to each prompt at the best levels, none of which is left out but those
    that did not end.
    """
    every = BootstrapConfig()
    kept = {key: getattr(every, key) for key in ("max_repetition", "labels", "max_distance", "keep_best", "best_by")}
    kept |= {"repetition_ngram": every.repetition_ngram, "drop_duplicates": every.drop_duplicates}
    return {
        **bootstrapping(run, step, model, ap, annotated, number),
        "bootstrap": {**kept, "responses_per_prompt": run.config.steerlm2.responses, "combinations": "best"},
    }


def weighing(run: Run, step: str, model: str, base: str, sampled: str) -> Overrides:
    """Weighing the responses of ``sampled``, which ``model`` drew, with ``base`` as the plain SFT model."""
    return {
        "checkpoint": str(run.folder(model)),
        "steerlm2": {"base": str(run.folder(base))},
        "input": run.path(sampled, "bootstrap.jsonl"),
        "output": run.path(step, "weighed.jsonl"),
    }


def steerlm2(run: Run, model: str, weighed: str, data: str) -> Overrides:
    """Training ``model`` on the shards of ``data``, whose weights the step ``weighed`` found."""
    return {
        "init_from": str(run.folder(model)),
        "train": {**_NO_LABEL_WEIGHTS, "objective": "steerlm2", "keep_best": False},
        "optim": _NO_HEAD,
        "data": {**shards(run, data), "targets": run.path(weighed, "weighed.jsonl")},
    }


def evaluating(run: Run, ap: str, rounds: int, iterations: int = 0) -> Overrides:
    """Evaluation of the models of a run with so many rounds of bootstrapping and iterations of SteerLM 2.0."""
    models: Overrides = {name: str(run.folder(name)) for name in evaluate.MODELS}
    later = range(2, rounds + 1)
    models["rounds"] = [str(run.folder(f"{evaluate.MODELS[-1]}_{number}")) for number in later]
    models["steerlm2"] = [str(run.folder(steerlm2_name(number))) for number in range(1, iterations + 1)]
    return {"ap_checkpoint": str(run.folder(ap)), "evaluate": {"models": models}}


# ---- bodies


def data(run: Run, here: Session) -> None:
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
    tokenized = run.folder("data") / "shards" / "train"
    for step in run.steps.values():
        config = step.config(run)
        if step.command == "bootstrap" and (step.round == 1 or config.bootstrap.prompts is not None):
            # Rounds that take all prompts take the same.
            check_bootstrap_prompts(RecordReader(here), records_of(run, "train"), config, tokenized)
        if step.command == "evaluate" and (files := config.evaluate.prompts or _held_out_prompts(run)):
            check_evaluation_prompts(RecordReader(here), files, config, tokenized)


def _held_out_prompts(run: Run) -> str | None:
    """Return the prompts to evaluate on where the user names none: the corpus's, else the validation records'."""
    own = run.folder("data") / "records" / "prompts.jsonl"
    return str(own) if own.exists() else next(iter(records_of(run, "valid")), None)


def _require_labels(here: Session, summary: Mapping[str, Any]) -> None:
    if not any(counts.get("labelled_turns") for counts in summary["splits"].values()):
        raise UserError(
            f"data.input={' '.join(here.config.data.input)}: no response has a value of "
            f"attributes={here.config.attributes.name}; "
            "an attribute-prediction model cannot be trained. Give labelled data, or annotate with "
            "an existing model and train_sft"
        )


def records_of(run: Run, split: str) -> list[str]:
    """Return record files of a split of the corpus."""
    splits: dict[str, list[str]] = json.loads((run.folder("data") / "splits.json").read_text(encoding="utf-8"))
    return splits.get(split, [])


def training(run: Run, here: Session) -> None:
    """Train a model of any kind."""
    train.train(here)


def annotation(run: Run, here: Session) -> None:
    """Annotate both splits, so that validation of SFT sees predicted labels too."""
    loaded = load_model(str(here.config.checkpoint), here.config, "checkpoint", head="ap")
    reader, found = RecordReader(here), Counter[str]()
    for split in SPLITS:
        if paths := records_of(run, split):
            records = reader.read(split, paths, "data.input")
            found.update(annotate.annotate(here, loaded, records, paths, here.folder / f"{split}.jsonl"))
    here.run.update(counts=reader.counts() | found)
    loaded.free()


def annotated_data(run: Run, here: Session, annotated: str) -> None:
    """Make shards of the records that the step ``annotated`` has written."""
    files = {split: [run.path(annotated, f"{split}.jsonl")] for split in SPLITS if records_of(run, split)}
    on_main(lambda: reshard(run, here, files))


def bootstrapped_data(run: Run, here: Session, sampled: str) -> None:
    """Make shards of the responses of the step ``sampled``."""
    _sampled_data(run, here, run.path(sampled, "bootstrap.jsonl"))


def weighed_data(run: Run, here: Session, weighed: str) -> None:
    """Make shards of the responses that the step ``weighed`` has given weights."""
    _sampled_data(run, here, run.path(weighed, "weighed.jsonl"))


def _sampled_data(run: Run, here: Session, path: str) -> None:
    files = {"train": [path]}
    on_main(lambda: reshard(run, here, files, valid_fraction=0.0))


def reshard(run: Run, here: Session, files: Mapping[str, list[str]], valid_fraction: float | None = None) -> None:
    """Make shards of records with the tokenizer of the first shards. The main rank alone calls this."""
    overrides: Overrides = {"tokenizer": {"path": run.path("data", "shards/train"), "train": False}}
    if valid_fraction is not None:
        overrides["data"] = {"valid_fraction": valid_fraction}
    summary = make_shards(with_overrides(here.config, overrides), files, here.folder / "shards")
    here.run.update(counts={k: summary[k] for k in ("in", "out", "skipped")})


def sampling(run: Run, here: Session) -> None:
    """Draw responses at the best attribute values, and score them."""
    bootstrap.bootstrap(here, here.config.input, Path(str(here.config.output)))


def weights(run: Run, here: Session) -> None:
    """Weigh responses against the others to the same prompt."""
    weigh.weigh(here, here.config.input, Path(str(here.config.output)))


def evaluation(run: Run, here: Session, labelled: bool = True) -> None:
    """Evaluate on held-out prompts, those of the corpus, else of the validation records; and, if ``labelled``, the
    attribute-prediction model on the labelled validation records.
    """
    config = here.config
    valid = records_of(run, "valid")
    if labelled:
        config.input = config.input or (valid[0] if valid else None)
    config.evaluate.prompts = config.evaluate.prompts or _held_out_prompts(run) or next(iter(valid), None)
    if config.evaluate.prompts is None:
        raise UserError(
            "there is no validation split to evaluate on; set data.valid_fraction above 0 or evaluate.prompts"
        )
    evaluate.check(config)
    results = evaluate.evaluate(here)
    on_main(lambda: evaluate.write_results(here, results))


def report(run: Run, here: Session) -> None:
    """Write the report of a run without an ablation."""
    on_main(lambda: write_results(run, here, {}))


def write_results(run: Run, here: Session, results: Overrides) -> None:
    """Write ``report.html``, ``report.json`` and ``report.md`` of ``results``, with what is known of the run."""
    results = of_pipeline(run.here.folder, {run.folder(name).name for name in run.steps}) | results
    results |= {"timings": run.timings, "versions": versions(), "config": to_yaml(run.config)}
    results["cost"] = run.here.cost.steps
    html, content = write_report(here.folder, results)
    here.run.update(outputs={"report": str(html), "report_json": str(content)})
