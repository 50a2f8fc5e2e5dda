"""``export.format=hf``: a language model as a Hugging Face folder, which anyone can load without our code.

Owns: the tokenizer's files with the added tokens, the chat template, ``generation_config.json``, putting the folder in
its place. Does not own: weights and ``config.json`` (``model/hf``), what a chat template says (``steer``).
Invariant: the folder stands under its name only when it is whole; and its tokenizer makes of messages the tokens that
the model was trained on, which is tried before the folder is put there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_bytes_atomic, write_json_atomic
from steerlm_megatron.model.hf import config_for, family_for, hf_tensors, write_hf
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.device import dtype_of
from steerlm_megatron.stages.prompt_tokens import (
    difference,
    exported_tokenizer,
    first_difference,
    levels_to_try,
    prompt_ids,
    prompts_for,
)
from steerlm_megatron.stages.session import LoadedModel, OpenedCheckpoint
from steerlm_megatron.steer.chat_template import chat_template, variable
from steerlm_megatron.steer.jinja_template import JinjaTemplate

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


def check(config: Config, opened: OpenedCheckpoint) -> None:
    """Refuse what has no such form, before weights are read.

    Raises:
        UserError: an attribute-prediction model, a tokenizer that is not Hugging Face's or makes other tokens of a
            prompt than the model was trained on, more than one rank, attributes that cannot be variables.
    """
    told = f"export.format=hf: {config.checkpoint}"
    if opened.meta.head != "lm":
        raise UserError(
            f"{told} is an attribute-prediction model, which has no form there yet; take export.format=steerlm"
        )
    if config.parallel.tensor * config.parallel.pipeline > 1:
        raise UserError(
            "export.format=hf writes from one rank; leave parallel.tensor and parallel.pipeline at 1 (no GPU is needed)"
        )
    if opened.hf is not None:
        return
    family_for(opened.model_config)
    if opened.tokenizer.model_kind != "huggingface":
        raise UserError(
            f"{told} has a tokenizer of kind {opened.tokenizer.model_kind}; such a folder needs a tokenizer.json: "
            "train from a model that has one"
        )
    _chat_template(opened)
    said = difference(opened.tokenizer, opened.template, opened.conditioned_on, exported_tokenizer(opened.tokenizer))
    if said is not None:
        raise UserError(
            f"{told}: a chat template of template.name={opened.template.name} gives other tokens with this tokenizer "
            f"than the model was trained on ({said}); another template may do"
        )


def write(loaded: LoadedModel, target: Path, precision: str) -> None:
    """Write the folder ``target``, whole or not at all; one that stands there is replaced (``export.check_target``)."""
    work = target.with_name(f".{target.name}.steerlm")
    shutil.rmtree(work, ignore_errors=True)
    try:
        _write(loaded, work / "new", precision)
        if loaded.hf is None:
            _try_prompts(loaded, work / "new")
        if target.exists():
            target.rename(work / "old")
        (work / "new").rename(target)
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
    write_json_atomic(work / "tokenizer.json", exported_tokenizer(loaded.tokenizer))
    write_json_atomic(work / "tokenizer_config.json", _tokenizer_config(loaded))
    write_json_atomic(work / "generation_config.json", {"eos_token_id": config["eos_token_id"]})


def _tokenizer_config(loaded: LoadedModel) -> dict[str, Any]:
    # A model's own chat template reads its special tokens from here.
    named = dict(loaded.template.tokens) if isinstance(loaded.template, JinjaTemplate) else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": loaded.template.stop_strings[0],
        "pad_token": loaded.template.stop_strings[0],
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": loaded.meta.model_config().max_position,
        "chat_template": _chat_template(loaded),
    }


def _chat_template(opened: OpenedCheckpoint) -> str:
    schema = opened.conditioned_on
    return chat_template(opened.template, schema, {} if schema is None else schema.complete({}))


def _try_prompts(loaded: LoadedModel, folder: Path) -> None:
    """Compare the tokens that ``transformers`` makes with the folder's chat template with ours. ``UserError`` if they
    differ: a model that reads other tokens than it was trained on answers worse, and nobody sees why.
    """
    from transformers import AutoTokenizer

    theirs, schema = AutoTokenizer.from_pretrained(folder), loaded.conditioned_on
    prompts = prompts_for(loaded.template)
    for messages in prompts:
        for levels in levels_to_try(schema):
            plain = [{"role": message.role, "content": message.content} for message in messages]
            named = {variable(name): level for name, level in levels.items()}
            found = theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, **named)
            ids = list(found["input_ids"] if isinstance(found, Mapping) else found)
            expected = prompt_ids(loaded.tokenizer, loaded.template, messages, schema, levels)
            if said := first_difference(ids, expected, loaded.tokenizer):
                raise UserError(
                    f"export.format=hf: transformers makes other tokens of a prompt than the model knows ({said})"
                )
    get_logger(__name__).info("transformers makes the model's own tokens of %d prompts", len(prompts))
