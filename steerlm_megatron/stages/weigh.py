"""``weigh``: target weights of sampled responses, on which SteerLM 2.0 trains (arXiv 2406.08673 §4.5).

The responses y_i to a prompt x that were asked for the same levels a are a group. Their weights are (Eq. 6)

    w_i = P(a | y_i, x) P(y_i | x) / Q'(y_i | a, x):

P(a | y, x) follows from the values that an attribute-prediction model measured (``evaluate/label_likelihood.py``),
P(y | x) is a plain SFT model's (``steerlm2.base``), and Q' is the conditioned model that the responses were drawn from
(``checkpoint``). The log-probability of a response is summed over its trained tokens, as training has them: the text
and the end of its turn.

Owns: the groups, the two passes over all responses, the output file. Does not own: drawing and measuring
(``bootstrap.py``), the fields that training reads (``data/groups.py``), log-probabilities (``log_probabilities.py``).
Invariants: a response's conditioned text is the one that ``preprocess`` makes of the output; a killed run loses at most
the chunk in flight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.groups import GROUP, LOG_WEIGHT, LOGPROB, TARGETS, shares
from steerlm_megatron.data.views import View
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.label_likelihood import log_likelihood
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import JOURNAL
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.chunked_work import compute_in_chunks
from steerlm_megatron.stages.journal import Journal, open_journal
from steerlm_megatron.stages.log_probabilities import log_probabilities
from steerlm_megatron.stages.record_reader import Record, RecordReader
from steerlm_megatron.stages.response_filters import prompt_key
from steerlm_megatron.stages.session import OpenedCheckpoint, Session, load_model, open_checkpoint, session
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, expand_paths, write_records

# What the output keeps of each response beside what training reads.
LABELS, BASE, MEASURED = "log_label_probability", "base_logprob", "measured"
NO_WEIGHT, ALONE = "too_long", "alone"  # reasons for which a response is left out


def run(config: Config) -> None:
    """Weigh the responses of ``input`` and write ``output``. Collective over the world."""
    with session(config) as here:
        weigh(here, config.input, Path(cast(str, config.output)))


@dataclass(frozen=True)
class Response:
    """A response that was drawn: its conversation, with the levels asked for on the last message; what was measured in
    it; the group of responses that it is compared with.
    """

    conversation: Conversation
    asked: Mapping[str, int]
    measured: Mapping[str, float]
    group: str


def response_of(record: Record, schema: AttributeSchema) -> Response:
    """Return what a record of ``bootstrap`` says of its response.

    Raises:
        UserError: a record that has no ``requested`` levels, or no measured value of one of them.
    """
    where, one = record.where, record.conversation
    final, asked = one.messages[-1], one.extra.get("requested")
    if final.role != "assistant" or not isinstance(asked, dict) or not asked:
        raise UserError(
            f"{where}: this is no response that was drawn: it lacks the levels that were asked for ('requested'); "
            "input is what `steerlm bootstrap` writes"
        )
    try:
        label = schema.format(asked)  # which checks names and levels
    except UserError as error:
        raise UserError(f"{where}: requested: {error}") from None
    measured = dict(final.attributes or {})
    if lacking := [name for name in asked if name not in measured]:
        raise UserError(f"{where}: the response has no measured value of {' '.join(lacking)}, which was asked for")
    levels = {name: float(level) for name, level in asked.items()}
    conversation = replace(one, messages=(*one.messages[:-1], replace(final, attributes=levels, weight=1)))
    return Response(conversation, asked, measured, f"{prompt_key(one.messages[:-1])[:24]}|{label}")


def weigh(here: Session, source: str | list[str], output: Path) -> dict[str, Any]:
    """Weigh the responses of ``source`` and write ``output``. Collective over the world. Returns the counts."""
    config, reader = here.config, RecordReader(here)
    records = reader.read("input", source, "input")
    policy = open_checkpoint(cast(str, config.checkpoint), "checkpoint", head="lm")
    base = open_checkpoint(cast(str, config.steerlm2.base), "steerlm2.base", head="lm")
    schema = policy.conditioned_on
    if schema is None:
        raise UserError(f"checkpoint={config.checkpoint} was trained without attributes; weigh needs the model that "
                        "the responses were drawn from")  # fmt: skip
    if base.meta.conditioned:
        raise UserError(f"steerlm2.base={config.steerlm2.base} is conditioned on attributes; P(response | prompt) is a "
                        "plain SFT model's (train_sft attributes=none)")  # fmt: skip
    responses = _read(reader, records, schema)
    names = _attributes_of(config, responses)
    conversations = [one.conversation for one in responses]
    found: dict[str, Journal] = {}
    for kind, opened, key in (("policy", policy, "checkpoint"), ("base", base, "steerlm2.base")):
        view: View = "acsft" if kind == "policy" else "sft"
        found[kind] = _log_probabilities(here, opened, key, view, conversations, source, f"{output.name}-{kind}")
    counts: dict[str, Any] = reader.counts()
    if job_of_array(config)[0] is None:
        values = {kind: on_main(journal.read) for kind, journal in found.items()}
        kept = on_main(lambda: _kept(responses, values["policy"] or {}, values["base"] or {}, reader))
        counts = reader.counts()
        on_main(lambda: _write(here, responses, kept or [], values, names, schema, counts, output))
        for journal in found.values():
            on_main(journal.remove)
    return counts


def _read(reader: RecordReader, records: Sequence[Record], schema: AttributeSchema) -> list[Response]:
    """Return the responses of all records; those with a fault are skipped where ``data.on_error`` says so."""
    responses = []
    for record in records:
        try:
            responses.append(response_of(record, schema))
        except UserError as error:
            if reader.on_error == "error":
                raise
            reader.skip("input", "rejected", record.where, str(error), record.conversation)
    reader.list_rejected()
    if not responses:
        raise UserError("input holds no response that was drawn; see rejected.jsonl")
    twice = [name for name, n in Counter(one.conversation.id for one in responses).items() if n > 1]
    if twice:
        raise UserError(f"input: the id {twice[0]!r} occurs {len(twice) + 1} times; responses need ids of their own")
    return responses


def _attributes_of(config: Config, responses: Sequence[Response]) -> list[str]:
    """Return the attributes in P(a | y, x): ``steerlm2.attributes``, or all that were asked of every response."""
    asked = [name for name in responses[0].asked if all(name in one.asked for one in responses)]
    if unknown := [name for name in config.steerlm2.attributes if name not in asked]:
        raise UserError(
            f"steerlm2.attributes: {' '.join(unknown)} was not asked of every response; these were: {' '.join(asked)}"
        )
    return list(config.steerlm2.attributes) or asked


def _log_probabilities(
    here: Session, opened: OpenedCheckpoint, key: str, view: View, conversations: Sequence[Conversation],
    source: str | list[str], name: str,
) -> Journal:  # fmt: skip
    """Compute log P of every response under one model, into a journal, where None stands for a response that does not
    fit into the model. Collective over the world.
    """
    config = here.config
    journal, done = open_journal(
        here, f"{JOURNAL}{name}", opened, {"responses": len(conversations), "view": view}, expand_paths(source)
    )
    task, tasks = job_of_array(config)
    if all(i in done for i in range(len(conversations)) if task is None or i % tasks == task):
        return journal
    loaded = load_model(str(opened.folder), config, key, head="lm")
    sizes = [sum(len(m.content) for m in one.messages) for one in conversations]

    def compute(chunk: list[int]) -> list[float | None]:
        some = [conversations[i] for i in chunk]
        return log_probabilities(loaded, some, view, config.scoring.batch_tokens, here.cost)

    compute_in_chunks(here, journal, done, sizes, compute, f"log-probabilities, {key}", "response")
    loaded.free()
    return journal


def _kept(
    responses: Sequence[Response], policy: Mapping[int, float | None], base: Mapping[int, float | None],
    reader: RecordReader,
) -> list[int]:  # fmt: skip
    """Return the responses that have a weight, and count the others. The main rank alone calls it."""
    assert len(policy) == len(base) == len(responses), "a response lacks a log-probability"
    for kind, values in (("checkpoint", policy), ("steerlm2.base", base)):
        if wrong := [i for i, value in values.items() if value is not None and not math.isfinite(value)]:
            raise UserError(
                f"{kind} gives {len(wrong)} responses a log-probability that is no finite number, the first is "
                f"{responses[wrong[0]].conversation.id!r}; its weights are damaged, or engine.precision is too low"
            )
    fit = [i for i in range(len(responses)) if policy[i] is not None and base[i] is not None]
    sizes = Counter(responses[i].group for i in fit)
    kept = [i for i in fit if sizes[responses[i].group] > 1]
    reader.leave_out("input", NO_WEIGHT, len(responses) - len(fit))
    reader.leave_out("input", ALONE, len(fit) - len(kept))
    if not kept:
        raise UserError(
            f"none of {len(responses)} responses has another one to the same prompt and levels beside it; draw several "
            "(bootstrap.responses_per_prompt=10 bootstrap.combinations=best)"
        )
    return kept


def _write(
    here: Session, responses: Sequence[Response], kept: Sequence[int], values: Mapping[str, Any], names: Sequence[str],
    schema: AttributeSchema, counts: dict[str, Any], output: Path,
) -> None:  # fmt: skip
    """Write the weighted records, and how unequal their weights are. The main rank alone calls it."""
    s, rows = here.config.steerlm2, []
    for i in kept:
        one, policy, base = responses[i], values["policy"][i], values["base"][i]
        labels = log_likelihood(one.asked, one.measured, names, schema.max_level, s.concentration, s.bins)
        rows.append({GROUP: one.group, LOG_WEIGHT: labels + base - policy, LOGPROB: policy, LABELS: labels, BASE: base})
    records = [_weighed(responses[i], row) for i, row in zip(kept, rows, strict=True)]
    write_records(output, records)
    groups, group_S = np.unique([str(row[GROUP]) for row in rows], return_inverse=True)
    share_S = shares(np.array([row[LOG_WEIGHT] for row in rows]), group_S, len(groups))
    effective = float(np.mean(1.0 / np.bincount(group_S, share_S**2)))
    metrics = {"groups": len(groups), "responses_per_group": len(rows) / len(groups), "effective_responses": effective}
    shown = []
    for name in names:
        asked, value_S = (np.array([getattr(responses[i], kind)[name] for i in kept]) for kind in ("asked", "measured"))
        drawn = float(np.mean(np.abs(value_S - asked)))
        weighed = float(np.sum(share_S * np.abs(value_S - asked)) / len(groups))
        metrics |= {f"distance/{name}": drawn, f"weighed_distance/{name}": weighed}
        shown.append(f"{name} {drawn:.2f} → {weighed:.2f}")
    here.run.update(counts=counts, metrics=metrics, outputs={"output": str(output)})
    get_logger(__name__).info(
        "%d responses in %d groups → %s; by their weights, %.2f of %.2f responses of a group count, and their distance "
        "from the levels asked for goes from that of all responses: %s",
        len(rows), len(groups), output, effective, len(rows) / len(groups), ", ".join(shown),
    )  # fmt: skip


def _weighed(response: Response, row: Mapping[str, Any]) -> Conversation:
    """Return the record of a weighed response: with the levels that were asked for as its attributes, and the measured
    values beside them.
    """
    one = response.conversation
    *earlier, final = one.messages
    extra = {key: value for key, value in final.extra.items() if key != "levels"}  # those of measured values
    final = replace(final, extra={**extra, MEASURED: dict(response.measured)})
    return replace(one, messages=(*earlier, final), extra={**one.extra, TARGETS: dict(row)})
