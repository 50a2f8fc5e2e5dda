"""Checkpoints on disk: one folder per saved step, whole or absent.

Owns: the layout of ``checkpoints/``, commit by rename, retention, finding the checkpoint a user means, and the metadata
that makes a checkpoint usable alone (model, tokenizer, schema, template, loader position). Does not own: what an engine
puts inside (``sharded.py``).

    checkpoints/step_00000100/   Megatron-Core's sharded tensors, common.pt, metadata.json
                 meta.json       CheckpointMeta, with size and SHA-256 of every file, and of itself
                 tokenizer/      the tokenizer that the model was trained with
    checkpoints/best.json        {"folder": "step_00000100", "metric": 1.23}
Invariant: ``step_<number>`` is complete; a killed save leaves only a ``.tmp`` that the next save removes; folders of
other names are not ours. At most one save is under way; what is collective of it happens in the main thread.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from steerlm_megatron.errors import UserError
from steerlm_megatron.files import file_sha256, sync_path, write_json_atomic
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import any_rank, barrier, broadcast_object, gather_objects, on_main
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.train.meta import CheckpointMeta, read_meta, write_meta
from steerlm_megatron.train.sharded import Write

_STEP = re.compile(r"step_\d{8,}")


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
        if sync:
            sync_path(folder / name)
        out[name] = file_sha256(folder / name)
    return out


def step_folders(root: Path) -> list[Path]:
    """Folders under ``root`` with the name of a committed checkpoint, in step order; some may be damaged."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def complete_steps(root: Path) -> list[Path]:
    """Those of them with metadata."""
    return [p for p in step_folders(root) if (p / "meta.json").exists()]


def _read_best(root: Path) -> tuple[Path, float] | None:
    """The checkpoint that ``best.json`` names, and its metric; None without one."""
    path = root / "best.json"
    try:
        best = json.loads(path.read_text(encoding="utf-8"))
        return root / str(best["folder"]), math.inf if best["metric"] is None else float(best["metric"])
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); delete it: the latest checkpoint is then taken, until "
            "a validation finds a new best"
        ) from None


def resolve(path: str, key: str) -> Path:
    """The checkpoint folder that ``path`` means: that folder, or a run's best, else its latest. Errors name ``key``."""
    root = Path(path)
    if not root.exists():
        raise UserError(f"{key}={path}: no such file or folder")
    if (root / "meta.json").exists():
        return root
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    best = _read_best(folder)
    if best is not None and best[0].is_dir():
        return best[0]
    steps = step_folders(folder)
    if best is not None and steps:
        get_logger(__name__).warning(
            "%s=%s: the best checkpoint, %s, is gone; taking %s", key, path, best[0], steps[-1]
        )
    if not steps:
        raise UserError(f"{key}={path}: neither a checkpoint nor a run folder with checkpoints/step_* in it")
    return steps[-1]


class _Saving(threading.Thread):
    """This rank's part of a save: written and hashed, in a thread of its own or in the caller's."""

    def __init__(
        self,
        meta: CheckpointMeta,
        write: Write,
        temporary: Path,
        final: Path,
        aside: Path,
        save_tokenizer: Callable[[Path], None] | None,
        best: bool,
    ) -> None:
        """``aside``: where a folder goes that has the name ``final`` already."""
        super().__init__(name=f"save {final.name}")
        self.meta, self.write, self.temporary, self.final, self.aside = meta, write, temporary, final, aside
        self.save_tokenizer, self.best = save_tokenizer, best
        self.digests: dict[str, str] = {}
        self.error: str | None = None

    def run(self) -> None:
        try:
            self.write.run()
            names = list(self.write.files)
            if self.save_tokenizer is not None:
                self.save_tokenizer(self.temporary / "tokenizer")
                names += [name for name in _sizes(self.temporary) if name.startswith(f"tokenizer{os.sep}")]
            self.digests = _hashes(self.temporary, names, sync=True)
        except Exception as error:  # raised on every rank by the commit: this may be a thread of one of them
            self.error = f"{type(error).__name__}: {error}"
            if self.temporary.exists():  # torch says of a full disk that a position is unexpected
                self.error += f" ({shutil.disk_usage(self.temporary).free / 1e6:,.1f} MB are free there)"


