"""Read Hugging Face ``datasets``, by hub name or local path, as rows for another source's converter.

``datasets`` is imported only for this source. A local folder is one that ``save_to_disk`` wrote, or that
``load_dataset`` opens. A local file is read by its content (Parquet, Arrow, JSON, CSV) and never looked up on the hub,
nor is a name that can only be a file's. ``split`` names a single split, which is divided into train and valid like any
other source; without it ``train`` is train, the first of ``validation valid val dev test`` is valid, and others are
left out (a note).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.rows import Row
from data_tools.sources.base import Context
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.lines import OnError, Rejected
from steerlm_megatron.steer.records import expand_paths

_READERS = {
    ".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv",
    ".tsv": "csv",
}  # fmt: skip
_MARKS = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_VALID = ("validation", "valid", "val", "dev", "test")


def read(
    inputs: Sequence[str], context: Context, on_error: OnError, rejected: Rejected | None
) -> Iterator[tuple[str, Row, str | None]]:
    """Yield ``("name:split:row", row, its split)``, streamed from the data set's own memory map.

    Raises:
        UserError: ``datasets`` is not installed, the hub cannot be reached, there is no such data set or split.
    """
    for name in _names(inputs):
        loaded = _load(name, context)
        if not isinstance(loaded, dict):
            splits: list[tuple[str, Any, str | None]] = [(context.split or "all", loaded, None)]
        else:
            splits = _choose(name, loaded, context)
        for split, rows, own in splits:
            for number, row in enumerate(rows, 1):
                yield f"{name}:{split}:{number}", dict(row), own


def _names(inputs: Sequence[str]) -> list[str]:
    """Return the inputs, with the files that a glob names in its place."""
    names: list[str] = []
    for name in inputs:
        names += expand_paths(name) if any(sign in name for sign in "*?[") else [name]
    return names


def _reader(name: str) -> str | None:
    """Return the reader of ``datasets`` that a local file needs; None for a folder, or a name on the hub.

    Raises:
        UserError: a missing file, or one of another kind.
    """
    path = Path(name)
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst", ".bz2", ".xz", ".zip")]
    reader = _READERS.get(suffixes[-1].lower()) if suffixes else None
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(8)
        reader = next((kind for mark, kind in _MARKS.items() if start.startswith(mark)), reader)
        if reader is None:
            raise UserError(f"{name}: a file of a kind that data.source=hf does not read; legal: {' '.join(_READERS)}")
        return reader
    if not path.exists() and (reader is not None or path.is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"{name}: no such file; check the path (relative paths start at {Path.cwd()})")
    return None


def _choose(name: str, loaded: dict[str, Any], context: Context) -> list[tuple[str, Any, str | None]]:
    """Return (name, rows, our split) of the splits to read."""
    if "train" not in loaded:
        raise UserError(f"{name}: has no split 'train'; name one with data.hf_split: {' '.join(loaded)}")
    valid = next((split for split in _VALID if split in loaded), None)
    for split in loaded:
        if split not in ("train", valid):
            context.notes[f"split_not_read:{name}:{split}"] = len(loaded[split])
    chosen = [("train", loaded["train"], "train" if valid else None)]
    return chosen + ([(valid, loaded[valid], "valid")] if valid else [])


def _load(name: str, context: Context) -> Any:
    reader = _reader(name)
    if reader is not None and context.subset is not None:
        raise UserError(f"data.hf_subset={context.subset} is set, but {name} is one file; leave it out")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data.source=hf needs the package datasets; pip install datasets, or give JSONL files"
        ) from error
    path = Path(name)
    try:
        if path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(path))
            if context.split is not None:
                if not isinstance(loaded, dict) or context.split not in loaded:
                    has = " ".join(loaded) if isinstance(loaded, dict) else "one only"
                    raise UserError(f"{name}: data.hf_split={context.split!r} is not there; its splits: {has}")
                loaded = loaded[context.split]
            return loaded
        if reader is not None:
            more = {"delimiter": "\t"} if ".tsv" in path.suffixes else {}
            files = {context.split or "train": name}
            return datasets.load_dataset(reader, data_files=files, split=context.split, **more)
        return datasets.load_dataset(name, context.subset, split=context.split)
    except UserError:
        raise
    except Exception as error:  # errors of the hub, of HTTP clients and of Arrow have no common base class
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"{name}: the data set cannot be loaded ({reason[:200]}); check the name, data.hf_subset, data.hf_split; "
            "without network give a local folder, or fill the cache first (HF_HOME)"
        ) from error
