"""``export.format=hf``: a language model as a Hugging Face folder, which anyone can load without our code.

Owns: the tokenizer's files with the added tokens, the chat template, ``generation_config.json``, putting the folder in
its place. Does not own: weights and ``config.json`` (``model/hf``), what a chat template says (``steer``).
Invariant: the folder stands under its name only when it is whole; and its tokenizer makes of messages the tokens that
the model was trained on, which is tried before the folder is put there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_bytes_atomic, write_json_atomic
from steerlm_megatron.model.hf import config_for, family_for, hf_tensors, write_hf
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.device import dtype_of
from steerlm_megatron.stages.session import LoadedModel
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.chat_template import chat_template, variable
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import Template

# What a tokenizer of Hugging Face consists of; a folder that came as one keeps its own.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_PROBES = (
    (Message("user", "Hello, who are you?"),),
    (
        Message("system", "Answer briefly."),
        Message("user", "What is 2 + 2?\nShow your work."),
        Message("assistant", "It is 4."),
        Message("user", "Thanks!"),
    ),
)


def check(config: Config, loaded: LoadedModel, target: Path) -> None:
    """Refuse what has no such form, before anything is written.

    Raises:
        UserError: an attribute-prediction model, a tokenizer that is not Hugging Face's, a model that is split over
            ranks, a folder that is there.
    """
    if loaded.meta.head != "lm":
        raise UserError(
            f"export.format=hf: {config.checkpoint} is an attribute-prediction model, which has no form there yet; "
            "take export.format=steerlm"
        )
    if loaded.hf is None and loaded.tokenizer.model_kind != "huggingface":
        raise UserError(
            f"export.format=hf: the tokenizer of {config.checkpoint} is of kind {loaded.tokenizer.model_kind}; such a "
            "folder needs a tokenizer.json: train from a model that has one"
        )
    if loaded.parallel.tensor * loaded.parallel.pipeline > 1:
        raise UserError(
            "export.format=hf writes from one rank; leave parallel.tensor and parallel.pipeline at 1 (no GPU is needed)"
        )
    if target.exists():
        raise UserError(f"output={target} exists; choose a new folder for export.format=hf")


def write(loaded: LoadedModel, target: Path, precision: str) -> None:
    """Write the folder ``target``, whole or not at all."""
    work = target.with_name(f".{target.name}.steerlm")
    shutil.rmtree(work, ignore_errors=True)
    try:
        _write(loaded, work, precision)
        _try_prompts(loaded, work)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(loaded: LoadedModel, work: Path, precision: str) -> None:
    model, rows = loaded.meta.model_config(), loaded.meta.vocab_size
    family = loaded.hf.family if loaded.hf is not None else family_for(model)
    config = config_for(model, family, rows, loaded.hf.config if loaded.hf is not None else None)
    if loaded.hf is None:
        stops = [loaded.tokenizer.control_id(text) for text in loaded.template.stop_strings]
        config |= {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    write_hf(work, hf_tensors(loaded.model, model, family, rows), config, dtype_of(precision))
    if loaded.hf is not None:
        for name in _TOKENIZER_FILES:
            if (loaded.hf.folder / name).is_file():
                write_bytes_atomic(work / name, (loaded.hf.folder / name).read_bytes())
        return
    write_json_atomic(work / "tokenizer.json", _with_added_tokens(loaded.tokenizer))
    write_json_atomic(work / "tokenizer_config.json", _tokenizer_config(loaded))
    write_json_atomic(work / "generation_config.json", {"eos_token_id": config["eos_token_id"]})


def _with_added_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of ``tokenizer.json`` with what we added to it, at the ids that the model knows them by."""
    content: dict[str, Any] = json.loads(tokenizer.model_data)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": text, **flags, "special": text in tokenizer.controls}
        for text, i in tokenizer.added.items()
    ]
    content["added_tokens"] = sorted([*content.get("added_tokens", []), *added], key=lambda token: int(token["id"]))
    content["truncation"] = content["padding"] = None
    return content


def _tokenizer_config(loaded: LoadedModel) -> dict[str, Any]:
    schema = loaded.conditioned_on
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": loaded.template.stop_strings[0],
        "pad_token": loaded.template.stop_strings[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": loaded.meta.model_config().max_position,
        "chat_template": chat_template(loaded.template, schema, _defaults(schema)),
    }


def _defaults(schema: AttributeSchema | None) -> Mapping[str, int]:
    return {} if schema is None else schema.complete({})


def _try_prompts(loaded: LoadedModel, folder: Path) -> None:
    """Compare the folder's tokens with ours on a few prompts. ``UserError`` if they differ: a model that reads other
    tokens than it was trained on answers worse, and nobody sees why.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    schema = loaded.conditioned_on
    asked: list[dict[str, int]] = [dict(_defaults(schema))]
    if schema is not None:
        asked.append(dict.fromkeys(schema.seen, 0))
    for messages in _PROBES:
        for levels in asked:
            plain = [{"role": message.role, "content": message.content} for message in messages]
            named = {variable(name): level for name, level in levels.items()}
            found = theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, **named)
            found = list(found["input_ids"]) if isinstance(found, Mapping) else list(found)
            expected = prompt_ids(loaded.tokenizer, loaded.template, messages, schema, levels)
            if found != expected:
                at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
                raise UserError(
                    f"export.format=hf: the tokenizer of Hugging Face makes other tokens of a prompt than the model "
                    f"was trained on (first at token {at}: {theirs.decode(found[at : at + 3])!r}); template."
                    f"{loaded.template.name} cannot be written for this tokenizer"
                )
    get_logger(__name__).info("the chat template gives the model's own tokens on %d prompts", len(_PROBES) * len(asked))


def prompt_ids(
    tokenizer: Tokenizer,
    template: Template,
    messages: tuple[Message, ...],
    schema: AttributeSchema | None,
    levels: Mapping[str, int],
) -> list[int]:
    """Return the token ids of a prompt, as training and ``generate`` make them."""
    return list(tokenizer.encode_segments(template.prefix(messages, schema, levels))[0])