def _begin(
    final: Path,
    temporary: Path,
    aside: Path,
    meta: CheckpointMeta,
    begin: Callable[[Path], Write],
    save_tokenizer: Callable[[Path], None],
    best: bool = False,
) -> _Saving:
    """Plan the save of one checkpoint folder, in ``temporary``, which is not there. Collective over the world."""
    is_main = layout().is_main
    if is_main:
        temporary.mkdir(parents=True)
    barrier()
    write = begin(temporary)
    barrier()  # Megatron-Core looks for leftovers in the folder: nobody writes before that
    return _Saving(meta, write, temporary, final, aside, save_tokenizer if is_main else None, best)


def _finish(saving: _Saving) -> list[Path]:
    """Once every rank's part is written: Megatron-Core's metadata, ours, the name. Returns (on rank 0) the folder that
    had the name before, set aside to be removed. Collective over the world; ``UserError`` on every rank if one could
    not write: what there is of it is then removed, so that the run's summary finds room on a full disk.
    """
    by_rank = gather_objects((saving.digests, saving.error))
    for rank, (_, error) in enumerate(by_rank):
        if error is not None:
            if layout().is_main:
                shutil.rmtree(saving.temporary, ignore_errors=True)
            raise UserError(f"{saving.final}: not saved, rank {rank} could not write it: {error}")
    saving.write.finalize()
    if not layout().is_main:
        return []
    digests = {name: digest for found, _ in by_rank for name, digest in found.items()}
    sizes = _sizes(saving.temporary)
    digests |= _hashes(saving.temporary, sorted(sizes.keys() - digests.keys()), sync=True)
    saving.meta.files = {name: {"bytes": size, "sha256": digests[name]} for name, size in sizes.items()}
    write_meta(saving.temporary, saving.meta)
    doomed = []
    if saving.final.exists():
        os.rename(saving.final, saving.aside)
        doomed = [saving.aside]
    os.rename(saving.temporary, saving.final)
    sync_path(saving.final.parent)
    return doomed


def write_checkpoint(
    folder: Path, meta: CheckpointMeta, begin: Callable[[Path], Write], save_tokenizer: Callable[[Path], None]
) -> None:
    """Write one checkpoint as ``folder``, whole or not at all; what stands there is replaced. Collective over the
    world.

    Args:
        begin: plans the writing of the tensors in the folder that it is given. Collective over the world.
    """
    # A folder beside it whose name nobody else gives: what a killed call left there goes with the next one.
    work = folder.with_name(f".{folder.name}.steerlm")
    on_main(lambda: shutil.rmtree(work, ignore_errors=True))
    saving = _begin(folder, work / "new", work / "old", meta, begin, save_tokenizer)
    saving.run()
    _finish(saving)
    on_main(lambda: shutil.rmtree(work))


