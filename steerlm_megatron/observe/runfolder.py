"""The folder of one run: its configuration, its environment, and how it ended.

Owns: ``config.yaml command.txt env.json summary.json`` and the rule that a complete run is not overwritten. Does not
own: ``metrics.jsonl`` (``metrics.py``), ``log/`` (``log.py``), ``checkpoints/`` (``train``). Invariants: each of these
files is complete or absent, and ``summary.json`` says ``complete`` only after everything else is written; one run at a
time works in a folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from steerlm_megatron.errors import TryLater, UserError
from steerlm_megatron.files import file_sha256, to_strict_json, write_json_atomic, write_text_atomic
from steerlm_megatron.observe.log import get_logger

STATUSES = ("running", "complete", "failed", "interrupted")
_IN_HUB_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)$")
REQUEUE_EXIT_CODE = 75  # the run was stopped after saving, and the scheduler should start the same command again
_PACKAGES = (
    "torch megatron-core deepspeed transformer-engine numpy hydra-core omegaconf sentencepiece tokenizers transformers "
    "safetensors fastapi uvicorn httpx"
).split()
_VARIABLES = (
    "OMP_NUM_THREADS CUDA_VISIBLE_DEVICES RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT "
    "SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_NNODES SLURM_NTASKS SLURM_RESTART_COUNT"
).split()
JOURNAL = "journal-"  # prefix of folders with the finished work of a stopped attempt
PARTS = "part-*.jsonl"
_OWN_ENTRIES = (
    "config.yaml command.txt env.json metrics.jsonl summary.json report.html report.md report.json log checkpoints "
    "tensorboard hub.json cost"
).split()


def fingerprint(values: Mapping[str, Any], paths: Iterable[str | Path] = ()) -> str:
    """Return a SHA-256 (hex) over ``values`` and the content of ``paths``: equal inputs have equal fingerprints.

    A file counts by its content. A run folder counts by the fingerprint in its own summary. Any other folder counts by
    the names, sizes and modification times in it, since reading a checkpoint would take longer than the step that it
    saves; hidden files and folders are of tools, and do not count. A folder in the hub's cache counts by its commit.

    Raises:
        UserError: a path does not exist.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(to_strict_json(values), sort_keys=True).encode())
    for path in map(Path, paths):
        digest.update(b"\0" + str(path.name).encode() + b"\0")
        if path.is_file():
            digest.update(bytes.fromhex(file_sha256(path)))
        elif path.is_dir() and (source := hub_source(path)) is not None:
            digest.update(f"{source}".encode())
        elif path.is_dir():
            own = (read_summary(path) or {}).get("fingerprint")
            digest.update(str(own).encode() if own else _folder_listing(path).encode())
        else:
            raise UserError(f"{path}: no such file or folder; it is an input of this step")
    return digest.hexdigest()


def hub_source(folder: str | Path) -> tuple[str, str] | None:
    """Return (``owner/name``, commit) of a model's folder in the cache of the Hugging Face hub; None for any other."""
    found = _IN_HUB_CACHE.search(str(Path(folder).absolute()))
    return None if found is None else (f"{found[1]}/{found[2]}", found[3])


def _folder_listing(path: Path) -> str:
    lines = []
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        name, stat = file.relative_to(path), file.stat()
        if not any(part.startswith(".") for part in name.parts):
            lines.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join(lines)


def read_summary(run_dir: str | Path) -> dict[str, Any] | None:
    """Return the content of a run folder's ``summary.json``; None if there is none. A damaged one is a UserError."""
    path = Path(run_dir) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); delete it to run this step again") from error
    if not isinstance(summary, dict):
        raise UserError(f"{path} is not a JSON object; delete it to run this step again")
    return summary


def is_complete(run_dir: str | Path, wanted_fingerprint: str | None = None) -> bool:
    """Return whether the run ended well and, if a fingerprint is given, had the same inputs."""
    summary = read_summary(run_dir)
    if summary is None or summary.get("status") != "complete":
        return False
    return wanted_fingerprint is None or summary.get("fingerprint") == wanted_fingerprint


def default_run_dir(command: str, root: str | Path = "runs") -> Path:
    """Create and return a new folder ``runs/<command>/<date>_<time>``, so that two commands that start at once differ.

    Raises:
        UserError: the folder cannot be made.
    """
    base = Path(root) / command / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    path, number = base, 1
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
                path = base.with_name(f"{base.name}-{number}")
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}; name a run_dir") from error


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that a run depends on, without importing them."""
    found = {"python": platform.python_version()}
    for package in ("steerlm_megatron", *_PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an optional library, or this package in a checkout that was never installed
    return found


def environment() -> dict[str, Any]:
    """Return the content of ``env.json``: versions, host, devices, environment variables, git commit of the code."""
    return {
        "versions": versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.executable,
        "cpu_count": os.cpu_count(),
        "devices": _devices(),
        "git": _git_state(Path(__file__).resolve().parents[2]),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "working_dir": os.getcwd(),
    }


def _devices() -> list[str]:
    """Return names of the CUDA devices, if torch is loaded already, since importing it for this would be slow."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit, and whether tracked files were changed; None outside a git checkout or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None  # the package is installed inside another repository, whose commit says nothing about this code
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


_LOCK_WAIT_SEC = 5.0
LOCK = ".lock"  # file that a run locks while it works in the folder; it holds the process's id and host
_held: dict[Path, IO[str]] = {}  # folders locked by this process, which may open one again


