"""Conversation records: JSONL files (plain, ``.gz`` or ``.zst``) of the field's ``messages`` shape, read and written.

``{"id": "…", "messages": [{"role": "system|user|assistant", "content": "…", "attributes": {"quality": 6.75},
"weight": 1}], "source": "…"}``. ``attributes`` are floats on the schema's scale, on assistant messages only; absent or
partial is fine, and a null value is an absent one. ``weight`` is 0 or 1 on assistant messages, as in OpenAI's
fine-tuning format: 0 is context only; so say ``train``, ``training`` or ``loss`` = false, ``mask`` = true and
``loss_weight`` = 0. A reply without text is context, whatever else it says: there is nothing in it to learn. An object
of nothing but nulls is absent, wherever it stands (Arrow gives every struct all keys). Of OpenAI's variants,
``developer`` is ``system`` and content in parts of text is their text; tools are refused. Unknown keys of a record and
of a message are kept and written back.

Owns: opening files, the record's shape and its checks, writing. Does not own: lines that are no JSON (``lines.py``),
prompt text (``templates.py``).

Invariants: a file is read in constant memory; every line becomes a record, an error naming ``file:line``, or an entry
of ``rejected``; a written file appears only when it is whole.
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
from steerlm_megatron.steer.attributes import AttributeSchema, is_number
from steerlm_megatron.steer.lines import OnError, Rejected, decode_line, json_line, parse_lines, refuse_foreign, reject

_ROLES = ("system", "user", "assistant")
_RECORD_KEYS = frozenset(("id", "messages", "source"))
_MESSAGE_KEYS = frozenset(("role", "content", "attributes", "weight"))
# Other names under which corpora say whether a reply is trained, and the value that says that it is.
SWITCHES: Mapping[str, bool] = {"train": True, "training": True, "loss": True, "mask": False}
LOSS_WEIGHT = "loss_weight"
_READ_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Args:
        role: ``system``, ``user`` or ``assistant``.
        content: its text.
        attributes: values on the schema's scale (assistant only); None if there are none.
        weight: assistant only: 1 is trained on and a label target, 0 is context only (so is a reply without text).
        extra: the other keys of the message, as read.
    """

    role: str
    content: str
    attributes: Mapping[str, float] | None = None
    weight: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation (a *sample*). ``extra`` holds the other keys of the record, as read."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


# Files


