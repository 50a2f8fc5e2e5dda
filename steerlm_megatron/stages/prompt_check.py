"""Check early whether prompts will fit into a model that is yet to be trained.

Owns: checking prompts as soon as the corpus exists, since a ``steerlm run`` draws responses hours later. Does not own:
choosing prompts (``bootstrap.py``, ``generate.py``), the limits (``sampling.py``). Invariant: this is only an early
warning: drawing checks again, with the tokenizer of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from random import Random

from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.stages.base import configured_template
from steerlm_megatron.stages.bootstrap import choose_prompts
from steerlm_megatron.stages.generate import read_prompts
from steerlm_megatron.stages.record_reader import Record, RecordReader
from steerlm_megatron.stages.response_filters import ResponseFilters
from steerlm_megatron.stages.sampling import Prompt, check_room, request_for
from steerlm_megatron.stages.session import OpenedCheckpoint
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.train.meta import CheckpointMeta


def check_bootstrap_prompts(reader: RecordReader, files: list[str], config: Config, shards: Path) -> None:
    """Check the prompts that ``bootstrap`` under ``config`` will choose among the records of ``files``; the tokenizer
    is that of ``shards``. With ``data.on_error=skip`` no prompt is checked, since prompts that do not fit are skipped
    later. Collective over the world.

    Raises:
        UserError: a prompt does not fit; no prompt can ever fit; a filter names an attribute that the schema lacks.
    """
    ResponseFilters.from_config(config.bootstrap, AttributeSchema.from_config(config.attributes))
    if reader.on_error == "skip":
        return
    records = reader.read("bootstrap", files, "data.input")
    chosen, _ = choose_prompts(records, config.bootstrap.prompts, Random(config.sampling.seed))
    _check(chosen, config, shards)


def check_evaluation_prompts(reader: RecordReader, file: str, config: Config, shards: Path) -> None:
    """Do the same as :func:`check_bootstrap_prompts` for the prompts of ``file`` that ``evaluate`` will take."""
    if reader.on_error == "skip":
        return
    records = read_prompts(reader, "evaluate", file, "evaluate.prompts")
    _check(records[: config.evaluate.max_prompts], config, shards)


def _check(records: Iterable[Record], config: Config, shards: Path) -> None:
    model = _coming_model(config, Tokenizer.load(shards))
    check_room(model, config)
    levels = model.schema.complete(None) if model.schema else None
    for record in records:
        prompt = Prompt(record.conversation.id, record.conversation.messages, levels, record.where)
        request_for(0, prompt, model, config.sampling, config.generation)


def _coming_model(config: Config, tokenizer: Tokenizer) -> OpenedCheckpoint:
    """Return the description that a checkpoint of an attribute-conditioned model of ``config`` will have."""
    schema, template = AttributeSchema.from_config(config.attributes), configured_template(config)
    meta = CheckpointMeta(
        step=0,
        task="acsft",
        model=dataclasses.asdict(config.model),
        vocab_size=tokenizer.vocab_size,
        schema=schema.to_dict(),
        template=template.to_dict(),
        tokenizer_hash=tokenizer.hash,
    )
    return OpenedCheckpoint(Path(), meta, tokenizer, schema, template)
