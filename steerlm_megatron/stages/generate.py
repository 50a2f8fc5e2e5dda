"""``generate``: responses for the prompts of a record file, at levels that ``attributes.best`` sets."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.sampling import Prompt, draw, forget, open_sampler, requests_for
from steerlm_megatron.stages.session import load_model, session
from steerlm_megatron.steer.records import Conversation, Message, OnError, read_records, write_records


def run(config: Config) -> None:
    """Write ``output``: the records of ``input`` up to their last user message, each with a drawn response."""
    for key in ("input", "output", "checkpoint"):
        if getattr(config, key) is None:
            raise UserError(f"{key} is not set; generate needs input, output and checkpoint")
    with session(config) as here:
        records = read_prompts(cast(str, config.input), cast(OnError, config.data.on_error))
        loaded = load_model(cast(str, config.checkpoint), config, "checkpoint", head="lm", gather_logits=True)
        schema = loaded.schema if loaded.meta.conditioned else None
        levels = None
        if schema is not None:
            asked = config.attributes.best if set(config.attributes.names) == set(schema.names) else {}
            levels = schema.complete(asked)
        prompts = [Prompt(record.id, record.messages, levels) for record in records]
        limit = min(config.server.max_sequence_tokens, loaded.model_config.max_position)
        requests = requests_for(prompts, loaded.tokenizer, loaded.template, schema, config.sampling, limit)
        output = Path(cast(str, config.output))
        results = draw(here, loaded, open_sampler(config, loaded), requests, output.name, "generate")
        if here.layout.is_main:
            extra = {"requested": dict(levels)} if levels else {}
            write_records(
                output,
                (
                    Conversation(
                        p.id,
                        (*p.messages, Message("assistant", r.text, extra={"finish_reason": r.finish_reason})),
                        "generate",
                        extra,
                    )
                    for p, r in zip(prompts, results, strict=True)
                ),
            )
            forget(here, [output.name])
            here.run.update(counts={"in": len(prompts), "out": len(results)}, outputs={"output": str(output)})


def read_prompts(path: str, on_error: OnError = "error") -> list[Conversation]:
    """The records of ``path`` cut after their last user message; records without one are refused."""
    prompts = []
    for record in read_records(path, None, on_error, [], require_response=False):
        last = max((i for i, m in enumerate(record.messages) if m.role == "user"), default=None)
        assert last is not None, "read_records refuses a record without a user message"
        prompts.append(Conversation(record.id, record.messages[: last + 1], record.source, record.extra))
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return prompts
