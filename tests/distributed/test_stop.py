"""A run that is asked to stop inside validation or a step ends with the numbers of an undisturbed run when resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.model.arithmetic import forward_flops
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.stages import train as train_stage
from steerlm_megatron.train import engine as engine_module
from steerlm_megatron.train.engine_mcore import MegatronEngine
from tests.distributed.test_checkpoint import config, write_shards
from tests.helpers.dist import run_ranks

pytestmark = pytest.mark.distributed


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class stopped_in_validation:
    """Inside the ``with``, the last rank gets SIGTERM when validation number ``number`` asks for its second batch."""

    def __init__(self, number: int) -> None:
        self.left, self.original = number, MegatronEngine.evaluate

    def __enter__(self) -> None:
        original: Callable[..., dict[str, float]] = self.original

        def evaluate(engine: MegatronEngine, steps: Any) -> dict[str, float]:
            def asked(steps: Any) -> Any:
                for number, batches in enumerate(steps):
                    if number == 1 and self.left == 0 and layout().rank == layout().world_size - 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batches

            self.left -= 1
            return original(engine, asked(steps))

        MegatronEngine.evaluate = evaluate  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        MegatronEngine.evaluate = self.original  # type: ignore[method-assign]


def run(root: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, validation in (("whole", None), ("midway", 1), ("at the end", 2)):
        wanted = config("train_sft", root / name, root / "data")
        wanted.train.global_batch_samples = 4  # gives several batches of validation
        wanted.train.log_every_steps = 2
        if validation is not None:
            with stopped_in_validation(validation):
                try:
                    train_stage.run(wanted)
                except SystemExit as end:
                    out[f"{name} code"] = end.code
            out[f"{name} stopped"] = rows_of(root / name)
        train_stage.run(wanted)
        out[name] = rows_of(root / name)
        out[f"{name} summary"] = json.loads((root / name / "summary.json").read_text())
    return out


def test_validation_gives_way_to_a_signal_and_is_done_when_the_run_goes_on(tmp_path: Path) -> None:
    write_shards(tmp_path / "data")
    found, _ = run_ranks(2, run, tmp_path)

    def at(name: str, key: str) -> dict[int, float]:
        return {row["step"]: row[key] for row in found[name] if key in row}

    for name, stopped, validated in (("midway", 3, []), ("at the end", 6, [3])):
        assert found[f"{name} code"] == 75
        assert (
            found[f"{name} stopped"][-1]["step"] <= stopped and list(at(f"{name} stopped", "valid/loss")) == validated
        )
        for key in ("loss", "valid/loss", "tokens"):
            assert at(name, key) == at("whole", key), (name, key)
        ended, whole = found[f"{name} summary"], found["whole summary"]
        assert ended["status"] == "complete" and ended["counts"]["tokens"] == whole["counts"]["tokens"] > 0
        assert ended["metrics"] == whole["metrics"]
        cost, undisturbed = ended["cost"], whole["cost"]
        assert (cost["attempts"], undisturbed["attempts"]) == (2, 1) and cost["devices"] == 2
        assert cost["tokens"]["trained"] == undisturbed["tokens"]["trained"] == whole["counts"]["tokens"]
        # The validation that was cut short costs what it has computed, and is done again.
        assert cost["tokens"]["validated"] > undisturbed["tokens"]["validated"] and cost["flops"] > undisturbed["flops"]

    cost = found["whole summary"]["cost"]
    assert len(cost["peak_memory_gib_by_rank"]) == 2 and min(cost["peak_memory_gib_by_rank"]) > 0
    assert cost["wall_sec"] < cost["device_sec"] <= 2.01 * cost["wall_sec"] and 0 < cost["work_sec"] < cost["wall_sec"]
    trained = sum(2 * row["flops_per_sec"] * row["step_sec"] for row in found["whole"] if "loss" in row)  # of two steps
    meta = json.loads(next((tmp_path / "whole" / "checkpoints").glob("step_*/meta.json")).read_text())
    model, tokens = ModelConfig(**meta["model"]), cost["tokens"]["validated"]
    least, most = (
        forward_flops(model, meta["vocab_size"], tokens, squares, tokens)
        for squares in (0, tokens * model.max_position)
    )
    assert least < cost["flops"] - trained < most, "the rest is validation, by forward passes"


class stopped_within_step:
    """Inside the ``with``, the last rank gets SIGTERM when it begins micro-batch number ``number`` of this attempt, and
    steps are computed in parts of one micro-batch.
    """

    def __init__(self, number: int) -> None:
        self.left, self.original, self.usual = number, MegatronEngine._forward, engine_module._UNTIL_ASKED

    def __enter__(self) -> None:
        original: Callable[..., Any] = self.original

        def forward(engine: MegatronEngine, *args: Any) -> Any:
            self.left -= 1
            if self.left == 0 and layout().rank == layout().world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(engine, *args)

        engine_module._UNTIL_ASKED = 1
        MegatronEngine._forward = forward  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        engine_module._UNTIL_ASKED = self.usual
        MegatronEngine._forward = self.original  # type: ignore[method-assign]


def run_by_micro_batches(root: Path) -> dict[str, Any]:
    """Run until a stop inside the first step, and inside a later one, and resume each time."""
    out: dict[str, Any] = {}
    for name, number in (("whole", None), ("first", 1), ("later", 8)):
        wanted = config("train_sft", root / name, root / "data")
        with stopped_within_step(number or 0):
            if number is not None:
                try:
                    train_stage.run(wanted)
                except SystemExit as end:
                    out[f"{name} code"] = end.code
                out[f"{name} saved"] = sorted(path.name for path in (root / name / "checkpoints").glob("step_*"))
                began = (root / name / "metrics.jsonl").exists()
                out[f"{name} stopped"] = rows_of(root / name) if began else []
            train_stage.run(wanted)
        out[name] = rows_of(root / name)
    return out


def test_a_signal_is_obeyed_within_a_step_which_is_then_done_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "data")
    found, _ = run_ranks(2, run_by_micro_batches, tmp_path)
    for name in ("first", "later"):
        assert found[f"{name} code"] == 75
        stopped = [row["step"] for row in found[f"{name} stopped"] if "loss" in row]
        assert len(stopped) < 6 and found[f"{name} saved"] == ([f"step_{stopped[-1]:08d}"] if stopped else [])
        for key in ("loss", "grad_norm", "samples", "valid/loss"):
            values = [[(row["step"], row[key]) for row in found[run] if key in row] for run in (name, "whole")]
            assert values[0] == values[1], (name, key)
    assert not [row for row in found["first stopped"] if "loss" in row], "nothing was done, and nothing is saved"
    assert [row for row in found["later stopped"] if "loss" in row], "the steps before it stand"
