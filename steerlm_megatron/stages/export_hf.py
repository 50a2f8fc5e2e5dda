"""``export.format=hf``: a model as a Hugging Face folder, which anyone can load without our code.

Owns: the tokenizer's files with the added tokens, the chat template, ``generation_config.json``, putting the folder in
its place. Does not own: weights and ``config.json`` (``model/hf``), what a chat template says (``steer``), the model
card (``model_card.py``). Invariant: the folder stands under its name only when it is whole; and its tokenizer makes of
messages the tokens that the model was trained on, which is tried before the folder is put there.

A model that began as a Hugging Face folder keeps what that folder said (``stages/published.py``): its family, keys of
``config.json`` that we do not know, special tokens, how responses are drawn. The end of a response is the template's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.text.sentencepiece_json import MODEL
from steerlm_megatron.data.text.sentencepiece_model import sentencepiece_model
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import put_folder, take_back, write_bytes_atomic, write_json_atomic
from steerlm_megatron.model.hf import (
    FAMILIES,
    SECTION,
    Family,
    Labels,
    classifier_config,
    config_for,
    family_for,
    hf_tensors,
    place_bias,
    unfit,
    without_code,
    write_hf,
)
from steerlm_megatron.model.hf.peft import write_adapter
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.device import dtype_of
from steerlm_megatron.stages.model_card import RunFacts, model_card
from steerlm_megatron.stages.prompt_tokens import (
    difference,
    exported_tokenizer,
    first_difference,
    levels_to_try,
    prompt_ids,
    prompts_for,
    text_difference,
)
from steerlm_megatron.stages.published import TOKENIZER_CONFIG, section_of
from steerlm_megatron.stages.scored_tokens import scored_difference, scored_for, scored_ids, scored_segments
from steerlm_megatron.stages.session import LoadedModel, OpenedCheckpoint
from steerlm_megatron.steer.chat_template import chat_template, scored_template, variable
from steerlm_megatron.steer.jinja_sandbox import render_chat_template
from steerlm_megatron.steer.jinja_template import JinjaTemplate
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import join

# What a folder of Hugging Face has beside its weights and config.json; one that came as such keeps its own.
_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    MODEL,
    "chat_template.jinja",
    "generation_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
# Settings of a base's tokenizer that say how its files make tokens of a text; the exported tokenizer.json says it all.
_SAID_BY_TOKENIZER = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "auto_map",
    "backend",
    "is_local",
    "legacy",
    "name_or_path",
    "sp_model_kwargs",
    "tokenizer_file",
    "use_default_system_prompt",
)


# The exported tokenizer.json puts nothing before or after a text. llama.cpp does, where these keys do not say so.
_NOTHING_PUT_BEFORE = {"add_bos_token": False, "add_eos_token": False, "add_prefix_space": False}


def check(config: Config, opened: OpenedCheckpoint) -> None:
    """Refuse what has no such form, before weights are read.

    Raises:
        UserError: a generative attribute-prediction model, a tokenizer that has no such form or makes other tokens of a
            conversation than the model was trained on, more than one rank, attributes that cannot be variables, a
            template without such a form.
    """
    told = f"export.format=hf: {config.checkpoint}"
    if opened.meta.predicts and opened.meta.head == "lm":
        raise UserError(
            f"{told} is a generative attribute-prediction model: a chat template asks for responses, and has no form "
            "for the labels that it writes after them. Take export.format=steerlm, which annotate, evaluate, bootstrap "
            "and serve read; or train with ap.kind=regression, which leaves as a classifier of transformers"
        )
    if config.parallel.tensor * config.parallel.pipeline > 1:
        raise UserError(
            "export.format=hf writes from one rank; leave parallel.tensor and parallel.pipeline at 1 (no GPU is needed)"
        )
    if opened.hf is not None:
        return
    _family(opened)
    _chat_template(opened)
    try:
        theirs = exported_tokenizer(opened.tokenizer)
    except UserError as error:
        raise UserError(f"{told}: {error}") from None
    if opened.tokenizer.model_kind == "sentencepiece" and (said := text_difference(opened.tokenizer, theirs)):
        raise UserError(
            f"{told}: as a tokenizer.json, its tokenizer would make other tokens of some texts ({said}); train with "
            "another one"
        )
    if opened.meta.head == "regression":
        said = scored_difference(opened.tokenizer, opened.template, theirs)
        _check_scored_text(opened, told)
    else:
        said = difference(opened.tokenizer, opened.template, opened.conditioned_on, theirs)
    if said is not None:
        raise UserError(
            f"{told}: a chat template of template.name={opened.template.name} gives other tokens with this tokenizer "
            f"than the model was trained on ({said}); another template may do"
        )


def _check_scored_text(opened: OpenedCheckpoint, told: str) -> None:
    """Compare what the chat template of an attribute-prediction model writes with what the model was trained on."""
    source = scored_template(opened.template)
    tokens = opened.template.tokens if isinstance(opened.template, JinjaTemplate) else {}
    for messages in scored_for(opened.template):
        plain = [{"role": message.role, "content": message.content} for message in messages]
        if render_chat_template(source, plain, tokens, False, date.today()) != join(
            scored_segments(opened.template, messages)
        ):
            raise UserError(
                f"{told}: its chat template has no form that marks where values are read; train it with "
                "template=chatml or template=steerlm"
            )


def write(loaded: LoadedModel, target: Path, precision: str, run: RunFacts) -> None:
    """Write the folder ``target``, whole or not at all; one that stands there is replaced (``export.check_target``).
    ``run`` is for the model card.
    """
    if loaded.hf is not None:
        _replace(loaded, target, lambda work: _write_untouched(loaded, work, precision))
    else:
        _replace(loaded, target, lambda work: _write(loaded, work, precision, target.name, run))


def write_adapter_folder(
    opened: OpenedCheckpoint, target: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> None:
    """Write an adapter with the tokenizer and chat template that it was trained with, whole or not at all."""

    def fill(work: Path) -> None:
        work.mkdir(parents=True)
        _write_tokenizer(opened, work, _stops(opened))
        write_adapter(work, tensors, config)

    _replace(opened, target, fill)


def _replace(opened: OpenedCheckpoint, target: Path, fill: Callable[[Path], None]) -> None:
    """Put what ``fill`` writes in the place of ``target``; a model that was trained here is tried before."""
    work = _work_beside(target)
    shutil.rmtree(work, ignore_errors=True)
    try:
        fill(work / "new")
        if opened.hf is None:
            _try_tokens(opened, work / "new")
        put_folder(work / "new", target, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def take_back_unfinished(target: Path) -> None:
    """Put back an earlier export that a killed command had moved aside to replace it."""
    take_back(target, _work_beside(target) / "old")


def _work_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.steerlm")


def _family(opened: OpenedCheckpoint) -> Family:
    """Return the family that the model's base had, if it can still express the model, or the first that can."""
    model, base = opened.model_config, FAMILIES.get(str(opened.meta.base.get("family")))
    return base if base is not None and not unfit(model, base) else family_for(model)


