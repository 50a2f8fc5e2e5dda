"""``bootstrap``: responses of the model at the best attribute values, scored again (SteerLM, arXiv 2310.05344 §3.4).

Owns: the set V of combinations, pairing them with prompts, the output records. Does not own: drawing (``sampling.py``),
scoring (``scoring.py``). Invariant: labels of the output come from the attribute-prediction model, never from the
requested levels.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.record_reader import Record, RecordReader
from steerlm_megatron.stages.sampling import Drawn, Prompt, draw, forget, open_drawing, open_sampler, requests_for
from steerlm_megatron.stages.scoring import Scorer, score_all
from steerlm_megatron.stages.session import Session, load_model, session
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message, write_records


def run(config: Config) -> None:
    """Draw and score responses to prompts of ``input`` (annotated records), and write ``output``. Collective over the
    world.
    """
    with session(config) as here:
        bootstrap(here, cast(str, config.input), Path(cast(str, config.output)))


def combinations(records: Iterable[Conversation], schema: AttributeSchema) -> list[dict[str, int]]:
    """Return V: the distinct combinations of levels in the annotated data that have the best quality found there.

    Only responses with a value of every attribute that occurs in the data count, and only attributes that the model has
    seen. V is sorted, so that drawing from it is a function of the seed alone.
    """
    labelled = [
        {name: value for name, value in message.attributes.items() if name in schema.seen}
        for record in records
        for message in record.messages
        if message.role == "assistant" and message.attributes and message.weight
    ]
    present = [name for name in schema.seen if any(name in values for values in labelled)]
    levels = [schema.levels(values) for values in labelled if len(values) == len(present)]
    found = {tuple(one[name] for name in present) for one in levels}
    if not found or schema.quality not in present:
        lacking = schema.quality if schema.quality not in present else " and ".join(present)
        raise UserError(f"input holds no response with a value of {lacking} ({schema.name}); annotate it first")
    quality = present.index(schema.quality)
    best = max(one[quality] for one in found)
    return [dict(zip(present, one, strict=True)) for one in sorted(found) if one[quality] == best]


def choose_prompts(
    records: Sequence[Record], limit: int | None, rng: random.Random
) -> tuple[list[Record], dict[str, int]]:
    """Return the prompts to draw for, and how many records are left out, by reason.

    A prompt is a record's messages before its last response. Each distinct prompt counts once, and ``limit`` of them
    are drawn without replacement.
    """
    prompts: dict[tuple[tuple[str, str], ...], Record] = {}
    for where, record in ((r.where, r.conversation) for r in records):
        last = max(i for i, m in enumerate(record.messages) if m.role == "assistant")  # every record has one
        messages = record.messages[:last]
        prompts.setdefault(
            tuple((m.role, m.content) for m in messages), Record(where, Conversation(record.id, messages))
        )
    pool = list(prompts.values())
    chosen = rng.sample(pool, limit) if limit is not None and limit < len(pool) else pool
    return chosen, {"repeated_prompt": len(records) - len(pool), "not_drawn": len(pool) - len(chosen)}


def pair_prompts(
    chosen: Sequence[Record], combinations: Sequence[Mapping[str, int]], responses: int, rng: random.Random
) -> list[Prompt]:
    """Return each prompt ``responses`` times, each with a combination that is drawn uniformly."""
    return [
        Prompt(f"{r.conversation.id}/{n}", r.conversation.messages, dict(rng.choice(list(combinations))), r.where)
        for r in chosen
        for n in range(responses)
    ]


def bootstrap(here: Session, source: str, output: Path) -> dict[str, Any]:
    """Draw responses, score them and write them. Collective over the world.

    Returns counts of responses, where a record counts as ``bootstrap.responses_per_prompt`` of them.
    """
    config, reader = here.config, RecordReader(here)
    schema, prompts, responses = _draw(here, reader, source, output)
    if job_of_array(config)[0] is not None:  # the job that puts all parts together scores them
        return reader.counts()
    kept = [(p, r) for p, r in zip(prompts, responses, strict=True) if r.finish_reason == "stop" and r.text.strip()]
    reader.leave_out("input", "unfinished", sum(r.finish_reason != "stop" for r in responses))
    reader.leave_out("input", "empty", sum(r.finish_reason == "stop" and not r.text.strip() for r in responses))
    counts = reader.counts()
    if not kept:
        unfinished = sum(r.finish_reason != "stop" for r in responses)
        raise UserError(
            f"none of {len(prompts)} responses is of use: {unfinished} did not end within sampling.max_tokens="
            f"{config.sampling.max_tokens} (raise it), {len(prompts) - unfinished} are empty"
        )
    ap = load_model(cast(str, config.ap_checkpoint), config, "ap_checkpoint", head="regression")
    if ap.schema is None or ap.schema.names != schema.names or ap.schema.max_level != schema.max_level:
        raise UserError("checkpoint and ap_checkpoint were trained with different attributes")
    drawn = [
        Conversation(
            p.id, (*p.messages, Message("assistant", r.text)), "bootstrap", {"requested": dict(p.levels or {})}
        )
        for p, r in kept
    ]
    scores = score_all(Scorer(ap, config.scoring.batch_tokens), drawn)
    ap.free()

    def write() -> None:
        write_records(output, (_scored(c, s[len(c.messages) - 1], schema) for c, s in zip(drawn, scores, strict=True)))
        forget(here, [output.name])
        here.run.update(counts=counts, outputs={"output": str(output)})
        get_logger(__name__).info(
            "%d responses drawn, %d kept and scored → %s; left out: %d that reached sampling.max_tokens=%d, %d empty",
            len(prompts), len(kept), output, counts["skipped"].get("unfinished", 0), config.sampling.max_tokens,
            counts["skipped"].get("empty", 0),
        )  # fmt: skip

    on_main(write)
    return counts


def _draw(
    here: Session, reader: RecordReader, source: str, output: Path
) -> tuple[AttributeSchema, list[Prompt], list[Drawn]]:
    """Return prompts and their responses, and the attributes that they were asked for."""
    config, b = here.config, here.config.bootstrap
    records = reader.read("input", source, "input", each=b.responses_per_prompt)
    loaded = open_drawing(config)
    schema = loaded.conditioned_on
    if schema is None:
        raise UserError(
            f"checkpoint={config.checkpoint} was trained without attributes; bootstrap needs an "
            "attribute-conditioned model"
        )
    found = combinations((record.conversation for record in records), schema)
    get_logger(__name__).info("%d combinations with %s=%d", len(found), schema.quality, found[0][schema.quality])
    rng = random.Random(config.sampling.seed)
    chosen, left_out = choose_prompts(records, b.prompts, rng)
    for reason, count in left_out.items():
        reader.leave_out("input", reason, count * b.responses_per_prompt)
    paired = pair_prompts(chosen, found, b.responses_per_prompt, rng)
    prompts, requests = requests_for(paired, loaded, config, reader, "input")
    responses = draw(here, loaded, open_sampler(config, loaded), requests, output.name, "bootstrap")
    loaded.free()
    return schema, prompts, responses


def _scored(record: Conversation, values: Mapping[str, float], schema: AttributeSchema) -> Conversation:
    """Return the record with the prediction on its last message; earlier responses are context and are not trained
    again.
    """
    *context, response = record.messages
    earlier = tuple(
        Message(m.role, m.content, m.attributes, 0 if m.role == "assistant" else m.weight, m.extra) for m in context
    )
    final = Message("assistant", response.content, dict(values), extra={"levels": schema.levels(values)})
    return Conversation(record.id, (*earlier, final), record.source, record.extra)
