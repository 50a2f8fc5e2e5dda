"""``generate``: draw responses for the prompts of a record file, at the levels of ``attributes.best``."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.config.schema import Config
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.record_reader import Record, RecordReader, skipped_in_words
from steerlm_megatron.stages.sampling import Prompt, draw, forget, open_drawing, opened_sampler, requests_for
from steerlm_megatron.stages.session import NO_ATTRIBUTES, requested_best, session
from steerlm_megatron.steer.records import Conversation, Message, write_records


def run(config: Config) -> None:
    """Write ``output``: the records of ``input`` up to their last user message, each with a drawn response. Collective
    over the world.
    """
    with session(config) as here:
        reader = RecordReader(here)
        records = read_prompts(reader, "input", config.input, "input")
        loaded = open_drawing(config)
        levels = requested_best(config, loaded.conditioned_on or NO_ATTRIBUTES) or None
        asked = [Prompt(r.conversation.id, r.conversation.messages, levels, r.where) for r in records]
        prompts, requests = requests_for(asked, loaded, config, reader, "input")
        output = Path(cast(str, config.output))
        with opened_sampler(here, loaded) as sampler:
            results = draw(here, loaded, sampler, requests, output.name, "generate")
        if job_of_array(config)[0] is not None:  # the job that puts all parts together writes them
            loaded.free()
            return
        levels_asked = {"requested": dict(levels)} if levels else {}

        def write() -> None:
            write_records(
                output,
                (
                    Conversation(
                        p.id,
                        (*p.messages, Message("assistant", r.text, extra={"finish_reason": r.finish_reason})),
                        "generate",
                        levels_asked,
                    )
                    for p, r in zip(prompts, results, strict=True)
                ),
            )
            forget(here, [output.name])
            counts = reader.counts() | {"empty_replies": sum(not r.text.strip() for r in results)}
            here.run.update(counts=counts, outputs={"output": str(output)})
            get_logger(__name__).info(
                "%d prompts in, %d responses out (%d of them empty)%s → %s",
                counts["in"], counts["out"], counts["empty_replies"], skipped_in_words(counts), output,
            )  # fmt: skip

        on_main(write)


def read_prompts(reader: RecordReader, part: str, path: str | list[str], key: str) -> list[Record]:
    """Return the records of ``path``, each cut after its last user message. Collective over the world."""
    return [
        Record(record.where, up_to_last_user(record.conversation))
        for record in reader.read(part, path, key, require_response=False)
    ]


def up_to_last_user(record: Conversation) -> Conversation:
    """Return the conversation as a prompt: what follows its last user message is left out."""
    last = max(i for i, m in enumerate(record.messages) if m.role == "user")  # every record has a user message
    return Conversation(record.id, record.messages[: last + 1], record.source, record.extra)