def _write_untouched(loaded: LoadedModel, work: Path, precision: str) -> None:
    """Write what came as a Hugging Face folder, as it came."""
    assert loaded.hf is not None
    model, rows, hf = loaded.model_config, loaded.meta.vocab_size, loaded.hf
    config = config_for(model, hf.family, rows, hf.config)
    if hf.custom is not None and hf.labels is not None:
        config = without_code(config, hf.labels, hf.family)
        get_logger(__name__).warning(
            "%s leaves as a %s, which needs no code of its own, without %s",
            hf.folder,
            hf.family.classifier,
            hf.custom.made,
        )
    write_hf(work, hf_tensors(loaded.model, model, hf.family, rows), config, dtype_of(precision))
    for name in _FILES:
        if (hf.folder / name).is_file():
            write_bytes_atomic(work / name, (hf.folder / name).read_bytes())


def _write(loaded: LoadedModel, work: Path, precision: str, name: str, run: RunFacts) -> None:
    model, rows, kept = loaded.model_config, loaded.meta.vocab_size, loaded.meta.base
    family, dtype = _family(loaded), dtype_of(precision)
    base = kept["config"] if kept.get("family") == family.name else None
    stops, labels = _stops(loaded), None
    if loaded.meta.head == "regression":
        assert loaded.schema is not None
        instead, bias = place_bias(loaded.model, dtype)
        labels = Labels(loaded.schema.names, bias)
        config = classifier_config(model, family, rows, labels, section_of(loaded.meta), base)
        if bias is not None:
            get_logger(__name__).warning(
                "%s has no place for the head's bias: add config.steerlm['head_bias'] to its values, as the model card "
                "shows; a head that is trained with model.head_bias=false needs nothing to be added",
                family.classifier,
            )
    else:
        instead = {}
        config = config_for(model, family, rows, base) | {"architectures": [family.architecture]}
    config |= {"eos_token_id": stops}
    if labels is not None and config.get("pad_token_id") in (None, _marker(loaded)):
        # The values are read at the last token that is none of padding.
        config["pad_token_id"] = stops if isinstance(stops, int) else stops[0]
    write_hf(work, hf_tensors(loaded.model, model, family, rows, instead), config, dtype)
    _write_tokenizer(loaded, work, stops)
    card = model_card(loaded, name, family, labels, run)
    write_bytes_atomic(work / "README.md", card.encode())


