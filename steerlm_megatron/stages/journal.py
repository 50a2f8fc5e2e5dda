"""An append-only journal per rank: what a killed job had finished.

Owns: lines of JSON keyed by record index, read back whatever ranks wrote them. Invariant: a line that counts is whole;
a torn last line is cut off before the next is written; the journal of other inputs is not taken for ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import fingerprint, write_json_atomic
from steerlm_megatron.runtime.collectives import broadcast_object, on_main
from steerlm_megatron.stages.session import LoadedModel, Session


class Journal:
    """``folder/part-*.jsonl`` of a job with ``key`` (a fingerprint of its inputs). One writer per part."""

    def __init__(self, folder: Path, part: int, key: str, is_main: bool) -> None:
        """With another key in the folder, main empties it: construct on main first, then (after a barrier)
        elsewhere.
        """
        self.folder, self.path = folder, folder / f"part-{part:05d}.jsonl"
        self._torn = True  # perhaps: the first line written looks
        marker = folder / "key.json"
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            stored = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
            if stored != key:
                for part_file in folder.glob("part-*.jsonl"):
                    part_file.unlink()
                write_json_atomic(marker, key)

    def read(self) -> dict[int, Any]:
        """Everything that any rank has finished: index → value."""
        done: dict[int, Any] = {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            for line in part.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # torn
                    continue
                try:
                    entry = json.loads(line)
                    done[entry["i"]] = entry["v"]
                except (ValueError, TypeError, KeyError):  # a disk's fault: that piece of work is done again
                    get_logger(__name__).warning("%s: a line that is no entry is left out", part)
        return done

    def append(self, entries: Iterable[tuple[int, Any]]) -> None:
        """Add finished entries; on disk when this returns."""
        lines = b"".join(json.dumps({"i": i, "v": v}).encode() + b"\n" for i, v in entries)
        if not lines:
            return
        with open(self.path, "a+b") as file:
            if self._torn and (size := file.seek(0, os.SEEK_END)):
                file.seek(0)
                whole = file.read().rfind(b"\n") + 1
                if whole != size:
                    file.truncate(whole)
            self._torn = True
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
            self._torn = False

    def remove(self) -> None:
        """The job is complete and its output stands."""
        for part in self.folder.glob("part-*.jsonl"):
            part.unlink()
        (self.folder / "key.json").unlink(missing_ok=True)
        self.folder.rmdir()


def open_journal(
    here: Session, name: str, loaded: LoadedModel, inputs: Mapping[str, Any], paths: Sequence[str] = ()
) -> tuple[Journal, dict[int, Any]]:
    """The journal ``name`` of this run for what ``loaded`` makes of ``inputs`` and ``paths``, and what it holds of an
    earlier attempt. Collective over the world.

    That of another model (by the names, sizes and times of its files), precision or input is emptied.
    """
    model = {"step": loaded.meta.step, "precision": here.config.engine.precision}
    key = on_main(lambda: fingerprint({"model": model, **inputs}, [loaded.folder, *paths])) or ""
    folder = here.folder / name
    on_main(lambda: Journal(folder, 0, key, is_main=True))
    journal = Journal(folder, here.layout.rank, key, is_main=False)
    # All go on from the same: what rank 0 sees of files that others wrote on other nodes.
    return journal, broadcast_object(journal.read() if here.layout.is_main else {})
