"""``srun steerlm …`` works without further settings, on two virtual nodes of a real SLURM on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ENVIRONMENT, TINY, losses, summary

SCRIPT = Path(__file__).resolve().parents[3] / "shared" / "slurm" / "local_slurm.sh"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the script that starts a SLURM on one machine"),
    pytest.mark.skipif(
        not (shutil.which("slurmctld") or Path("/usr/sbin/slurmctld").exists()), reason="needs Debian's slurmctld"
    ),
]
TRAIN = ("train_sft", *(a for a in TINY if not a.startswith(("bootstrap.", "evaluate.", "sampling."))))


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """Start SLURM, and yield the environment in which its commands reach two nodes."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # the path is short, since SLURM's sockets are below it
        local = {**ENVIRONMENT, "LOCAL_SLURM_DIR": folder}
        subprocess.run(["bash", str(SCRIPT), "start", "2"], env=local, check=True, timeout=120)
        try:
            said = subprocess.run(
                ["bash", "-c", f'eval "$(bash {SCRIPT} env)"; env -0'],
                env=local, check=True, timeout=60, capture_output=True, text=True,
            ).stdout  # fmt: skip
            yield dict(entry.split("=", 1) for entry in said.split("\0") if "=" in entry)
        finally:
            subprocess.run(["bash", str(SCRIPT), "clean"], env=local, check=True, timeout=120)


def test_two_nodes_train_as_one_process_does(slurm: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steerlm_megatron", *TRAIN, "data.output_dir=data"]
    for name, launcher, more in (
        ("one", [], []),
        ("two", ["srun", "-N2", "-n2", "-t5"], ["parallel.data=2"]),
        ("alone", ["salloc", "-N2", "-n2", "-t5"], []),  # without srun the job's two tasks are not started
    ):
        done = subprocess.run(
            [*launcher, *command, f"run_dir={name}", *more],
            cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"
        assert summary(tmp_path / name)["status"] == "complete"
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6), name
    ranks = sorted(os.listdir(tmp_path / "two" / "log"))
    assert [name for name in ranks if name.startswith("rank_")] == ["rank_0.log", "rank_1.log"]