def _marker(opened: OpenedCheckpoint) -> int:
    return opened.tokenizer.control_id(opened.template.label_marker)


def _stops(opened: OpenedCheckpoint) -> int | list[int]:
    """Return the id of the token that ends a response, or a list of several."""
    stops = [opened.tokenizer.control_id(text) for text in opened.template.stop_strings]
    return stops[0] if len(stops) == 1 else stops


def _write_tokenizer(opened: OpenedCheckpoint, work: Path, stops: int | list[int]) -> None:
    """Write the tokenizer's files and, of a language model, how responses are drawn."""
    content, config = exported_tokenizer(opened.tokenizer), _tokenizer_config(opened)
    write_json_atomic(work / "tokenizer.json", content)
    if (model := sentencepiece_model(content)) is not None:
        write_bytes_atomic(work / MODEL, model)
        # Whoever reads that file finds here the tokens behind its vocabulary.
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: token[key] for key in flags} for token in content["added_tokens"]
        }
    elif content["model"].get("byte_fallback"):
        get_logger(__name__).warning(
            "the tokenizer has no form of a SentencePiece model (tokenizer.model), without which llama.cpp makes other "
            "tokens of texts"
        )
    write_json_atomic(work / TOKENIZER_CONFIG, config)
    if opened.meta.head == "lm":
        generation = {**opened.meta.base.get("generation_config", {}), "eos_token_id": stops}
        write_json_atomic(work / "generation_config.json", generation)


def _tokenizer_config(loaded: OpenedCheckpoint) -> dict[str, Any]:
    before = loaded.meta.base.get("tokenizer_config", {})
    kept = {key: value for key, value in before.items() if key not in _SAID_BY_TOKENIZER}
    stop = loaded.template.stop_strings[0]
    pad = kept.get("pad_token")
    text = pad.get("content") if isinstance(pad, Mapping) else pad
    # A model's own chat template reads its special tokens from here.
    named = dict(loaded.template.tokens) if isinstance(loaded.template, JinjaTemplate) else {}
    return {
        **kept,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": stop,
        "pad_token": pad if text not in (None, loaded.template.label_marker) else stop,
        **named,
        **({SECTION: section_of(loaded.meta)} if loaded.meta.head == "lm" else {}),
        **_NOTHING_PUT_BEFORE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": kept.get("model_max_length", loaded.model_config.max_position),
        "chat_template": _chat_template(loaded),
    }


def _chat_template(opened: OpenedCheckpoint) -> str:
    if opened.meta.head == "regression":
        return scored_template(opened.template)
    schema = opened.conditioned_on
    return chat_template(opened.template, schema, {} if schema is None else schema.complete({}))


def _try_tokens(loaded: OpenedCheckpoint, folder: Path) -> None:
    """Compare the tokens that ``transformers`` makes with the folder's chat template with ours. ``UserError`` if they
    differ: a model that reads other tokens than it was trained on answers worse, and nobody sees why.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)

    def compare(messages: Sequence[Message], expected: list[int], **options: Any) -> None:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        found = theirs.apply_chat_template(plain, tokenize=True, **options)
        ids = list(found["input_ids"] if isinstance(found, Mapping) else found)
        if said := first_difference(ids, expected, loaded.tokenizer):
            raise UserError(
                f"export.format=hf: transformers makes other tokens of a prompt than the model knows ({said})"
            )

    if loaded.meta.head == "regression":
        tried = scored_for(loaded.template)
        for messages in tried:
            compare(messages, scored_ids(loaded.tokenizer, loaded.template, messages))
    else:
        schema = loaded.conditioned_on
        tried = prompts_for(loaded.template)
        for messages in tried:
            for levels in levels_to_try(schema):
                named = {variable(name): level for name, level in levels.items()}
                expected = prompt_ids(loaded.tokenizer, loaded.template, messages, schema, levels)
                compare(messages, expected, add_generation_prompt=True, **named)
    get_logger(__name__).info("transformers makes the model's own tokens of %d prompts", len(tried))
