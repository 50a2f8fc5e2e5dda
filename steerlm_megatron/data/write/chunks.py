"""Chunks of input lines, and the tokenised chunks, which are kept on disk until the corpus is complete.

A chunk is a fixed number of lines of one file, for any number of processes. It is tokenised to one file in the work
folder, named by a hash over its bytes, its position and all settings that decide the result. So a job that was killed
finds finished chunks by their names: there is no journal that could be torn or out of date, and after an input was
corrected only the chunks with other bytes are done again.

Owns: cutting files into chunks, tokenising a chunk, its file. Does not own: the order of work (``preprocess.py``), the
meaning of a record (``steer.records``). Invariants: the result is a function of the chunk and the ``Job``; a chunk's
file is complete, by the checksum in it, or counts as missing; memory is that of one chunk.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.views import TURN
from steerlm_megatron.data.write.blocks import Array, Block, concatenate, join
from steerlm_megatron.data.write.builder import Builder, ConversationLike
from steerlm_megatron.data.write.fast_records import FastRecords
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import atomic_path
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.lines import OnError, Rejected, reject
from steerlm_megatron.steer.messages import count_empty_replies
from steerlm_megatron.steer.records import Conversation, parse_records, raw_lines
from steerlm_megatron.steer.splits import assign_split
from steerlm_megatron.steer.templates import Template

FORMAT = 2  # increase it when the same chunk gives other documents
CHUNK_LINES = 4096
CHUNK_BYTES = 2 << 20  # the line that reaches this size closes a chunk
SUFFIX = ".chunk"  # suffix of a chunk's file
_MAGIC, _HEAD = b"SLMCHUNK", struct.Struct("<8sII")  # magic, CRC-32 of all that follows, size of the JSON part
_BATCH = 512  # conversations encoded in one call

TRAIN, VALID = 0, 1


@dataclass(frozen=True)
class Job:
    """All settings that decide the result of a chunk.

    Args:
        valid_fraction: share of prompts assigned to ``valid``; with 0 all records go to the split of their file.
        control_strings: ``escape`` or ``reject``, see ``config.schema.DataConfig``.
    """

    tokenizer: Tokenizer
    schema: AttributeSchema | None
    template: Template
    on_error: str
    valid_fraction: float
    split_seed: int
    control_strings: str

    @cached_property
    def builder(self) -> Builder:
        """The builder of documents, made once per process."""
        return Builder(self.tokenizer, self.template, self.schema)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def key(self) -> str:
        """Hash of all settings but ``on_error``, which changes nothing in a chunk without errors."""
        parts = [
            FORMAT, _BATCH, self.tokenizer.hash, self.schema and self.schema.to_dict(), self.template.to_dict(),
            self.valid_fraction, self.split_seed, self.control_strings,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Chunk:
    """Lines of one file. ``damage`` is an error that reading met after the last line, and that ends the file."""

    split: str
    path: str
    first_line: int
    lines: Sequence[bytes]
    damage: str = ""

    @property
    def name(self) -> str:
        """Name of the chunk's file: a hash over its position and bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.split, self.path, str(self.first_line), self.damage):
            digest.update(f"{len(part)}:{part}".encode())
        for line in self.lines:
            digest.update(line)
        return f"{digest.hexdigest()}{SUFFIX}"


def read_chunks(split: str, paths: Sequence[str]) -> Iterator[Chunk]:
    """Yield the chunks of files in order, holding one in memory. A reading error is stored in the chunk where it
    occurs.
    """
    for path in paths:
        lines, size, first, damage = [], 0, 1, ""
        try:
            for _, line in raw_lines(path):
                lines.append(line)
                size += len(line)
                if len(lines) >= CHUNK_LINES or size >= CHUNK_BYTES:
                    yield Chunk(split, path, first, lines)
                    first += len(lines)
                    lines, size = [], 0
        except UserError as error:
            damage = str(error)
        if lines or damage:
            yield Chunk(split, path, first, lines, damage)


