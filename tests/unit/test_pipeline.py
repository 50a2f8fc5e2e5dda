"""The keys and paths on which the fingerprint of a step of ``steerlm run`` depends."""

from __future__ import annotations

from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.schema import KEYS, Config, DataConfig
from steerlm_megatron.stages.pipeline import relative_to_run, what_is_read
from steerlm_megatron.stages.pipeline_steps import STEPS


def test_a_step_comes_after_what_it_needs_and_depends_on_keys_that_are_there() -> None:
    before: set[str] = set()
    for name, step in STEPS.items():
        assert name == step.name and step.command in COMMANDS
        depends = step.depends_on(Config())
        assert depends.keys() <= KEYS.keys() and "tracking.wandb" not in depends and "run_dir" not in depends
        assert set(step.after) <= before, name
        before.add(name)
    assert set(STEPS["report"].after) == before - {"report"}


def test_the_embedded_corpus_depends_on_the_seed_and_others_do_not() -> None:
    demo = Config(data=DataConfig(source="demo"))
    assert "train.seed" in STEPS["data"].depends_on(demo)
    assert "train.seed" not in STEPS["data"].depends_on(Config(data=DataConfig(source="oasst")))
    assert "train.seed" in STEPS["acsft"].depends_on(Config()) and "train.seed" not in STEPS["annotate"].depends_on(
        demo
    )


def test_a_run_folder_has_no_part_in_its_steps_and_nothing_else_is_cut() -> None:
    def config(root: str) -> dict[str, object]:
        return {
            "train": {"nonfinite": "raise"},
            "data": {"input": [f"{root}/01-data/a.jsonl", "runs/other.jsonl"], "output_dir": root},
        }

    names = ("r", "runs/run", "/big/disk/run")
    first, *others = (relative_to_run(config(root), root) for root in names)
    assert first["train"] == {"nonfinite": "raise"} and first["data"]["input"] == [
        "/01-data/a.jsonl",
        "runs/other.jsonl",
    ]
    assert all(other == first for other in others)


def test_a_base_counts_by_its_content_and_not_by_its_path() -> None:
    spelt = [
        what_is_read(STEPS["sft"], Config(command="train_sft", init_from=base), base, "run") for base in ("m", "./m/")
    ]
    assert spelt[0] == spelt[1] and "init_from" not in spelt[0]
    own = what_is_read(STEPS["bootstrapped"], Config(command="train_sft", init_from="run/07-acsft"), "m", "run")
    assert own["init_from"] == "/07-acsft"
