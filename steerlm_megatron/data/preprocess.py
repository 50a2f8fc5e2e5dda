"""Record files → shard folders, one per split.

Owns: the streaming pass (read, split, render, encode in batches, write), its counts, ``rejected.jsonl``. Does not own:
reading and checking records (``steer.records``), the folder's format (``shards.py``), where a tokenizer comes from.
Invariants: in = out + skipped by reason; memory does not grow with the input; the same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.shards import MANIFEST, ShardWriter
from steerlm_megatron.data.tokenizer import Tokenizer
from steerlm_megatron.data.views import build_documents, scored_turns
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, OnError, Rejected, expand_paths, read_records
from steerlm_megatron.steer.templates import Template

REJECTED_FILE = "rejected.jsonl"
_BATCH = 256  # conversations encoded in one call
_READ_BYTES = 1 << 20

Paths = Sequence[str | os.PathLike[str]]
Progress = Callable[[int, int], None]


def preprocess(
    inputs: Mapping[str, Paths],
    output_dir: str | Path,
    tokenizer: Tokenizer,
    schema: AttributeSchema | None,
    template: Template,
    data: DataConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``output_dir/<split>`` for every split of ``inputs`` (split name → record files), and sum up.

    With the one split ``train`` and ``data.valid_fraction`` > 0, conversations are dealt to ``train`` and ``valid``
    by the hash of (``data.split_seed``, first user message), so that all answers to one prompt are on one side. A
    split that gets no conversation this way is not written (and an older one of that name is removed).

    ``progress(done, total)``: records read, and an estimate of all (lines of the files).
    Returns ``{"in", "out", "skipped": {reason: n}, "splits": {split: counts}}`` with in = out + skipped; reasons are
    ``rejected`` (malformed, under ``data.on_error=skip``; see ``rejected.jsonl``) and ``no_target`` (no trained token
    and no labelled response). Errors: ``UserError`` as from ``read_records``; nothing left in a split (all tokens are
    masked); the folder cannot be written.
    """
    try:
        return _Run(inputs, Path(output_dir), tokenizer, schema, template, data, progress).run()
    except OSError as error:
        raise UserError(f"data.output_dir={output_dir}: {error.strerror or error} ({error.filename})") from error


def training_texts(paths: Paths, schema: AttributeSchema | None, template: Template, data: DataConfig) -> Iterator[str]:
    """The texts that a tokenizer for this corpus is trained on: all that is rendered, label lines too."""
    for conversation in read_records(list(paths), schema, cast(OnError, data.on_error), []):
        for segment in template.render(conversation, schema):
            if not segment.control:
                yield segment.text


