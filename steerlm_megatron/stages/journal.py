"""An append-only journal per rank with the work that a killed job had finished.

Owns: lines of JSON keyed by record index, which are read back whichever rank wrote them. Invariant: only complete lines
count; a torn last line is cut off before the next is written; entries for other inputs are ignored.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import PARTS, fingerprint, remove_journal
from steerlm_megatron.runtime.collectives import broadcast_object, on_main
from steerlm_megatron.stages.session import OpenedCheckpoint, Session

_PARTS_OF_A_JOB = 100_000  # more than the ranks of any job of an array, so that no two jobs write into one file


class Journal:
    """``folder/part-*.jsonl`` of a job with ``key`` (a fingerprint of its inputs). One writer per part."""

    def __init__(self, folder: Path, part: int, key: str, is_main: bool) -> None:
        """The main rank removes parts of other keys, so construct the journal there first and, after a barrier,
        elsewhere.
        """
        # The key is in the names, so that a rank that survived an attempt with another key cannot write into these
        # files.
        self.folder, self._ours = folder, f"part-{key[:16]}-"
        self.path = folder / f"{self._ours}{part:05d}.jsonl"
        self._torn = True  # unknown yet; the first write checks
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob(PARTS):
                if not file.name.startswith(self._ours):
                    file.unlink(missing_ok=True)  # jobs of an array may do so at once

    def read(self) -> dict[int, Any]:
        """Return everything that any rank has finished, as index → value."""
        done: dict[int, Any] = {}
        for part in sorted(self.folder.glob(f"{self._ours}*.jsonl")):
            for line in part.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # torn
                    continue
                try:
                    entry = json.loads(line)
                    done[entry["i"]] = entry["v"]
                except (ValueError, TypeError, KeyError):  # the line is damaged, so its work is done again
                    get_logger(__name__).warning("%s: a line that is no entry is left out", part)
        return done

    def append(self, entries: Iterable[tuple[int, Any]]) -> None:
        """Add finished entries, which are on disk when this returns.

        Raises:
            OSError: they could not be written, and can be added again.
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
        """Yield a function ``note(index, value)`` that returns at once; a thread appends its entries every
        ``every_sec`` seconds. All entries are on disk when the ``with`` is left, also by an exception.

        Raises:
            OSError: as :meth:`append`; inside the ``with``, the next ``note`` raises it.
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
        """Remove the journal, once the job's output is complete."""
        remove_journal(self.folder)


def open_journal(
    here: Session, name: str, loaded: OpenedCheckpoint, inputs: Mapping[str, Any], paths: Sequence[str] = ()
) -> tuple[Journal, dict[int, Any]]:
    """Return the journal ``name`` of this run for the work of the model ``loaded`` on ``inputs`` and ``paths``, and the
    entries of an earlier attempt. Collective over the world.

    A journal of another model (by the names, sizes and times of its files), precision or input is removed.
    """
    model = {"step": loaded.meta.step, "precision": here.config.engine.precision}
    key = broadcast_object(on_main(lambda: fingerprint({"model": model, **inputs}, [loaded.folder, *paths]))) or ""
    folder = here.shared / name
    on_main(lambda: Journal(folder, 0, key, is_main=True))
    part = here.layout.rank
    task, _ = job_of_array(here.config)
    if task is not None:
        part += _PARTS_OF_A_JOB * (task + 1)
    journal = Journal(folder, part, key, is_main=False)
    # All ranks go on from what rank 0 sees, since other nodes may not see the same files yet.
    return journal, broadcast_object(journal.read() if here.layout.is_main else {})
