"""Text files line by line, plain or compressed, and the JSON objects in them.

Owns: which files a path or a glob names, decompression, what a file is that is no text, what is wrong with a line that
is no JSON. Does not own: what an object means (``records.py``), JSON arrays (``data_tools/rows.py``).

Invariants: a file is read in constant memory; every line becomes an object, an error naming ``file:line``, or an entry
of ``rejected``; an error of the whole file is never skipped.
"""

from __future__ import annotations

import ast
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import IO, Any, Literal, NoReturn

from steerlm_megatron.errors import UserError

OnError = Literal["error", "skip"]
Rejected = list[tuple[str, str]]  # ("file:line", reason)

_LINE_ERROR = re.compile(r"(.*?:\d+): (.*)", re.DOTALL)
_READ_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"

_TABLE = "take data.source=hf, which reads it by name"
_UNPACK = "unpack it first"
_ENCODING = "save it as UTF-8"
_PICKLE = "write its rows as JSON lines (opening a pickle runs what it holds)"
# What a file is whose content begins so, and what to do with it.
_FOREIGN = (
    (b"PAR1", "a Parquet file", _TABLE),
    (b"ARROW1", "an Arrow file", _TABLE),
    (b"\xff\xff\xff\xff", "an Arrow stream", _TABLE),
    (b"\x1f\x8b", "compressed with gzip", "name it so that it ends with .gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "name it so that it ends with .zst"),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", "fetch it again"),
    (b"BZh", "compressed with bzip2", _UNPACK),
    (b"\xfd7zXZ\x00", "compressed with xz", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"\x89HDF", "an HDF5 file", "write its rows as JSON lines"),
    (b"\x93NUMPY", "a numpy file", "write its rows as JSON lines"),
    (b"SQLite format 3", "an SQLite database", "write its rows as JSON lines"),
    (b"ORC", "an ORC file", "write its rows as JSON lines"),
    (b"Obj\x01", "an Avro file", "write its rows as JSON lines"),
    *((bytes([0x80, version]), "a Python pickle", _PICKLE) for version in range(2, 6)),
    (b"\xff\xfe\x00\x00", "text in UTF-32", _ENCODING),
    (b"\xff\xfe", "text in UTF-16", _ENCODING),
    (b"\xfe\xff", "text in UTF-16", _ENCODING),
    (b"{\x00", "text in UTF-16", _ENCODING),
    (b"[\x00", "text in UTF-16", _ENCODING),
    (b"\x00{", "text in UTF-16", _ENCODING),
    (b"\x00[", "text in UTF-16", _ENCODING),
)


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
        yield _decode(line, where).rstrip("\r\n")


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


def parse_lines(
    lines: Iterator[tuple[str, bytes]], on_error: OnError = "error", rejected: Rejected | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``("file:line", object)`` for every line that is not blank; ``lines`` and errors as of ``raw_lines``."""
    where = ""
    while True:
        try:
            where, line = next(lines, ("", b""))
            if not where:
                break
            if line.isspace():
                continue
            value = _parse(line, where)
        except UserError as error:
            reject(error, on_error, rejected)
            continue
        yield where, value


def reject(error: UserError, on_error: OnError, rejected: Rejected | None) -> None:
    """Raise ``error`` (``file:line: reason``) or, if ``on_error`` is ``skip``, note it in ``rejected``."""
    match = _LINE_ERROR.fullmatch(str(error))
    if on_error != "skip" or match is None:  # an error of the whole file is never skipped
        raise error
    if rejected is not None:
        rejected.append((match[1], match[2].encode("utf-8", "backslashreplace").decode()))


def rejected_json(where: str, reason: str, line: bytes | None) -> str:
    """A line of ``rejected.jsonl``; ``line``: what was rejected, None where it cannot be told (what is no UTF-8: �)."""
    entry = {"where": where, "reason": reason}
    if line is not None:
        entry["line"] = line.decode("utf-8", "replace").rstrip("\r\n")
    return json_line(entry).decode()


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
            _refuse_foreign(path, stream.peek(16))
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


def _refuse_foreign(path: str, start: bytes) -> None:
    """Raise ``UserError`` for a file whose content is not text in UTF-8, by what it begins with."""
    for mark, what, remedy in _FOREIGN:
        if start.startswith(mark):
            inside = "holds " if path.endswith((".gz", ".zst")) else "is "
            raise UserError(f"{path} {inside}{what}, not JSON lines; {remedy}")


def _pieces(stream: IO[bytes], most_bytes: int) -> Iterator[tuple[int, bytes]]:
    """``(line number, piece)``."""
    number = 1
    while piece := stream.readline(most_bytes):
        yield number, piece
        number += piece.endswith(b"\n")


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; leave an unknown value out")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    """One line as a JSON object; raises UserError."""
    return parse_object(_decode(line, where), where, whole=line.endswith(b"\n"))


def parse_object(text: str, where: str, whole: bool = True) -> dict[str, Any]:
    """A JSON object. ``whole``: nothing of ``text`` can be missing at its end.

    Raises:
        UserError: naming ``where`` for malformed JSON, NaN, or another type.
    """
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        reason = _why_malformed(text, error)
        if not whole and not reason:
            raise UserError(
                f"{where}: torn last line, the file was cut off while it was written ({error}); delete the line"
            ) from error
        raise UserError(f"{where}: malformed JSON: {reason or error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}; write one record per line")
    return value


_BRACKETS = re.compile(r"[\[{\s]*\n")
_SPARE_COMMA = re.compile(r",\s*([}\]])")
_MOST_TRIED = 1 << 20  # characters of a line that is looked at again


def _why_malformed(text: str, error: Exception) -> str:
    """What is wrong with a text that is no JSON, where something usual is; else empty."""
    said = getattr(error, "msg", "")
    stripped = text.strip()[:_MOST_TRIED]
    if said.startswith("Invalid control character"):
        return f"a tab or another control character stands in a string ({error}); write it as an escape such as \\t"
    if _BRACKETS.fullmatch(text):
        return f"{stripped[:40]!r} only begins a value of several lines; write one object per line"
    if stripped.endswith(",") and _is_json(stripped[:-1]):
        return "a comma stands after the object; take it out"
    without = _SPARE_COMMA.sub(r"\1", stripped)
    if without != stripped and _is_json(without):
        return "a comma stands before a closing bracket; take it out"
    if stripped.startswith("{") and _is_python(stripped):
        return "it is a Python dict (single quotes, or None, True, False); write it with json.dumps"
    if said.startswith("Extra data"):
        return f"more than one value stands in the line ({error}); write one object per line"
    return ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_python(text: str) -> bool:
    """Whether it is a literal of Python (which is parsed, never run)."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def json_line(data: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8. Half a surrogate pair (in an id or an unknown key) stays the escape that it was."""
    return (_encode(data) + "\n").encode("utf-8", "backslashreplace")
