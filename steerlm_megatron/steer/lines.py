"""Parse lines of bytes as JSON objects, and explain lines that are malformed.

Owns: recognising files that are not text, explaining lines that are not JSON, the list ``rejected``. Does not own:
opening and decompressing files, the meaning of an object (``records.py``), JSON arrays (``data_tools/rows.py``).

Invariants: every line becomes an object, an error naming ``file:line``, or an entry of ``rejected``; an error that
concerns a whole file is never skipped.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn

from steerlm_megatron.errors import UserError

OnError = Literal["error", "skip"]
Rejected = list[tuple[str, str]]  # ("file:line", reason)

_LINE_ERROR = re.compile(r"(.*?:\d+): (.*)", re.DOTALL)

_TABLE = "take data.source=hf, which reads it by name"
_UNPACK = "unpack it first"
_ENCODING = "save it as UTF-8"
_PICKLE = "write its rows as JSON lines (opening a pickle runs what it holds)"
# Beginnings of files that are not text, with the name of the format and the remedy.
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


def parse_lines(
    lines: Iterator[tuple[str, bytes]], on_error: OnError = "error", rejected: Rejected | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("file:line", object)`` for every line that is not blank; ``lines`` are those of ``raw_lines``, whose
    errors pass through.
    """
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
    """Raise ``error`` (``file:line: reason``) or, if ``on_error`` is ``skip``, append it to ``rejected``."""
    match = _LINE_ERROR.fullmatch(str(error))
    if on_error != "skip" or match is None:  # an error that concerns the whole file is never skipped
        raise error
    if rejected is not None:
        rejected.append((match[1], match[2].encode("utf-8", "backslashreplace").decode()))


def rejected_json(where: str, reason: str, line: bytes | None) -> str:
    """Return a line of ``rejected.jsonl``; ``line`` is the rejected line, or None if it is unknown. Invalid UTF-8
    becomes �.
    """
    entry = {"where": where, "reason": reason}
    if line is not None:
        entry["line"] = line.decode("utf-8", "replace").rstrip("\r\n")
    return json_line(entry).decode()


def refuse_foreign(path: str, start: bytes) -> None:
    """Raise ``UserError`` for a file whose content is not text in UTF-8, by what it begins with."""
    for mark, what, remedy in _FOREIGN:
        if start.startswith(mark):
            inside = "holds " if path.endswith((".gz", ".zst")) else "is "
            raise UserError(f"{path} {inside}{what}, not JSON lines; {remedy}")


def decode_line(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; leave an unknown value out")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    """Return one line as a JSON object; raises UserError."""
    return parse_object(decode_line(line, where), where, complete=line.endswith(b"\n"))


def parse_object(text: str, where: str, complete: bool = True) -> dict[str, Any]:
    """Return ``text`` parsed as a JSON object. ``complete`` says that nothing can be missing at the end of ``text``.

    Raises:
        UserError: naming ``where`` for malformed JSON, NaN, or another type.
    """
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        reason = _why_malformed(text, error)
        if not complete and not reason:
            raise UserError(
                f"{where}: torn last line, the file was cut off while it was written ({error}); delete the line"
            ) from error
        raise UserError(f"{where}: malformed JSON: {reason or error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}; write one record per line")
    return value


_BRACKETS = re.compile(r"[\[{\s]*\n")
_SPARE_COMMA = re.compile(r",\s*([}\]])")
_MOST_TRIED = 1 << 16  # longer lines are not analysed


def _why_malformed(text: str, error: Exception) -> str:
    """Return the usual mistake that makes a text no JSON, in words; empty if none is recognised."""
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
    """Return whether ``text`` is a Python literal. It is parsed and never executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's warnings about unknown escapes do not help the user
            ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def json_line(data: Mapping[str, Any]) -> bytes:
    """Return one line of JSON in UTF-8. A lone surrogate (in an id or an unknown key) stays an escape."""
    return (_encode(data) + "\n").encode("utf-8", "backslashreplace")
