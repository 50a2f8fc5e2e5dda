"""Write the files of a conversion: ``train.jsonl.zst``, ``valid.jsonl.zst`` and ``rejected.jsonl``; report progress.

Owns: these files. Does not own: their content (``convert.py``). Invariant: each of them is complete, or still the old
one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from data_tools.rows import is_array
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import atomic_path
from steerlm_megatron.steer.lines import Rejected, json_line, rejected_json
from steerlm_megatron.steer.records import Conversation, from_json, raw_lines, to_json, write_records

REJECTED_FILE = "rejected.jsonl"
_PROGRESS_EVERY = 200

Progress = Callable[[int], None]


def counted(
    stream: Iterable[tuple[str, Conversation]], progress: Progress | None, count: Callable[[], int]
) -> Iterator[tuple[str, Conversation]]:
    """Yield the items of ``stream``, calling ``progress`` from time to time and at the end."""
    for number, item in enumerate(stream):
        if progress is not None and number % _PROGRESS_EVERY == 0:
            progress(count())
        yield item
    if progress is not None:
        progress(count())


class NothingLeftError(Exception):
    """No conversation is left for training."""


def write_splits(output_dir: str, stream: Iterable[tuple[str, Conversation]]) -> dict[str, Any]:
    """Write both files. The validation set, the smaller part, is buffered in an unnamed temporary file."""
    train_file, valid_file = Path(output_dir, "train.jsonl.zst"), Path(output_dir, "valid.jsonl.zst")
    valid_count = 0
    with tempfile.TemporaryFile(dir=output_dir) as waiting:

        def training() -> Iterator[Conversation]:
            nonlocal valid_count
            found = False
            for split, conversation in stream:
                if split == "train":
                    found = True
                    yield conversation
                else:
                    waiting.write(json_line(to_json(conversation)))
                    valid_count += 1
            if not found:  # checked before write_records would replace the file by an empty one
                raise NothingLeftError

        train_count = write_records(train_file, training())
        waiting.seek(0)
        if valid_count:
            write_records(valid_file, (from_json(json.loads(line), str(valid_file)) for line in waiting))
    if not valid_count:
        valid_file.unlink(missing_ok=True)
    return {
        "train": {"file": str(train_file), "conversations": train_count},
        "valid": {"file": str(valid_file) if valid_count else None, "conversations": valid_count},
    }


def keep_rejected(output_dir: str, rejected: Rejected) -> None:
    """Write ``rejected.jsonl``: position, reason, and the line itself, for which the files are read again.

    Entries are in the order of their lines; an entry before the last one's line starts its file again.
    """
    target = Path(output_dir, REJECTED_FILE)
    if not rejected:
        target.unlink(missing_ok=True)
        return
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for path, entries in groupby(rejected, key=lambda entry: entry[0].rpartition(":")[0]):
            lines, last = _lines(path), 0
            for where, reason in entries:
                number = where.rpartition(":")[2]
                if number.isdigit():
                    if int(number) <= last:
                        lines = _lines(path)
                    last = int(number)
                file.write(rejected_json(where, reason, next((line for here, line in lines if here == where), None)))


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield the lines of a file, up to its end or to damage; nothing for an array or a data set of the hub."""
    if os.path.isfile(path) and not is_array(path):
        with suppress(UserError):
            yield from raw_lines(path)
