"""Get the record files of ``data.source``, converted or as they are, and divide them into splits.

Owns: which keys of ``data.*`` a converter gets, and when a conversion is done again. Does not own: conversion itself
(``data_tools``), tokenizer and shards (``shards.py``). Invariants: the same files are not converted again with the same
options; the records are complete before ``source.json`` says what they were made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from data_tools import make_demo_corpus
from data_tools.convert import REJECTED_FILE, Options, convert
from data_tools.filters import Filters
from data_tools.rows import is_array
from steerlm_megatron.config.schema import Config, DataConfig
from steerlm_megatron.data.shards import MANIFEST
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import describe_file, write_json_atomic
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.stages.record_reader import Reject, read_lines
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import OnError, expand_paths, write_records
from steerlm_megatron.steer.splits import assign_split

_CONVERSION_FORMAT = 3  # increase it when a converter gives other records for the same files
_SPLITS = ("train", "valid")


def schema_of(config: Config) -> AttributeSchema | None:
    """Return the configured schema, None for ``attributes=none``."""
    return AttributeSchema.from_config(config.attributes) if config.attributes.names else None


def collect_records(
    config: Config, output_dir: Path, shards: Path | None = None
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return record files per split for ``data.source``, and the converter's report. Converters write into
    ``output_dir``.

    ``shards`` is the folder for shards of these records. Shards there that other inputs or settings gave are refused
    without ``config.overwrite``, before their records are replaced.

    A converted source has its validation set already, so ``valid`` is an empty list if it has none. Records
    (``messages`` without ``map`` and filters) are read as they are; they have no report, and ``valid`` only where
    ``data.valid_input`` names files.
    """
    data = config.data
    if data.source == "demo":
        _check_demo(data)
        made = make_demo_corpus.write(output_dir, data.demo_conversations, config.train.seed)
        return {"train": [str(output_dir / "train.jsonl")], "valid": [str(output_dir / "valid.jsonl")]}, made
    if not data.input:
        raise UserError(f"data.input is empty: name the files of data.source={data.source}")
    options = _conversion_options(data)
    if data.source == "messages" and options.filters == Filters() and not options.map and not _has_array(data):
        return {"train": data.input, **({"valid": data.valid_input} if data.valid_input else {})}, {}
    report = _convert_once(config, options, output_dir, shards)
    return {split: [report[split]["file"]] if report[split]["file"] else [] for split in ("train", "valid")}, report


def _conversion_options(data: DataConfig) -> Options:
    """Return ``data.*`` as options of the converters."""
    filters = Filters(
        tuple(data.languages), tuple(data.roles), data.min_turns, data.max_turns, data.min_chars, data.max_chars,
        tuple(data.labels), data.dedupe,
    )  # fmt: skip
    mapping = data.map or ""
    if isinstance(mapping, dict):
        mapping = ",".join(f"{name}={path}" for name, path in mapping.items())
    if not isinstance(mapping, str):
        raise UserError(f"data.map={data.map} must be text, such as 'prompt=instruction,response=output', or a mapping")
    return Options(
        data.paths, filters, tuple(data.valid_input or ()), data.valid_fraction, data.split_seed, data.on_error,
        mapping, data.label_max, data.hf_rows, data.hf_subset, data.hf_split,
    )  # fmt: skip


def _check_demo(data: DataConfig) -> None:
    """Refuse keys that the embedded corpus does not read: it has no input files and no filters."""
    defaults = DataConfig()
    for key in ("input", "valid_input", "map", "label_max", "hf_subset", "hf_split", "languages", "roles", "min_turns",
                "max_turns", "min_chars", "max_chars", "labels", "dedupe"):  # fmt: skip
        value = getattr(data, key)
        if value != getattr(defaults, key) and value != []:
            raise UserError(f"data.{key}={value} is set, but data.source=demo does not read it; leave it out")


def _has_array(data: DataConfig) -> bool:
    """Return whether a file is one JSON array, which the reader of records does not accept."""
    return any(is_array(path) for path in expand_paths([*data.input, *(data.valid_input or ())]))


