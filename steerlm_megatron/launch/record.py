"""What a run folder knows of its jobs: ``launch/jobs.jsonl`` and the histories that the jobs write.

Owns: the files below ``launch/`` that Python writes, and reading all of them. Does not own: what jobs write into their
histories (``launch/slurm/job.sh``). Invariant: a job is listed as soon as SLURM has it; lines are only appended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerlm_megatron.errors import UserError

FOLDER = "launch"
_JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted.

    Args:
        job: SLURM's id.
        name: the step or command.
        launch: the name of the launch.
        run_dir: folder that the job works in, absolute; of an array of a sweep, the folder above those of its tasks.
        log: path of its log, with SLURM's names for ids.
        ranks: nodes and ranks of each, in words.
        after: ids of the jobs whose good end it waits for.
        kind: ``job``, ``records``, ``sweep`` or ``server``.
        tasks: of an array.
    """

    job: str
    name: str
    launch: str
    run_dir: str
    log: str
    ranks: str
    after: tuple[str, ...] = ()
    kind: str = "job"
    tasks: int = 1


def note(launch_dir: Path, job: Submitted) -> None:
    """Add a job to the run folder's list."""
    with open(launch_dir / _JOBS, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(job)) + "\n")


def has_jobs(run_dir: Path) -> bool:
    """Return whether ``steerlm launch`` submitted jobs of this run folder."""
    return (run_dir / FOLDER / _JOBS).is_file()


def submitted(run_dir: Path) -> list[Submitted]:
    """Return the jobs of all launches of a run folder, in order.

    Raises:
        UserError: there are none.
    """
    path = run_dir / FOLDER / _JOBS
    if not path.is_file():
        raise UserError(f"{run_dir} has no {FOLDER}/{_JOBS}: no job of it was submitted by steerlm launch")
    return [Submitted(**entry | {"after": tuple(entry["after"])}) for entry in _lines(path)]


def history(run_dir: Path, name: str, launch: str) -> dict[str, list[dict[str, Any]]]:
    """Return the events of a job of a launch, by the unit that wrote them: one, or one for each task of an array."""
    found = {}
    for path in sorted((run_dir / FOLDER / "history").glob(f"steerlm-{name}*.jsonl")):
        unit = path.name.removeprefix("steerlm-").removesuffix(".jsonl")
        if unit != name and not unit.removeprefix(f"{name}-").isdigit():
            continue
        if events := [event for event in _lines(path) if event.get("launch") == launch]:
            found[unit] = events
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that a node that was lost did not end
        if isinstance(entry, dict):
            yield entry


def find(names: Sequence[str], root: Path) -> list[Path]:
    """Return the run folders that ``names`` are: folders with jobs. Without names, all below ``root``, newest last.

    Raises:
        UserError: a name is no folder with jobs, or there is none at all.
    """
    if names:
        for name in names:
            submitted(Path(name))
        return [Path(name) for name in names]
    found = [path.parent.parent for pattern in ("*/*", "*") for path in root.glob(f"{pattern}/{FOLDER}/{_JOBS}")]
    if not found:
        raise UserError(f"no run folder with jobs below {root}; name one")
    return sorted(found, key=lambda folder: (folder / FOLDER / _JOBS).stat().st_mtime)
