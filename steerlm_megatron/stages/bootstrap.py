"""``bootstrap``: responses of the model at the best attribute values, scored again (SteerLM, arXiv 2310.05344 §3.4).

Owns: the set V of combinations, pairing them with prompts, the output records and the account of all others. Does not
own: drawing (``sampling.py``), scoring (``scoring.py``), what is left out (``response_filters.py``), the statistics
(``bootstrap_stats.py``). Invariants: labels of the output come from the attribute-prediction model, never from the
requested levels; which combination a prompt is paired with depends on the seed, the prompt and V, and not on other
prompts.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import to_strict_json, write_json_atomic
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.bootstrap_stats import STATISTICS_FILE, Response, statistics
from steerlm_megatron.stages.record_reader import Record, RecordReader
from steerlm_megatron.stages.response_filters import UNFINISHED, Reasons, ResponseFilters, prompt_key
from steerlm_megatron.stages.sampling import Drawn, Prompt, draw, forget, open_drawing, opened_sampler, requests_for
from steerlm_megatron.stages.scoring import Scorer, check_decode, score_all
from steerlm_megatron.stages.session import Session, load_model, open_checkpoint, session
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message, write_records

DROPPED_FILE = "dropped.jsonl"  # its name in the run folder


def run(config: Config) -> None:
    """Draw and score responses to prompts of ``input`` (annotated records), and write ``output``. Collective over the
    world.
    """
    with session(config) as here:
        bootstrap(here, config.input, Path(cast(str, config.output)))


@dataclass(frozen=True)
class Combination:
    """A combination of levels, and the number of responses of the annotated data that have it."""

    levels: Mapping[str, int]
    count: int


def combinations(records: Iterable[Conversation], schema: AttributeSchema) -> list[Combination]:
    """Return V: the distinct combinations of levels in the annotated data that have the best quality found there.

    Only responses with a value of every attribute that occurs in the data count, and only attributes that the model has
    seen. V is sorted, so that drawing from it is a function of the seed alone.
    """
    labelled = [values for _, values in _annotated(records, schema)]
    present = [name for name in schema.seen if any(name in values for values in labelled)]
    levels = [schema.levels(values) for values in labelled if len(values) == len(present)]
    found = Counter(tuple(one[name] for name in present) for one in levels)
    if not found or schema.quality not in present:
        lacking = schema.quality if schema.quality not in present else " and ".join(present)
        raise UserError(f"input holds no response with a value of {lacking} ({schema.name}); annotate it first")
    quality = present.index(schema.quality)
    best = max(one[quality] for one in found)
    return [
        Combination(dict(zip(present, one, strict=True)), found[one]) for one in sorted(found) if one[quality] == best
    ]


def _annotated(records: Iterable[Conversation], schema: AttributeSchema) -> list[Response]:
    """Return text and values of the trained responses that have values, of attributes that the model has seen."""
    return [
        (message.content, {name: value for name, value in message.attributes.items() if name in schema.seen})
        for record in records
        for message in record.messages
        if message.role == "assistant" and message.attributes and message.weight
    ]


def cumulative(found: Sequence[Combination], how: str) -> list[int]:
    """Return the running sum of the weights with which combinations are drawn: with ``uniform`` 1 for each (arXiv
    2310.05344 §3.4), with ``frequency`` the number of responses of the annotated data that have it.
    """
    return list(accumulate(one.count if how == "frequency" else 1 for one in found))


def draw_combination(upto: Sequence[int], seed: int, prompt: str, number: int) -> int:
    """Return the index of the combination for the ``number``-th response to the prompt with the key ``prompt``.

    ``upto`` is of :func:`cumulative`. A number in [0, 1), the first 64 bits of a hash of seed, prompt and number, is
    looked up there, so that the draw depends neither on other prompts nor on their order.
    """
    bits = int.from_bytes(hashlib.sha256(f"{seed}:{prompt}:{number}".encode()).digest()[:8], "big")
    return bisect(upto, bits * upto[-1] >> 64)


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
    chosen: Sequence[Record], found: Sequence[Combination], responses: int, how: str, seed: int
) -> list[Prompt]:
    """Return each prompt ``responses`` times, each time with a drawn combination (:func:`draw_combination`)."""
    paired, upto = [], cumulative(found, how)
    for record in chosen:
        one, key = record.conversation, prompt_key(record.conversation.messages)
        for n in range(responses):
            levels = dict(found[draw_combination(upto, seed, key, n)].levels)
            paired.append(Prompt(f"{one.id}/{n}", one.messages, levels, record.where))
    return paired


@dataclass(frozen=True)
class _Round:
    """Everything that was drawn: prompts and responses, and what they were drawn for."""

    schema: AttributeSchema
    filters: ResponseFilters
    records: Sequence[Conversation]
    combinations: Sequence[Combination]
    prompts: Sequence[Prompt]
    responses: Sequence[Drawn]


def bootstrap(here: Session, source: str | list[str], output: Path) -> dict[str, Any]:
    """Draw responses, score and filter them, and write them. Collective over the world.

    Returns counts of responses, where a record counts as ``bootstrap.responses_per_prompt`` of them.
    """
    config, reader = here.config, RecordReader(here)
    drawn = _draw(here, reader, source, output)
    if job_of_array(config)[0] is not None:  # the job that puts all parts together scores them
        return reader.counts()
    reasons = drawn.filters.by_text(drawn.prompts, drawn.responses, drawn.records)
    passed = [i for i, reason in enumerate(reasons) if reason is None]
    values = dict(zip(passed, _score(here, drawn, passed), strict=True))
    by_values = drawn.filters.by_values([drawn.prompts[i] for i in passed], [values[i] for i in passed])
    for index, reason in zip(passed, by_values, strict=True):
        reasons[index] = reason
    left_out = Counter(reason for reason in reasons if reason is not None)
    for reason in drawn.filters.reasons:
        reader.leave_out("input", reason, left_out[reason])
    counts = reader.counts()
    on_main(lambda: _write(here, drawn, reasons, values, counts, output))
    return counts


def _score(here: Session, drawn: _Round, which: Sequence[int]) -> list[Mapping[str, float]]:
    """Return the values that the attribute-prediction model measures in these responses. Collective over the world."""
    if not which:
        return []
    config = here.config
    ap = load_model(cast(str, config.ap_checkpoint), config, "ap_checkpoint", head="ap")
    whole = [
        Conversation(p.id, (*p.messages, Message("assistant", r.text)))
        for p, r in ((drawn.prompts[i], drawn.responses[i]) for i in which)
    ]
    scores = score_all(Scorer(ap, config.scoring.batch_tokens, config.scoring.decode, here.cost), whole)
    ap.free()
    return [values[len(c.messages) - 1] for c, values in zip(whole, scores, strict=True)]


def _write(
    here: Session, drawn: _Round, reasons: Reasons, values: Mapping[int, Mapping[str, float]], counts: dict[str, Any],
    output: Path,
) -> None:  # fmt: skip
    """Write the kept responses, where it is asked for those that are left out, and the statistics. The main rank alone
    calls it.

    Raises:
        UserError: no response is kept.
    """
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    dropped = here.folder / DROPPED_FILE
    if here.config.bootstrap.write_dropped and len(kept) < len(reasons):
        write_records(dropped, (_record(drawn, i, values.get(i), r) for i, r in enumerate(reasons) if r is not None))
    else:
        dropped.unlink(missing_ok=True)
    left_out = {reason: n for reason in drawn.filters.reasons if (n := reasons.count(reason))}
    if not kept:
        raise UserError(_nothing_kept(here.config, len(reasons), left_out))
    write_records(output, (_record(drawn, i, values[i]) for i in kept))
    found = {
        "combinations": {
            "drawn": here.config.bootstrap.combinations, "number": len(drawn.combinations),
            "quality": drawn.combinations[0].levels[drawn.schema.quality],
        },
        "counts": {"drawn": len(reasons), "kept": len(kept), "left_out": left_out},
        **statistics(
            _annotated(drawn.records, drawn.schema), [(drawn.responses[i].text, values[i]) for i in kept],
            [(drawn.prompts[i].levels or {}, one) for i, one in values.items()], drawn.schema,
            here.config.sampling.seed,
        ),
    }  # fmt: skip
    write_json_atomic(here.folder / STATISTICS_FILE, to_strict_json(found))
    forget(here, [output.name])
    here.run.update(counts=counts, outputs={"output": str(output), "statistics": str(here.folder / STATISTICS_FILE)})
    get_logger(__name__).info(
        "%d responses drawn, %d kept → %s; left out: %s", len(reasons), len(kept), output, _in_words(left_out)
    )


def _in_words(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in left_out.items()) or "none"


def _nothing_kept(config: Config, drawn: int, left_out: Mapping[str, int]) -> str:
    """Return the error of a run whose filters left nothing, with the most frequent reason first."""
    remedy = "loosen the filters (bootstrap.*), or draw more (bootstrap.responses_per_prompt)"
    if left_out.get(UNFINISHED, 0) == max(left_out.values()):
        remedy = f"raise sampling.max_tokens={config.sampling.max_tokens}, within which they did not end"
    ordered = dict(sorted(left_out.items(), key=lambda item: -item[1]))
    return f"none of {drawn} responses is of use ({_in_words(ordered)}): {remedy}"


def _draw(here: Session, reader: RecordReader, source: str | list[str], output: Path) -> _Round:
    """Draw responses to prompts of ``source``, after all checks. Collective over the world."""
    config, b = here.config, here.config.bootstrap
    records = reader.read("input", source, "input", each=b.responses_per_prompt)
    ap = open_checkpoint(cast(str, config.ap_checkpoint), "ap_checkpoint", head="ap")
    check_decode(ap, config.scoring.decode)
    loaded = open_drawing(config)
    schema = loaded.conditioned_on
    if schema is None:
        raise UserError(
            f"checkpoint={config.checkpoint} was trained without attributes; bootstrap needs an "
            "attribute-conditioned model"
        )
    if ap.schema is None or ap.schema.names != schema.names or ap.schema.max_level != schema.max_level:
        raise UserError("checkpoint and ap_checkpoint were trained with different attributes")
    filters = ResponseFilters.from_config(b, ap.schema)
    read = [record.conversation for record in records]
    if b.combinations == "best":
        found = [Combination(schema.complete({}), len(read))]
    else:
        found = combinations(read, schema)
    if never := [name for name in b.max_distance if name not in found[0].levels]:
        raise UserError(f"bootstrap.max_distance: {' '.join(never)} is not asked for: the input has no values of it")
    get_logger(__name__).info("%d combinations with %s=%d", len(found), schema.quality, found[0].levels[schema.quality])
    chosen, left_out = choose_prompts(records, b.prompts, random.Random(config.sampling.seed))
    for reason, count in left_out.items():
        reader.leave_out("input", reason, count * b.responses_per_prompt)
    paired = pair_prompts(chosen, found, b.responses_per_prompt, b.combinations, config.sampling.seed)
    prompts, requests = requests_for(paired, loaded, config, reader, "input")
    with opened_sampler(here, loaded) as sampler:
        responses = draw(here, loaded, sampler, requests, output.name, "bootstrap")
    loaded.free()
    return _Round(schema, filters, read, found, prompts, responses)


def _record(drawn: _Round, index: int, values: Mapping[str, float] | None, reason: str | None = None) -> Conversation:
    """Return a response as a record: with the predicted values on its last message, and with ``dropped``, the reason,
    if it is left out. Earlier responses are context and are not trained again.
    """
    prompt, response, schema = drawn.prompts[index], drawn.responses[index], drawn.schema
    earlier = tuple(
        Message(m.role, m.content, m.attributes, 0 if m.role == "assistant" else m.weight, m.extra)
        for m in prompt.messages
    )
    extra: dict[str, Any] = {} if values is None else {"levels": schema.levels(values)}
    if response.finish_reason != "stop":
        extra["finish_reason"] = response.finish_reason
    final = Message("assistant", response.text, None if values is None else dict(values), extra=extra)
    about = {"requested": dict(prompt.levels or {})} | ({} if reason is None else {"dropped": reason})
    return Conversation(prompt.id, (*earlier, final), "bootstrap", about)