@dataclass
class Tokenized:
    """A tokenised chunk.

    Args:
        blocks: the documents for training and for validation (``TRAIN``, ``VALID``).
        lines, sides, hashes: for every accepted record, in order: its line, its split, 16 bytes of the hash of its id
            (zeros if the record has no id, so that it cannot repeat one).
        control_like, empty: per split, the number of messages that contain what looks like a control string, and of
            replies without text.
        refused: per split, the number of records left out because they hold one (``control_strings=reject``).
        rejected: ``(line, where, reason)`` of each record to list in ``rejected.jsonl``.
        malformed: how many of those are malformed (the others are refused).
    """

    blocks: tuple[Block, Block]
    lines: Array
    sides: Array
    hashes: Array
    has_target: Array
    refused: list[int] = field(default_factory=lambda: [0, 0])
    control_like: list[int] = field(default_factory=lambda: [0, 0])
    empty: list[int] = field(default_factory=lambda: [0, 0])
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    malformed: int = 0

    def save(self, path: Path) -> None:
        """Write the file atomically. It is not synced to disk, since its checksum shows if a power cut tore it."""
        arrays: dict[str, Array] = {name: getattr(self, name) for name in ("lines", "sides", "hashes", "has_target")}
        for side, block in enumerate(self.blocks):
            arrays |= {f"{side}.{name}": array for name, array in block.arrays().items()}
            arrays[f"{side}.turns"] = block.turns.view(np.uint8)
        said = [self.refused, self.control_like, self.empty, self.rejected, self.malformed]
        about = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
        data = [np.ascontiguousarray(array).view(np.uint8).data for array in arrays.values()]
        head = json.dumps([about, said]).encode()
        checksum = zlib.crc32(head, len(head))  # the checksum covers the size as well
        for part in data:
            checksum = zlib.crc32(part, checksum)
        with atomic_path(path, sync=False) as temporary, open(temporary, "wb") as file:
            file.write(_HEAD.pack(_MAGIC, checksum, len(head)))
            file.write(head)
            file.writelines(data)

    @staticmethod
    def load(path: Path) -> Tokenized | None:
        """Read what ``save`` wrote; None if the file is missing or torn."""
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(stored) < _HEAD.size:
            return None
        (magic, checksum, at), rest = _HEAD.unpack_from(stored), memoryview(stored)[_HEAD.size :]
        if magic != _MAGIC or checksum != zlib.crc32(rest, at):
            return None
        about, (refused, control_like, empty, rejected, malformed) = json.loads(bytes(rest[:at]))
        arrays: dict[str, Array] = {}
        for name, (code, shape) in about.items():
            dtype, count = np.dtype(code), math.prod(shape)
            arrays[name] = np.frombuffer(rest, dtype, count, at).reshape(shape)
            at += count * dtype.itemsize
        for side in (TRAIN, VALID):
            arrays[f"{side}.turns"] = arrays[f"{side}.turns"].view(TURN)
        blocks = [
            Block(**{name[2:]: array for name, array in arrays.items() if name.startswith(f"{side}.")})
            for side in (TRAIN, VALID)
        ]
        return Tokenized(
            (blocks[TRAIN], blocks[VALID]),
            arrays["lines"],
            arrays["sides"],
            arrays["hashes"],
            arrays["has_target"],
            refused,
            control_like,
            empty,
            [(line, where, reason) for line, where, reason in rejected],
            malformed,
        )


def tokenize(chunk: Chunk, job: Job) -> Tokenized:
    """Tokenise one chunk. Raises ``UserError`` for the first malformed line under ``on_error=error``."""
    # A chunk makes millions of small objects and no reference cycles, and collecting them took a tenth of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _Tokenizing(chunk, job).run()
    finally:
        if collecting:
            gc.enable()


