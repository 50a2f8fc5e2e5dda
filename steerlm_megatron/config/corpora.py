"""Sections about what is trained on: attributes, prompt template, tokenizer, corpora."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerlm_megatron.config.fields import at_least, between, one_of, option
from steerlm_megatron.steer.templates import LABEL_AT

# `data.source` names one of these: the converters of data_tools (a test keeps the two lists equal), or `demo`.
SOURCES = ("oasst", "helpsteer", "hh_rlhf", "msid", "nemo", "sharegpt", "messages", "hf", "demo")


@dataclass
class AttributesConfig:
    """An attribute schema (``steer.attributes.AttributeSchema``); without ``names`` there is no conditioning at all."""

    name: str = option("oasst", "what the schema is called")
    names: list[str] = option([], "attributes in the order of the label line; empty: none")
    max_level: int = option(9, at_least(1), "highest level; the lowest is 0")
    quality: str = option("quality", "the attribute that bootstrapping maximises")
    best: dict[str, int] = option({}, "levels that are asked for where a user names none")


@dataclass
class TemplateConfig:
    """The prompt template (``steer.templates``)."""

    name: str = option(
        "steerlm", "the format: steerlm, llama2, chatml, or auto: the chat format of the tokenizer's folder"
    )
    system: str = option("", "the system text of a conversation that has none")
    system_suffix: str = option("\n\n", "steerlm: what follows the system text")
    label_at: str = option(
        LABEL_AT[0],
        one_of(*LABEL_AT),
        "the label line stands before the response, or (auto alone) behind the user's text",
    )


@dataclass
class TokenizerConfig:
    """A SentencePiece model, a Hugging Face tokenizer, or bytes."""

    path: str | None = option(
        None,
        "a .model file, a tokenizer.json or its folder, a shard folder, checkpoint or run with one, owner/name on "
        "Hugging Face's hub, or bytes",
    )
    extend: bool = option(True, "control strings that it lacks get ids after its vocabulary; false: that is an error")
    train: bool = option(False, "train a SentencePiece model on the input first")
    vocab_size: int = option(1024, at_least(16), "most pieces of a model that is trained")


@dataclass
class DataConfig:
    """Corpora in, shards out, shards for training. What the sources read, and what filters do, is in docs/data.md."""

    source: str = option("messages", one_of(*SOURCES), "kind of corpus")
    input: Any = option(None, "a file, a glob, or a list of them; hf: hub names, files or folders")
    valid_input: Any = option(None, "files of the validation set; then all of input is for training")
    output_dir: str | None = option(None, "folder for records and shards")
    train: Any = option(None, "a shard folder, a folder with train/ and valid/ in it, or a list of them: a blend")
    valid: Any = option(None, "the same for validation; null: the valid/ beside the training shards")
    targets: str | None = option(None, "SteerLM 2.0: the record file of steerlm weigh that data.train was made of")
    weights: list[float] = option([], "share of each of data.train in an epoch; empty: by size")
    map: Any = option(None, 'messages: "prompt=KEY,response=KEY" or "turns=KEY,text=KEY,...", or a mapping')
    label_max: float | None = option(None, "nemo: the labels are on 0..label_max; null: on the schema's scale")
    hf_rows: str = option(
        "messages", one_of(*(n for n in SOURCES if n not in ("hf", "demo"))), "hf: the source that its rows are of"
    )
    hf_subset: str | None = option(None, "hf: the data set's configuration")
    hf_split: str | None = option(None, "hf: the split to read; null: train, and the validation set if there is one")
    paths: str = option("reply", one_of("reply", "leaf"), "reply trains a reply once, leaf as often as it occurs")
    languages: list[str] = option([], "languages that are kept; empty: all")
    roles: list[str] = option([], "conversations of these roles only; empty: all")
    min_turns: int = option(0, at_least(0), "fewest user and assistant messages")
    max_turns: int | None = option(None, at_least(1), "most user and assistant messages; null: any number")
    min_chars: int = option(0, at_least(0), "fewest characters of all messages together")
    max_chars: int | None = option(None, at_least(1), "most characters of all messages together; null: any number")
    labels: list[str] = option([], '"quality>=6": a reply that fails is context only')
    dedupe: bool = option(False, "leave out a conversation of the same roles and contents as an earlier one")
    valid_fraction: float = option(0.05, between(0, 0.5), "share of conversations that are dealt to validation")
    split_seed: int = option(10, at_least(0), "seed of that deal")
    on_error: str = option("error", one_of("error", "skip"), "what a bad record does, or a prompt that is too long")
    control_strings: str = option(
        "escape",
        one_of("escape", "reject"),
        "text that looks like a control string: kept, or its record left out",
    )
    shard_tokens: int = option(50_000_000, at_least(1), "tokens of a shard file")
    workers: int | None = option(None, at_least(1), "processes that tokenise; null: one per core")
    verify: bool = option(False, "compare the checksums of shards that are opened, not only their sizes")
    overlong: str = option(
        "truncate_left_turns",
        one_of("drop", "truncate_left_turns", "truncate_response", "error"),
        "what becomes of a conversation longer than train.row_tokens",
    )
    demo_conversations: int = option(3000, at_least(50), "size of the embedded corpus")
