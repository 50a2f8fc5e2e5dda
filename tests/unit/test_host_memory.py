"""Memory limits of control groups, as a SLURM job or a container has them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from steerlm_megatron.runtime import host_memory

GIB = 2**30


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {idle}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("version", "root", "line"), [(V2, "", "0::/job_3/step_0\n"), (V1, "memory", "4:memory:/job_3/step_0\n")]
)
def test_the_tightest_group_counts(tmp_path: Path, version: tuple[str, str, str], root: str, line: str) -> None:
    ours = tmp_path / "cgroup"
    ours.write_text(f"9:name=systemd:/\n1:cpu,cpuacct:/elsewhere\n{line}")
    groups = tmp_path / "fs"
    assert host_memory.available(groups, ours) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    no_limit = "max" if version is V2 else str(2**63 - 4096)
    group(groups / root / "job_3/step_0", version, no_limit, GIB // 2, 0)
    group(groups / root / "job_3", version, str(GIB), 3 * GIB // 4, GIB // 4)
    group(groups / root / "job_4", version, "0", 0, 0)
    assert host_memory.available(groups, ours) == GIB // 2, (
        "the job's limit; files that can be dropped are no use of it"
    )
    group(groups / root, version, "1000", 2000, 0)
    assert host_memory.available(groups, ours) == 0, "in a container the root has the limit"


def test_where_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert host_memory.available(tmp_path, tmp_path / "none") > 0
    (tmp_path / "cgroup").write_text("0::/\n")
    group(tmp_path, V2, "not a number", 0, 0)
    assert host_memory.available(tmp_path, tmp_path / "cgroup") > 0