def expand_paths(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Files for paths and globs, in the order given, those of one glob sorted, each once. A glob takes no folders.

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


def open_text(path: str | os.PathLike[str]) -> Iterator[str]:
    """The lines of a UTF-8 file, decompressed by suffix, without their line ends.

    Raises:
        UserError: naming ``file:line``: invalid UTF-8, damaged or cut-off compressed data; missing file.
    """
    for where, line in raw_lines(os.fspath(path)):
        yield decode_line(line, where).rstrip("\r\n")


def read_json_lines(
    path: str | os.PathLike[str], on_error: OnError = "error", rejected: Rejected | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``("file:line", object)`` for every line of a JSONL file that is not blank.

    Args:
        path: the file; ``.gz`` and ``.zst`` are decompressed.
        on_error: ``"skip"`` appends a malformed line to ``rejected`` and goes on; ``"error"`` raises.
        rejected: receives ``("file:line", reason)``.

    Raises:
        UserError: a malformed line (``on_error="error"``); a missing, unreadable or empty file (always).
    """
    yield from parse_lines(raw_lines(os.fspath(path)), on_error, rejected)


class _ZstdReader(io.RawIOBase):
    """Decompresses a ``.zst`` file of one or more frames; refuses a cut-off one, unlike zstandard's own reader."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard  # only who reads .zst needs it

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
    """``("file:line", bytes with their newline)``; raises UserError for a file that is missing, empty, or damaged.

    A byte order mark at the start of a line is left out. ``most_bytes``: longer lines come in pieces of that size, so
    that memory does not depend on what a line holds.
    """
    number, blank, begins = 0, True, True  # begins: the next piece is the beginning of a line
    try:
        with ExitStack() as stack:
            stream: Any = stack.enter_context(open(path, "rb"))
            if path.endswith(".gz"):
                stream = stack.enter_context(gzip.open(stream))
            elif path.endswith(".zst"):
                stream = io.BufferedReader(_ZstdReader(stream), _READ_BYTES)
            refuse_foreign(path, stream.peek(16))
            for number, line in enumerate(stream, 1) if most_bytes is None else _pieces(stream, most_bytes):
                if begins and line.startswith(_BOM):  # also within a file: several files were joined
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
    """``(line number, piece)``."""
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
    """Conversations of one or more record files or globs, in order, streamed.

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
    """``("file:line", conversation)`` of raw lines; the rest as in ``read_records``."""
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
    """A conversation from a parsed record, checked. A record without an id takes ``<file name>:<line>`` from ``where``.

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
        raise UserError(f"{where}: messages={_brief(raw)} must be a list of at least one message")
    messages = tuple([_message(item, where, index, schema) for index, item in enumerate(raw)])
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
            raise UserError(f"{where}: id={_brief(name)} must be a string")
        name = str(name)
    source = data.get("source") or ""
    if not isinstance(source, str):
        raise UserError(f"{where}: source={_brief(source)} must be a string")
    extra = {} if data.keys() <= _RECORD_KEYS else {k: v for k, v in data.items() if k not in _RECORD_KEYS}
    return Conversation(name, messages, source, extra)


def _message(item: Any, where: str, index: int, schema: AttributeSchema | None) -> Message:
    if not isinstance(item, dict):
        raise UserError(f"{where}: messages[{index}]={_brief(item)} must be an object with role and content")
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        role = _other_role(role, f"{where}: messages[{index}]")
    if not isinstance(content, str):
        content = _joined_parts(item, f"{where}: messages[{index}]")
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: messages[{index}].content has half a surrogate pair at character {error.start}; mend it"
            ) from error
    attributes = item.get("attributes")
    extra = {} if item.keys() <= _MESSAGE_KEYS else {k: v for k, v in item.items() if k not in _MESSAGE_KEYS}
    if extra and _calls(extra):
        raise UserError(f"{where}: messages[{index}] {TOOL_RULE}")
    if role != "assistant":  # other switches there say what is so anyway
        if attributes or item.get("weight") is not None:
            key = "attributes" if attributes else "weight"
            raise UserError(f"{where}: messages[{index}].{key} is on a {role} message; only assistant messages have it")
        return Message(role, content, None, 1, extra)
    weight, extra = _weight(item, extra, f"{where}: messages[{index}]")
    if attributes is not None:
        attributes = _attributes(attributes, f"{where}: messages[{index}].attributes", schema)
    return Message(role, content, attributes, weight if has_text(content) else 0, extra)


def has_text(content: str) -> bool:
    """Whether a reply says anything: one that does not is never trained, nor a target of its labels."""
    return bool(content) and not content.isspace()


def count_empty_replies(messages: Iterable[Message]) -> int:
    """How many replies have no text."""
    return sum(message.role == "assistant" and not has_text(message.content) for message in messages)


def _weight(item: Mapping[str, Any], extra: dict[str, Any], where: str) -> tuple[int, dict[str, Any]]:
    """The weight of an assistant message, by whichever keys say it, and ``extra`` without these.

    Raises:
        UserError: a weight other than 0 and 1; two keys that contradict each other.
    """
    said = {key: item[key] for key in ("weight", LOSS_WEIGHT) if item.get(key) is not None}
    for key, value in said.items():
        if not is_number(value) or value not in (0, 1):
            raise UserError(f"{where}.{key}={_brief(value)} must be 0 (context only) or 1")
    weights = {key: int(value) for key, value in said.items()}
    if extra:
        switches = {key: value for key, value in extra.items() if key in SWITCHES and isinstance(value, bool)}
        said |= switches
        weights |= {key: int(value is SWITCHES[key]) for key, value in switches.items()}
        extra = {key: value for key, value in extra.items() if key not in weights}
    if len(set(weights.values())) > 1:
        both = " and ".join(f"{key}={_brief(said[key])}" for key in weights)
        raise UserError(f"{where}: {both} contradict each other; keep one of them")
    return next(iter(weights.values()), 1), extra


def without_null_objects(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``data``, in which every object of nothing but nulls is null, or (in a list) not there. ``UserError`` if it is
    nested too deep.
    """
    try:
        return _present(data) or {}
    except RecursionError as error:
        raise UserError(f"{where}: the record is nested too deep") from error


def _present(data: Mapping[str, Any]) -> dict[str, Any] | None:
    made: dict[str, Any] = {}
    found = not data  # an empty object is one without nulls
    for key, value in data.items():
        if isinstance(value, dict):
            value = _present(value)
        elif isinstance(value, list):
            value = _present_items(value)
        found = found or value is not None
        made[key] = value
    return made if found else None


def _present_items(items: list[Any]) -> list[Any]:
    made = []
    for item in items:
        if isinstance(item, dict):
            item = _present(item)
            if item is None:
                continue
        elif isinstance(item, list):
            item = _present_items(item)
        made.append(item)
    return made


TOOL_RULE = "calls or is a tool; only system, user and assistant text can be trained on"


def _calls(item: Mapping[str, Any]) -> bool:
    return bool(item.get("tool_calls") or item.get("function_call"))  # the second: OpenAI's older name


def _other_role(role: Any, where: str) -> str:
    """OpenAI's other roles: ``developer`` is ``system``; tools are not text."""
    if role == "developer":
        return "system"
    if role in ("tool", "function"):
        raise UserError(f"{where} {TOOL_RULE}")
    raise UserError(f"{where}.role={_brief(role)}; legal: {' '.join(_ROLES)}")


def _joined_parts(item: Mapping[str, Any], where: str) -> str:
    """The text of OpenAI's content in parts (``[{"type": "text", "text": "…"}]``)."""
    parts = item.get("content")
    if parts is None and _calls(item):
        raise UserError(f"{where} {TOOL_RULE}")
    if not isinstance(parts, list) or not parts:
        raise UserError(f"{where}.content={_brief(parts)} must be a string of text")
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise UserError(f"{where}.content={_brief(parts)} has a part that is no text; only text can be trained on")
    return "".join(part["text"] for part in parts)


def _attributes(data: Any, where: str, schema: AttributeSchema | None) -> dict[str, float] | None:
    if not isinstance(data, dict):
        raise UserError(f"{where}={_brief(data)} must be an object of numbers")
    values = {name: value for name, value in data.items() if value is not None} if None in data.values() else data
    try:
        (schema or _ANY).check_values(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return values or None


_ANY = AttributeSchema("any", (), 1)  # knows no names: checks only that values are numbers


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Writing


def to_json(conversation: Conversation) -> dict[str, Any]:
    """The record as plain data; ``from_json`` is its inverse. Keys at their defaults are left out."""
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
    """SHA-256 (hex) over roles and contents alone: the same text has the same hash whatever its id and labels."""
    digest = hashlib.sha256()
    for message in conversation.messages:
        content = message.content.encode("utf-8", "surrogatepass")
        digest.update(f"{message.role}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def write_records(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> int:
    """Write a record file, compressed by its suffix; returns the number of records.

    The file appears under its name only when it is whole (temporary name, fsync, rename); the same records give the
    same bytes. Missing parent folders are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "wb") as raw:
            with ExitStack() as stack:
                stream: Any = raw
                if target.suffix == ".gz":
                    stream = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0))
                elif target.suffix == ".zst":
                    import zstandard  # only who writes .zst needs it

                    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
                    stream = stack.enter_context(compressor.stream_writer(raw, closefd=False))
                for conversation in conversations:
                    stream.write(json_line(to_json(conversation)))
                    count += 1
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a crash
    finally:
        os.close(folder)
    return count
