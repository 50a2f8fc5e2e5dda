"""What makes a step of ``steerlm run`` the same step."""

from __future__ import annotations

from steerlm_megatron.stages.pipeline import _without_root


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
