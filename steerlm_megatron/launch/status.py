"""``steerlm status``, ``cancel`` and ``logs``: what became of the jobs of a run.

Owns: the table, and which log is shown. Does not own: run folders' records (``record.py``), SLURM (``slurm.py``).
Invariant: without SLURM's commands the table still shows what the run folder knows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.launch import record, slurm
from steerlm_megatron.launch.record import Submitted
from steerlm_megatron.observe.metrics import FILE_NAME as METRICS
from steerlm_megatron.observe.progress import format_seconds
from steerlm_megatron.observe.runfolder import read_summary

_WATCH_SEC = 5.0
_TAIL_BYTES = 1 << 16
COLUMNS = ("job", "step", "size", "state", "reason", "at", "left", "tok/s", "loss", "starts")


@dataclass(frozen=True)
class Row:
    """One line of the table; every value is text, empty where it is not known."""

    job: str
    step: str
    size: str
    state: str
    reason: str
    at: str = ""
    left: str = ""
    tokens: str = ""
    loss: str = ""
    starts: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.job, self.step, self.size, self.state, self.reason, self.at, self.left, self.tokens, self.loss,
            self.starts,
        )  # fmt: skip


def status(arguments: list[str]) -> None:
    """Print a table of the jobs of the run folders in ``arguments``, or of all below ``runs``; ``--watch``: again and
    again until none is left.

    Raises:
        UserError: a name is no run folder with jobs.
    """
    names = _names(arguments, ("--watch",), "status")
    folders = record.find(names, Path("runs"))
    if "--watch" not in arguments:
        _print(folders)
        return
    from rich.live import Live
    from rich.text import Text

    from steerlm_megatron.observe.log import console

    with Live(Text(_table(folders)), console=console(), auto_refresh=False) as live:
        while any(row.state in ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING") for row in _rows(folders)):
            time.sleep(_WATCH_SEC)
            live.update(Text(_table(folders)), refresh=True)


def cancel(arguments: list[str]) -> None:
    """End all jobs of a run folder that run or wait.

    Raises:
        UserError: there is no such run folder, or SLURM refuses.
    """
    names = _names(arguments, (), "cancel")
    if not names:
        raise UserError("cancel: name the run folder")
    for folder in record.find(names, Path("runs")):
        left = slurm.alive(_all_ids(folder, record.submitted(folder)))
        if not left:
            print(f"{folder}: no job runs or waits")
            continue
        # Jobs that wait go first, so that the end of one does not start the next.
        left.sort(key=lambda one: one.state == "RUNNING")
        jobs = list(dict.fromkeys(one.job.split("_")[0] for one in left))
        slurm.cancel(jobs)
        print(f"{folder}: cancelled {' '.join(jobs)}")


def logs(arguments: list[str]) -> None:
    """Print the end of a run's log: of its newest job, or with ``--rank R`` of that rank; ``--follow`` goes on.

    Raises:
        UserError: there is no such run folder or log.
    """
    rest, rank = list(arguments), None
    if "--rank" in rest:
        at = rest.index("--rank")
        rank = rest[at + 1] if at + 1 < len(rest) else ""
        if not rank.isdigit():
            raise UserError("logs --rank: name a number")
        del rest[at : at + 2]
    names = _names(rest, ("--follow", "-f"), "logs")
    if len(names) != 1:
        raise UserError("logs: name one run folder")
    path = find_log(Path(names[0]), rank)
    print(f"== {path}")
    print("\n".join(_tail(path)))
    if "--follow" in rest or "-f" in rest:
        for line in _follow(path):
            print(line, end="", flush=True)


def _names(arguments: Sequence[str], flags: Sequence[str], tool: str) -> list[str]:
    if wrong := [one for one in arguments if one.startswith("-") and one not in flags]:
        raise UserError(f"{tool} {wrong[0]}: no such option{'; legal: ' + ' '.join(flags) if flags else ''}")
    return [one for one in arguments if not one.startswith("-")]


def find_log(run_dir: Path, rank: str | None) -> Path:
    """Return the newest log of a run folder: what a job printed, or what a rank wrote. Steps of a pipeline and jobs of
    arrays have folders below it.

    Raises:
        UserError: there is none.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder")
    patterns = [f"{record.FOLDER}/slurm-*.out"]
    if rank is not None:
        patterns = [f"{deep}log/rank_{rank}.log" for deep in ("", "*/", "*/*/", "*/*/*/")]
    found = [path for pattern in patterns for path in run_dir.glob(pattern)]
    if not found:
        what = "no job has started" if rank is None else f"rank {rank} has written no log"
        raise UserError(f"{run_dir}: {what} yet")
    return max(found, key=lambda path: path.stat().st_mtime)


