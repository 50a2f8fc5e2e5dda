"""Conversation records: JSONL files (plain, ``.gz`` or ``.zst``) of the field's ``messages`` shape, read and written.

``{"id": "…", "messages": [{"role": "system|user|assistant", "content": "…", "attributes": {"quality": 6.75}, "weight":
1}], "source": "…"}``. ``attributes`` are floats on the schema's scale. Only assistant messages have them; they may be
absent or partial, and a null value counts as absent. ``weight`` is 0 or 1 on assistant messages, as in OpenAI's
fine-tuning format, and 0 makes the message context. ``train``, ``training`` or ``loss`` = false, ``mask`` = true and
``loss_weight`` = 0 mean the same. A reply without text is context whatever its keys say, since there is nothing to
learn in it. An object that holds nothing but nulls counts as absent, because Arrow gives every struct all keys. Of
OpenAI's variants, the role ``developer`` is read as ``system``, and content in parts is joined; tools are refused.
Unknown keys of a record and of a message are kept and written back.

Owns: opening files, the record's fields and their checks, writing. Does not own: lines that are not JSON
(``lines.py``), prompt text (``templates.py``).

Invariants: a file is read in constant memory; every line becomes a record, an error naming ``file:line``, or an entry
of ``rejected``; a written file appears only when it is complete.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.files import atomic_path
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.lines import OnError, Rejected, json_line, parse_lines, refuse_foreign, reject
from steerlm_megatron.steer.messages import Message, brief, message_from_json, without_null_objects

_RECORD_KEYS = frozenset(("id", "messages", "source"))
_READ_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation (a *sample*). ``extra`` holds the record's other keys as they were read."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


# Files


def expand_paths(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the files that paths and globs name, each once, in the order given; those of a glob are sorted.

    A glob matches no folders.

    Raises:
        UserError: no path at all, a missing file, a folder, a file that may not be read, a glob that matches nothing.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise UserError("no input file is given; name at least one .jsonl, .jsonl.gz or .jsonl.zst file")
    found: list[str] = []
    for item in [os.fspath(path) for path in given]:
        if os.path.isdir(item):
            raise UserError(f"{item}: is a folder; name its files, for example {os.path.join(item, '*.jsonl*')!r}")
        matches = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
        matches = [match for match in matches if not os.path.isdir(match)]
        if not matches:
            raise UserError(f"{item}: no such file; check the path (relative paths start at {os.getcwd()})")
        for match in matches:
            if not os.access(match, os.R_OK):
                raise UserError(f"{match}: may not be read by this user; mend its permissions")
        found += matches
    return list(dict.fromkeys(found))


def read_json_lines(
    path: str | os.PathLike[str], on_error: OnError = "error", rejected: Rejected | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("file:line", object)`` for every line of a JSONL file that is not blank.

    Args:
        path: the file; ``.gz`` and ``.zst`` are decompressed.
        on_error: ``"skip"`` appends a malformed line to ``rejected`` and goes on; ``"error"`` raises.
        rejected: receives ``("file:line", reason)``.

    Raises:
        UserError: a malformed line (``on_error="error"``); a missing, unreadable or empty file (always).
    """
    yield from parse_lines(raw_lines(os.fspath(path)), on_error, rejected)


class _ZstdReader(io.RawIOBase):
    """Decompress a ``.zst`` file of one or more frames. Unlike zstandard's reader it refuses a file that is cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard  # imported here, since only .zst files need it

        self._raw = raw
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._out = memoryview(b"")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            data = self._rest or self._raw.read(_READ_BYTES)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the compressed data is cut off")
                return 0
            if self._frame is None:
                self._frame = self._new()
            try:
                self._out = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(self._out), len(buffer))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


def raw_lines(path: str, most_bytes: int | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield ``("file:line", bytes with their newline)``; raises UserError for a file that is missing, empty, or
    damaged.

    A byte order mark at the start of a line is removed. Lines longer than ``most_bytes`` come in parts of that size, so
    that memory does not depend on the length of lines.
    """
    number, blank, begins = 0, True, True  # begins: whether the next part begins a line
    try:
        with ExitStack() as stack:
            stream: Any = stack.enter_context(open(path, "rb"))
            if path.endswith(".gz"):
                stream = stack.enter_context(gzip.open(stream))
            elif path.endswith(".zst"):
                stream = io.BufferedReader(_ZstdReader(stream), _READ_BYTES)
            refuse_foreign(path, stream.peek(16))
            for number, line in enumerate(stream, 1) if most_bytes is None else _pieces(stream, most_bytes):
                if begins and line.startswith(_BOM):  # a mark within a file shows that several files were joined
                    line = line[len(_BOM) :]
                begins = most_bytes is None or line.endswith(b"\n")
                blank = blank and (not line or line.isspace())
                yield f"{path}:{number}", line
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except (OSError, EOFError, zlib.error) as error:
        line_number = f":{number + 1}" if number else ""
        raise UserError(f"{path}{line_number}: cannot be read ({error}); fetch or write the file again") from error
    if blank:
        raise UserError(f"{path}: the file is empty; it needs one JSON object per line")


