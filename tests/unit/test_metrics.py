"""metrics.jsonl: strict JSON, torn lines, resume; throughput and FLOPs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from steerlm_megatron.errors import UserError
from steerlm_megatron.model.arithmetic import model_flops
from steerlm_megatron.observe.metrics import MetricsWriter, Throughput, peak_flops, read_metrics


def test_lines_are_strict_json_and_nan_stays_visible(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, loss=np.float32(2.5), tokens=np.int64(7), note="ok")
        writer.write(2, {"loss": math.nan, "grad_norm": math.inf, "per_attribute": {"humor": math.nan}}, lr=1e-5)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2, "each line is flushed"

    def refuse(name: str) -> None:
        raise AssertionError(name)

    first, second = (
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert first == {"step": 1, "loss": 2.5, "tokens": 7, "note": "ok"}
    assert second["loss"] is None and second["per_attribute"] == {"humor": None} and second["lr"] == 1e-5
    assert second["nonfinite"] == ["grad_norm", "loss", "per_attribute"]


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, loss=step / 10)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 8, "lo')
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 8))
    writer = MetricsWriter(tmp_path)
    assert path.read_bytes().endswith(b"}\n"), "opening cuts the torn line off"
    assert writer.truncate_after(5) == 2
    writer.write(6, loss=9.0)
    writer.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[-1]["loss"] == 9.0
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_a_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with MetricsWriter(tmp_path) as writer:
        writer.write(3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        MetricsWriter(tmp_path)


def test_a_full_disk_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No space left on device\): mend that"):
            writer.write(1, loss=1.0)


@pytest.mark.parametrize("how", ["file", "folder", "replaced"])
def test_a_file_that_is_taken_away_is_made_anew(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path.parent) as writer:
        for step in (1, 2, 3):
            writer.write(step, loss=1.0)
            if step == 1:
                path.unlink()
                if how == "folder":
                    path.parent.rmdir()
                elif how == "replaced":
                    path.write_text('{"step": 1, "edited": true}\n')
    assert [row["step"] for row in read_metrics(path)] == ([1, 2, 3] if how == "replaced" else [2, 3])
    assert len([line for line in caplog.messages if "was removed or replaced" in line]) == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, active=False) as writer:
        assert writer.write(1, loss=1.0) == {"step": 1, "loss": 1.0}
        assert writer.truncate_after(0) == 0
    assert list(tmp_path.iterdir()) == []


def test_model_flops() -> None:
    # 6·10·100 + 6·2·8·(40² + 60²)
    assert model_flops(10, 2, 8, 100, 40**2 + 60**2) == 6000 + 96 * 5200
    assert model_flops(10, 2, 8, 100, 5200, training=False) == pytest.approx((6000 + 96 * 5200) / 3)


def test_throughput_counts_useful_tokens_and_leaves_pauses_out() -> None:
    now = [100.0]
    meter = Throughput(flops_of=lambda tokens, squares: 10.0 * tokens + squares, peak_flops=1e4, clock=lambda: now[0])
    meter.add(300, target_tokens=100, slot_tokens=400, sum_squared_lengths=1000.0)
    now[0] += 1.0
    with meter.paused():
        now[0] += 50.0
    meter.add(100, target_tokens=60, slot_tokens=400)
    now[0] += 1.0
    rates = meter.take()
    assert rates["tokens_per_sec"] == pytest.approx(200.0)
    assert rates["target_tokens_per_sec"] == pytest.approx(80.0)
    assert rates["step_sec"] == pytest.approx(1.0)
    assert rates["fill"] == pytest.approx(0.5)
    assert rates["flops_per_sec"] == pytest.approx(2500.0)
    assert rates["mfu"] == pytest.approx(0.25)
    meter.add(50)
    now[0] += 1.0
    again = meter.take()
    assert again["tokens"] == 450 and again["tokens_per_sec"] == pytest.approx(50.0) and "fill" not in again


def test_peaks_of_gpus() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == peak_flops("NVIDIA GH200 480GB", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H100 NVL", "bf16") == 835e12 and peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA A10G", "bf16") == 70e12 and peak_flops("NVIDIA RTX A1000", "bf16") is None
    assert peak_flops("cpu", "bf16") is None and peak_flops("NVIDIA H200", "fp32") is None
