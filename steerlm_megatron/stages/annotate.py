"""``annotate``: an attribute-prediction model labels every response of a record file (SteerLM, step 2; facts §1.2,
§8.1).

Owns: sharding records over data-parallel ranks, resuming, the output file. Does not own: scoring (``scoring.py``).
Invariants: output records are the input's, in order, once each; a killed run loses at most the chunk in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import Interrupted, UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.observe.runfolder import JOURNAL
from steerlm_megatron.runtime.collectives import any_rank, barrier, on_main
from steerlm_megatron.stages.journal import open_journal
from steerlm_megatron.stages.scoring import Scorer, Values
from steerlm_megatron.stages.session import LoadedModel, Session, load_model, session
from steerlm_megatron.steer.records import Conversation, OnError, Rejected, expand_paths, read_records, write_records
from steerlm_megatron.train.signals import StopRequest

_CHUNK = 512  # conversations scored between two writes of the journal


def run(config: Config) -> None:
    """``input`` → ``output``, scored by ``checkpoint``. Collective over the world."""
    for key in ("input", "output", "checkpoint"):
        if getattr(config, key) is None:
            raise UserError(f"{key} is not set; annotate needs input, output and checkpoint")
    with session(config) as here:
        records = load_records(config)
        loaded = load_model(cast(str, config.checkpoint), config, "checkpoint", head="regression")
        annotate(here, loaded, records, Path(cast(str, config.output)))
        loaded.free()


def load_records(config: Config) -> list[Conversation]:
    """All records of ``input``, checked; read on every rank."""
    rejected: Rejected = []
    records = list(read_records(cast(str, config.input), None, cast(OnError, config.data.on_error), rejected))
    for where, reason in rejected:
        get_logger(__name__).warning("skipped %s: %s", where, reason)
    if not records:
        raise UserError(f"input={config.input} holds no record")
    return records


def annotate(here: Session, loaded: LoadedModel, records: list[Conversation], output: Path) -> dict[str, Any]:
    """Score ``records`` and write them with values to ``output``. Returns counts. Collective over the world."""
    layout, config = here.layout, here.config
    scorer = Scorer(loaded, config.annotate.batch_tokens)
    paths = expand_paths(cast(Any, config.input))
    journal, done = open_journal(here, f"{JOURNAL}{output.name}", loaded, {"records": len(records)}, paths)
    mine = [i for i in range(len(records)) if i % layout.dp_size == layout.dp_rank and i not in done]
    # Similar lengths together: rows fill better and a chunk's work is even.
    mine.sort(key=lambda i: sum(len(m.content) for m in records[i].messages))
    total = len(records)
    if done:
        get_logger(__name__).info("resuming: %d of %d records are scored", len(done), total)
    chunks = [mine[start : start + _CHUNK] for start in range(0, len(mine), _CHUNK)]
    with (
        StopRequest() as stop,
        Progress(total, "annotate", unit="record", initial=len(done), enabled=layout.is_main) as bar,
    ):
        while any_rank(bool(chunks)):
            chunk = chunks.pop(0) if chunks else []
            values = scorer.score([records[i] for i in chunk])
            if layout.is_model_head:
                journal.append((i, {str(m): v for m, v in one.items()}) for i, one in zip(chunk, values, strict=True))
            bar.set(min(total, bar.completed + len(chunk) * layout.dp_size))
            if any_rank(stop.requested):
                barrier()
                raise Interrupted(stop.reason or "what asked another rank to")
    counts = {"in": total, "out": total, "turns": 0, "truncated_turns": scorer.truncated_turns}

    def write() -> None:
        scored = journal.read()
        assert len(scored) == total, f"{total - len(scored)} records lack a score"
        counts["turns"] = sum(len(v) for v in scored.values())
        write_records(output, _labelled(records, scored, loaded, config.annotate.overwrite_labels))
        journal.remove()
        here.run.update(counts=counts, outputs={"output": str(output)})
        get_logger(__name__).info("%d records, %d responses scored → %s", total, counts["turns"], output)

    barrier()  # every journal is written
    on_main(write)
    return counts


def _labelled(
    records: list[Conversation], scored: dict[int, Any], loaded: LoadedModel, overwrite: bool
) -> Iterator[Conversation]:
    """Records with ``attributes`` (floats) and ``levels`` (integers) on every assistant message."""
    schema = loaded.schema
    assert schema is not None
    for index, record in enumerate(records):
        messages = list(record.messages)
        for at, predicted in scored[index].items():
            message = messages[int(at)]
            values: Values = dict(predicted)
            if not overwrite and message.attributes:
                values |= {k: float(v) for k, v in message.attributes.items() if k in schema.names}
            messages[int(at)] = replace(
                message, attributes=values, extra={**message.extra, "levels": schema.levels(values)}
            )
        yield replace(record, messages=tuple(messages))
