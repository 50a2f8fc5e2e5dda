"""From what a user has to shards: ``preprocess`` for every source, and the embedded corpus made when it is absent.

Owns: choosing the converter of ``data.source`` (``data_tools``), the tokenizer, the shard folder. Does not own:
conversion itself,
tokenisation, file formats. Invariant: a shard folder that exists and was made from the same inputs is not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from data_tools import make_demo_corpus, oasst
from steerlm_megatron.config.schema import AttributesConfig, Config
from steerlm_megatron.data.preprocess import preprocess, training_texts
from steerlm_megatron.data.shards import MANIFEST
from steerlm_megatron.data.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.runtime.collectives import barrier
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, OnError, read_records, write_records
from steerlm_megatron.steer.templates import Template

# What conf/attributes/demo.yaml says; a test keeps the two equal.
DEMO_ATTRIBUTES = AttributesConfig(
    name="demo",
    names=["quality", "helpfulness", "verbosity", "humor", "toxicity"],
    max_level=4,
    quality="quality",
    best={"quality": 4, "helpfulness": 4, "verbosity": 2, "humor": 0, "toxicity": 0},
)


def schema_of(config: Config) -> AttributeSchema | None:
    """The configured schema, None for ``attributes=none``."""
    return AttributeSchema.from_config(config.attributes) if config.attributes.names else None


def collect_records(config: Config, output_dir: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Record files per split for ``data.source``, and the converter's report. Converters write into ``output_dir``."""
    data, schema = config.data, schema_of(config)
    if data.source == "messages":
        if not data.input:
            raise UserError("data.input is empty: name the record files to preprocess")
        return {"train": data.input}, {}
    if data.source == "demo":
        report = make_demo_corpus.write(output_dir, data.demo_conversations, config.train.seed)
        return {"train": [str(output_dir / "train.jsonl")], "valid": [str(output_dir / "valid.jsonl")]}, report
    if not data.input:
        raise UserError("data.input is empty: name the OASST tree or message files")
    if schema is None:
        raise UserError("data.source=oasst needs a schema for its labels; choose attributes=oasst")
    report = oasst.convert(
        data.input,
        str(output_dir),
        schema,
        data.paths,
        data.languages,
        data.valid_fraction,
        data.split_seed,
        data.on_error,
    )
    splits = {"train": [str(output_dir / "train.jsonl.zst")]}
    if (output_dir / "valid.jsonl.zst").exists():
        splits["valid"] = [str(output_dir / "valid.jsonl.zst")]
    return splits, report


def split_records(config: Config, files: Sequence[str], output_dir: Path) -> dict[str, list[str]]:
    """Deal records without a split of their own to ``train`` and ``valid`` files, all answers to one prompt on one
    side.

    For what needs the splits as records (annotation, evaluation); ``preprocess`` alone deals while it writes.
    """
    data = config.data

    def side(conversation: Conversation) -> str:
        prompt = next((m.content for m in conversation.messages if m.role == "user"), conversation.id)
        digest = hashlib.sha256(f"{data.split_seed}:{prompt}".encode()).digest()
        return "valid" if int.from_bytes(digest[:8], "big") < data.valid_fraction * 2**64 else "train"

    out: dict[str, list[str]] = {}
    for split in ("train", "valid"):
        path = output_dir / f"{split}.jsonl.zst"
        records = read_records(list(files), schema_of(config), cast(OnError, data.on_error), [])
        if write_records(path, (c for c in records if side(c) == split)):
            out[split] = [str(path)]
        else:
            path.unlink()
    if "train" not in out:
        raise UserError(
            f"data.input={' '.join(files)}: no record is left for training with "
            f"data.valid_fraction={data.valid_fraction}"
        )
    return out


def make_tokenizer(config: Config, files: Sequence[str]) -> Tokenizer:
    """``tokenizer.path`` opened, or one trained on ``files``."""
    template = Template.from_config(config.template)
    strings = tuple(dict.fromkeys((*template.control_strings, template.label_marker)))
    texts = training_texts(files, schema_of(config), template, config.data) if config.tokenizer.train else None
    return Tokenizer.from_config(config.tokenizer, strings, texts)


def check_tokenizer(config: Config) -> None:
    """Refuse a tokenizer that cannot be opened, before a corpus is read for it."""
    if not config.tokenizer.train or config.tokenizer.path:
        template = Template.from_config(config.template)
        Tokenizer.from_config(config.tokenizer, (*template.control_strings, template.label_marker))


def make_shards(config: Config, splits: Mapping[str, Sequence[str]], output_dir: Path) -> dict[str, Any]:
    """Tokenize ``splits`` into ``output_dir/<split>`` with a progress bar. Returns the summary of ``preprocess``."""
    tokenizer = make_tokenizer(config, list(splits["train"]))
    with Progress(None, "preprocess", unit="record") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.set(done)

        return preprocess(
            splits,
            output_dir,
            tokenizer,
            schema_of(config),
            Template.from_config(config.template),
            config.data,
            progress=show,
        )


def ensure_shards(config: Config) -> tuple[str, str | None]:
    """Shard folders for a training command that names none: those of the embedded corpus. Collective over the world."""
    if config.data.source != "demo":
        raise UserError(
            "data.train is not set: name a shard folder made by steerlm preprocess, or take experiment=quickstart"
        )
    folder = demo_folder(config)
    if layout().is_main:
        ensure_demo(config, folder)
    barrier()
    return str(folder / "shards" / "train"), str(folder / "shards" / "valid")


def demo_folder(config: Config) -> Path:
    """Where the embedded corpus of this configuration lives: beside the runs, named by what it depends on."""
    key = json.dumps(
        [
            config.data.demo_conversations, config.train.seed, dataclasses.asdict(config.tokenizer),
            dataclasses.asdict(config.template),
        ],
        sort_keys=True,
    )  # fmt: skip
    return Path(config.data.output_dir or "runs/quickstart-data") / hashlib.sha256(key.encode()).hexdigest()[:12]


def ensure_demo(config: Config, folder: Path) -> None:
    """Make the embedded corpus and its shards in ``folder`` unless they stand there whole."""
    if (folder / "shards" / "train" / MANIFEST).exists():
        return
    get_logger(__name__).info("making the embedded corpus in %s", folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Plain SFT (attributes=none) trains on the same labelled shards, so they do not depend on config.attributes.
    demo = dataclasses.replace(config, attributes=DEMO_ATTRIBUTES)
    splits, _ = collect_records(demo, folder / "records")
    make_shards(demo, splits, folder / "shards")
