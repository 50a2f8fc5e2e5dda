"""A shard folder: documents as Megatron-Core indexed binary shards, side arrays that describe them, and a manifest.

::

    manifest.json             schema, template, tokenizer, counts, label sums, sources, shards; files' checksums
    tokenizer.*, steerlm_tokenizer.json    the tokenizer that made the tokens (``Tokenizer.load(folder)``)
    shard-00000.bin, .idx     for Megatron-Core's ``IndexedDataset``: one sequence, one document per conversation
    shard-00000.docs.npy      ``DOC`` [documents + 1]: where each document's turns, spans and id begin; its header
    shard-00000.turns.npy     ``views.TURN`` [turns]
    shard-00000.spans.npy     int32 [spans, 2]: runs of trained tokens, as positions in their document
    shard-00000.values.npy    float32 [turns, attributes], NaN where missing
    shard-00000.ids.npy       uint8: the documents' ids as UTF-8, end to end

Owns: writing and reading this folder. Does not own: the meaning of turns and spans (``views.py``), tokenising
(``write/preprocess.py``). Invariants: the folder appears by one rename when it is complete; the same documents give the
same bytes (it holds no time, host or path); opening reads only the manifest and the heads of the index files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.views import ASSISTANT, Document
from steerlm_megatron.data.write.blocks import Block, join, token_dtype
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import describe_file, file_sha256, sync_path
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.templates import Template

FORMAT = 2
MANIFEST = "manifest.json"
SIDE_ARRAYS = ("docs", "turns", "spans", "values", "ids")
DOC = np.dtype([("turns", "<i8"), ("spans", "<i8"), ("id", "<i8"), ("header_start", "<i4"), ("header_end", "<i4")])

_IDX_HEAD = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries (Megatron's layout)
_IDX_MAGIC = b"MMIDIDX\x00\x00"
_IDX_KNOWN = _IDX_MAGIC + (1).to_bytes(8, "little")  # the beginning of every index; the code of the token type follows
_IDX_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}  # Megatron's codes for token ids

Array = npt.NDArray[Any]


class ShardWriter:
    """Write one shard folder, as a context manager. Leaving it without ``publish`` leaves nothing behind.

    It holds one shard's side arrays in memory, and no tokens.

    Args:
        folder: the final path. A shard folder that exists there is replaced at the end; anything else there is refused.
        shard_tokens: a shard is closed once it holds this many tokens.
        schema: None if there are no attributes.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        schema: AttributeSchema | None,
        template: Template,
        shard_tokens: int,
    ) -> None:
        if shard_tokens < 1:
            raise UserError(f"data.shard_tokens={shard_tokens} must be at least 1")
        self.folder = Path(folder)
        self._work = self.folder.with_name(f".{self.folder.name}.tmp")
        self._tokenizer, self._schema, self._template = tokenizer, schema, template
        self._shard_tokens = shard_tokens
        names = list(schema.names) if schema else []
        self._label_sum = np.zeros(len(names), np.float64)
        self._label_count = np.zeros(len(names), np.int64)
        self._shards: list[dict[str, Any]] = []
        self._bin: IO[bytes] | None = None  # of the open shard
        self._digest = hashlib.sha256()
        self._blocks: list[Block] = []  # the blocks of the open shard, without their tokens
        self._tokens = 0
        self._closed_documents = 0
        self.counts = {"tokens": 0, "target_tokens": 0, "turns": 0, "labelled_turns": 0, "unk_tokens": 0}

    def __enter__(self) -> ShardWriter:
        if self.folder.exists() and not (self.folder / MANIFEST).is_file() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} exists and is not a shard folder; name another data.output_dir or remove it"
            )
        shutil.rmtree(self._work, ignore_errors=True)  # a killed job may have left it
        self._work.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bin is not None:
            try:
                self._bin.close()
            except OSError:
                if error is None:  # otherwise an error (a full disk) has been raised already
                    raise
            self._bin = None
        shutil.rmtree(self._work, ignore_errors=True)

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return self._closed_documents + sum(map(len, self._blocks))

    def add(self, document: Document) -> None:
        """Append a document."""
        attributes = len(self._schema.names) if self._schema else 0
        self.add_block(join([document], self._tokenizer.vocab_size, attributes))

    def add_block(self, block: Block) -> None:
        """Append documents. Where shards end depends on the documents alone, and not on their division into blocks."""
        at, ends = 0, np.cumsum(block.lengths, dtype=np.int64)
        while at < len(block):
            before = int(ends[at - 1]) if at else 0
            # The document that fills the shard is its last one.
            stop = int(np.searchsorted(ends, before + self._shard_tokens - self._tokens)) + 1
            self._append(block.cut(at, min(stop, len(block))))
            at = stop
            if self._tokens >= self._shard_tokens:
                self._close_shard()

    def _append(self, block: Block) -> None:
        if self._bin is None:
            self._bin = open(self._work / f"{self._prefix()}.bin", "wb")  # noqa: SIM115  (open until the shard is full)
            self._digest = hashlib.sha256()
        data = np.ascontiguousarray(block.tokens).view(np.uint8).data
        self._bin.write(data)
        self._digest.update(data)
        self._blocks.append(replace(block, tokens=block.tokens[:0]))
        self._tokens += len(block.tokens)
        self.counts["unk_tokens"] += int(np.count_nonzero(block.tokens == self._tokenizer.unk_id))

    def commit(self, counts: Mapping[str, Any], sources: list[dict[str, Any]]) -> dict[str, Any]:
        """Call ``finish`` and ``publish``, and return the manifest."""
        manifest = self.finish(counts, sources)
        self.publish()
        return manifest

    def finish(
        self,
        counts: Mapping[str, Any],
        sources: list[dict[str, Any]],
        policies: Mapping[str, Any] | None = None,
        run: Mapping[str, Any] | None = None,
        converted: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Finish the last shard, write the manifest and return it. The folder is not published yet.

        ``counts``: how many records came in, went out and were skipped, by reason. ``sources``: name and hash of each
        input. ``policies``: the policy for each kind of doubtful input, and how often it was applied. ``run``: values
        by which a later run recognises that it would write the same. ``converted``: the files that the sources were
        converted from, and the conversion's counts.
        """
        if self._bin is not None:
            self._close_shard()
        self._tokenizer.save(self._work)
        manifest = {
            "format": FORMAT,
            "schema": self._schema.to_dict() if self._schema else None,
            "template": self._template.to_dict(),
            "label_marker_id": self._tokenizer.control_id(self._template.label_marker),
            "tokenizer": {
                "hash": self._tokenizer.hash,
                "vocab_size": self._tokenizer.vocab_size,
                "base_size": self._tokenizer.base_size,
                "added": self._tokenizer.added,
                **({"losses": list(self._tokenizer.losses)} if self._tokenizer.losses else {}),
            },
            "counts": {**counts, **self.counts},
            "policies": dict(policies or {}),
            "run": dict(run or {}),
            "labels": {"sum": self._label_sum.tolist(), "count": self._label_count.tolist()},
            "sources": sources,
            "converted": dict(converted) if converted else None,
            "files": {name: _finished(self._work / name) for name in self._tokenizer.files},
            "shards": self._shards,
        }
        with open(self._work / MANIFEST, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.write("\n")
        sync_path(self._work / MANIFEST)
        sync_path(self._work)
        return manifest

    def publish(self) -> None:
        """Rename the finished folder to its final path, replacing an older one."""
        replaced = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(replaced)
        self._work.rename(self.folder)
        sync_path(self.folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prefix(self) -> str:
        return f"shard-{len(self._shards):05d}"

    def _close_shard(self) -> None:
        assert self._bin is not None
        prefix, blocks = self._prefix(), self._blocks
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        self._bin = None
        lengths = np.concatenate([block.lengths for block in blocks])
        headers = np.concatenate([block.headers for block in blocks])
        docs = np.zeros(len(lengths) + 1, DOC)
        for name, counts in (("turns", "turn_counts"), ("spans", "span_counts"), ("id", "id_sizes")):
            np.cumsum(np.concatenate([getattr(block, counts) for block in blocks]), out=docs[name][1:])
        docs["header_start"][:-1], docs["header_end"][:-1] = headers[:, 0], headers[:, 1]
        arrays: dict[str, Array] = {"docs": docs}
        for name in SIDE_ARRAYS[1:]:
            arrays[name] = np.concatenate([getattr(block, name) for block in blocks])
        self._count(arrays["turns"], arrays["spans"], arrays["values"])
        write_index(self._work / f"{prefix}.idx", lengths, token_dtype(self._tokenizer.vocab_size))
        for name in SIDE_ARRAYS:
            np.save(self._work / f"{prefix}.{name}.npy", arrays[name])
        itemsize = token_dtype(self._tokenizer.vocab_size).itemsize
        files = {f"{prefix}.bin": {"bytes": self._tokens * itemsize, "sha256": self._digest.hexdigest()}}
        for name in (f"{prefix}.idx", *(f"{prefix}.{name}.npy" for name in SIDE_ARRAYS)):
            files[name] = _finished(self._work / name)
        self._shards.append(
            {
                "name": prefix,
                "documents": len(lengths),
                "tokens": self._tokens,
                "turns": int(docs["turns"][-1]),
                "files": files,
            }
        )
        self._closed_documents += len(lengths)
        self._blocks, self._tokens = [], 0

    def _count(self, turns: Array, spans: Array, values: Array) -> None:
        """Add a shard's turns to the manifest's counts."""
        present = ~np.isnan(values) & ((turns["role"] == ASSISTANT) & (turns["weight"] > 0))[:, None]
        self._label_sum += np.where(present, values, 0).sum(axis=0, dtype=np.float64)
        self._label_count += present.sum(axis=0)
        self.counts["tokens"] += self._tokens
        self.counts["target_tokens"] += int((spans[:, 1] - spans[:, 0]).sum())
        self.counts["turns"] += len(turns)
        self.counts["labelled_turns"] += int(present.any(axis=1).sum())


def write_index(path: Path, lengths: Array, dtype: np.dtype[Any]) -> None:
    """Write Megatron-Core's index of documents of one sequence each: the bytes that its ``IndexedDatasetBuilder``
    writes.

    This function writes whole arrays, where the builder loops over lists of Python integers and takes seconds to
    import.
    """
    sequences = len(lengths)
    code = next(code for code, known in _IDX_DTYPES.items() if known == dtype)
    pointers = np.zeros(sequences, np.int64)
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    with open(path, "wb") as file:
        file.write(_IDX_HEAD.pack(_IDX_MAGIC, 1, code, sequences, sequences + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((pointers * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(sequences + 1, dtype="<i8").tobytes())


class Shard:
    """One shard, memory-mapped when first used."""

    def __init__(self, folder: Path, entry: Mapping[str, Any]) -> None:
        self.prefix = folder / entry["name"]
        self.documents: int = entry["documents"]
        self._dtype = self._check_index()

    @cached_property
    def lengths(self) -> Array:
        """int32 [documents]: tokens of each document."""
        return np.memmap(self._path("idx"), np.int32, "r", _IDX_HEAD.size, (self.documents,))

    @cached_property
    def tokens(self) -> Array:
        """All tokens of the shard, end to end."""
        return np.memmap(self._path("bin"), self._dtype, "r")

    @cached_property
    def docs(self) -> Array:
        return self._array("docs")

    @cached_property
    def turns(self) -> Array:
        return self._array("turns")

    @cached_property
    def spans(self) -> Array:
        return self._array("spans")

    @cached_property
    def values(self) -> Array:
        return self._array("values")

    @cached_property
    def ids(self) -> Array:
        return self._array("ids")

    def document(self, index: int) -> Document:
        """Return document ``index`` of this shard; its arrays are views of the files."""
        begin, end = self.docs[index], self.docs[index + 1]
        pointer = int(self._pointers[index]) // self._dtype.itemsize
        turns = slice(int(begin["turns"]), int(end["turns"]))
        return Document(
            bytes(self.ids[int(begin["id"]) : int(end["id"])]).decode(),
            self.tokens[pointer : pointer + int(self.lengths[index])],
            (int(begin["header_start"]), int(begin["header_end"])),
            self.turns[turns],
            self.spans[int(begin["spans"]) : int(end["spans"])],
            self.values[turns],
        )

    def document_ids(self) -> list[str]:
        """Return the ids of the documents of this shard."""
        data, bounds = bytes(self.ids), np.asarray(self.docs["id"]).tolist()
        return [data[start:end].decode() for start, end in zip(bounds, bounds[1:], strict=False)]

    @cached_property
    def _pointers(self) -> Array:
        return np.memmap(self._path("idx"), np.int64, "r", _IDX_HEAD.size + 4 * self.documents, (self.documents,))

    def _path(self, suffix: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.{suffix}")

    def _array(self, name: str) -> Array:
        path = self._path(f"{name}.npy")
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}); run `steerlm preprocess` again") from None

    def _check_index(self) -> np.dtype[Any]:
        """Return the token type from the head of the index file; ``UserError`` if it is torn or of another format."""
        path = self._path("idx")
        remedy = "run `steerlm preprocess` again"
        try:
            with open(path, "rb") as file:
                head = file.read(_IDX_HEAD.size)
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
        if len(head) < _IDX_HEAD.size:
            raise UserError(f"{path} is truncated at byte {size}: an index header has {_IDX_HEAD.size}; {remedy}")
        magic, version, code, sequences, boundaries = _IDX_HEAD.unpack(head)
        if magic != _IDX_MAGIC or version != 1 or code not in _IDX_DTYPES:
            wrong = next((i for i, (a, b) in enumerate(zip(head, _IDX_KNOWN, strict=False)) if a != b), len(_IDX_KNOWN))
            raise UserError(
                f"{path} is not a Megatron-Core index of token ids: byte {wrong} is {head[wrong]:#04x}; {remedy}"
            )
        wanted = _IDX_HEAD.size + 12 * sequences + 8 * boundaries
        if size != wanted:
            problem = "truncated" if size < wanted else "too long"
            raise UserError(f"{path} is {problem}: it ends at byte {size}, by its header at {wanted}; {remedy}")
        if sequences != self.documents:
            raise UserError(
                f"{path} is of another corpus: {sequences} documents, {MANIFEST} has {self.documents}; {remedy}"
            )
        return _IDX_DTYPES[code]


class ShardReader:
    """A shard folder, opened for reading. Opening reads the manifest and the size of each file."""

    def __init__(self, folder: str | Path, verify: bool = False) -> None:
        """Open the folder. ``verify`` also compares all checksums. ``UserError`` names what is missing or damaged."""
        self.folder = Path(folder)
        self.manifest, self.hash = _read_manifest(self.folder)
        # The heads of the indexes are checked first, since the size of a foreign index would be a misleading error.
        self.shards = [Shard(self.folder, entry) for entry in self.manifest["shards"]]
        for name, entry in self._files().items():
            self._check_file(self.folder / name, entry, verify)
        self._first = np.concatenate(([0], np.cumsum([shard.documents for shard in self.shards]))).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def document(self, index: int) -> Document:
        """Return document ``index`` of the folder."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.shards[shard].document(index - int(self._first[shard]))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored with the shards."""
        return Tokenizer.load(self.folder)

    @cached_property
    def schema(self) -> AttributeSchema | None:
        """The attribute schema; None if there is none."""
        stored = self.manifest["schema"]
        return AttributeSchema.from_dict(stored) if stored else None

    @cached_property
    def template(self) -> Template:
        """The prompt template."""
        return Template.from_dict(self.manifest["template"])

    def _files(self) -> dict[str, Any]:
        files = dict(self.manifest["files"])
        for shard in self.manifest["shards"]:
            files.update(shard["files"])
        return files

    @staticmethod
    def _check_file(path: Path, entry: Mapping[str, Any], verify: bool) -> None:
        remedy = "run `steerlm preprocess` again"
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
        if size != entry["bytes"]:
            problem = "truncated" if size < entry["bytes"] else "too long"
            raise UserError(f"{path} is {problem}: it ends at byte {size}, by {MANIFEST} at {entry['bytes']}; {remedy}")
        if verify and file_sha256(path) != entry["sha256"]:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; {remedy}")


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the manifest and the SHA-256 of its bytes, which identifies the folder."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such shard folder; make it with `steerlm preprocess`, or mend data.train / data.valid"
        )
    try:
        data = path.read_bytes()
    except OSError:
        inside = sorted(child.parent.name for child in folder.glob(f"*/{MANIFEST}"))
        hint = f"; did you mean {folder / inside[0]}?" if inside else "; make one with `steerlm preprocess`"
        raise UserError(f"{folder} is not a shard folder: it has no {MANIFEST}{hint}") from None
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); run `steerlm preprocess` again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path}: format={found!r}, this version reads {FORMAT}; run `steerlm preprocess` again")
    lacking = [key for key in ("schema", "template", "tokenizer", "counts", "files", "shards") if key not in manifest]
    if lacking:
        raise UserError(f"{path} is damaged: it lacks {' '.join(lacking)}; run `steerlm preprocess` again")
    return manifest, hashlib.sha256(data).hexdigest()


def _finished(path: Path) -> dict[str, Any]:
    """Flush a finished file to the disk and return its size and checksum."""
    sync_path(path)
    return describe_file(path)
