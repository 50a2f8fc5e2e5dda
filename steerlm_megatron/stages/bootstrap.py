"""``bootstrap``: the model's own responses at the best attribute values, re-scored (SteerLM, step 4; facts §1.4).

Owns: the set V of combinations, pairing them with prompts, the output records. Does not own: drawing
(``sampling.py``), scoring (``scoring.py``). Invariant: labels of the output come from the attribute-prediction model,
never from what was asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.annotate import load_records
from steerlm_megatron.stages.sampling import Drawn, Prompt, draw, forget, open_sampler, requests_for
from steerlm_megatron.stages.scoring import Scorer, score_all
from steerlm_megatron.stages.session import Session, load_model, session
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message, write_records


def run(config: Config) -> None:
    """``input`` (annotated records) → ``output`` (drawn and scored records). Collective over the world."""
    for key in ("input", "output", "checkpoint", "ap_checkpoint"):
        if getattr(config, key) is None:
            raise UserError(f"{key} is not set; bootstrap needs input, output, checkpoint (SFT) and ap_checkpoint")
    with session(config) as here:
        bootstrap(here, load_records(config), Path(cast(str, config.output)))


def combinations(records: Iterable[Conversation], schema: AttributeSchema) -> list[dict[str, int]]:
    """V: the distinct combinations of levels in the annotated data whose quality is the best found there.

    Only responses with all attributes count. Sorted, so that drawing from V is a function of the seed alone.
    """
    found: set[tuple[int, ...]] = set()
    for record in records:
        for message in record.messages:
            if message.role == "assistant" and message.attributes and message.weight:
                levels = schema.levels({k: v for k, v in message.attributes.items() if k in schema.names})
                if len(levels) == len(schema.names):
                    found.add(tuple(levels[name] for name in schema.names))
    if not found:
        raise UserError(f"input holds no response with all attributes of {schema.name}; annotate it first")
    quality = schema.names.index(schema.quality)
    best = max(levels[quality] for levels in found)
    return [dict(zip(schema.names, levels, strict=True)) for levels in sorted(found) if levels[quality] == best]


def pair_prompts(
    records: Sequence[Conversation], chosen: Sequence[Mapping[str, int]], limit: int | None, responses: int, seed: int
) -> list[Prompt]:
    """Prompts of the records (all before the last response), each ``responses`` times, with combinations drawn
    uniformly.

    A prompt that several records share is used once; ``limit`` prompts are drawn without replacement.
    """
    rng = random.Random(seed)
    prompts: dict[tuple[tuple[str, str], ...], tuple[str, tuple[Message, ...]]] = {}
    for record in records:
        last = max((i for i, m in enumerate(record.messages) if m.role == "assistant"), default=None)
        if last is None or not any(m.role == "user" for m in record.messages[:last]):
            continue
        messages = record.messages[:last]
        prompts.setdefault(tuple((m.role, m.content) for m in messages), (record.id, messages))
    pool = list(prompts.values())
    if limit is not None and limit < len(pool):
        pool = rng.sample(pool, limit)
    return [
        Prompt(f"{name}/{n}", messages, dict(rng.choice(list(chosen))))
        for name, messages in pool
        for n in range(responses)
    ]


def bootstrap(here: Session, records: list[Conversation], output: Path) -> dict[str, int]:
    """Draw, score, write. Returns counts. Collective over the world."""
    config = here.config
    schema, prompts, responses = _draw(here, records, output)
    kept = [(p, r) for p, r in zip(prompts, responses, strict=True) if r.finish_reason == "stop" and r.text.strip()]
    counts = {
        "in": len(prompts),
        "out": len(kept),
        "skipped_unfinished": sum(r.finish_reason != "stop" for r in responses),
        "skipped_empty": sum(r.finish_reason == "stop" and not r.text.strip() for r in responses),
    }
    if not kept:
        raise UserError(
            f"none of {len(prompts)} responses ended within sampling.max_tokens={config.sampling.max_tokens}; raise it"
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
    scores = score_all(Scorer(ap, config.annotate.batch_tokens), drawn)
    ap.free()

    def write() -> None:
        write_records(output, (_scored(c, s[len(c.messages) - 1], schema) for c, s in zip(drawn, scores, strict=True)))
        forget(here, [output.name])
        here.run.update(counts=counts, outputs={"output": str(output)})
        get_logger(__name__).info(
            "%d responses drawn, %d kept and scored → %s; left out: %d that reached sampling.max_tokens=%d, %d empty",
            len(prompts), len(kept), output, counts["skipped_unfinished"], config.sampling.max_tokens,
            counts["skipped_empty"],
        )  # fmt: skip

    on_main(write)
    return counts


def _draw(
    here: Session, records: list[Conversation], output: Path
) -> tuple[AttributeSchema, list[Prompt], list[Drawn]]:
    """Prompts and their responses, and the attributes that they were asked for."""
    config = here.config
    loaded = load_model(cast(str, config.checkpoint), config, "checkpoint", head="lm", gather_logits=True)
    if loaded.schema is None or not loaded.meta.conditioned:
        raise UserError(
            f"checkpoint={config.checkpoint} was trained without attributes; bootstrap needs an "
            "attribute-conditioned model"
        )
    schema = loaded.schema
    chosen = combinations(records, schema)
    get_logger(__name__).info("%d combinations with %s=%d", len(chosen), schema.quality, chosen[0][schema.quality])
    b = config.bootstrap
    prompts = pair_prompts(records, chosen, b.prompts, b.responses_per_prompt, config.sampling.seed)
    limit = min(config.server.max_sequence_tokens, loaded.model_config.max_position)
    requests = requests_for(prompts, loaded.tokenizer, loaded.template, schema, config.sampling, limit)
    responses = draw(here, loaded, open_sampler(config, loaded), requests, output.name, "bootstrap")
    loaded.free()
    return schema, prompts, responses


def _scored(record: Conversation, values: Mapping[str, float], schema: AttributeSchema) -> Conversation:
    """The record with the prediction on its last message; earlier responses are context and are not trained again."""
    *context, response = record.messages
    earlier = tuple(
        Message(m.role, m.content, m.attributes, 0 if m.role == "assistant" else m.weight, m.extra) for m in context
    )
    final = Message("assistant", response.content, dict(values), extra={"levels": schema.levels(values)})
    return Conversation(record.id, (*earlier, final), record.source, record.extra)
