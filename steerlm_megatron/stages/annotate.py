"""``annotate``: an attribute-prediction model labels every response of a record file (arXiv 2310.05344 §3.2).

Owns: the output file. Does not own: scoring (``scoring.py``), distributing records to replicas and resuming
(``chunked_work.py``).
Invariants: the output has each input record once, in order; a killed run loses at most the chunk in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.config.schema import Config
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import JOURNAL
from steerlm_megatron.runtime.collectives import gather_objects, on_main
from steerlm_megatron.stages.chunked_work import compute_in_chunks
from steerlm_megatron.stages.journal import open_journal
from steerlm_megatron.stages.record_reader import Record, RecordReader
from steerlm_megatron.stages.scoring import Scorer, Values, described
from steerlm_megatron.stages.session import LoadedModel, Session, load_model, session
from steerlm_megatron.steer.messages import Message, has_text
from steerlm_megatron.steer.records import Conversation, expand_paths, write_records


def run(config: Config) -> None:
    """Score the records of ``input`` by ``checkpoint`` and write ``output``. Collective over the world."""
    with session(config) as here:
        reader = RecordReader(here)
        records = reader.read("input", config.input, "input")
        loaded = load_model(cast(str, config.checkpoint), config, "checkpoint", head="ap", attributes=config.attributes)
        records = reader.writable("input", records, loaded.template)
        found = annotate(here, loaded, records, config.input, Path(cast(str, config.output)))
        here.run.update(counts=reader.counts() | found)
        loaded.free()


def annotate(
    here: Session, loaded: LoadedModel, read: list[Record], source: str | list[str], output: Path
) -> dict[str, int]:
    """Score ``read``, the records of ``source``, and write them with values to ``output``. Collective over the world.

    A job of an array scores its part of them into the journal; whoever comes without a number finds all of it there.
    Returns the numbers of scored ``turns``, of ``truncated_turns``, and of ``empty_replies``, which have no text to
    score and are written unchanged.
    """
    config = here.config
    records = [record.conversation for record in read]
    scorer = Scorer(loaded, config.scoring.batch_tokens, config.scoring.decode, here.cost)
    paths = expand_paths(source)
    inputs = {"records": len(records), "values": described(loaded, config.scoring.decode)}
    journal, done = open_journal(here, f"{JOURNAL}{output.name}", loaded, inputs, paths)
    sizes = [sum(len(m.content) for m in record.messages) for record in records]

    def score(chunk: list[int]) -> list[dict[str, Values]]:
        values = scorer.score([records[i] for i in chunk])
        return [{str(message): found for message, found in one.items()} for one in values]

    total = compute_in_chunks(here, journal, done, sizes, score, "annotate")
    empty = sum(_is_empty(message) for record in records for message in record.messages)
    replies = sum(message.role == "assistant" for record in records for message in record.messages)
    counts = {"turns": replies - empty, "truncated_turns": scorer.truncated_turns, "empty_replies": empty}

    outside = sum(gather_objects(scorer.outside if here.layout.is_model_head else 0))
    if loaded.scored_at_end and outside:
        get_logger(__name__).warning(
            "%d values lie outside 0-%d, the scale of attributes=%s, and were set to its ends",
            outside, scorer.schema.max_level, scorer.schema.name,
        )  # fmt: skip

    def write() -> None:
        scored = journal.read()
        assert len(scored) == total, f"{total - len(scored)} records lack a score"
        write_records(output, _labelled(records, scored, loaded, config.annotate.overwrite_labels))
        journal.remove()
        here.run.update(outputs={"output": str(output)})
        get_logger(__name__).info(
            "%d records, %d responses scored%s → %s",
            total, counts["turns"], f", {empty} empty ones left as they are" if empty else "", output,
        )  # fmt: skip

    if job_of_array(config)[0] is None:
        on_main(write)
    return counts


def _labelled(
    records: list[Conversation], scored: dict[int, Any], loaded: LoadedModel, overwrite: bool
) -> Iterator[Conversation]:
    """Yield records with ``attributes`` (floats) and ``levels`` (integers) on every assistant message with text.

    An attribute of which the model never saw a label is not predicted, and a message keeps its value of it.
    """
    schema = loaded.schema
    assert schema is not None
    for index, record in enumerate(records):
        messages = list(record.messages)
        for at, predicted in scored[index].items():
            message = messages[int(at)]
            if _is_empty(message):
                continue
            kept = {
                name: float(value)
                for name, value in (message.attributes or {}).items()
                if name in schema.names and not (overwrite and name in predicted)
            }
            values: Values = {**predicted, **kept}
            messages[int(at)] = replace(
                message, attributes=values, extra={**message.extra, "levels": schema.levels(values)}
            )
        yield replace(record, messages=tuple(messages))


def _is_empty(message: Message) -> bool:
    """Return whether ``message`` is a response without text."""
    return message.role == "assistant" and not has_text(message.content)