def _pieces(stream: IO[bytes], most_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield ``(line number, part of the line)``."""
    number = 1
    while piece := stream.readline(most_bytes):
        yield number, piece
        number += piece.endswith(b"\n")


# Reading


def read_records(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    schema: AttributeSchema | None = None,
    on_error: OnError = "error",
    rejected: Rejected | None = None,
    require_response: bool = True,
) -> Iterator[Conversation]:
    """Yield conversations of one or more record files or globs, in order, streamed.

    Args:
        paths: files or globs; missing ones are reported at the call, not at the first record.
        schema: checks the attributes' names and range; without one (or without names) only that they are numbers.
        on_error: ``"skip"`` appends a bad line to ``rejected`` and goes on; ``"error"`` raises.
        rejected: receives ``("file:line", reason)``.
        require_response: whether a record without an assistant message is an error (false for files of prompts).

    Raises:
        UserError: as ``expand_paths``, ``read_json_lines`` and ``from_json``.
    """
    if on_error not in ("error", "skip"):
        raise UserError(f"on_error={on_error!r}; legal: error skip")
    return _read_records(expand_paths(paths), schema, on_error, rejected, require_response)


def _read_records(
    files: list[str],
    schema: AttributeSchema | None,
    on_error: OnError,
    rejected: Rejected | None,
    require_response: bool,
) -> Iterator[Conversation]:
    for path in files:
        for _, conversation in parse_records(raw_lines(path), schema, on_error, rejected, require_response):
            yield conversation


def parse_records(
    lines: Iterator[tuple[str, bytes]],
    schema: AttributeSchema | None,
    on_error: OnError,
    rejected: Rejected | None,
    require_response: bool = True,
) -> Iterator[tuple[str, Conversation]]:
    """Yield ``("file:line", conversation)`` of raw lines. Arguments and errors are those of ``read_records``."""
    for where, value in parse_lines(lines, on_error, rejected):
        try:
            conversation = from_json(value, where, schema, require_response)
        except UserError as error:
            reject(error, on_error, rejected)
            continue
        yield where, conversation


def from_json(
    data: Mapping[str, Any], where: str, schema: AttributeSchema | None = None, require_response: bool = True
) -> Conversation:
    """Check a parsed record and return its conversation. Without an id it gets ``<file name>:<line>`` from ``where``.

    Args:
        data: the record.
        where: ``"file:line"``; every error message starts with it.
        schema: as in ``read_records``.
        require_response: as in ``read_records``.

    Raises:
        UserError: naming ``where``, the value, the rule.
    """
    data = without_null_objects(data, where)
    raw = data.get("messages")
    if raw is None:
        keys = " ".join(data) or "none"
        raise UserError(f"{where}: the row has no list 'messages' (its keys: {keys}); set data.source or data.map")
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: messages={brief(raw)} must be a list of at least one message")
    messages = tuple([message_from_json(item, where, index, schema) for index, item in enumerate(raw)])
    roles = [message.role for message in messages]
    first = roles[1] if roles[0] == "system" and len(roles) > 1 else roles[0]
    if "system" in roles[1:]:
        raise UserError(f"{where}: messages[{roles.index('system', 1)}] is a system message; only the first can be one")
    if first == "assistant":
        raise UserError(f"{where}: the conversation begins with an assistant message; begin it with a user message")
    if "user" not in roles:
        raise UserError(f"{where}: the conversation has no user message")
    if require_response and "assistant" not in roles:
        raise UserError(f"{where}: the conversation has no response: it needs an assistant message")
    name = data.get("id")
    if name is None:
        name = os.path.basename(where)
    elif not isinstance(name, str):
        if not isinstance(name, int) or isinstance(name, bool):
            raise UserError(f"{where}: id={brief(name)} must be a string")
        name = str(name)
    source = data.get("source") or ""
    if not isinstance(source, str):
        raise UserError(f"{where}: source={brief(source)} must be a string")
    extra = {} if data.keys() <= _RECORD_KEYS else {k: v for k, v in data.items() if k not in _RECORD_KEYS}
    return Conversation(name, messages, source, extra)


# Writing


def to_json(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation as plain data, the inverse of ``from_json``. Keys at their defaults are left out."""
    messages = []
    for message in conversation.messages:
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.attributes is not None:
            item["attributes"] = dict(message.attributes)
        if message.weight != 1:
            item["weight"] = message.weight
        item.update(message.extra)
        messages.append(item)
    record: dict[str, Any] = {"id": conversation.id, "messages": messages}
    if conversation.source:
        record["source"] = conversation.source
    record.update(conversation.extra)
    return record


def content_hash(conversation: Conversation) -> str:
    """Return SHA-256 (hex) over roles and contents alone, so that equal texts with other ids or labels are equal."""
    digest = hashlib.sha256()
    for message in conversation.messages:
        content = message.content.encode("utf-8", "surrogatepass")
        digest.update(f"{message.role}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def write_records(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> int:
    """Write a record file, compressed by its suffix; returns the number of records.

    The file appears under its name only when it is complete (temporary name, fsync, rename); the same records give the
    same bytes. Missing parent folders are made.
    """
    target = Path(path)
    count = 0
    with atomic_path(target) as temporary, ExitStack() as stack:
        stream: Any = stack.enter_context(open(temporary, "wb"))
        if target.suffix == ".gz":
            stream = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=stream, mtime=0))
        elif target.suffix == ".zst":
            import zstandard  # imported here, since only .zst files need it

            compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
            stream = stack.enter_context(compressor.stream_writer(stream, closefd=False))
        for conversation in conversations:
            stream.write(json_line(to_json(conversation)))
            count += 1
    return count