class _Tokenizing:
    """The state of one call of ``tokenize``."""

    def __init__(self, chunk: Chunk, job: Job) -> None:
        self.chunk, self.job = chunk, job
        self.control_like = _ControlLike(job)
        self.parts: tuple[list[Block], list[Block]] = ([], [])
        self.records: list[tuple[Array, Array, Array, Array]] = []
        self.refused, self.messages, self.empty, self.malformed = [0, 0], [0, 0], [0, 0], 0
        self.rejected: list[tuple[int, str, str]] = []

    def run(self) -> Tokenized:
        rejected: Rejected = []
        records = self._records(rejected)
        while batch := list(islice(records, _BATCH)):
            self._take(batch)
        self.malformed = len(rejected)
        self.rejected += [(_line(where), where, reason) for where, reason in rejected]
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.uint8), _hash_array([]), np.zeros(0, np.bool_))
        lines, sides, hashes, has_target = (np.concatenate(x) for x in zip(nothing, *self.records, strict=True))
        return Tokenized(
            (self._joined(TRAIN), self._joined(VALID)),
            lines,
            sides,
            hashes,
            has_target,
            self.refused,
            self.messages,
            self.empty,
            sorted(self.rejected),
            self.malformed,
        )

    def _records(self, rejected: Rejected) -> Iterator[tuple[int, ConversationLike]]:
        """Yield line and conversation of every record that the template can write; ``rejected`` is as in
        ``read_records``.
        """
        chunk = self.chunk
        for number, conversation in self._parsed(rejected):
            if (reason := self.job.template.refusal(conversation.messages)) is None:
                yield number, conversation
            else:
                reject(UserError(f"{chunk.path}:{number}: {reason}"), cast(OnError, self.job.on_error), rejected)

    def _parsed(self, rejected: Rejected) -> Iterator[tuple[int, ConversationLike]]:
        """Yield line and conversation of every record."""
        job, chunk = self.job, self.chunk
        parse = FastRecords(chunk.path, job.schema).parse
        for number, line in enumerate(chunk.lines, chunk.first_line):
            record = parse(line, number)
            if record is not None:
                yield number, record
                continue
            one = iter([(f"{chunk.path}:{number}", line)])
            for _, conversation in parse_records(one, job.schema, cast(OnError, job.on_error), rejected):
                yield number, conversation
        if chunk.damage:
            reject(UserError(chunk.damage), cast(OnError, job.on_error), rejected)

    def _take(self, batch: list[tuple[int, ConversationLike]]) -> None:
        batch = self._without_control_strings(batch)
        conversations, lines = [conversation for _, conversation in batch], [line for line, _ in batch]
        block, has_target = self.job.builder.build(conversations, lines)
        sides = np.array([self._side(conversation) for conversation in conversations], np.uint8)
        for side, conversation in zip(sides.tolist(), conversations, strict=True):
            if isinstance(conversation, Conversation):  # lines that the fast parser accepts have no empty reply
                self.empty[side] += count_empty_replies(conversation.messages)
        name = os.path.basename(self.chunk.path)
        hashes = [
            bytes(16) if conversation.id == f"{name}:{line}" else _id_hash(conversation.id)
            for line, conversation in batch
        ]
        self.records.append((block.lines, sides, _hash_array(hashes), has_target))
        for side in (TRAIN, VALID):
            if (chosen := has_target & (sides == side)).any():
                self.parts[side].append(block.select(chosen))

    def _without_control_strings(self, batch: list[tuple[int, ConversationLike]]) -> list[tuple[int, ConversationLike]]:
        """Count texts that look like control strings. Return the records; ``reject`` drops those with one."""
        if not self.control_like.anywhere([m.content for _, conversation in batch for m in conversation.messages]):
            return batch
        kept = []
        for line, conversation in batch:
            looks = [self.control_like.first(message.content) for message in conversation.messages]
            if any(looks):
                side = self._side(conversation)
                self.messages[side] += sum(map(bool, looks))
                if self.job.control_strings == "reject":
                    index, text = next((index, text) for index, text in enumerate(looks) if text)
                    reason = f"messages[{index}].content has the control string {text!r} (data.control_strings=reject)"
                    self.refused[side] += 1
                    self.rejected.append((line, f"{self.chunk.path}:{line}", reason))
                    continue
            kept.append((line, conversation))
        return kept

    def _side(self, conversation: ConversationLike) -> int:
        return VALID if assign_split(conversation, self.job.valid_fraction, self.job.split_seed) == "valid" else TRAIN

    def _joined(self, side: int) -> Block:
        attributes = len(self.job.schema.names) if self.job.schema else 0
        return concatenate(self.parts[side] or [join([], self.job.tokenizer.vocab_size, attributes)])


def _line(where: str) -> int:
    return int(where.rpartition(":")[2])


def _id_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _hash_array(hashes: list[bytes]) -> Array:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)


class _ControlLike:
    """Finds texts that look like control strings: those of the template and tokenizer, and any ``<extra_id_N>``."""

    def __init__(self, job: Job) -> None:
        known = sorted({*job.template.control_strings, *job.tokenizer.controls}, key=len, reverse=True)
        self._pattern = re.compile("|".join([r"<extra_id_\d+>", *map(re.escape, known)]))
        # Substring searches are many times faster than the pattern, and nearly all texts contain none of these.
        self._hints = ("<extra_id_", *(text for text in known if not text.startswith("<extra_id_")))

    def anywhere(self, texts: list[str]) -> bool:
        """Return whether any of ``texts`` may hold a control string; False is certain."""
        together = "\n".join(texts)
        return any(hint in together for hint in self._hints)

    def first(self, text: str) -> str:
        """Return the first one in ``text``; empty if there is none."""
        if not any(hint in text for hint in self._hints):
            return ""
        found = self._pattern.search(text)
        return found[0] if found else ""