def _lock(folder: Path) -> None:
    """Lock the folder for this process, until :func:`_unlock` or the end of the process.

    Raises ``TryLater`` if another process still has the lock after ``_LOCK_WAIT_SEC``; the wait gives the ranks of a
    killed launcher time to stop.
    """
    if folder.resolve() in _held:
        return
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
    end = time.monotonic() + _LOCK_WAIT_SEC
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise TryLater(
                f"run_dir={folder} is in use by {owner}; wait for its end or stop it, or choose another run_dir"
            ) from None
        except OSError as error:
            get_logger(__name__).warning(
                "run_dir=%s: no lock on this file system (%s): see to it that no other run works there", folder, error
            )
            file.close()
            return
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[folder.resolve()] = file


def _unlock(folder: Path) -> None:
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        file.truncate(0)  # the file stays, since after a removal two processes could each lock a different file
        file.close()


def remove_journal(folder: Path) -> None:
    """Remove a journal's parts, and its folder if nothing else is in it."""
    for part in folder.glob(PARTS):
        part.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


class RunFolder:
    """One run's folder. Every rank may have an object, and only rank 0 writes.

    Use it as a context manager around the work. The summary says ``running`` inside, then ``complete``, ``failed``
    (with the error) or ``interrupted`` (Ctrl-C, or ``SystemExit(75)`` after a signal).

    Attributes:
        path: the folder.
        resumed: whether the folder holds an earlier attempt that did not complete.
        attempts: how many attempts there were with this one; rank 0 alone knows.
    """

    def __init__(self, path: str | Path, command: str, *, overwrite: bool = False, rank: int = 0) -> None:
        """Create the folder. With ``overwrite`` a complete run in it is removed first (files that runs write, nothing
        else).

        Raises:
            UserError: the run in it is complete and ``overwrite`` is false.
            TryLater: another process works in it.
        """
        self.path = Path(path)
        self.command = command
        self.rank = rank
        self.resumed = False
        self.attempts = 1
        self._summary: dict[str, Any] = {}
        self._started = time.monotonic()
        if rank != 0:
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir={self.path} is a file; give a folder, existing or new")
        if not overwrite:
            self._refuse_complete()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _lock(self.path)
        except OSError as error:
            raise UserError(f"run_dir={self.path} cannot be written: {error.strerror}") from error
        earlier = read_summary(self.path)
        if earlier is not None and earlier.get("status") == "complete":
            if not overwrite:  # the run that had the lock until now has completed
                _unlock(self.path)
                self._refuse_complete()
            self._remove_run_files()
            earlier = None
        self.resumed = earlier is not None
        self.attempts = int((earlier or {}).get("attempts", 0)) + 1

    def _refuse_complete(self) -> None:
        earlier = read_summary(self.path)
        if earlier is not None and earlier.get("status") == "complete":
            raise UserError(
                f"run_dir={self.path} holds a complete run of '{earlier.get('command', '?')}'; "
                "choose another run_dir, or set overwrite=true to replace it"
            )

    def _remove_run_files(self) -> None:
        # The summary is removed first, so that after an interruption the folder no longer claims to be complete.
        for name in ("summary.json", *_OWN_ENTRIES):
            entry = self.path / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        for folder in self.path.glob(f"{JOURNAL}*/"):
            remove_journal(folder)

    def start(self, config_yaml: str = "", argv: Sequence[str] | None = None, inputs: str | None = None) -> RunFolder:
        """Write config, command, environment and a summary that says ``running``. ``inputs`` is the run's
        ``fingerprint``.
        """
        if self.rank != 0:
            return self
        self._started = time.monotonic()
        write_text_atomic(self.path / "config.yaml", config_yaml)
        history = self.path / "command.txt"
        earlier = history.read_text(encoding="utf-8") if self.resumed and history.exists() else ""
        write_text_atomic(history, earlier + shlex.join(sys.argv if argv is None else argv) + "\n")
        write_json_atomic(self.path / "env.json", environment())
        self._summary = {
            "status": "running",
            "command": self.command,
            "fingerprint": inputs,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "attempts": self.attempts,
            "counts": {},
            "metrics": {},
            "timings": {},
            "outputs": {},
            "versions": versions(),
        }
        self._write()
        return self

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint that :meth:`start` was given, on rank 0."""
        inputs: str | None = self._summary.get("fingerprint")
        return inputs

    def update(self, **sections: Mapping[str, Any]) -> None:
        """Merge into sections of the summary, as in ``update(counts={"in": 5}, timings={"score_sec": 2.5})``, and write
        it.
        """
        for name, values in sections.items():
            self._summary.setdefault(name, {}).update(values)
        self._write()

    def finish(self, status: str = "complete", error: str | None = None) -> None:
        """Write how the run ended. It is the last thing that a run does."""
        assert status in STATUSES, status
        self._summary["status"] = status
        self._summary["ended"] = datetime.now().astimezone().isoformat(timespec="seconds")
        self._summary["wall_sec"] = round(time.monotonic() - self._started, 3)
        if error is not None:
            self._summary["error"] = error
        self._write()
        if self.rank == 0:
            _unlock(self.path)

    def _write(self) -> None:
        if self.rank == 0:
            write_json_atomic(self.path / "summary.json", self._summary)

    def __enter__(self) -> RunFolder:
        if not self._summary:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            if self._summary.get("status", "running") == "running":
                self.finish("complete")
            return
        try:
            if isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == REQUEUE_EXIT_CODE:
                self.finish("interrupted")
            else:
                self.finish("failed", error=f"{type(error).__name__}: {error}")
        except (
            OSError
        ) as unwritten:  # most likely the disk is full; the error that ended the run must not be hidden by this one
            get_logger(__name__).warning("%s could not be written: %s", self.path / "summary.json", unwritten)