def _convert_once(config: Config, options: Options, output_dir: Path, shards: Path | None) -> dict[str, Any]:
    """Convert, unless ``output_dir`` has the result for the same files and options (``source.json``, written last)."""
    data, schema, journal = config.data, schema_of(config), output_dir / "source.json"
    key = None
    if data.source == "hf":  # the content behind a name on the hub may change, so its name alone is the key
        sources: list[dict[str, Any]] = [{"name": name} for name in data.input]
    else:
        files = [expand_paths(data.input), expand_paths(list(options.valid_inputs)) if data.valid_input else []]
        described = [[_describe(path) for path in paths] for paths in files]
        sources = [source for each in described for source in each]
        parts = [_CONVERSION_FORMAT, data.source, dataclasses.asdict(options), schema and schema.to_dict(), described]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        known = _stored_report(journal, key)
        if known is not None:
            get_logger(__name__).info("%s was converted before; its records are in %s", data.source, output_dir)
            return known
        if shards is not None and not config.overwrite:
            _refuse_other(shards, key, sources)
    for stale in output_dir.glob(".*.tmp"):  # a killed conversion left it
        stale.unlink()
    journal.unlink(missing_ok=True)
    title = f"convert {data.source}" + (" (in two passes)" if data.source == "oasst" else "")
    with Progress(None, title, unit="conversation") as bar:
        report = convert(data.source, data.input, str(output_dir), schema, options, progress=bar.set)
    skipped = sum(report["skipped"]["conversations"].values())
    get_logger(__name__).info(
        "%s: %d conversations in, %d out, %d skipped %s; replies: %d trained, %d context, %d repeated, %d filtered, "
        "%d empty",
        data.source, report["in"], report["out"], skipped, report["skipped"]["conversations"],
        report["trained_replies"], report["context_replies"], report["repeated_replies_avoided"],
        report["filtered_replies"], report["empty_replies"],
    )  # fmt: skip
    if report["notes"]:
        get_logger(__name__).info("%s: %s", data.source, report["notes"])
    if report["rejected_lines"]:
        get_logger(__name__).warning(
            "%d lines rejected, listed in %s; the first: %s", report["rejected_lines"], output_dir / REJECTED_FILE,
            ": ".join(report["rejected"][0].values()),
        )  # fmt: skip
    report |= {"key": key, "sources": sources}
    # Only base names are stored, so that the same input gives the same bytes wherever it is.
    names = {split: os.path.basename(report[split]["file"] or "") or None for split in _SPLITS}
    sizes = {name: os.path.getsize(output_dir / name) for name in names.values() if name}
    stored = report | {split: report[split] | {"file": name} for split, name in names.items()}
    write_json_atomic(journal, {"key": key, "sizes": sizes, "report": stored})
    return report


def _describe(path: str) -> dict[str, Any]:
    return {"name": os.path.basename(path), **describe_file(path)}


def _refuse_other(shards: Path, key: str, sources: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``UserError`` if existing shards were made of other files, or by other settings of the conversion."""
    try:
        made = json.loads((shards / "train" / MANIFEST).read_text(encoding="utf-8"))["converted"]
        before = made["sources"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # there are no shards, or no converter made them; ``preprocess`` compares the records then
    if made["key"] in (key, None):
        return
    changed = next((old["name"] for old, new in zip(before, sources, strict=False) if old != new), None)
    if changed is not None:
        how = f"from {changed}, whose contents have changed since (or another file is in its place)"
    else:
        how = "from another number of files" if len(before) != len(sources) else "with other data.* settings"
    raise UserError(
        f"data.output_dir={shards}: {shards / 'train'} was made {how}; name another folder, or set overwrite=true to "
        "replace it"
    )


def _stored_report(journal: Path, key: str) -> dict[str, Any] | None:
    """Return the report of an earlier conversion with this key whose files are still there."""
    try:
        stored = json.loads(journal.read_text(encoding="utf-8"))
        folder, report = journal.parent, stored["report"]
        sizes = stored["sizes"].items()
        whole = stored["key"] == key and all(os.path.getsize(folder / name) == size for name, size in sizes)
        for split in _SPLITS:
            name = report[split]["file"]
            report[split]["file"] = str(folder / name) if name else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # there is none, or it cannot be read, so the files are converted again
    return report if whole else None


def split_records(
    config: Config, files: Sequence[str], output_dir: Path, rejects: list[Reject]
) -> dict[str, list[str]]:
    """Write records without splits to ``train`` and ``valid`` files, with all answers to one prompt in one split.
    Malformed lines are added to ``rejects``, or are an error (``data.on_error``).

    Annotation and evaluation need the splits as records; ``preprocess`` by itself assigns splits while it writes
    shards.
    """
    data = config.data
    out: dict[str, list[str]] = {}
    for split in ("train", "valid"):
        path = output_dir / f"{split}.jsonl.zst"
        rejects.clear()  # each split reads all files, so rejects would be listed twice
        lines = read_lines(files, cast(OnError, data.on_error), rejects, schema=schema_of(config))
        read = (line.conversation for line in lines)
        if write_records(path, (c for c in read if assign_split(c, data.valid_fraction, data.split_seed) == split)):
            out[split] = [str(path)]
        else:
            path.unlink()
    if "train" not in out:
        raise UserError(
            f"data.input={' '.join(files)}: no record is left for training with "
            f"data.valid_fraction={data.valid_fraction}"
        )
    return out
