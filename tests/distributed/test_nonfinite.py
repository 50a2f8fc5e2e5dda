"""A step whose loss or gradients are not finite changes nothing, and its samples are named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.test_checkpoint import config, write_shards

from steerlm_megatron.config.schema import ParallelConfig
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.stages import train as train_stage
from steerlm_megatron.train.engine_mcore import MegatronEngine
from tests.helpers.dist import run_ranks
from tests.helpers.engines import Case, make, shards_of, step_batches

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "DP2": ParallelConfig(data=2),
    "TP2": ParallelConfig(tensor=2),
    "PP2": ParallelConfig(pipeline=2),
}
CASES = {name: Case("ap", layout) for name, layout in LAYOUTS.items()} | {
    "DP2 ZeRO 2": Case("ap", zero=2),
    "DP2 ZeRO 3": Case("ap", zero=3),
}


def parameters(engine: Any) -> torch.Tensor:
    return torch.cat([shard.tensor.flatten().clone() for shard in shards_of(engine).values()])


def poisoned(engine: Any) -> list[Any]:
    """Return the batches of step 0, with a label whose square overflows on the last data-parallel rank."""
    batches = step_batches(0)
    if layout().dp_rank == layout().dp_size - 1:
        batches[-1].values_PA[0, 0] = 1e30
    return batches


def run(case: Case) -> dict[str, Any]:
    """Run steps 1 and 2 with a poisoned step between them, and without it."""
    engine = make(case)
    engine.train_step(step_batches(1))
    before, lr = parameters(engine), engine.optimizer.param_groups[0]["lr"] if engine.optimizer.param_groups else None
    state = engine.schedule.num_steps
    bad = engine.train_step(poisoned(engine))
    unchanged = torch.equal(before, parameters(engine)) and engine.schedule.num_steps == state
    same_lr = lr is None or engine.optimizer.param_groups[0]["lr"] == lr
    after = engine.train_step(step_batches(2))
    plain = make(case)
    plain.train_step(step_batches(1))
    expected = plain.train_step(step_batches(2))
    return {
        "skipped": bad.skipped,
        "bad": bad.bad_batches,
        "where": (layout().dp_rank == layout().dp_size - 1, layout().is_last_stage),
        "count": len(step_batches(0)),
        "unchanged": unchanged and same_lr,
        "finite": torch.isfinite(parameters(engine)).all().item(),
        "same": torch.equal(parameters(engine), parameters(plain)) and after == expected and not after.skipped,
    }


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_updated_and_the_batch_is_named(name: str) -> None:
    for rank in run_ranks(2, run, CASES[name]):
        assert rank["skipped"] and rank["unchanged"] and rank["finite"], rank
        assert rank["bad"] == ([rank["count"] - 1] if rank["where"] == (True, True) else []), rank
        assert rank["same"], "the step after a skipped one is what it would have been without it"


# ---- the loop's policies


class poison:
    """Inside the ``with``, the labels of the ``wanted`` steps are so large that their squares overflow."""

    def __init__(self, *wanted: int) -> None:
        self.wanted, self.calls, self.original = wanted, 0, MegatronEngine.train_step

    def __enter__(self) -> None:
        def train_step(engine: MegatronEngine, batches: Any, stopping: Any) -> Any:
            self.calls += 1
            if self.calls in self.wanted:
                batches[0].values_PA[:] = 1e30
            return self.original(engine, batches, stopping)

        MegatronEngine.train_step = train_step

    def __exit__(self, *_: object) -> None:
        MegatronEngine.train_step = self.original


def policies(root: Path) -> dict[str, Any]:
    """Do one run per policy, each with steps 2 and 3 poisoned."""
    write_shards(root / "data")
    out: dict[str, Any] = {}
    for name, options in (
        ("raise", {}),
        ("skip", {"nonfinite": "skip"}),
        ("too many", {"nonfinite": "skip", "nonfinite_in_a_row": 1}),
        ("time", {"max_minutes": 0.0}),
    ):
        wanted = config("train_ap", root / name, root / "data")
        wanted.train = dataclasses.replace(wanted.train, validate_every_steps=100, **options)
        if name == "skip":
            wanted.profile.steps = [4, 5]
        try:
            with poison(*() if name == "time" else (2, 3)):
                out[name] = train_stage.run(wanted).steps
        except (FloatingPointError, SystemExit) as error:
            out[name] = str(error)
        out[f"{name} log"] = (root / name / "log" / "rank_0.log").read_text()
        rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        out[f"{name} rows"] = [row for row in rows if "skipped_steps" in row or row.get("loss") is not None]
    out["trace"] = json.loads((root / "skip" / "profile" / "rank_0.json").read_text())
    return out


def test_policies(tmp_path: Path) -> None:
    (found,) = run_ranks(1, policies, tmp_path)
    assert "step 2: loss inf" in found["raise"] and "train.nonfinite=skip" in found["raise"]
    assert "Samples: c" in found["raise"], "the samples are named"
    assert found["skip"] == 6
    assert [row["skipped_steps"] for row in found["skip rows"] if "skipped_steps" in row] == [1, 2]
    assert [row["step"] for row in found["skip rows"] if row.get("loss") is not None] == [1, 4, 5, 6]
    assert "Skipped (2 so far)" in found["skip log"]
    assert "2 steps in a row, above train.nonfinite_in_a_row=1" in found["too many"]
    assert any("linear" in str(event.get("name", "")).lower() for event in found["trace"]["traceEvents"])
    timed = found["skip rows"][-1]
    assert 0 < timed["sec/forward_backward"] + timed["sec/optimizer"] < timed["step_sec"] * 1.01 and "sec/data" in timed
    assert found["time"] == "75" and "stopped by train.max_minutes=0 after step 1" in found["time log"]
