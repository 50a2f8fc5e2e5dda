"""Checkpoints on disk: one folder per saved step, whole or absent.

Owns: the layout of ``checkpoints/``, commit by rename, retention, finding the checkpoint a user means, and the
metadata that
makes a checkpoint usable alone (model, tokenizer, schema, template, loader position). Does not own: what an engine
puts inside.

    checkpoints/step_00000100/   Megatron-Core's sharded tensors, common.pt, metadata.json
                 meta.json       CheckpointMeta, with size and SHA-256 of every file
                 tokenizer/      the tokenizer that the model was trained with
    checkpoints/best.json        {"folder": "step_00000100", "metric": 1.23}
Invariant: ``step_*`` without ``.tmp`` is complete; a killed save leaves only a ``.tmp`` that the next save removes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import write_json_atomic
from steerlm_megatron.runtime.collectives import barrier, broadcast_object, gather_objects
from steerlm_megatron.runtime.parallel import layout

_FORMAT = 2


@dataclass
class CheckpointMeta:
    """What a checkpoint says about itself.

    ``head``: ``lm`` or ``regression``. ``schema``: the attribute schema's dict, None for a model without attributes.
    ``conditioned``: whether responses were trained with label lines. ``loader``: where the data stood. ``metric``:
    validation loss.
    ``label_mean``: regression only, the training labels' mean per attribute (the constant predictor), None where
    there were none.
    """

    step: int
    head: str
    model: dict[str, Any]
    vocab_size: int
    schema: dict[str, Any] | None
    template: dict[str, Any]
    conditioned: bool
    tokenizer_hash: str
    loader: dict[str, int] = field(default_factory=dict)
    metric: float | None = None
    label_mean: list[float | None] = field(default_factory=list)
    parallel: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → {"bytes", "sha256"}
    format: int = _FORMAT

    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.model)


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state dict into an existing empty folder. Collective over the world."""
    dist_checkpointing.save(state, str(folder))


def common_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, the same on every rank."""
    return dist_checkpointing.load_common_state_dict(str(folder))


def load_sharded(state: dict[str, Any], folder: Path, missing_ok: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read what ``state`` asks for. Keys that start with one of ``missing_ok`` may be absent. Collective over the
    world.
    """
    if not missing_ok:
        return dist_checkpointing.load(state, str(folder))
    loaded, _, absent = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_UNEXPECTED)
    wrong = sorted(key for key in absent if not key.startswith(missing_ok))
    if wrong:
        raise UserError(f"{folder}: the checkpoint lacks {', '.join(wrong[:5])}: it holds another kind of model")
    return loaded


def read_meta(folder: Path) -> CheckpointMeta:
    """The metadata of a checkpoint folder, after checking that its files have the sizes they were saved with
    (:func:`verify` compares their contents).
    """
    path = folder / "meta.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no meta.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); the checkpoint is damaged") from None
    if raw.get("format") != _FORMAT:
        raise UserError(f"{path}: checkpoint format {raw.get('format')}, this version reads {_FORMAT}")
    known = {f.name for f in dataclasses.fields(CheckpointMeta)}
    meta = CheckpointMeta(**{k: v for k, v in raw.items() if k in known})
    for name, saved in meta.files.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != saved["bytes"]:
            raise UserError(
                f"{folder / name}: {'missing' if found is None else f'{found} bytes'}, saved with "
                f"{saved['bytes']}: torn checkpoint"
            )
    return meta


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its SHA-256; each rank reads a share. Collective over the world.

    ``UserError``, the same on every rank, names what is damaged.
    """
    if problem := _damage(folder):
        raise UserError(problem)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Collective over the world."""
    at = layout()
    try:
        files = read_meta(folder).files
        found = _hashes(folder, sorted(files)[at.rank :: at.world_size], sync=False)
        wrong = [str(folder / name) for name, digest in found.items() if digest != files[name]["sha256"]]
        problem = f"{wrong[0]}: its content is not what was saved (SHA-256 differs)" if wrong else None
    except (UserError, OSError) as error:
        problem = str(error)
    return next((found for found in gather_objects(problem) if found is not None), None)


