"""``evaluate``: measure the attribute-prediction model, the steering of each attribute, and the quality of models.

Owns: which measures run, collecting what they compute from, and ``evaluation.json``, which ``steerlm_megatron/report``
renders. Does not own: the figures and the judges (``steerlm_megatron/evaluate``), what is drawn
(``evaluate_drawing.py``) and scored (``evaluate_labels.py``). Invariant: what the configuration lacks is said before
any model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate import headlines, llm_judge, measures, needs
from steerlm_megatron.evaluate.judged import ENDPOINT
from steerlm_megatron.evaluate.judges import judges_of, lacking, open_judges
from steerlm_megatron.evaluate.needs import models_of
from steerlm_megatron.evaluate.outside import read_answers
from steerlm_megatron.evaluate.protocol import Inputs, JudgeContext, Material, Section
from steerlm_megatron.files import to_strict_json, write_json_atomic, write_text_atomic
from steerlm_megatron.runtime.collectives import broadcast_object, on_main
from steerlm_megatron.runtime.independent_work import independent_work
from steerlm_megatron.stages.evaluate_drawing import draw_and_measure, prompts_and_asks
from steerlm_megatron.stages.evaluate_follow_ups import journals_in
from steerlm_megatron.stages.evaluate_labels import annotated, labelled, preferences
from steerlm_megatron.stages.evaluate_shift import draw_shifts, journal_of_shift
from steerlm_megatron.stages.evaluation_files import EVALUATION_FILE, PROMPTS_FILE, RESPONSES_FILE
from steerlm_megatron.stages.record_reader import Record, RecordReader
from steerlm_megatron.stages.sampling import forget
from steerlm_megatron.stages.scoring import Scorer, described, score_all
from steerlm_megatron.stages.session import LoadedModel, Session, load_model, session
from steerlm_megatron.steer.preferences import Pair
from steerlm_megatron.steer.records import write_records

MODELS = needs.FIRST_MODELS
_IN_OTHER_FILES = ("responses", "prompt_records")  # parts of the results that are not in evaluation.json


def run(config: Config) -> dict[str, Any]:
    """Measure the models that the configuration names, and write ``evaluation.json`` into the run folder. Collective
    over the world.
    """
    check(config)
    with session(config) as here:
        results = evaluate(here)
        on_main(lambda: write_results(here, results))
        return results


def write_results(here: Session, results: Mapping[str, Any]) -> None:
    """Write ``evaluation.json``, from which ``report`` works, and all responses into the run folder."""
    path = here.folder / EVALUATION_FILE
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in to_strict_json(results.get("responses", []))]
    write_text_atomic(here.folder / RESPONSES_FILE, "".join(lines))
    if prompts := results.get("prompt_records"):
        write_records(here.folder / PROMPTS_FILE, prompts)
    write_json_atomic(
        path, to_strict_json({key: value for key, value in results.items() if key not in _IN_OTHER_FILES})
    )
    models = models_of(here.config)
    forget(here, [*models, *journals_in(here.folder, models), *map(journal_of_shift, needs.shifts_of(here.config))])
    here.run.update(outputs={"evaluation": str(path)})


def check(config: Config) -> None:
    """Refuse a configuration that cannot be evaluated, before any model is loaded."""
    e, models = config.evaluate, models_of(config)
    if e.steer is not None and e.steer not in models:
        raise UserError(
            f"evaluate.steer={e.steer} is not one of evaluate.models that are set: {' '.join(models) or 'none'}"
        )
    if models and e.prompts is None:
        raise UserError("evaluate.prompts is not set: name a record file of held-out prompts for evaluate.models")
    if not models and config.input is None and e.preferences is None:
        raise UserError(
            "nothing to evaluate: set input (labelled records) with ap_checkpoint, or "
            "evaluate.models with evaluate.prompts"
        )
    scored = config.input is not None or e.preferences is not None
    if config.ap_checkpoint is None and (scored or e.judge == "ap"):
        raise UserError(
            "ap_checkpoint is not set; it is what is evaluated on input, and the judge unless evaluate.judge=demo"
        )
    problems = lacking(config) if models else []
    if e.judges and not models:
        problems.append(f"evaluate.judges={' '.join(e.judges)} measure responses; set one of evaluate.models")
    if e.best_of > 1 and (not models or config.ap_checkpoint is None):
        problems.append(f"evaluate.best_of={e.best_of} needs ap_checkpoint, which chooses, and evaluate.models")
    if e.combinations and not set(models) - {"sft"}:
        problems.append("evaluate.combinations are asked of a model that takes attributes; set one of evaluate.models")
    if e.llm_judge.url is not None:
        problems += llm_judge.problems(config)
        if not models:
            problems.append("evaluate.llm_judge judges the answers of models; set evaluate.models")
        judged = [*models, *e.llm_judge.answers]
        if e.llm_judge.baseline not in (None, *judged):
            problems.append(
                f"evaluate.llm_judge.baseline={e.llm_judge.baseline} is not one of evaluate.models that are set, or of "
                f"evaluate.llm_judge.answers: {' '.join(judged) or 'none'}"
            )
        problems += [
            f"evaluate.llm_judge.answers.{name} has the name of one of evaluate.models; give it another"
            for name in e.llm_judge.answers
            if name in models
        ]
    if problems:
        raise UserError("; ".join(problems))
    measures.choose(config)


def evaluate(here: Session) -> dict[str, Any]:
    """Measure, and return the results for ``write_report`` without timings. Collective over the world."""
    config, reader = here.config, RecordReader(here)
    records = reader.read("input", config.input, "input") if config.input is not None else []
    pairs = reader.read_pairs("preferences", config.evaluate.preferences) if config.evaluate.preferences else []
    chosen = measures.choose(config, Inputs(annotated(records)))
    if measures.needed(chosen, ENDPOINT):
        on_main(lambda: llm_judge.open_endpoint(config).check())
    ap = None
    if config.ap_checkpoint is not None and _ap_is_used(config, chosen):
        ap = load_model(config.ap_checkpoint, config, "ap_checkpoint", head="ap")
    material = _material(here, reader, ap, records, pairs, chosen)
    results = _results(material) | {"measures": _run(here, chosen, material)}
    if ap is not None:
        ap.free()
    here.run.update(counts=reader.counts())
    return results


def _ap_is_used(config: Config, chosen: Sequence[str]) -> bool:
    """Return whether one of the ``chosen`` measures, or a judge, computes with the attribute-prediction model."""
    scoring = (needs.LABELLED, needs.ANNOTATED, needs.PREFERENCES, needs.SAMPLES)
    judged = bool(models_of(config)) and "ap" in judges_of(config)
    return judged or any(measures.needed(chosen, need) for need in scoring)


def _material(
    here: Session,
    reader: RecordReader,
    ap: LoadedModel | None,
    records: Sequence[Record],
    pairs: Sequence[Pair],
    chosen: Sequence[str],
) -> Material:
    """Score and draw what the ``chosen`` measures compute from. Collective over the world."""
    config, parts = here.config, dict[str, Any]()
    schema, score, quality, kind = None, None, config.attributes.quality, ""
    if ap is not None:
        kind = described(ap, config.scoring.decode)
        scorer = Scorer(ap, config.scoring.batch_tokens, config.scoring.decode, here.cost)
        schema, score = ap.schema, partial(score_all, scorer)
        if measures.needed(chosen, needs.LABELLED) or measures.needed(chosen, needs.ANNOTATED):
            parts["labelled"], unlabelled = labelled(ap, score, records)
            reader.leave_out("input", "unlabelled", unlabelled)
        if measures.needed(chosen, needs.PREFERENCES):
            parts["preferences"] = preferences(ap, score, pairs)
        parts["ap_model"] = kind
    if models_of(config):
        if config.evaluate.judge == "ap" and schema is not None:
            quality = schema.quality
        words = f"the attribute-prediction model ({kind})"
        judges = open_judges(JudgeContext(config, here.folder, schema, score, words), quality)
        steering = measures.needed(chosen, needs.STEERED)
        samples = config.evaluate.best_of if measures.needed(chosen, needs.SAMPLES) else 1
        if samples > 1 and schema is not None and quality not in schema.seen:
            raise UserError(
                f"evaluate.best_of={samples}: the model of ap_checkpoint has no values of {quality}, by which models "
                f"are compared; it has: {' '.join(schema.seen)}"
            )
        follow = measures.needed(chosen, ENDPOINT)
        prompts, asked = prompts_and_asks(here, reader, next(iter(judges.values())), steering, samples, follow)
        files = config.evaluate.llm_judge.answers if follow else {}
        parts["outside"] = {
            name: read_answers(path, prompts, f"evaluate.llm_judge.answers.{name}") for name, path in files.items()
        }
        drawn = draw_and_measure(here, judges, prompts, asked, score, quality, follow)
        parts |= {"judges": judges, "prompts": prompts, "answers": drawn.answers, "steered": drawn.steered}
        parts["samples"] = drawn.samples
        if measures.needed(chosen, needs.SHIFTS):
            parts["shifts"] = draw_shifts(here, prompts, {name: plan.best for name, plan in asked.items()})
    return Material(config, here.folder, quality, **parts)


def _results(material: Material) -> dict[str, Any]:
    """Return the short figures of each part, which the checks and the terminal's table are made from."""
    results: dict[str, Any] = {}
    if material.labelled is not None:
        results["ap"] = headlines.prediction(material.labelled)
        results["ap_model"] = material.ap_model
    if material.answers:
        results["judge"] = material.judges[material.judge].words
        results["judges"] = {name: judge.words for name, judge in material.judges.items()}
        results["quality_attribute"] = material.quality
        results |= headlines.quality(material)
        results["prompts"] = len(material.prompts)
        results["prompt_records"] = list(material.prompts)
    if material.steered is not None:
        results |= headlines.steering(material)
    results["responses"] = _responses(material)
    return results