def _tail(path: Path, lines: int = 40) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-lines:]


def _follow(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        while True:
            line = file.readline()
            if line:
                yield line
            else:
                time.sleep(0.5)


def _all_ids(folder: Path, jobs: Sequence[Submitted]) -> list[str]:
    """Return the ids of the jobs, and of those that took their place (``cluster.requeue=dependent``)."""
    ids = {job.job for job in jobs}
    for job in jobs:
        for events in record.history(folder, job.name, job.launch).values():
            for event in events:
                ids.add(str(event["job"]))
                ids.update(_successors([event]))
    return sorted(ids)


def _rows(folders: Sequence[Path]) -> list[Row]:
    rows: list[Row] = []
    for folder in folders:
        jobs = record.submitted(folder)
        try:
            known = {one.job: one for one in slurm.queue(_all_ids(folder, jobs))}
        except UserError:  # no SLURM here; the run folder has its part
            known = {}
        for job in jobs:
            rows += _rows_of(folder, job, known)
    return rows


def _rows_of(folder: Path, job: Submitted, known: dict[str, slurm.Queued]) -> Iterator[Row]:
    """Yield a row for a job, or one for each task of an array that SLURM or the history knows."""
    histories = record.history(folder, job.name, job.launch)
    is_array = job.kind in ("records", "sweep") or job.tasks > 1
    for unit, suffix in [(f"-{task}", f"_{task}") for task in range(job.tasks)] if is_array else [("", "")]:
        events = histories.get(f"{job.name}{unit}", [])
        successors = [f"{one}{more}" for one in _successors(events) for more in dict.fromkeys(("", suffix))]
        ids = [f"{job.job}{suffix}", *(str(event["job"]) for event in events), *successors]
        now = next((known[one] for one in reversed(ids) if one in known), None)
        last = events[-1] if events else {}
        state = now.state if now else {"done": "COMPLETED", "stop": "FAILED"}.get(str(last.get("decision")), "unknown")
        reason = str(last.get("reason") or "")
        if now and now.state == "PENDING":
            reason = now.reason
        elif state == "RUNNING" or (state == "COMPLETED" and not reason):
            reason = now.nodes if now else ""
        starts = str(sum(event["event"] == "start" for event in events) or "")
        below = {"sweep": unit[1:], "records": f"array/{unit[1:]}"}.get(job.kind, "")
        found = _progress(Path(job.run_dir) / below)
        yield Row(f"{job.job}{suffix}", f"{job.name}{unit}", job.ranks, state, reason, starts=starts, **found)


def _successors(events: Sequence[dict[str, Any]]) -> list[str]:
    said = [str(event.get("reason", "")) for event in events]
    return [reason.split("job ")[-1].split()[0] for reason in said if reason.endswith(" goes on")]


def _progress(run_dir: Path) -> dict[str, str]:
    """Return what the run's metrics say: step, time left, tokens/s, loss."""
    path = run_dir / METRICS
    if not path.is_file():
        return {}
    rows = []
    for line in _tail(path, lines=20):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the first line of the tail is cut, or the last one is being written
    rows = [row for row in rows if isinstance(row, dict) and "step" in row]
    trained = [row for row in rows if row.get("loss") is not None]
    if not rows:
        return {}
    summary = read_summary(run_dir) or {}
    total = summary.get("plan", {}).get("steps")
    step, found = rows[-1]["step"], {"at": f"{rows[-1]['step']}" + (f"/{total}" if total else "")}
    if trained:
        found["loss"] = f"{trained[-1]['loss']:.4g}"
        if trained[-1].get("tokens_per_sec"):
            found["tokens"] = f"{trained[-1]['tokens_per_sec']:,.0f}"
        if total and summary.get("status") == "running" and trained[-1].get("step_sec"):
            found["left"] = format_seconds((total - step) * trained[-1]["step_sec"])
    return found


def table_text(rows: Sequence[Row]) -> str:
    """Return the rows as lines with columns as wide as their content, without columns in which nothing is known."""
    cells = [COLUMNS, *(row.cells for row in rows)]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells[1:])]
    widths = {i: max(len(row[i]) for row in cells) for i in shown}
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in cells)


def _table(folders: Sequence[Path]) -> str:
    parts = [f"{os.path.relpath(folder)}\n{table_text(_rows([folder]))}" for folder in folders]
    return "\n\n".join([*parts, datetime.now().strftime("%H:%M:%S")])


def _print(folders: Sequence[Path]) -> None:
    print(_table(folders).rpartition("\n\n")[0])