class _Run:
    """One call of ``preprocess``."""

    def __init__(
        self,
        inputs: Mapping[str, Paths],
        output_dir: Path,
        tokenizer: Tokenizer,
        schema: AttributeSchema | None,
        template: Template,
        data: DataConfig,
        progress: Progress | None,
    ) -> None:
        if not inputs:
            raise UserError("data.input is empty; name at least one record file")
        self.files = {split: expand_paths(list(paths)) for split, paths in inputs.items()}
        if not 0 <= data.valid_fraction < 1:
            raise UserError(f"data.valid_fraction={data.valid_fraction} must be at least 0 and below 1")
        self.deal = set(self.files) == {"train"} and data.valid_fraction > 0
        self.splits = ["train", "valid"] if self.deal else list(self.files)
        self.output_dir, self.data, self.progress = output_dir, data, progress
        self.tokenizer, self.schema, self.template = tokenizer, schema, template
        self.counts: dict[str, dict[str, int]] = {
            split: {"in": 0, "rejected": 0, "no_target": 0} for split in self.splits
        }
        self.done = self.total = 0

    def run(self) -> dict[str, Any]:
        sources = {}
        for split, paths in self.files.items():
            sources[split] = [_describe_source(path) for path in paths]
            self.total += sum(source["lines"] for source in sources[split])
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rejected_path = self.output_dir / f".{REJECTED_FILE}.tmp"
        manifests = {}
        with ExitStack() as stack:
            rejected_file = stack.enter_context(open(rejected_path, "w", encoding="utf-8"))
            stack.callback(rejected_path.unlink, missing_ok=True)
            writers = {split: stack.enter_context(self._writer(split)) for split in self.splits}
            for split, paths in self.files.items():
                self._read_split(split, paths, writers, rejected_file)
            for split, writer in writers.items():
                if not writer.documents and not (self.deal and split == "valid"):
                    raise UserError(self._nothing_left(split))
            for split, writer in writers.items():
                if writer.documents:
                    manifests[split] = self._finish(split, writer, sources.get(split) or sources["train"])
            # Train comes last: where it stands, the others stand too.
            for split in sorted(self.splits, key=lambda split: split == "train"):
                if split in manifests:
                    writers[split].publish()
                else:
                    shutil.rmtree(self.output_dir / split, ignore_errors=True)
            self._keep_rejected(rejected_file, rejected_path)
        return self._summary(manifests)

    def _writer(self, split: str) -> ShardWriter:
        return ShardWriter(self.output_dir / split, self.tokenizer, self.schema, self.template, self.data.shard_tokens)

    def _read_split(
        self, split: str, paths: list[str], writers: dict[str, ShardWriter], rejected_file: IO[str]
    ) -> None:
        rejected: Rejected = []
        records = read_records(paths, self.schema, cast(OnError, self.data.on_error), rejected)
        while True:
            batch = list(islice(records, _BATCH))
            for where, reason in rejected:
                rejected_file.write(json.dumps({"where": where, "reason": reason}, ensure_ascii=False) + "\n")
            self.counts[split]["rejected"] += len(rejected)
            self.counts[split]["in"] += len(rejected)
            self.done += len(batch) + len(rejected)
            rejected.clear()
            if self.progress:
                self.progress(self.done, max(self.total, self.done))
            if not batch:
                return
            self._write(split, batch, writers)

    def _write(self, split: str, batch: list[Conversation], writers: dict[str, ShardWriter]) -> None:
        documents = build_documents(batch, self.tokenizer, self.template, self.schema)
        for conversation, document in zip(batch, documents, strict=True):
            target = self._side(conversation) if self.deal else split
            self.counts[target]["in"] += 1
            if len(document.spans) or len(scored_turns(document, "labelled")):
                writers[target].add(document)
            else:
                self.counts[target]["no_target"] += 1

    def _side(self, conversation: Conversation) -> str:
        prompt = next((message.content for message in conversation.messages if message.role == "user"), conversation.id)
        digest = hashlib.sha256(f"{self.data.split_seed}:{prompt}".encode()).digest()
        return "valid" if int.from_bytes(digest[:8], "big") < self.data.valid_fraction * 2**64 else "train"

    def _finish(self, split: str, writer: ShardWriter, sources: list[dict[str, Any]]) -> dict[str, Any]:
        counts = self.counts[split]
        skipped = {reason: counts[reason] for reason in ("rejected", "no_target") if counts[reason]}
        return writer.finish({"in": counts["in"], "out": writer.documents, "skipped": skipped}, sources)

    def _nothing_left(self, split: str) -> str:
        counts, files = self.counts[split], ", ".join(self.files.get(split, ()))
        return (
            f"{files} (split {split!r}): all tokens are masked: of {counts['in']} conversations "
            f"{counts['rejected']} are malformed and {counts['no_target']} have no response of weight 1"
        )

    def _keep_rejected(self, file: IO[str], path: Path) -> None:
        target = self.output_dir / REJECTED_FILE
        if sum(counts["rejected"] for counts in self.counts.values()):
            file.flush()
            os.fsync(file.fileno())
            os.replace(path, target)
        else:
            target.unlink(missing_ok=True)

    def _summary(self, manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
        skipped: dict[str, int] = {}
        for counts in self.counts.values():
            for reason in ("rejected", "no_target"):
                if counts[reason]:
                    skipped[reason] = skipped.get(reason, 0) + counts[reason]
        return {
            "in": sum(counts["in"] for counts in self.counts.values()),
            "out": sum(manifest["counts"]["out"] for manifest in manifests.values()),
            "skipped": skipped,
            "splits": {split: manifest["counts"] for split, manifest in manifests.items()},
        }


def is_complete(folder: str | Path) -> bool:
    """Whether a shard folder stands there (one that is there is whole)."""
    return (Path(folder) / MANIFEST).is_file()


def _describe_source(path: str) -> dict[str, Any]:
    """Name, size and hash of an input file, and its number of lines (for progress; damage is found when it is read)."""
    digest, lines, size = hashlib.sha256(), 0, 0
    plain = not path.endswith((".gz", ".zst"))
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
            lines += block.count(b"\n") if plain else 0
    if not plain:
        lines = sum(block.count(b"\n") for block in _decompressed(path))
    return {"name": os.path.basename(path), "bytes": size, "sha256": digest.hexdigest(), "lines": lines}


def _decompressed(path: str) -> Iterable[bytes]:
    """The blocks of a compressed file, up to its end or to where it is damaged (reading the records reports that)."""
    stream: Any
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    with open(path, "rb") as file:
        if path.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=file)
        else:
            import zstandard  # only who reads .zst needs it

            stream = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(file, read_across_frames=True)
            errors = (*errors, zstandard.ZstdError)
        while True:
            try:
                block = stream.read(_READ_BYTES)
            except errors:
                return
            if not block:
                return
            yield block