def _responses(material: Material) -> list[dict[str, Any]]:
    """Return the lines of ``responses.jsonl``: model, prompt (its id), asked (levels; null for a model without
    attributes), best (whether these are the best levels, by which models are compared), text, measured, the values of
    the judge by which models are compared, and judges, those of every judge by its name.
    """
    judge, lines = material.judge if material.judges else "", []
    for name, answers in material.answers.items():
        rows = [(answers.levels, answers.texts, {key: answers.measured[key] for key in material.judges})]
        if (steered := material.steered) is not None and steered.model == name:
            by_judge = [{key: steered.measured[key][i] for key in material.judges} for i in range(len(steered.asks))]
            rows = list(zip(steered.asks, steered.texts, by_judge, strict=True))
        lines += [
            {
                "model": name, "prompt": prompt.id, "asked": None if asked is None else dict(asked),
                "best": number == 0, "text": texts[place], "measured": dict(values[judge][place]),
                "judges": {key: dict(found[place]) for key, found in values.items()},
            }
            for number, (asked, texts, values) in enumerate(rows)
            for place, prompt in enumerate(material.prompts)
        ]  # fmt: skip
    return lines


def _run(here: Session, chosen: Sequence[str], material: Material) -> dict[str, Section]:
    """Run the measures on the main rank, for which the others wait as long as it lives. Collective over the world."""
    sections: dict[str, Section] = {}
    problem: UserError | None = None
    with independent_work():
        if here.layout.is_main:
            try:
                sections = measures.run(chosen, material)
            except UserError as error:
                problem = error

    def given() -> dict[str, Section]:
        if problem is not None:
            raise problem
        return sections

    return broadcast_object(on_main(given)) or {}