class CheckpointStore:
    """``checkpoints/`` of one run. Methods are collective over the world; rank 0 alone touches names."""

    def __init__(self, root: Path, keep_last: int, keep_best: bool) -> None:
        self.root = root
        self.keep_last = max(1, keep_last)
        self.keep_best = keep_best
        self.is_main = layout().is_main
        self._damaged: set[Path] = set()
        self._saving: _Saving | None = None
        self._removing: threading.Thread | None = None

    def latest(self) -> Path | None:
        """The newest intact checkpoint, None if there is none at all. A damaged one is named and passed over (its
        successor overwrites it). ``UserError`` if there are checkpoints and none is intact.
        """
        folders = broadcast_object(step_folders(self.root)[::-1] if self.is_main else [])
        problem = None
        for folder in folders:
            problem = _damage(folder)
            if problem is None:
                return folder
            self._damaged.add(folder)
            get_logger(__name__).warning("%s; looking for an earlier checkpoint", problem)
        if problem is not None:
            raise UserError(f"{problem}, and no other checkpoint in {self.root} is intact; remove it to start anew")
        return None

    def best_metric(self) -> float:
        """The metric of the checkpoint marked best; infinity if there is none, or it is gone, or :meth:`latest` found
        it damaged: the next best is then saved, although it may be no better than that.
        """

        def read() -> float:
            best = _read_best(self.root)
            return best[1] if best is not None and best[0].is_dir() and best[0] not in self._damaged else math.inf

        found = broadcast_object(on_main(read))
        assert found is not None
        return found

    def save(
        self,
        meta: CheckpointMeta,
        begin: Callable[[Path], Write],
        save_tokenizer: Callable[[Path], None],
        best: bool = False,
        background: bool = False,
    ) -> Path:
        """Write ``step_<meta.step>``; a save in the background is waited for first.

        Args:
            begin: plans the engine's part in the folder that it is given. Collective over the world.
            best: whether ``best.json`` is to name it.
            background: return when the copies are made; :meth:`poll` and :meth:`wait` commit it. Else all is done here.
        """
        self.wait()
        final = self.root / f"step_{meta.step:08d}"
        if self.is_main:
            for stale in self.root.glob("step_*.tmp"):
                shutil.rmtree(stale)
        temporary = final.with_name(f"{final.name}.tmp")
        self._saving = _begin(final, temporary, _aside(final), meta, begin, save_tokenizer, best)
        if background:
            self._saving.start()
        else:
            self._saving.run()
            self.wait()
        return final

    def poll(self) -> bool:
        """Commit the save in the background if every rank has written its part. Whether nothing is left to commit."""
        if self._saving is None:
            return True
        if not any_rank(self._saving.is_alive()):
            self._commit()
        return self._saving is None

    def wait(self) -> None:
        """Let what is in the background come to its end: a save, which is committed, and removals."""
        if self._saving is not None:
            if self._saving.is_alive():
                self._saving.join()
            self._commit()
        if self._removing is not None:
            self._removing.join()
            self._removing = None

    def _commit(self) -> None:
        """After every rank's part is written: Megatron-Core's metadata, ours, the name. ``UserError`` on every rank if
        one could not write.
        """
        assert self._saving is not None
        saving, self._saving = self._saving, None
        doomed = _finish(saving)
        self._damaged.discard(saving.final)
        if self.is_main:
            if saving.best:
                write_json_atomic(self.root / "best.json", {"folder": saving.final.name, "metric": saving.meta.metric})
            self._remove(doomed + [_set_aside(folder) for folder in self._superfluous(saving.final)])
        barrier()

    def _superfluous(self, saved: Path) -> list[Path]:
        """Checkpoints that are neither among the last, up to the one just ``saved``, nor the best.

        Damaged ones do not count: one of a later step than those that are saved now would otherwise be kept in their
        place. Nor do other later ones, which the run has left behind and will replace.
        """
        steps = complete_steps(self.root)
        folders = [f for f in steps[: steps.index(saved) + 1] if f not in self._damaged]
        keep = set(folders[-self.keep_last :])
        best = _read_best(self.root)
        if self.keep_best and best is not None:
            keep.add(best[0])
        return [folder for folder in folders if folder not in keep]

    def _remove(self, folders: list[Path]) -> None:
        """Beside training: gigabytes take seconds. What is left of them, if it fails, the next save removes."""

        def run() -> None:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

        self._removing = threading.Thread(target=run, name="remove checkpoints")
        self._removing.start()


def _set_aside(folder: Path) -> Path:
    """Rename a committed checkpoint that is to be removed: killed half-way through that, only a ``.tmp`` is left."""
    os.rename(folder, _aside(folder))
    return _aside(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old.tmp")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under ``folder``."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
