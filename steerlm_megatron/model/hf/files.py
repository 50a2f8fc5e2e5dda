"""What a folder's safetensors files say they hold, before any tensor is read.

Owns: headers, the index, and that they agree with each other and with the files' sizes. Does not own: which tensors a
model has. Invariant: a file that is cut short, or an index that lies, is a ``Damaged`` that names it.

A safetensors file is 8 bytes of length, a JSON header of that length with each tensor's dtype, shape and range of
bytes, and then the bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_HEADER_BYTES = 100_000_000  # of the library itself
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Damaged(Exception):
    """What is wrong with a folder's files, in words."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: which file, dtype as safetensors writes it, shape, its name there."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    name: str


def header_of(path: Path) -> dict[str, Stored]:
    """The tensors that a file says it holds."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise Damaged(f"{path.name} is cut short or no safetensors file: {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise Damaged(f"{path.name} is no safetensors file: its header is not JSON") from None
    out: dict[str, Stored] = {}
    ranges = []
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            if (item := _ITEM_BYTES.get(entry["dtype"])) and stop - start != item * math.prod(shape):
                raise Damaged(f"{path.name}: the header's bytes of {name} are not those of its shape {list(shape)}")
            ranges.append((start, stop))
            out[name] = Stored(path, entry["dtype"], shape, name)
        at = 0
        for start, stop in sorted(ranges):
            if start != at or stop < start:
                raise Damaged(f"{path.name}: the header's ranges of bytes do not follow each other")
            at = stop
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Damaged(f"{path.name} has a header that is not one of a safetensors file") from None
    end = 8 + length + at
    if size != end:
        raise Damaged(f"{path.name} is {'cut short' if size < end else 'too long'}: {size} bytes of {end}")
    return out


def tensors_of(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder, taken from one file or from those of an index, as ``transformers`` chooses."""
    if (folder / SINGLE).is_file():
        return header_of(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise Damaged(_no_weights(folder))
    try:
        places: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise Damaged(f"{INDEX} names a file that is not in the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{INDEX} is not an index of safetensors files") from None
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise Damaged(f"{INDEX} names files that are not there: {' '.join(absent)}")
    out: dict[str, Stored] = {}
    lies = []
    for file in files:
        for name, stored in header_of(folder / file).items():
            if places.get(name) != file:
                lies.append(f"{name} is in {file}, and not {places.get(name, 'in the index')}")
            out[name] = stored
    lies += [f"{name} is not in {places[name]}" for name in places if name not in out]
    if lies:
        raise Damaged(f"{INDEX} does not say what the files hold: {'; '.join(lies)}")
    return out


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        return f"there is neither {SINGLE} nor {INDEX}"
    return (
        f"its weights are pickles ({' '.join(pickles[:3])}), which may run code when they are read; make safetensors "
        'of them where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('NEW_FOLDER')\""
    )
