"""An append-only journal per rank: what a killed job had finished.

Owns: lines of JSON keyed by record index, read back whatever ranks wrote them. Invariant: a line that counts is whole;
a torn last line is cut off before the next is written; entries of other inputs are not taken for ours.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import PARTS, fingerprint, remove_journal
from steerlm_megatron.runtime.collectives import broadcast_object, on_main
from steerlm_megatron.stages.session import LoadedModel, Session


class Journal:
    """``folder/part-*.jsonl`` of a job with ``key`` (a fingerprint of its inputs). One writer per part."""

    def __init__(self, folder: Path, part: int, key: str, is_main: bool) -> None:
        """Main removes parts of other keys: construct on main first, then (after a barrier) elsewhere."""
        # By their names: a rank that outlived an attempt with another key writes on, but not into ours.
        self.folder, self._ours = folder, f"part-{key[:16]}-"
        self.path = folder / f"{self._ours}{part:05d}.jsonl"
        self._torn = True  # perhaps: the first line written looks
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob(PARTS):
                if not file.name.startswith(self._ours):
                    file.unlink()

    def read(self) -> dict[int, Any]:
        """Return everything that any rank has finished: index → value."""
        done: dict[int, Any] = {}
        for part in sorted(self.folder.glob(f"{self._ours}*.jsonl")):
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
        """Add finished entries; on disk when this returns.

        Raises:
            OSError: they are not, and can be added again.
        """
        lines = b"".join(json.dumps({"i": i, "v": v}).encode() + b"\n" for i, v in entries)
        if not lines:
            return
        try:
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
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    @contextmanager
    def recorder(self, every_sec: float) -> Iterator[Callable[[int, Any], None]]:
        """Inside, ``note(index, value)`` costs nothing: a thread appends what came, every ``every_sec`` seconds. On
        leaving, however that is, all is on disk.

        Raises:
            OSError: as :meth:`append`; inside, from the next ``note``.
        """
        waiting: list[tuple[int, Any]] = []
        failed: list[OSError] = []
        end = threading.Event()

        def write() -> None:
            taken = len(waiting)
            self.append(waiting[:taken])
            del waiting[:taken]

        def run() -> None:
            while not failed and not end.wait(every_sec):
                try:
                    write()
                except OSError as error:
                    failed.append(error)

        def note(index: int, value: Any) -> None:
            if failed:
                raise failed[0]
            waiting.append((index, value))

        thread = threading.Thread(target=run, name="journal", daemon=True)
        thread.start()
        try:
            yield note
        finally:
            end.set()
            thread.join()
            write()

    def remove(self) -> None:
        """The job is complete and its output stands."""
        remove_journal(self.folder)


def open_journal(
    here: Session, name: str, loaded: LoadedModel, inputs: Mapping[str, Any], paths: Sequence[str] = ()
) -> tuple[Journal, dict[int, Any]]:
    """Return the journal ``name`` of this run for what ``loaded`` makes of ``inputs`` and ``paths``, and what it holds
    of an earlier attempt. Collective over the world.

    That of another model (by the names, sizes and times of its files), precision or input is removed.
    """
    model = {"step": loaded.meta.step, "precision": here.config.engine.precision}
    key = broadcast_object(on_main(lambda: fingerprint({"model": model, **inputs}, [loaded.folder, *paths]))) or ""
    folder = here.folder / name
    on_main(lambda: Journal(folder, 0, key, is_main=True))
    journal = Journal(folder, here.layout.rank, key, is_main=False)
    # All go on from the same: what rank 0 sees of files that others wrote on other nodes.
    return journal, broadcast_object(journal.read() if here.layout.is_main else {})
