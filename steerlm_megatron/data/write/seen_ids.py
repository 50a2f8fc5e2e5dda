"""Remember which ids occurred, for any number of ids, in bounded memory.

Owns: ``SeenIds``. Invariant: exact up to collisions of 128-bit hashes; memory does not grow with the number of ids
(sorted runs lie in files, memory-mapped).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from steerlm_megatron.data.write.blocks import Array

RUN_IDS = 1 << 18  # ids held in memory before they become a file


class SeenIds:
    """A set of ids, kept as 16 bytes of their hashes. ``folder`` is scratch space, which is made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.recent: set[bytes] = set()
        self._runs: list[Array] = []  # sorted runs in files

    def repeated(self, hashes_N16: Array) -> Array:
        """Return bool [N]: whether each hash (uint8 [N, 16]) occurred before, among these or earlier ones, and add
        them.

        All zeros stand for no id, which never occurred before.
        """
        keys = _keys(hashes_N16)
        out = np.zeros(len(keys), np.bool_)
        for run in self._runs:
            out |= run[np.minimum(np.searchsorted(run, keys), len(run) - 1)] == keys
        named = hashes_N16.any(axis=1)
        out &= named
        data = hashes_N16.tobytes()
        for index in np.flatnonzero(named & ~out).tolist():
            key = data[16 * index : 16 * index + 16]
            if key in self.recent:
                out[index] = True
            else:
                self.recent.add(key)
        if len(self.recent) >= RUN_IDS:
            self._spill()
        return out

    def _spill(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(self._runs):05d}.npy"
        np.save(path, np.sort(_keys(np.frombuffer(b"".join(self.recent), np.uint8).reshape(-1, 16))))
        self._runs.append(np.load(path, mmap_mode="r"))
        self.recent.clear()


def _keys(hashes_N16: Array) -> Array:
    """Return hashes as byte strings, which numpy sorts and searches. It ignores trailing zeros, which all are padded
    to.
    """
    return np.ascontiguousarray(hashes_N16).view("S16").reshape(-1)
