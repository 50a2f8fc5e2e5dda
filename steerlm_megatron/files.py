"""Atomic writing of files, replacing a folder, strict JSON, and checksums. It imports no library but Python's.

Owns: the one way in which this package replaces a file, strict JSON, size and SHA-256 of a file. Does not own: what a
folder is called while it is written (shards, checkpoints), files that are appended to (``metrics.jsonl``, logs,
journals). Invariant: under its name there is the old file or the complete new one, also after a power cut.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerlm_megatron.errors import UserError

_BLOCK_BYTES = 1 << 20


@contextmanager
def atomic_path(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, and rename the file written there to ``path`` on success.

    On an exception the temporary file is removed and ``path`` stays as it was. Missing parent folders are made. Without
    ``sync`` a power cut may leave a torn file; use it for files that carry a checksum and can be made again.
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
    """Rename a finished file. Both its bytes and the rename are on the disk when this returns."""
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(Path(path).parent)


def put_folder(new: Path, target: Path, aside: Path) -> None:
    """Rename a finished folder to ``target``.

    A folder that stands there is at ``aside`` meanwhile, and then removed. It is put back if ``new`` cannot be renamed,
    or by :func:`take_back` after a kill between the two renames.
    """
    if not target.exists():
        new.rename(target)
        return
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def take_back(target: Path, aside: Path) -> None:
    """Put back the folder that a killed :func:`put_folder` left at ``aside``."""
    if aside.is_dir() and not target.exists():
        aside.rename(target)


def sync_path(path: str | os.PathLike[str]) -> None:
    """Flush a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` so that ``path`` is the old file or the complete new one, never a part of it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` is the old file or the complete new one, never a part of it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as strict JSON (NaN and infinities become null), indented, by temporary file, fsync and rename."""
    text = json.dumps(to_strict_json(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomic(
        path, text.encode("utf-8", "backslashreplace").decode()
    )  # a lone surrogate is written as its escape


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the object in a file of JSON; an empty one if there is no such file, or if it holds something else.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def to_strict_json(obj: Any) -> Any:
    """Return ``obj`` made of JSON's types alone: dict, list, str, int, float, bool, None. Non-finite floats become
    None.

    Mappings, sequences, sets (sorted), paths, and scalars with ``item()`` (numpy, torch) are converted; anything else
    is a TypeError.
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
    """Return ``{"bytes", "sha256"}`` of a file, read once; ``look`` is called with every block that is read."""
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
