"""Files that are whole or absent, and what a file's bytes are known by. Standard library only.

Owns: the one way in which this package puts a file in its place, strict JSON, size and SHA-256 of a file. Does not own:
folders that are renamed as a whole (shards, checkpoints), files that are appended to (``metrics.jsonl``, logs,
journals).
Invariant: under its own name a file is the old one or the whole new one, also after a power cut.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 20


@contextmanager
def atomic_path(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; what was written there is put in the place of ``path`` on success.

    On an exception the temporary file is removed and ``path`` stays as it was. Missing parent folders are made. Without
    ``sync`` a power cut may tear the file: for what can tell that it is torn, and can be made again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            move_into_place(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move_into_place(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Rename a finished file; both its bytes and the rename are on the disk when this returns."""
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(Path(path).parent)


def sync_path(path: str | os.PathLike[str]) -> None:
    """See to it that a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes ``data`` so that ``path`` is the old file or the whole new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` (UTF-8) so that ``path`` is the old file or the whole new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes ``obj`` as strict JSON (NaN and infinities become null), indented, by temporary file, fsync and rename."""
    text = json.dumps(to_strict_json(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomic(path, text.encode("utf-8", "backslashreplace").decode())  # half a surrogate pair: its escape


def to_strict_json(obj: Any) -> Any:
    """Return ``obj`` with only what JSON has: dict, list, str, int, float, bool, None. Non-finite floats become None.

    Mappings, sequences, sets (sorted), paths, and scalars with ``item()`` (numpy, torch) are turned; anything else is a
    TypeError.
    """
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {str(key): to_strict_json(value) for key, value in obj.items()}
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, set | frozenset):
        return [to_strict_json(value) for value in sorted(obj)]
    if hasattr(obj, "tolist"):  # numpy and torch, arrays and scalars
        return to_strict_json(obj.tolist())
    if isinstance(obj, Sequence):
        return [to_strict_json(value) for value in obj]
    raise TypeError(f"{type(obj).__name__} cannot be written as JSON: {obj!r}")


def describe_file(path: str | os.PathLike[str], look: Callable[[bytes], object] | None = None) -> dict[str, Any]:
    """Return ``{"bytes", "sha256"}`` of a file, read once; ``look`` is shown every block on the way."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            if look is not None:
                look(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return SHA-256 of a file's bytes, hex."""
    sha256: str = describe_file(path)["sha256"]
    return sha256
