"""Files → rows (JSON objects with their ``file:line``): JSON Lines, or one JSON array as FastChat and ShareGPT publish.

Owns: telling the two apart, streaming an array element by element. Does not own: what a row means (``sources/``).
Invariant: every element is yielded, rejected with its line, or ends the run; memory holds one element (and one line).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.records import OnError, Rejected, expand_paths, open_text, read_json_lines, reject

Row = dict[str, Any]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')  # strings as a whole, so that brackets inside them do not count
_BETWEEN = re.compile(r"[\s,]*")


def read_files(inputs: Sequence[str], on_error: OnError, rejected: Rejected | None) -> Iterator[tuple[str, Row]]:
    """``("file:line", row)`` of every file, in order; ``.gz`` and ``.zst`` are decompressed.

    Raises:
        UserError: as ``read_json_lines``; in an array also a torn end and what stands between the elements.
    """
    for path in expand_paths(inputs):
        yield from read_file(path, on_error, rejected)


def read_file(path: str, on_error: OnError, rejected: Rejected | None) -> Iterator[tuple[str, Row]]:
    """As ``read_files``, of one."""
    read = _read_array if is_array(path) else read_json_lines
    yield from read(path, on_error, rejected)


def is_array(path: str) -> bool:
    """Whether the file's first character is ``[``. A file that cannot be read so far is left to ``read_json_lines``."""
    try:
        return next((line.lstrip()[0] == "[" for line in open_text(path) if line.strip()), False)
    except UserError:
        return False


def _read_array(path: str, on_error: OnError, rejected: Rejected | None) -> Iterator[tuple[str, Row]]:
    depth, first_line, number = 0, 0, 0
    parts: list[str] = []  # of the open element
    for number, line in enumerate(open_text(path), 1):
        begin = end = 0
        for match in _TOKEN.finditer(line):
            token = match[0]
            if depth == 1:
                _check_between(line[end : match.start()], token, f"{path}:{number}")
            end = match.end()
            if token in "[{":
                depth += 1
                if depth == 2:
                    begin, first_line, parts = match.start(), number, []
            elif token in "]}":
                depth -= 1
                if depth == 1:
                    parts.append(line[begin:end])
                    where = f"{path}:{first_line}"
                    try:
                        row = parse_row("\n".join(parts), where)
                    except UserError as error:
                        reject(error, on_error, rejected)
                        continue
                    yield where, row
        if depth >= 2:
            parts.append(line[begin:])
        elif depth == 1:
            _check_between(line[end:], "", f"{path}:{number}")
        elif line[end:].strip():
            raise UserError(f"{path}:{number}: {line[end:].strip()[:40]!r} stands after the end of the JSON array")
    if depth:
        torn = UserError(f"{path}:{number}: torn end, the JSON array was cut off while it was written; mend the file")
        reject(torn, on_error, rejected)


def _check_between(text: str, token: str, where: str) -> None:
    if not _BETWEEN.fullmatch(text) or token.startswith('"'):
        raise UserError(
            f"{where}: {(text + token).strip()[:40]!r} stands in the JSON array; its elements must be objects"
        )


def parse_row(text: str, where: str) -> Row:
    """One JSON object. Raises ``UserError`` for malformed JSON, NaN, or another type."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; leave an unknown value out")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
