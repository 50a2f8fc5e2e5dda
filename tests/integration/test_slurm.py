"""Jobs on a real SLURM that is started on this machine: ``srun steerlm …`` by itself, and what ``steerlm launch``
submits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerlm_megatron.launch import record
from tests.helpers.commands import ENVIRONMENT, TINY, losses, summary
from tests.helpers.slurm import Slurm, missing

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"needs Debian's slurmctld, slurmd, slurm-client, munge: {missing()}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="munged and slurmd are started as root"),
]
TRAIN = ("train_sft", *(a for a in TINY if not a.startswith(("bootstrap.", "evaluate.", "sampling."))))
STEERLM = [sys.executable, "-m", "steerlm_megatron"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """Start SLURM with two nodes."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # the path is short, since SLURM's sockets are below it
        running = Slurm(Path(folder) / "s")
        running.environment = {**running.environment, **ENVIRONMENT, "PATH": running.environment["PATH"]}
        running.environment["PYTHONPATH"] = str(ROOT)
        try:
            yield running.start()
        finally:
            running.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, slurm: Slurm) -> Path:
    """Return a folder with ``one``, a run of one process, and its data."""
    folder = tmp_path_factory.mktemp("slurm")
    steerlm(slurm, folder, *TRAIN, "data.output_dir=data", "run_dir=one")
    return folder


def steerlm(slurm: Slurm, folder: Path, *arguments: str, launcher: tuple[str, ...] = (), code: int = 0) -> str:
    """Run a command with SLURM's environment, and return what it prints."""
    done = subprocess.run(
        [*launcher, *STEERLM, *arguments],
        cwd=folder, env=slurm.environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def launched(slurm: Slurm, folder: Path, run_dir: str, *arguments: str) -> str:
    """Launch a command and return its job."""
    said = steerlm(slurm, folder, "launch", *arguments, "cluster=local_slurm", f"run_dir={run_dir}")
    return said.split()[1].rstrip(":")


def log(folder: Path, run_dir: str) -> str:
    return "\n".join(path.read_text() for path in (folder / run_dir / "launch").glob("slurm-*.out"))


def history(folder: Path, run_dir: str) -> list[dict[str, object]]:
    job = record.submitted(folder / run_dir)[-1]
    return next(iter(record.history(folder / run_dir, job.name, job.launch).values()), [])


def test_two_nodes_train_as_one_process_does(slurm: Slurm, work: Path) -> None:
    for name, launcher, more in (
        ("two", ("srun", "-N2", "-n2", "-t5"), ("parallel.data=2",)),
        ("alone", ("salloc", "-N2", "-n2", "-t5"), ()),  # without srun the job's two tasks are not started
    ):
        steerlm(slurm, work, *TRAIN, "data.output_dir=data", f"run_dir={name}", *more, launcher=launcher)
        assert summary(work / name)["status"] == "complete"
        assert losses(work / name) == pytest.approx(losses(work / "one"), rel=1e-6), name
    ranks = sorted(os.listdir(work / "two" / "log"))
    assert [name for name in ranks if name.startswith("rank_")] == ["rank_0.log", "rank_1.log"]


def test_a_launched_job_comes_back_after_a_signal_and_trains_as_one_process_does(slurm: Slurm, work: Path) -> None:
    """By torchrun's agents, one on each node; ``benchmarks/slurm_faults.py`` has all faults, at work."""
    more = ("cluster.nodes=2", "cluster.starter=torchrun", "cluster.preflight=true", "cluster.min_free_gb=0")
    job = launched(slurm, work, "back", *TRAIN, "data.output_dir=data", *more)
    slurm.wait(lambda: "nodes fine" in log(work, "back"), 200, "no preflight")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(job, "COMPLETED", "FAILED", timeout=400)
    events = history(work, "back")
    assert [event["event"] for event in events] == ["start", "end", "start", "end"], log(work, "back")
    assert [event["decision"] for event in events if "decision" in event] == ["requeue", "done"]
    assert losses(work / "back") == pytest.approx(losses(work / "one"), rel=1e-6)
    table = steerlm(slurm, work, "status", "back")
    assert "COMPLETED" in table and "3/3" in table and table.splitlines()[2].endswith("  2"), table
    assert "trained to step 3" in steerlm(slurm, work, "logs", "back", "--rank", "0")


def test_two_jobs_on_a_node_do_not_collide_and_what_cannot_run_does_not_come_back(slurm: Slurm, work: Path) -> None:
    node = ("cluster.tasks_per_node=2", 'cluster.sbatch_lines=["--nodelist=node1"]', "train.steps=1")
    pair = [launched(slurm, work, name, *TRAIN, "data.output_dir=data", *node) for name in ("a", "b")]
    wrong = launched(slurm, work, "wrong", "report", "input=nowhere")
    for job, name in zip(pair, "ab", strict=True):
        assert slurm.wait_for(job, "COMPLETED", "FAILED", timeout=400) == "COMPLETED", log(work, name)
        assert losses(work / name) == pytest.approx(losses(work / "one")[:1], rel=1e-6)
    assert slurm.wait_for(wrong, "COMPLETED", "FAILED") == "FAILED"
    (start, end) = history(work, "wrong")
    assert (end["code"], end["decision"]) == (2, "stop") and "input=nowhere" in log(work, "wrong")
    said = steerlm(
        slurm, work, "launch", *TRAIN, "cluster=local_slurm", "cluster.partition=gpuu", "run_dir=c", code=2
    )  # fmt: skip
    assert said.count("\n") == 1 and "cluster.partition=gpuu" in said and "partitions here: debug high" in said
