"""The responses that ``evaluate`` measures: which requests each model gets, drawing them, and having them judged.

Owns: the requests of curves, combinations and best-of-n, and the prompts that fit into all models with all of these.
Does not own: what is computed of the responses (``steerlm_megatron/evaluate``), drawing (``sampling.py``). Invariants:
prompts are held out; every model answers the same ones; what is drawn for one measure does not change what is drawn for
another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.needs import models_of
from steerlm_megatron.evaluate.protocol import Answers, Judge, Levels, Measured, Samples, Scored, Steered
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.stages.evaluate_follow_ups import check_follow_ups, draw_follow_ups
from steerlm_megatron.stages.generate import read_prompts
from steerlm_megatron.stages.record_reader import RecordReader
from steerlm_megatron.stages.sampling import (
    Drawn,
    Prompt,
    PromptRefused,
    check_room,
    draw,
    open_drawing,
    opened_sampler,
    request_for,
    skip_prompt,
)
from steerlm_megatron.stages.session import OpenedCheckpoint, Session, open_checkpoint, requested_best
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message


@dataclass(frozen=True)
class Asked:
    """The levels that one model is asked for with every prompt, and how many responses at its best levels.

    Args:
        schema: None for a model without conditioning; ``best`` are its best levels.
        asks: all requests, the best levels first; ``curves`` and ``combinations`` have places in it.
        samples: responses to each prompt at the best levels.
    """

    schema: AttributeSchema | None
    best: Levels | None
    asks: tuple[Levels | None, ...] = (None,)
    curves: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    combinations: tuple[int, ...] = ()
    samples: int = 1


@dataclass
class Drawing:
    """What was drawn and measured: by model the responses at its best levels, and for best-of-n; those of one model at
    all levels.
    """

    answers: dict[str, Answers] = field(default_factory=dict)
    samples: dict[str, Samples] = field(default_factory=dict)
    steered: Steered | None = None


def levels_to_ask(schema: AttributeSchema, wanted: Sequence[int]) -> list[int]:
    """Return ``evaluate.levels``, or every level up to five, or five spread over the scale."""
    if wanted:
        if bad := [level for level in wanted if not 0 <= level <= schema.max_level]:
            raise UserError(f"evaluate.levels: {bad} outside 0..{schema.max_level} of attributes={schema.name}")
        return sorted(set(wanted))
    if schema.max_level <= 4:
        return list(range(schema.max_level + 1))
    return [round(i * schema.max_level / 4) for i in range(5)]


def prompts_and_asks(
    here: Session, reader: RecordReader, judge: Judge, steering: bool, samples: int, follow: bool = False
) -> tuple[list[Conversation], dict[str, Asked]]:
    """Return the prompts that fit into every model with all its requests, and these requests. Collective over the
    world.

    Only what checkpoints say of their models is read, and no weights, so that errors come early.

    Args:
        judge: the one by which models are compared; attributes that it measures have curves.
        steering: whether one model gets the requests of curves and combinations.
        samples: responses to each prompt at a model's best levels.
        follow: whether the prompts' follow-ups are asked, too.
    """
    config, models = here.config, models_of(here.config)
    opened = {name: open_checkpoint(path, f"evaluate.models.{name}", head="lm") for name, path in models.items()}
    for name, model in opened.items():
        check_room(model, config)
        if name != "sft" and model.conditioned_on is None:
            raise UserError(f"evaluate.models.{name}={models[name]} was trained without attributes")
    conditioned = [name for name, model in opened.items() if model.conditioned_on is not None and name != "sft"]
    steered = (config.evaluate.steer or (conditioned[-1] if conditioned else None)) if steering else None
    asked = {name: _asked(model, config, judge, name == steered, samples) for name, model in opened.items()}
    records = read_prompts(reader, "prompts", cast(str, config.evaluate.prompts), "evaluate.prompts")
    kept: list[Conversation] = []
    for number, record in enumerate(records):
        if len(kept) == config.evaluate.max_prompts:
            reader.leave_out("prompts", "not_drawn", len(records) - number)
            break
        conversation = record.conversation
        try:
            for name, model in opened.items():
                for ask in asked[name].asks:
                    prompt = Prompt(conversation.id, conversation.messages, ask, record.where)
                    request_for(0, prompt, model, config.sampling, config.generation)
                if follow:
                    check_follow_ups(conversation, record.where, asked[name].best, model, config)
        except PromptRefused as error:
            skip_prompt(prompt, error, reader, "prompts")
        else:
            kept.append(conversation)
    reader.list_rejected()
    if not kept:
        raise UserError(f"evaluate.prompts={config.evaluate.prompts}: none of its prompts fits into the models")
    return kept, asked


def _asked(model: OpenedCheckpoint, config: Config, judge: Judge, steered: bool, samples: int) -> Asked:
    """Return the requests for a model: its best levels and, for the model that is steered, each attribute over its
    levels while the others stay at their best, and the combinations that the configuration names.
    """
    schema = model.conditioned_on
    if schema is None:
        return Asked(None, None, samples=samples)
    best = requested_best(config, schema)
    if unknown := [name for name in config.evaluate.attributes if name not in schema.names]:
        raise UserError(f"evaluate.attributes: {' '.join(unknown)}; the model has: {' '.join(schema.names)}")
    wanted = [name for name in schema.seen if name in (config.evaluate.attributes or judge.measured)]
    if unmeasured := [name for name in wanted if name not in judge.measured]:
        raise UserError(f"evaluate.attributes: evaluate.judge={judge.name} has no values of {' '.join(unmeasured)}")
    levels = levels_to_ask(schema, config.evaluate.levels)
    if not steered:
        return Asked(schema, best, (best,), samples=samples)
    curves = {name: [schema.complete({**best, name: level}) for level in levels] for name in wanted}
    combined = [_combination(text, schema, best) for text in config.evaluate.combinations]
    places: dict[tuple[tuple[str, int], ...], int] = {}
    asks: list[Levels] = []
    for ask in [best, *(ask for line in curves.values() for ask in line), *combined]:
        if _key(ask) not in places:
            places[_key(ask)] = len(asks)
            asks.append(ask)
    return Asked(
        schema,
        best,
        tuple(asks),
        {name: tuple(places[_key(ask)] for ask in line) for name, line in curves.items()},
        tuple(dict.fromkeys(places[_key(ask)] for ask in combined)),
        samples,
    )


def _combination(text: str, schema: AttributeSchema, best: Levels) -> Levels:
    try:
        return schema.complete({**best, **schema.parse(text)})
    except UserError as error:
        raise UserError(f"evaluate.combinations: {error}") from None


def _key(levels: Levels) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(levels.items()))


def draw_and_measure(
    here: Session,
    judges: Mapping[str, Judge],
    prompts: Sequence[Conversation],
    asked: Mapping[str, Asked],
    score: Scored | None,
    quality: str,
    follow: bool = False,
) -> Drawing:
    """Draw from one model after the other, and have every response judged. Collective over the world.

    Args:
        score: the attribute-prediction model, which chooses by ``quality`` where there are several samples.
        follow: whether the prompts' follow-ups are asked, too.
    """
    config, out = here.config, Drawing()
    for name, path in models_of(config).items():
        plan = asked[name]
        loaded = open_drawing(config, path, f"evaluate.models.{name}")
        drawn = _draw(here, loaded, prompts, plan, name)
        texts = [one.text for one in drawn[0]]
        later = draw_follow_ups(here, loaded, prompts, texts, plan.best, name) if follow else []
        loaded.free()
        measured = {key: _judged(judge, prompts, drawn) for key, judge in judges.items()}
        requests, best = len(plan.asks), drawn[0]
        of_best = {key: rows[0] for key, rows in measured.items()}
        out.answers[name] = Answers(
            plan.best,
            [one.text for one in best],
            [one.tokens for one in best],
            [one.finish_reason == "length" for one in best],
            of_best,
            later,
        )
        if plan.curves or plan.combinations:
            assert plan.schema is not None and plan.best is not None
            out.steered = Steered(
                name,
                plan.schema,
                plan.best,
                cast(Sequence[Levels], plan.asks),
                plan.curves,
                plan.combinations,
                [[one.text for one in row] for row in drawn[:requests]],
                {key: rows[:requests] for key, rows in measured.items()},
            )
        if plan.samples > 1:
            assert score is not None, "see the need of best_of"
            several = [best, *drawn[requests:]]
            out.samples[name] = Samples(
                [[one.text for one in row] for row in several],
                [[one.tokens for one in row] for row in several],
                np.array([_scored(score, prompts, row, quality) for row in several]),
                {key: [rows[0], *rows[requests:]] for key, rows in measured.items()},
            )
    return out


def _draw(
    here: Session, loaded: OpenedCheckpoint, prompts: Sequence[Conversation], plan: Asked, name: str
) -> list[list[Drawn]]:
    """Draw and return responses [requests, then further samples at the best levels][prompts]. They stay in the journal
    until the results are written.
    """
    config = here.config
    asks = [*plan.asks, *([plan.best] * (plan.samples - 1))]
    wanted = [
        Prompt(f"{a}/{p}", prompt.messages, ask, prompt.id)
        for a, ask in enumerate(asks)
        for p, prompt in enumerate(prompts)
    ]
    usual = len(plan.asks) * len(prompts)
    varied = replace(config.sampling, temperature=config.evaluate.best_of_temperature)
    requests = [
        request_for(i, prompt, loaded, config.sampling if i < usual else varied, config.generation)
        for i, prompt in enumerate(wanted)
    ]
    with opened_sampler(here, loaded) as sampler:
        results = draw(here, loaded, sampler, requests, name, f"evaluate {name}")
    if cut := sum(r.finish_reason == "length" for r in results):
        get_logger(__name__).info("%s: %d of %d responses reached sampling.max_tokens", name, cut, len(results))
    return [results[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(asks))]


def _judged(judge: Judge, prompts: Sequence[Conversation], drawn: Sequence[Sequence[Drawn]]) -> list[list[Measured]]:
    """Return what a judge measures, [rows][prompts]."""
    flat = judge.measure([p for _ in drawn for p in prompts], [one.text for row in drawn for one in row])
    return [flat[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(drawn))]


def _scored(score: Scored, prompts: Sequence[Conversation], row: Sequence[Drawn], quality: str) -> list[float]:
    full = [
        Conversation(p.id, (*p.messages, Message("assistant", one.text))) for p, one in zip(prompts, row, strict=True)
    ]
    return [values[len(c.messages) - 1][quality] for c, values in zip(full, score(full), strict=True)]
