"""Open or train the configured tokenizer, and make shards of record files with it.

Owns: opening or training the tokenizer and refusing one that cannot write labels; the progress of tokenisation, and its
end on a signal. Does not own: collecting records (``collect.py``), tokenisation and file formats (``data``). Invariant:
no shards are made with a tokenizer that turns two labels into the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.convert import REJECTED_FILE
from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.write.preprocess import preprocess, training_texts
from steerlm_megatron.errors import Interrupted, UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.runtime.signals import StopRequest
from steerlm_megatron.stages.base import configured_template
from steerlm_megatron.stages.collect import schema_of
from steerlm_megatron.stages.prompt_tokens import difference, exported_tokenizer
from steerlm_megatron.steer.templates import Template


def make_tokenizer(config: Config, files: Sequence[str]) -> Tokenizer:
    """Open ``tokenizer.path``, or train a tokenizer on ``files``."""
    template = configured_template(config)
    strings = tuple(dict.fromkeys((*template.control_strings, template.label_marker)))
    texts = training_texts(files, schema_of(config), template, config.data) if config.tokenizer.train else None
    tokenizer = Tokenizer.from_config(config.tokenizer, strings, texts)
    _check_labels(tokenizer, config)
    _warn_of_other_tokens(tokenizer, template, config)
    if tokenizer.added:
        get_logger(__name__).info(
            "the tokenizer's %d ids are followed by %d added ones: %s",
            tokenizer.base_size, len(tokenizer.added), " ".join(map(repr, tokenizer.added)),
        )  # fmt: skip
    return tokenizer


def _warn_of_other_tokens(tokenizer: Tokenizer, template: Template, config: Config) -> None:
    """Say before any work that a model trained on these shards could not leave as a Hugging Face folder, if the
    template is what forbids it. (A tokenizer that has no such form at all is a choice of its own.)
    """
    try:
        theirs = exported_tokenizer(tokenizer)
    except UserError:
        return
    if said := difference(tokenizer, template, schema_of(config), theirs):
        get_logger(__name__).warning(
            "template.name=%s with this tokenizer: a chat template would give other tokens than training does (%s). "
            "Training and steerlm serve are not concerned; export.format=hf will refuse the model",
            template.name, said,
        )  # fmt: skip


def check_tokenizer(config: Config) -> None:
    """Refuse a tokenizer that cannot be opened or cannot write labels, before a corpus is read."""
    if not config.tokenizer.train or config.tokenizer.path:
        template = configured_template(config)
        strings = tuple(dict.fromkeys((*template.control_strings, template.label_marker)))
        _check_labels(Tokenizer.from_config(config.tokenizer, strings), config)


def _check_labels(tokenizer: Tokenizer, config: Config) -> None:
    """Refuse a tokenizer that turns two labels of the schema into the same tokens, since such labels could not steer.

    A model without byte fallback makes the same unknown token (or nothing) of every character that it lacks.
    """
    schema = schema_of(config)
    if schema is None:
        return
    labels = [schema.format({name: level}) for name in schema.names for level in range(schema.max_level + 1)]
    seen: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, map(tuple, tokenizer.encode_batch(labels)), strict=True):
        if ids in seen:
            raise UserError(
                f"tokenizer.path={config.tokenizer.path}: the labels {seen[ids]!r} and {label!r} become the same "
                f"tokens, {tokenizer.decode(ids)!r}: the model cannot write them; choose a tokenizer with bytes or "
                "with these characters, or attributes=none"
            )
        seen[ids] = label


def make_shards(
    config: Config,
    splits: Mapping[str, Sequence[str]],
    output_dir: Path,
    overwrite: bool = True,
    converted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Tokenize ``splits`` into ``output_dir/<split>`` with a progress bar. Returns the summary of ``preprocess``.

    ``converted`` is the report of the converter that made the records, if one did. If ``valid`` has no files, there is
    no validation set, and none is split off. ``overwrite`` replaces shards that other inputs or settings gave. When it
    is asked to stop, it exits with 75, and another run goes on from there.
    """
    data = config.data if splits.get("valid", True) else dataclasses.replace(config.data, valid_fraction=0.0)
    splits = {split: files for split, files in splits.items() if files}
    before = None  # the converter's rejected lines, in a file beside its records
    if converted and converted.get("rejected_lines"):
        listed = Path(splits["train"][0]).with_name(REJECTED_FILE)
        before = listed if listed.is_file() else None
    tokenizer = make_tokenizer(config, list(splits["train"]))
    with Progress(None, "preprocess", unit="record") as bar, StopRequest() as stop:

        def show(done: int, total: int) -> None:
            if stop.requested:
                raise Interrupted(stop.reason)
            bar.total = total
            bar.set(done)

        try:
            return preprocess(
                splits,
                output_dir,
                tokenizer,
                schema_of(config),
                configured_template(config),
                data,
                progress=show,
                overwrite=overwrite,
                converted=_converted(converted or {}),
                rejected_before=before,
            )
        except UserError as error:
            if stop.requested:  # the signal ended the worker processes too
                raise Interrupted(stop.reason) from error
            raise


def _converted(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the part of a converter's report that a manifest keeps; None if nothing was converted."""
    if "sources" not in report:
        return None
    kept = ("source", "key", "sources", "in", "out", "skipped", "rejected_lines", "trained_replies", "context_replies",
            "repeated_replies_avoided", "filtered_replies", "empty_replies", "notes")  # fmt: skip
    return {name: report[name] for name in kept}
