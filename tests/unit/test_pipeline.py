"""What makes a step of ``steerlm run`` the same step."""

from __future__ import annotations

from dataclasses import fields

from steerlm_megatron.cli import COMMANDS
from steerlm_megatron.config.schema import Config
from steerlm_megatron.stages.pipeline import _without_root
from steerlm_megatron.stages.pipeline_steps import STEPS


def test_a_step_comes_after_what_it_needs_and_reads_what_there_is() -> None:
    sections, before = {field.name for field in fields(Config)}, set()
    for name, step in STEPS.items():
        assert name == step.name and step.reads <= sections and step.command in COMMANDS
        assert set(step.after) <= before, name
        before.add(name)
    assert set(STEPS["report"].after) == before - {"report"}


def test_a_run_folder_has_no_part_in_its_steps_and_nothing_else_is_cut() -> None:
    def config(root: str) -> dict[str, object]:
        return {
            "train": {"nonfinite": "raise"},
            "data": {"input": [f"{root}/01-data/a.jsonl", "runs/other.jsonl"], "output_dir": root},
        }

    names = ("r", "runs/run", "/big/disk/run")
    first, *others = (_without_root(config(root), root) for root in names)
    assert first["train"] == {"nonfinite": "raise"} and first["data"]["input"] == [
        "/01-data/a.jsonl",
        "runs/other.jsonl",
    ]
    assert all(other == first for other in others)
