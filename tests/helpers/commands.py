"""Run commands as users do, in separate processes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.dist import end, forks

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# The pipeline is as short as possible, since these tests do not depend on what it learns.
TINY = (
    "experiment=quickstart", "data.demo_conversations=120", "tokenizer.vocab_size=500", "model.num_layers=2",
    "model.hidden_size=32", "model.ffn_hidden_size=64", "train.row_tokens=512", "train.steps=3",
    "train.validate_rows=2", "train.log_every_steps=1", "sampling.max_tokens=8", "bootstrap.prompts=24",
    "evaluate.max_prompts=2", "evaluate.levels=[0,4]", "evaluate.examples=1",
)  # fmt: skip


def steerlm(*arguments: str, cwd: Path, code: int = 0, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit code.

    Its process is forked from a server that has imported what commands import (``dist.py``), which saves seconds; ranks
    that it starts are processes like a user's.
    """
    with tempfile.TemporaryDirectory(prefix="command_") as name:
        said = Path(name, "stdout"), Path(name, "stderr")
        process = forks().Process(target=_command, args=(arguments, cwd, *said))
        process.start()
        try:
            process.join(timeout)
            found = process.exitcode
        finally:
            end(process)
        stdout, stderr = (path.read_text() if path.exists() else "" for path in said)
    ended = f"exit code {found}" if found is not None else f"running after {timeout:.0f} s"
    assert found == code, f"{ended}, not {code}\n{stdout}\n{stderr}"
    return subprocess.CompletedProcess(["steerlm", *arguments], found, stdout, stderr)


def _command(arguments: Sequence[str], cwd: Path, stdout: Path, stderr: Path) -> None:
    """Be ``python -m steerlm_megatron``, in a process of its own group whose output goes into two files."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(ENVIRONMENT)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    import torch

    from steerlm_megatron import cli

    torch.set_num_threads(1)
    gc.freeze()
    cli.main(list(arguments))


def start(*arguments: str, cwd: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a command in a new process group. ``launcher`` is a module, with arguments, that starts it."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "steerlm_megatron", *arguments],
        cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the process and its descendants, and wait until all have ended."""
    try:
        everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return  # the process has ended by itself
    for one in everybody:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    _, alive = psutil.wait_procs(everybody, timeout=120)
    assert not alive


def terminate(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to the process alone, and wait for its end."""
    process.terminate()
    process.communicate(timeout=600)


def losses(run_dir: Path) -> list[float]:
    """Return the training losses in ``metrics.jsonl``, in order of steps."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def summary(run_dir: Path) -> dict[str, Any]:
    """Return the content of a run's ``summary.json``."""
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return found
