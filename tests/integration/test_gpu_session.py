"""The GPU check runs as on a GPU, with tiny models: what it calls of the project is still there under that name.

Left out are the parts that run what other tests run (``e2e``, ``tests``), and ``annotate``, which is measured as
``train`` is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_profile import device_time
from tests.helpers.commands import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("rms_norm", "swiglu", "rotate")
MODES = ("project", "static shapes", "token dimension dynamic", "without compile")
MEASURED = {
    "env": ("torch", "versions", "import steerlm_megatron.cli", "copy GB/s (read + written)", "gemm TFLOP/s bf16"),
    "train_1b": ("tokens/s", "x faster than", "MFU of gemm peak", "first losses", "done"),
    "train_1b_ap": ("tokens/s", "x faster than", "MFU of gemm peak", "first losses", "done"),
    "step": (
        "1b micro 2", "1b micro 2, compile=false", "1b micro 4", "3b micro 1", "1b micro 1",
        "1b micro 2, attention=sdpa", "1b micro 4, recompute=selective",
    ),
    "decode": (
        "1b batch 64", "1b batch 1", "1b batch 256", "1b ragged", "7b batch 64", "7b batch 1", "transformers 1b ragged",
        "transformers 1b batch 64", "1b batch 64, mixed lengths", "1b batch 64, greedy", "1b batch 64, no graphs",
        "1b batch 64, compile=false",
    ),
    "kernels": tuple(f"{kernel}: {mode}" for kernel in KERNELS for mode in MODES),
}  # fmt: skip


def errors(found: object, where: str = "") -> Iterator[str]:
    """Yield every finding that is an error, or that was not measured for want of time."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from errors(value, f"{where}/{key}")
    elif isinstance(found, str) and found.startswith(("ERROR", "skipped")):
        yield f"{where}: {found}"


@pytest.mark.integration
@pytest.mark.slow
def test_parts_measure_what_they_say(tmp_path: Path) -> None:
    parts = [name for name in MEASURED if name != "env"]
    settings = {"TINY": "1", "BUDGET": "900", "ONLY": " ".join(name.split("_")[0] for name in parts)}
    places = {"PY": sys.executable, "WORK": str(tmp_path / "a folder"), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", "benchmarks/gpu_session.sh"],
        cwd=ROOT, env={**ENVIRONMENT, **settings, **places}, text=True, capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    results: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: part["rc"] for name, part in results["parts"].items()} == dict.fromkeys(MEASURED, 0), said
    assert list(errors(results)) == [], said
    for part, names in MEASURED.items():
        assert set(names) <= set(results[part]), said
    assert {"trace_train.json.gz", "trace_decode_1b.json.gz"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert all(profile["kernels"] > 0 for profile in profiles(results)) and "step | 1b micro 2: ms" in done.stdout


def profiles(results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the profiles of steps."""
    for part, name in (("step", "1b micro 2"), ("decode", "1b batch 64"), ("decode", "7b batch 64")):
        yield results[part][name]["profile"]


def test_a_device_is_idle_while_no_kernel_runs() -> None:
    spans = [(0.0, 10_000.0, "gemm_a"), (5_000.0, 8_000.0, "flash_b"), (20_000.0, 30_000.0, "gemm_c")]
    found = device_time(spans, times=1)
    assert (found["span ms"], found["busy ms"], found["gaps ms"], found["gaps > 20 us"]) == (30.0, 20.0, 10.0, 1)
    assert found["largest gaps (us, after, before)"] == [(10_000, "gemm_a", "gemm_c")] and found["kernels"] == 3
    assert [line.split()[0] for line in found["by kind"]] == ["20.000", "3.000"] and "gemm" in found["by kind"][0]