def _hashes(folder: Path, names: Sequence[str], sync: bool) -> dict[str, str]:
    """SHA-256 of files under ``folder``; ``sync`` sees to it that they are on the disk."""
    out = {}
    for name in names:
        with open(folder / name, "rb") as file:
            if sync:
                os.fsync(file.fileno())
            out[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def complete_steps(root: Path) -> list[Path]:
    """Committed checkpoint folders under ``root`` in step order."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.glob("step_*") if p.suffix != ".tmp" and (p / "meta.json").exists())


def resolve(path: str, key: str) -> Path:
    """The checkpoint folder that ``path`` means: itself, or a run folder's best, else its latest. Errors name
    ``key``.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"{key}={path}: no such file or folder")
    if (root / "meta.json").exists():
        return root
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    best = folder / "best.json"
    if best.exists():
        chosen = folder / json.loads(best.read_text(encoding="utf-8"))["folder"]
        if (chosen / "meta.json").exists():
            return chosen
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"{key}={path}: neither a checkpoint nor a run folder with checkpoints/step_* in it")
    return steps[-1]


class CheckpointStore:
    """``checkpoints/`` of one run. Methods are collective over the world; rank 0 alone touches names."""

    def __init__(self, root: Path, keep_last: int, keep_best: bool) -> None:
        self.root = root
        self.keep_last = max(1, keep_last)
        self.keep_best = keep_best
        self.is_main = layout().is_main

    def latest(self) -> Path | None:
        """The newest intact checkpoint, None if there is none at all. A damaged one is named and passed over (its
        successor overwrites it). ``UserError`` if there are checkpoints and none is intact.
        """
        folders = broadcast_object(complete_steps(self.root)[::-1] if self.is_main else [])
        problem = None
        for folder in folders:
            problem = _damage(folder)
            if problem is None:
                return folder
            get_logger(__name__).warning("%s; looking for an earlier checkpoint", problem)
        if problem is not None:
            raise UserError(f"{problem}, and no other checkpoint in {self.root} is intact; remove it to start anew")
        return None

    def best_metric(self) -> float:
        """The metric of the checkpoint marked best, else infinity."""
        value = float("inf")
        if self.is_main and (self.root / "best.json").exists():
            value = float(json.loads((self.root / "best.json").read_text(encoding="utf-8"))["metric"])
        return broadcast_object(value)

    def save(
        self,
        meta: CheckpointMeta,
        write: Callable[[Path], None],
        save_tokenizer: Callable[[Path], None],
        best: bool = False,
    ) -> Path:
        """Write ``step_<meta.step>``: ``write`` puts the engine's part into the folder on every rank; then commit and
        retain.
        """
        final = self.root / f"step_{meta.step:08d}"
        temporary = final.with_suffix(".tmp")
        if self.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
            for stale in self.root.glob("step_*.tmp"):
                shutil.rmtree(stale)
            temporary.mkdir()
        barrier()
        write(temporary)
        barrier()
        if self.is_main:
            save_tokenizer(temporary / "tokenizer")
        files = broadcast_object(_sizes(temporary) if self.is_main else {})
        at = layout()
        by_rank = gather_objects(_hashes(temporary, sorted(files)[at.rank :: at.world_size], sync=True))
        if self.is_main:
            digests = {name: digest for found in by_rank for name, digest in found.items()}
            meta.files = {name: {"bytes": size, "sha256": digests[name]} for name, size in files.items()}
            write_json_atomic(temporary / "meta.json", dataclasses.asdict(meta))
            if final.exists():
                _discard(final)
            os.rename(temporary, final)
            _fsync_folder(self.root)
            if best:
                write_json_atomic(self.root / "best.json", {"folder": final.name, "metric": meta.metric})
            self._retain()
        barrier()
        return final

    def mark_best(self, folder: Path, metric: float) -> None:
        """Point ``best.json`` at a checkpoint that already stands."""
        if self.is_main:
            write_json_atomic(self.root / "best.json", {"folder": folder.name, "metric": metric})
        barrier()

    def _retain(self) -> None:
        keep = set(complete_steps(self.root)[-self.keep_last :])
        best = self.root / "best.json"
        if self.keep_best and best.exists():
            keep.add(self.root / json.loads(best.read_text(encoding="utf-8"))["folder"])
        for folder in complete_steps(self.root):
            if folder not in keep:
                _discard(folder)


def _discard(folder: Path) -> None:
    """Remove a committed checkpoint. Its name goes first: killed half-way, only a ``.tmp`` is left."""
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under ``folder``."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
