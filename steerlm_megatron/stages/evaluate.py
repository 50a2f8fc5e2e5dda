"""``evaluate``: measure the attribute-prediction model, the steering of each attribute, and the quality of models.

Owns: the requests that are drawn and measured, and the results that ``steerlm_megatron/report`` renders. Does not own:
formulas of metrics (``observe/stats.py``). Invariant: prompts are held out; the judge that the results name measured
every number in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from data_tools import demo_judge
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import to_strict_json, write_json_atomic
from steerlm_megatron.observe import stats
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.generate import read_prompts
from steerlm_megatron.stages.record_reader import RecordReader
from steerlm_megatron.stages.sampling import (
    Prompt,
    PromptRefused,
    check_room,
    draw,
    forget,
    open_generator,
    request_for,
    skip_prompt,
)
from steerlm_megatron.stages.scoring import Scorer, score_all
from steerlm_megatron.stages.session import (
    LoadedModel,
    OpenedCheckpoint,
    Session,
    load_model,
    open_checkpoint,
    requested_best,
    session,
)
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message

MODELS = ("sft", "acsft", "bootstrapped")
Levels = Mapping[str, int]
Measured = dict[str, float]


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
    """Write ``evaluation.json``, from which ``report`` works, into the run folder."""
    path = here.folder / "evaluation.json"
    write_json_atomic(path, to_strict_json(results))
    forget(here, models_of(here.config))
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
    if not models and config.input is None:
        raise UserError(
            "nothing to evaluate: set input (labelled records) with ap_checkpoint, or "
            "evaluate.models with evaluate.prompts"
        )
    if config.ap_checkpoint is None and (config.input is not None or e.judge == "ap"):
        raise UserError(
            "ap_checkpoint is not set; it is what is evaluated on input, and the judge unless evaluate.judge=demo"
        )


def models_of(config: Config) -> dict[str, str]:
    """Return those of ``evaluate.models`` that are set, in the order of training."""
    found = {name: getattr(config.evaluate.models, name) for name in MODELS}
    return {name: path for name, path in found.items() if path is not None}


def evaluate(here: Session) -> dict[str, Any]:
    """Measure, and return the results for ``write_report`` without timings. Collective over the world."""
    config, reader = here.config, RecordReader(here)
    results: dict[str, Any] = {}
    ap: LoadedModel | None = None
    if config.ap_checkpoint is not None:
        ap = load_model(config.ap_checkpoint, config, "ap_checkpoint", head="regression")
        if config.input is not None:
            records = [record.conversation for record in reader.read("input", config.input, "input")]
            results["ap"], unlabelled = prediction_quality(ap, records, config.scoring.batch_tokens)
            reader.leave_out("input", "unlabelled", unlabelled)
    if models_of(config):
        judge = Judge(config, ap)
        results["judge"] = judge.name
        prompts, asks = _prompts(here, reader, judge)
        results |= _compare(here, judge, prompts, asks)
        results["prompts"] = len(prompts)
    if ap is not None:
        ap.free()
    here.run.update(counts=reader.counts())
    return results


def prediction_quality(
    ap: LoadedModel, records: list[Conversation], batch_tokens: int | None
) -> tuple[dict[str, dict[str, float]], int]:
    """Return MSE, MAE, Pearson and Spearman per attribute against human labels, the errors of two predictors that read
    no text (``stats.attribute_metrics``), and the number of records without a label to compare with.

    One is constant, the mean of the training labels, which the checkpoint holds; the other knows a response's length.
    Attributes of which the model never saw a label are left out. Turns of weight 0 are repeats and do not count, nor do
    empty turns, which have no text to score.
    """
    schema = ap.schema
    assert schema is not None
    scores = score_all(Scorer(ap, batch_tokens), records)
    predicted: list[list[float]] = []
    wanted: list[list[float]] = []
    lengths: list[int] = []
    prompts: list[str] = []
    unlabelled = 0
    for record, values in zip(records, scores, strict=True):
        before = len(wanted)
        for index, message in enumerate(record.messages):
            if message.role == "assistant" and message.attributes and message.weight and message.content.strip():
                predicted.append([values[index][name] for name in schema.seen])
                wanted.append([float(message.attributes.get(name, math.nan)) for name in schema.seen])
                lengths.append(len(message.content))
                prompts.append(record.messages[0].content)  # conversations with one beginning are of one tree
        unlabelled += len(wanted) == before
    if not wanted:
        raise UserError("input holds no labelled response to evaluate the attribute-prediction model on")
    means = dict(zip(schema.names, ap.meta.label_mean, strict=True))
    constant = [cast(float, means[name]) for name in schema.seen]  # every attribute that was seen has a mean
    return (
        stats.attribute_metrics(np.array(predicted), np.array(wanted), schema.seen, constant, lengths, prompts),
        unlabelled,
    )


class Judge:
    """Measures responses, by the attribute-prediction model or by the program that made the embedded corpus."""

    def __init__(self, config: Config, ap: LoadedModel | None) -> None:
        self.kind = config.evaluate.judge
        self.name = (
            "demo_judge, a program independent of the models"
            if self.kind == "demo"
            else "the attribute-prediction model"
        )
        self.scorer: Scorer | None = None
        self.measured: tuple[str, ...] = demo_judge.NAMES  # attributes that the judge can measure
        self.quality = config.attributes.quality
        if self.kind == "ap":
            assert ap is not None and ap.schema is not None, "see check"
            self.scorer = Scorer(ap, config.scoring.batch_tokens)
            self.measured, self.quality = ap.schema.seen, ap.schema.quality
        if self.quality not in self.measured:
            raise UserError(
                f"evaluate.judge={self.kind} cannot measure {self.quality}, by which models are compared: it has "
                f"values of {' '.join(self.measured)}"
            )

    def measure(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> list[Measured]:
        """Return values of each response to its prompt. Collective over the world."""
        if self.kind == "demo":
            return [demo_judge.measure(p.messages[-1].content, r) for p, r in zip(prompts, responses, strict=True)]
        assert self.scorer is not None
        full = [
            Conversation(f"{i}", (*p.messages, Message("assistant", r)))
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
        return [values[len(c.messages) - 1] for c, values in zip(full, score_all(self.scorer, full), strict=True)]


def levels_to_ask(schema: AttributeSchema, wanted: Sequence[int]) -> list[int]:
    """Return ``evaluate.levels``, or every level up to five, or five spread over the scale."""
    if wanted:
        if bad := [level for level in wanted if not 0 <= level <= schema.max_level]:
            raise UserError(f"evaluate.levels: {bad} outside 0..{schema.max_level} of attributes={schema.name}")
        return sorted(set(wanted))
    if schema.max_level <= 4:
        return list(range(schema.max_level + 1))
    return [round(i * schema.max_level / 4) for i in range(5)]


@dataclass(frozen=True)
class _Asked:
    """The levels that one model is asked for with every prompt."""

    schema: AttributeSchema | None  # None for a model without conditioning
    best: Levels | None
    curves: Mapping[str, list[Levels]]  # attribute → one request per level; empty if this model has no steering curves

    @property
    def all(self) -> list[Levels | None]:
        """All distinct requests: the best levels first, then the other combinations of the curves."""
        seen = {_key(ask): ask for asks in self.curves.values() for ask in asks}
        seen.pop(_key(self.best), None)
        return [self.best, *seen.values()]


def _key(levels: Levels | None) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((levels or {}).items()))


def _prompts(here: Session, reader: RecordReader, judge: Judge) -> tuple[list[Conversation], dict[str, _Asked]]:
    """Return the prompts that fit into every model with all its requests, and these requests. No model is loaded yet,
    so that errors come early. Collective over the world.
    """
    config, models = here.config, models_of(here.config)
    opened = {name: open_checkpoint(path, f"evaluate.models.{name}", head="lm") for name, path in models.items()}
    for name, model in opened.items():
        check_room(model, config)
        if name != "sft" and model.conditioned_on is None:
            raise UserError(f"evaluate.models.{name}={models[name]} was trained without attributes")
    conditioned = [name for name, model in opened.items() if model.conditioned_on is not None and name != "sft"]
    steered = config.evaluate.steer or (conditioned[-1] if conditioned else None)
    asks = {name: _asked(model, config, judge, name == steered) for name, model in opened.items()}
    records = read_prompts(reader, "prompts", cast(str, config.evaluate.prompts), "evaluate.prompts")
    kept: list[Conversation] = []
    for number, record in enumerate(records):
        if len(kept) == config.evaluate.max_prompts:
            reader.leave_out("prompts", "not_drawn", len(records) - number)
            break
        conversation = record.conversation
        try:
            for name, model in opened.items():
                for ask in asks[name].all:
                    prompt = Prompt(conversation.id, conversation.messages, ask, record.where)
                    request_for(0, prompt, model, config.sampling, config.generation)
        except PromptRefused as error:
            skip_prompt(prompt, error, reader, "prompts")
        else:
            kept.append(conversation)
    reader.list_rejected()
    if not kept:
        raise UserError(f"evaluate.prompts={config.evaluate.prompts}: none of its prompts fits into the models")
    return kept, asks


def _asked(model: OpenedCheckpoint, config: Config, judge: Judge, steered: bool) -> _Asked:
    """Return the requests for a model: the best levels and, for the model with steering curves, each attribute over its
    levels while the others stay at their best.
    """
    schema = model.conditioned_on
    if schema is None:
        return _Asked(None, None, {})
    best = requested_best(config, schema)
    if unknown := [name for name in config.evaluate.attributes if name not in schema.names]:
        raise UserError(f"evaluate.attributes: {' '.join(unknown)}; the model has: {' '.join(schema.names)}")
    wanted = [name for name in schema.seen if name in (config.evaluate.attributes or judge.measured)]
    if unmeasured := [name for name in wanted if name not in judge.measured]:
        raise UserError(f"evaluate.attributes: evaluate.judge={judge.kind} has no values of {' '.join(unmeasured)}")
    levels = levels_to_ask(schema, config.evaluate.levels)
    curves: dict[str, list[Levels]] = {}
    if steered:
        curves = {name: [schema.complete({**best, name: level}) for level in levels] for name in wanted}
    return _Asked(schema, best, curves)


def _compare(here: Session, judge: Judge, prompts: list[Conversation], asked: Mapping[str, _Asked]) -> dict[str, Any]:
    """Draw from one model after the other; measure the quality of each at its best levels and one model's curves."""
    config, models = here.config, models_of(here.config)
    out: dict[str, Any] = {"quality_detail": {}, "examples": []}
    for name, plan in asked.items():
        loaded = load_model(models[name], config, f"evaluate.models.{name}", head="lm", gather_logits=True)
        drawn = _draw(here, loaded, prompts, plan.all, name)
        measured = judge.measure([p for _ in plan.all for p in prompts], [text for texts in drawn for text in texts])
        table = [measured[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(plan.all))]
        quality = [values[judge.quality] for values in table[0]]
        out["quality_detail"][name] = {"mean": float(np.mean(quality)), "sem": stats.sem(quality), "n": len(quality)}
        if plan.curves:
            assert plan.schema is not None
            out["max_level"] = plan.schema.max_level
            out["steering"] = _curves(plan, table)
            out["steered_model"] = name
            out["examples"] = _examples(plan, prompts[: config.evaluate.examples], drawn, table)
        loaded.free()
    out["quality"] = {name: row["mean"] for name, row in out["quality_detail"].items()}
    return out


