"""``evaluate``: how good is the attribute-prediction model, does each attribute steer, which model is best.

Owns: what is drawn and measured, and the results that ``report.py`` renders. Does not own: metric formulas
(``observe/stats.py``).
Invariant: held-out prompts only; every number in the results was measured by the judge that the results name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from data_tools import demo_judge
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe import stats
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import to_strict_json, write_json_atomic
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.annotate import load_records
from steerlm_megatron.stages.generate import read_prompts
from steerlm_megatron.stages.sampling import Prompt, draw, forget, open_generator, requests_for
from steerlm_megatron.stages.scoring import Scorer, score_all
from steerlm_megatron.stages.session import LoadedModel, Session, load_model, session
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message, OnError

MODELS = ("sft", "acsft", "bootstrapped")
Levels = Mapping[str, int]
Measured = dict[str, float]


def run(config: Config) -> dict[str, Any]:
    """Measure what the configuration names; write ``evaluation.json`` into the run folder. Collective over the
    world.
    """
    check(config)
    with session(config) as here:
        results = evaluate(here)
        on_main(lambda: write_results(here, results))
        return results


def write_results(here: Session, results: Mapping[str, Any]) -> None:
    """``evaluation.json`` in the run folder: what ``report`` takes."""
    path = here.folder / "evaluation.json"
    write_json_atomic(path, to_strict_json(results))
    forget(here, models_of(here.config))
    here.run.update(outputs={"evaluation": str(path)})


def check(config: Config) -> None:
    """Refuse what cannot be evaluated before anything is loaded."""
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
    """``evaluate.models`` that are set, in the order of training."""
    found = {name: getattr(config.evaluate.models, name) for name in MODELS}
    return {name: path for name, path in found.items() if path is not None}


def evaluate(here: Session) -> dict[str, Any]:
    """The results of ``write_report``, without timings."""
    config = here.config
    results: dict[str, Any] = {}
    ap: LoadedModel | None = None
    if config.ap_checkpoint is not None:
        ap = load_model(config.ap_checkpoint, config, "ap_checkpoint", head="regression")
        if config.input is not None:
            results["ap"] = prediction_quality(ap, load_records(config), config.annotate.batch_tokens)
    if models_of(config):
        judge = Judge(config, ap)
        results["judge"] = judge.name
        prompts = read_prompts(cast(str, config.evaluate.prompts), cast(OnError, config.data.on_error))
        prompts = prompts[: config.evaluate.max_prompts]
        results |= _compare(here, judge, prompts)
        results["prompts"] = len(prompts)
    if ap is not None:
        ap.free()
    return results


def prediction_quality(
    ap: LoadedModel, records: list[Conversation], batch_tokens: int | None
) -> dict[str, dict[str, float]]:
    """MSE, MAE, Pearson, Spearman per attribute against human labels, beside the constant predictor's MSE.

    The constant is the training labels' mean, kept in the checkpoint. Turns of weight 0 are repeats and do not count.
    """
    schema = ap.schema
    assert schema is not None
    scores = score_all(Scorer(ap, batch_tokens), records)
    predicted, wanted = [], []
    for record, values in zip(records, scores, strict=True):
        for index, message in enumerate(record.messages):
            if message.role == "assistant" and message.attributes and message.weight:
                predicted.append([values[index][name] for name in schema.names])
                wanted.append(schema.vector({k: v for k, v in message.attributes.items() if k in schema.names}))
    if not wanted:
        raise UserError("input holds no labelled response to evaluate the attribute-prediction model on")
    constant = [float("nan") if mean is None else mean for mean in ap.meta.label_mean]
    return stats.attribute_metrics(np.array(predicted), np.array(wanted), schema.names, constant)


class Judge:
    """Measures responses: the attribute-prediction model, or the program that knows the embedded corpus."""

    def __init__(self, config: Config, ap: LoadedModel | None) -> None:
        self.kind = config.evaluate.judge
        self.name = (
            "demo_judge, a program independent of the models"
            if self.kind == "demo"
            else "the attribute-prediction model"
        )
        self.scorer = Scorer(ap, config.annotate.batch_tokens) if self.kind == "ap" and ap is not None else None

    def measure(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> list[Measured]:
        """Values of each response to its prompt. Collective over the world."""
        if self.kind == "demo":
            return [demo_judge.measure(p.messages[-1].content, r) for p, r in zip(prompts, responses, strict=True)]
        assert self.scorer is not None
        full = [
            Conversation(f"{i}", (*p.messages, Message("assistant", r)))
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
        return [values[len(c.messages) - 1] for c, values in zip(full, score_all(self.scorer, full), strict=True)]


def levels_to_ask(schema: AttributeSchema, wanted: Sequence[int]) -> list[int]:
    """``evaluate.levels``, or every level up to five, or five spread over the scale."""
    if wanted:
        if bad := [level for level in wanted if not 0 <= level <= schema.max_level]:
            raise UserError(f"evaluate.levels: {bad} outside 0..{schema.max_level} of attributes={schema.name}")
        return sorted(set(wanted))
    if schema.max_level <= 4:
        return list(range(schema.max_level + 1))
    return [round(i * schema.max_level / 4) for i in range(5)]


def _compare(here: Session, judge: Judge, prompts: list[Conversation]) -> dict[str, Any]:
    """Draw from one model after the other and measure: quality of each at its best, steering curves of one."""
    config = here.config
    models = models_of(config)
    conditioned = [name for name in ("acsft", "bootstrapped") if name in models]
    steered = config.evaluate.steer or (conditioned[-1] if conditioned else None)
    out: dict[str, Any] = {"quality_detail": {}, "examples": []}
    for name in MODELS:
        if name not in models:
            continue
        loaded = load_model(models[name], config, f"evaluate.models.{name}", head="lm", gather_logits=True)
        schema = loaded.schema if loaded.meta.conditioned else None
        if name != "sft" and schema is None:
            raise UserError(f"evaluate.models.{name}={models[name]} was trained without attributes")
        asks: list[Levels | None] = [schema.complete(None) if schema else None]
        if name == steered and schema is not None:
            asks += _asks(schema, config)
            out["max_level"] = schema.max_level
        drawn = _draw(here, loaded, prompts, asks, name)
        measured = judge.measure([p for _ in asks for p in prompts], [text for texts in drawn for text in texts])
        table = [measured[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(asks))]
        quality_name = schema.quality if schema else config.attributes.quality
        quality = [values[quality_name] for values in table[0]]
        out["quality_detail"][name] = {"mean": float(np.mean(quality)), "sem": stats.sem(quality), "n": len(quality)}
        if name == steered and schema is not None:
            out["steering"] = _curves(schema, asks, table, config)
            out["steered_model"] = name
            out["examples"] = _examples(schema, prompts[: config.evaluate.examples], asks, drawn, table)
        loaded.free()
    out["quality"] = {name: row["mean"] for name, row in out["quality_detail"].items()}
    return out


def _steered_attributes(schema: AttributeSchema, config: Config) -> list[str]:
    return [name for name in schema.names if not config.evaluate.attributes or name in config.evaluate.attributes]


def _asks(schema: AttributeSchema, config: Config) -> list[Levels]:
    """Distinct combinations: one attribute at a time over its levels, the others at their best."""
    seen: dict[tuple[tuple[str, int], ...], Levels] = {}
    for name in _steered_attributes(schema, config):
        for level in levels_to_ask(schema, config.evaluate.levels):
            ask = schema.complete({name: level})
            seen.setdefault(tuple(sorted(ask.items())), ask)
    seen.pop(tuple(sorted(schema.complete(None).items())), None)  # asked already, for quality
    return list(seen.values())


def _draw(
    here: Session, loaded: LoadedModel, prompts: list[Conversation], asks: Sequence[Levels | None], name: str
) -> list[list[str]]:
    """Texts [asks][prompts]. They stay in the journal until the results are written."""
    config = here.config
    wanted = [
        Prompt(f"{a}/{p}", prompt.messages, ask) for a, ask in enumerate(asks) for p, prompt in enumerate(prompts)
    ]
    limit = min(config.server.max_sequence_tokens, loaded.model_config.max_position)
    requests = requests_for(wanted, loaded.tokenizer, loaded.template, loaded.schema, config.sampling, limit)
    results = draw(here, loaded, open_generator(config, loaded), requests, name, f"evaluate {name}")
    if cut := sum(r.finish_reason == "length" for r in results):
        get_logger(__name__).info("%s: %d of %d responses reached sampling.max_tokens", name, cut, len(results))
    texts = [result.text for result in results]
    return [texts[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(asks))]


def _curves(
    schema: AttributeSchema, asks: Sequence[Levels | None], table: Sequence[Sequence[Measured]], config: Config
) -> dict[str, dict[str, Any]]:
    """Per attribute: requested levels, mean and deviation of what was measured, Spearman of the curve and of single
    responses.
    """
    rows = {tuple(sorted((ask or {}).items())): measured for ask, measured in zip(asks, table, strict=True)}
    curves: dict[str, dict[str, Any]] = {}
    for name in _steered_attributes(schema, config):
        requested, means, deviations = [], [], []
        pairs: list[tuple[int, float]] = []
        for level in levels_to_ask(schema, config.evaluate.levels):
            values = [m[name] for m in rows[tuple(sorted(schema.complete({name: level}).items()))]]
            requested.append(level)
            means.append(float(np.mean(values)))
            deviations.append(float(np.std(values)))
            pairs += [(level, value) for value in values]
        curves[name] = {
            "requested": requested,
            "measured": means,
            "std": deviations,
            "spearman": stats.spearman(means, requested),
            "sample_spearman": stats.spearman([v for _, v in pairs], [level for level, _ in pairs]),
        }
    return curves


def _examples(
    schema: AttributeSchema,
    prompts: Sequence[Conversation],
    asks: Sequence[Levels | None],
    drawn: Sequence[Sequence[str]],
    table: Sequence[Sequence[Measured]],
) -> list[dict[str, Any]]:
    """Responses of a few prompts at the best combination and at each attribute's extremes."""
    best = schema.complete(None)
    chosen = [0]
    for name in schema.names:
        for level in (0, schema.max_level):
            ask = {**best, name: level}
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
