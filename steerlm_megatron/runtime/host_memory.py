"""How much memory this process may still take: what the host has left, or its control group, if that is less.

Owns: reading control groups, of either version. Does not own: what the memory is for. Invariant: what cannot be read
counts as no limit. A SLURM job with ``--mem`` and a container are ended by the kernel at their group's limit, which the
host's own numbers (psutil) do not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_GROUPS, _OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Names of the limit and of what is used, per version; memory of files that nobody needs any more is given back at once.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available(groups: Path = _GROUPS, of_process: Path = _OF_PROCESS) -> int:
    """Return the bytes that this process and others of its control group can still take."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups(groups, of_process)])


def _left_in_groups(groups: Path, of_process: Path) -> Iterator[int]:
    """What is left in each control group with a limit that the process is in, directly or through another group."""
    try:
        lines = of_process.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (groups / "memory", _V1) if controllers else (groups, _V2)
        folder = root / path.lstrip("/")
        # A container may see its own group at the root, and the path as the host names it.
        for each in {folder, *folder.parents, root}:
            if each == root or root in each.parents:
                left = _left(each, *names)
                if left is not None:
                    yield left


def _left(folder: Path, limit: str, used: str, idle: str) -> int | None:
    try:
        most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if most == "max" else max(0, int(most) - taken + int(stat.get(idle, 0)))
    except (OSError, ValueError):
        return None