def _draw(
    here: Session, loaded: LoadedModel, prompts: list[Conversation], asks: Sequence[Levels | None], name: str
) -> list[list[str]]:
    """Draw and return texts [requests][prompts]. They stay in the journal until the results are written."""
    config = here.config
    wanted = [
        Prompt(f"{a}/{p}", prompt.messages, ask, prompt.id)
        for a, ask in enumerate(asks)
        for p, prompt in enumerate(prompts)
    ]
    requests = [request_for(i, prompt, loaded, config.sampling, config.generation) for i, prompt in enumerate(wanted)]
    results = draw(here, loaded, open_generator(config, loaded), requests, name, f"evaluate {name}")
    if cut := sum(r.finish_reason == "length" for r in results):
        get_logger(__name__).info("%s: %d of %d responses reached sampling.max_tokens", name, cut, len(results))
    texts = [result.text for result in results]
    return [texts[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(asks))]


def _curves(plan: _Asked, table: Sequence[Sequence[Measured]]) -> dict[str, dict[str, Any]]:
    """Return per attribute the requested levels, mean and deviation of the measured values, and Spearman of the curve
    and of single responses.
    """
    rows = {_key(ask): measured for ask, measured in zip(plan.all, table, strict=True)}
    curves: dict[str, dict[str, Any]] = {}
    for name, asks in plan.curves.items():
        requested, means, deviations = [], [], []
        pairs: list[tuple[int, float]] = []
        for ask in asks:
            values = [m[name] for m in rows[_key(ask)]]
            requested.append(ask[name])
            means.append(float(np.mean(values)))
            deviations.append(float(np.std(values)))
            pairs += [(ask[name], value) for value in values]
        curves[name] = {
            "requested": requested,
            "measured": means,
            "std": deviations,
            "spearman": stats.spearman(means, requested),
            "sample_spearman": stats.spearman([v for _, v in pairs], [level for level, _ in pairs]),
        }
    return curves


def _examples(
    plan: _Asked,
    prompts: Sequence[Conversation],
    drawn: Sequence[Sequence[str]],
    table: Sequence[Sequence[Measured]],
) -> list[dict[str, Any]]:
    """Return responses of a few prompts at the best combination and at each attribute's extremes."""
    assert plan.schema is not None
    asks, chosen = plan.all, [0]
    for name in plan.schema.seen:
        for level in (0, plan.schema.max_level):
            ask = plan.schema.complete({**(plan.best or {}), name: level})
            chosen += [i for i, a in enumerate(asks) if a == ask and i not in chosen]
    return [
        {
            "prompt": prompt.messages[-1].content,
            "responses": [
                {"attributes": dict(asks[i] or {}), "text": drawn[i][p], "measured": table[i][p]} for i in chosen
            ],
        }
        for p, prompt in enumerate(prompts)
    ]
