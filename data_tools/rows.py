"""Read files as rows (JSON objects with their ``file:line``): JSON Lines, or one JSON array as FastChat publishes.

Owns: distinguishing the two, streaming an array element by element. Does not own: the meaning of a row (``sources/``).
Invariant: every element is yielded, rejected with its line, or ends the run; memory holds one element (in an array of
one line too), or one line.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.lines import OnError, Rejected, parse_object, reject
from steerlm_megatron.steer.records import expand_paths, raw_lines, read_json_lines

Row = dict[str, Any]

_OUTSIDE, _INSIDE = (
    re.compile(r'["\[\]{}]'),
    re.compile(r'["\\]'),
)  # characters that matter outside of strings, and inside
_BETWEEN = re.compile(r"[\s,]*")
PIECE_BYTES = 1 << 20  # a line is read in parts of this size, since many arrays are one line


def read_files(inputs: Sequence[str], on_error: OnError, rejected: Rejected | None) -> Iterator[tuple[str, Row]]:
    """Yield ``("file:line", row)`` of every file, in order; ``.gz`` and ``.zst`` are decompressed.

    Raises:
        UserError: as ``read_json_lines``; for an array also a torn end, and anything but commas between the elements.
    """
    for path in expand_paths(inputs):
        yield from read_file(path, on_error, rejected)


def read_file(path: str, on_error: OnError, rejected: Rejected | None) -> Iterator[tuple[str, Row]]:
    """Do ``read_files`` for one file."""
    read = _read_array if is_array(path) else read_json_lines
    yield from read(path, on_error, rejected)


def is_array(path: str) -> bool:
    """Return whether the file's first character is ``[``. For a file that cannot be read it is False, and
    ``read_json_lines`` reports the error.
    """
    try:
        return next((piece.lstrip()[:1] == b"[" for _, piece in raw_lines(path, 4096) if piece.strip()), False)
    except UserError:
        return False


def _read_array(path: str, on_error: OnError, rejected: Rejected | None) -> Iterator[tuple[str, Row]]:
    depth, first, where = 0, "", path
    elements, before = 0, ""  # number and line of the last element
    in_string = escaped = False
    parts: list[str] = []  # parts of the open element
    for where, text in _text_pieces(path):
        at = begin = end = 0  # next position to search, begin of the open element, end of the last bracket
        while True:
            if escaped and at < len(text):
                at, escaped = at + 1, False
            match = (_INSIDE if in_string else _OUTSIDE).search(text, at)
            if match is None:
                break
            token, at = match[0], match.end()
            if token == "\\":
                escaped = True
                continue
            if depth == 1 and not in_string:
                _check_between(text[end : match.start()], text[match.start() : match.start() + 40], where)
            if token == '"':
                in_string = not in_string
                continue
            end = at
            if token in "[{":
                depth += 1
                if depth == 2:
                    begin, parts, elements = match.start(), [], elements + 1
                    # If a line holds several elements, the line number alone would not identify one.
                    first, before = where if where != before else f"{where}: element {elements}", where
            else:
                depth -= 1
                if depth == 1:
                    parts.append(text[begin:at])
                    try:
                        row = parse_object("".join(parts), first)
                    except UserError as error:
                        reject(error, on_error, rejected)
                        continue
                    yield first, row
        if depth >= 2:
            parts.append(text[begin:])
        elif depth == 1:
            _check_between(text[end:], "", where)
        elif text[end:].strip():
            raise UserError(f"{where}: {text[end:].strip()[:40]!r} stands after the end of the JSON array")
    if depth:
        torn = UserError(f"{where}: torn end, the JSON array was cut off while it was written; mend the file")
        reject(torn, on_error, rejected)


def _text_pieces(path: str) -> Iterator[tuple[str, str]]:
    """Yield ``("file:line", text)``: parts of the file, none of which exceeds a line or ``PIECE_BYTES``."""
    decoder, before, offset = codecs.getincrementaldecoder("utf-8")(), "", 0
    for where, piece in raw_lines(path, PIECE_BYTES):
        offset = offset if where == before else 0  # offset of the part in its line
        before, held = where, len(decoder.getstate()[0])
        try:
            yield where, decoder.decode(piece)
        except UnicodeDecodeError as error:
            at = offset - held + error.start
            raise UserError(f"{where}: invalid UTF-8 at byte {at}; save the file as UTF-8") from error
        offset += len(piece)


def _check_between(text: str, after: str, where: str) -> None:
    """Refuse anything but commas and white space between elements. ``after`` is the text that follows."""
    if not _BETWEEN.fullmatch(text) or after.startswith('"'):
        raise UserError(
            f"{where}: {(text + after).strip()[:40]!r} stands in the JSON array; its elements must be objects"
        )
