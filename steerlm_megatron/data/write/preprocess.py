"""Make shard folders, one per split, of record files.

Owns: the order of the work, the counts, ``rejected.jsonl``, what a second run does with existing results. Does not own:
tokenising (``chunks.py``, ``pool.py``), the folder's format (``data/shards.py``), opening a tokenizer. Invariants: in =
out + skipped by reason; memory does not grow with the input; the same input gives the same bytes, for any number of
processes and interruptions.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.shards import MANIFEST, ShardReader, ShardWriter
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.write.chunks import CHUNK_BYTES, TRAIN, VALID, Chunk, Job, Tokenized, read_chunks
from steerlm_megatron.data.write.pool import default_workers, tokenized
from steerlm_megatron.data.write.seen_ids import SeenIds
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import describe_file, move_into_place
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.lines import OnError, rejected_json
from steerlm_megatron.steer.records import expand_paths, read_records
from steerlm_megatron.steer.templates import Template

REJECTED_FILE = "rejected.jsonl"
WORK = ".work"  # folder for finished chunks, inside the output folder while a job is under way
SKIPPED = ("rejected", "control_string", "no_target")
_READ_BYTES = 1 << 20
WORKER_BYTES = 16 * CHUNK_BYTES  # a second of work; two processes break even at 22 MB each (benchmarks/preprocess.md)
_COMPRESSION = 4  # rough lower bound of the compression ratio of text

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
    overwrite: bool = True,
    converted: Mapping[str, Any] | None = None,
    rejected_before: Path | None = None,
) -> dict[str, Any]:
    """Write ``output_dir/<split>`` for every split of ``inputs`` (split name → record files), and return a summary.

    If ``train`` is the only split and ``data.valid_fraction`` > 0, conversations are assigned to ``train`` and
    ``valid`` by the hash of (``data.split_seed``, first user message), so that all answers to one prompt are in one
    split. A split that gets no conversation in this way is not written (and an older one of that name is removed).

    A call that fails or is killed leaves its tokenised chunks in ``output_dir/.work``, and a second call goes on from
    there. Shards that the same inputs and settings gave are left as they are; others are replaced, or refused without
    ``overwrite``.

    ``converted`` tells from which files, and how, the record files were made; the manifests keep it.
    ``rejected_before`` are the lines that the conversion rejected, which come first in ``rejected.jsonl``.
    ``progress(done, total)`` gets the records read, and an estimate of all (lines of the files). Returns ``{"in",
    "out", "skipped": {reason: n}, "splits": {split: counts}}`` with in = out + skipped, and ``empty_replies`` where
    there are some (replies without text, which are context); reasons are ``rejected`` (malformed, or of an id that
    occurred before in its split, under ``data.on_error=skip``; see ``rejected.jsonl``), ``control_string`` (holds one,
    under ``data.control_strings=reject``; listed there too) and ``no_target`` (no trained token and no labelled
    response). Raises ``UserError`` as ``read_records`` does, for an id that occurred before, if nothing is left in a
    split (all tokens are masked), or if the folder cannot be written.
    """
    run = _Run(
        inputs, Path(output_dir), tokenizer, schema, template, data, progress, overwrite, converted, rejected_before
    )
    try:
        return run.run()
    except OSError as error:
        kept = (
            f"make room and run the same command again: it goes on from {run.work}"
            if run.work.is_dir()
            else "name a folder that can be written"
        )
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"data.output_dir={output_dir}: {error.strerror or error}{where}; {kept}") from error


def training_texts(paths: Paths, schema: AttributeSchema | None, template: Template, data: DataConfig) -> Iterator[str]:
    """Yield the texts that a tokenizer for this corpus is trained on: all rendered text, including label lines."""
    for conversation in read_records(list(paths), schema, cast(OnError, data.on_error), []):
        for segment in template.render(conversation, schema):
            if not segment.control:
                yield segment.text


class _Run:
    """The state of one call of ``preprocess``."""

    def __init__(
        self,
        inputs: Mapping[str, Paths],
        output_dir: Path,
        tokenizer: Tokenizer,
        schema: AttributeSchema | None,
        template: Template,
        data: DataConfig,
        progress: Progress | None,
        overwrite: bool,
        converted: Mapping[str, Any] | None,
        rejected_before: Path | None,
    ) -> None:
        if not inputs:
            raise UserError("data.input is empty; name at least one record file")
        self.files = {split: expand_paths(list(paths)) for split, paths in inputs.items()}
        if not 0 <= data.valid_fraction < 1:
            raise UserError(f"data.valid_fraction={data.valid_fraction} must be at least 0 and below 1")
        if data.workers is not None and data.workers < 1:
            raise UserError(f"data.workers={data.workers} must be at least 1, or null for one per core")
        self.splits_by_hash = set(self.files) == {"train"} and data.valid_fraction > 0
        self.splits = ["train", "valid"] if self.splits_by_hash else list(self.files)
        self.output_dir, self.data, self.progress, self.overwrite = output_dir, data, progress, overwrite
        self.converted = json.loads(json.dumps(converted))  # normalised, so that it can be compared with a manifest
        self.rejected_before, self.first_rejected = rejected_before, ""
        fraction = data.valid_fraction if self.splits_by_hash else 0.0
        self.job = Job(
            tokenizer, schema, template, data.on_error, fraction, data.split_seed, data.control_strings
        )  # fmt: skip
        self.work = output_dir / WORK / self.job.key
        names = ("in", *SKIPPED, "control_like", "empty_replies")
        self.counts: dict[str, dict[str, int]] = {split: dict.fromkeys(names, 0) for split in self.splits}
        self.done = self.total = 0

    def run(self) -> dict[str, Any]:
        stamps = {path: _stamp(path) for paths in self.files.values() for path in paths}
        sources = {split: [_describe_source(path) for path in paths] for split, paths in self.files.items()}
        self.total = sum(source["lines"] for described in sources.values() for source in described)
        stands = self._standing(sources)
        if stands is not None:
            self._clear()
            return stands
        self._open_work()
        rejected_path = self.output_dir / f".{REJECTED_FILE}.tmp"
        manifests: dict[str, dict[str, Any]] = {}
        with ExitStack() as stack:
            rejected_file = stack.enter_context(open(rejected_path, "w", encoding="utf-8"))
            stack.callback(rejected_path.unlink, missing_ok=True)
            if self.rejected_before:
                rejected_file.write(self.rejected_before.read_text(encoding="utf-8"))
            writers = {split: stack.enter_context(self._writer(split)) for split in self.splits}
            self._fill(writers, rejected_file)
            for path, stamp in stamps.items():
                if _stamp(path) != stamp:
                    raise UserError(f"{path} was changed while it was read; run it again when it is whole")
            for split, writer in writers.items():
                if not writer.documents and not (self.splits_by_hash and split == "valid"):
                    raise UserError(self._nothing_left(split))
            counted = {split: self._counted(split) for split in self.splits}
            run = {"settings": self._settings(), "counts": counted}
            for split, writer in writers.items():
                if writer.documents:
                    described = sources.get(split) or sources["train"]
                    manifests[split] = writer.finish(
                        counted[split], described, self._policies(split), run, self.converted
                    )
            # Train is published last, so that its presence means that all is complete.
            self._keep_rejected(rejected_file, rejected_path)
            for split in sorted(self.splits, key=lambda split: split == "train"):
                if split in manifests:
                    writers[split].publish()
                else:
                    shutil.rmtree(self.output_dir / split, ignore_errors=True)
        self._clear()
        return self._summary(counted, manifests)

    def _clear(self) -> None:
        """Remove the work folder of this job, and of one that was killed at its very end."""
        for name in (WORK, *(f".{split}.{kind}" for split in self.splits for kind in ("old", "tmp"))):
            shutil.rmtree(self.output_dir / name, ignore_errors=True)
        (self.output_dir / f".{REJECTED_FILE}.tmp").unlink(missing_ok=True)

    # -- results of earlier runs --------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return the settings that the result depends on. The inputs are in a manifest's ``sources``."""
        return {
            "key": self.job.key,
            "on_error": self.data.on_error,
            "shard_tokens": self.data.shard_tokens,
            "splits": self.splits,
        }

    def _standing(self, sources: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
        """Return the summary of existing complete shards if the same inputs and settings gave them; else None."""
        manifests: dict[str, dict[str, Any]] = {}
        for split in self.splits:
            folder = self.output_dir / split
            if not is_complete(folder):
                continue
            try:
                manifest = ShardReader(folder, self.data.verify).manifest
            except UserError:
                return None  # the shards are damaged or of another format, so they are made again
            change = self._change(manifest, sources.get(split) or sources["train"])
            if change and not self.overwrite:
                raise UserError(
                    f"data.output_dir={self.output_dir}: {folder} was made {change}; name another folder, or set "
                    "overwrite=true to replace it"
                )
            if change:
                return None
            manifests[split] = manifest
        for manifest in manifests.values():
            counted = manifest["run"]["counts"]
            if {split for split, counts in counted.items() if counts["out"]} != set(manifests):
                return None  # a split was removed, or the job was killed between publishing one and the other
            return self._summary(counted, manifests)
        return None

    def _change(self, manifest: dict[str, Any], sources: list[dict[str, Any]]) -> str:
        """Return in words how the job that wrote ``manifest`` differs from this one; empty if it does not."""
        if manifest.get("run", {}).get("settings") != self._settings():
            return "with another tokenizer, template, schema, or other data.* settings"
        for before, now in zip(manifest["sources"], sources, strict=False):
            if before != now:
                return f"from {before['name']}, whose contents have changed since (or another file is in its place)"
        if len(manifest["sources"]) != len(sources):
            return "from another number of files"
        return "" if manifest.get("converted") == self.converted else "of records that were converted from other files"

    # -- the work -----------------------------------------------------------------------------------------------------

    def _open_work(self) -> None:
        """Make the folder of this job's finished chunks, and remove those of jobs with other settings."""
        self.work.mkdir(parents=True, exist_ok=True)
        for other in self.work.parent.iterdir():
            if other != self.work:
                shutil.rmtree(other, ignore_errors=True)

    def _workers(self) -> int:
        """Return the number of processes, so that each has work for longer than its start takes."""
        size = 0
        for path in (path for paths in self.files.values() for path in paths):
            size += os.path.getsize(path) * (_COMPRESSION if path.endswith((".gz", ".zst")) else 1)
        return max(1, min(self.data.workers or default_workers(), size // WORKER_BYTES))

    def _writer(self, split: str) -> ShardWriter:
        job = self.job
        return ShardWriter(self.output_dir / split, job.tokenizer, job.schema, job.template, self.data.shard_tokens)

    def _fill(self, writers: dict[str, ShardWriter], rejected_file: IO[str]) -> None:
        chunks = (chunk for split, paths in self.files.items() for chunk in read_chunks(split, paths))
        seen = {split: SeenIds(self.work / f"ids-{split}") for split in self.files}
        with closing(tokenized(chunks, self.job, self.work, self._workers())) as results:
            for chunk, found in results:
                repeated = seen[chunk.split].repeated(found.hashes)
                rejected = [*found.rejected, *self._repeats(chunk, found.lines[repeated].tolist())]
                for line, where, reason in sorted(rejected):
                    self.first_rejected = self.first_rejected or f"{where}: {reason}"
                    text = chunk.lines[line - chunk.first_line] if line < chunk.first_line + len(chunk.lines) else None
                    rejected_file.write(rejected_json(where, reason, text))
                self._count(chunk, found, repeated)
                for side, block in enumerate(found.blocks):
                    if repeated.any():
                        block = block.select(~np.isin(block.lines, found.lines[repeated]))
                    if len(block):
                        writers[self._target(chunk, side)].add_block(block)
                if self.progress:
                    self.progress(self.done, max(self.total, self.done))

    def _target(self, chunk: Chunk, side: int) -> str:
        return ("train", "valid")[side] if self.splits_by_hash else chunk.split

    def _repeats(self, chunk: Chunk, lines: list[int]) -> Iterator[tuple[int, str, str]]:
        """Yield records whose id occurred before as rejected lines; under ``on_error=error`` raise for the first."""
        for line in lines:
            name = json.loads(chunk.lines[line - chunk.first_line])["id"]
            reason = f"id={name!r} occurred before; ids must be unique in a split (without an id, the line is the id)"
            if self.data.on_error == "error":
                raise UserError(f"{chunk.path}:{line}: {reason}")
            yield line, f"{chunk.path}:{line}", reason

    def _count(self, chunk: Chunk, found: Tokenized, repeated: Any) -> None:
        for side in (TRAIN, VALID) if self.splits_by_hash else (TRAIN,):
            counts, mine = self.counts[self._target(chunk, side)], (found.sides == side) & ~repeated
            counts["in"] += int(mine.sum()) + found.refused[side]
            counts["no_target"] += int((mine & ~found.has_target).sum())
            counts["control_string"] += found.refused[side]
            counts["control_like"] += found.control_like[side]
            counts["empty_replies"] += found.empty[side]
        refused = int(repeated.sum()) + found.malformed
        self.counts[chunk.split]["rejected"] += refused
        self.counts[chunk.split]["in"] += refused
        self.done += len(found.lines) + found.malformed + sum(found.refused)

    # -- sums ---------------------------------------------------------------------------------------------------------

    def _counted(self, split: str) -> dict[str, Any]:
        counts = self.counts[split]
        skipped = {reason: counts[reason] for reason in SKIPPED if counts[reason]}
        counted: dict[str, Any] = {"in": counts["in"], "out": counts["in"] - sum(skipped.values()), "skipped": skipped}
        return counted | ({"empty_replies": counts["empty_replies"]} if counts["empty_replies"] else {})

    def _policies(self, split: str) -> dict[str, Any]:
        """Return the policy for each kind of doubtful input, and how often it was applied."""
        counts = self.counts[split]
        return {
            "on_error": {"policy": self.data.on_error, "records": counts["rejected"]},
            "control_strings": {"policy": self.data.control_strings, "messages": counts["control_like"]},
            "empty_replies": {"policy": "context", "messages": counts["empty_replies"]},
        }

    def _nothing_left(self, split: str) -> str:
        counts, files = self.counts[split], ", ".join(self.files.get(split, ()))
        held = f", {counts['control_string']} hold control strings" if counts["control_string"] else ""
        first = f"; the first: {self.first_rejected}" if self.first_rejected else ""
        return (
            f"{files} (split {split!r}): all tokens are masked: of {counts['in']} conversations "
            f"{counts['rejected']} are malformed{held} and {counts['no_target']} have no response of weight 1 with "
            f"text{first}"
        )

    def _keep_rejected(self, file: IO[str], path: Path) -> None:
        target = self.output_dir / REJECTED_FILE
        if self.rejected_before or any(
            counts["rejected"] or counts["control_string"] for counts in self.counts.values()
        ):
            file.flush()
            move_into_place(path, target)
        else:
            target.unlink(missing_ok=True)

    def _summary(
        self, counted: Mapping[str, dict[str, Any]], manifests: Mapping[str, dict[str, Any]]
    ) -> dict[str, Any]:
        skipped = {reason: sum(counts["skipped"].get(reason, 0) for counts in counted.values()) for reason in SKIPPED}
        empty = sum(counts.get("empty_replies", 0) for counts in counted.values())
        return {
            "in": sum(counts["in"] for counts in counted.values()),
            "out": sum(counts["out"] for counts in counted.values()),
            "skipped": {reason: count for reason, count in skipped.items() if count},
            **({"empty_replies": empty} if empty else {}),
            "splits": {split: manifest["counts"] for split, manifest in manifests.items()},
        }


def is_complete(folder: str | Path) -> bool:
    """Return whether ``folder`` is a shard folder; one that exists is complete."""
    return (Path(folder) / MANIFEST).is_file()


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _describe_source(path: str) -> dict[str, Any]:
    """Return name, size and hash of an input file, and its number of lines for the progress bar."""
    lines: list[int] = []
    if path.endswith((".gz", ".zst")):
        described = describe_file(path)
        lines += (block.count(b"\n") for block in _decompressed(path))
    else:
        described = describe_file(path, lambda block: lines.append(block.count(b"\n")))
    return {"name": os.path.basename(path), **described, "lines": sum(lines)}


def _decompressed(path: str) -> Iterable[bytes]:
    """Return the blocks of a compressed file, up to its end or to damage, which reading the records reports later."""
    stream: Any
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    with open(path, "rb") as file:
        if path.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=file)
        else:
            import zstandard  # imported here, since only .zst files need it

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
