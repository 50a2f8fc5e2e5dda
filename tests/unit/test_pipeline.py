"""The steps of ``steerlm run``: their order and folders, their inputs, and what their fingerprints depend on."""

from __future__ import annotations

from typing import Any

import pytest

from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.load import from_container
from steerlm_megatron.config.schema import KEYS, BootstrapConfig, Config, DataConfig
from steerlm_megatron.observe.runfolder import RunFolder
from steerlm_megatron.runtime.parallel import Layout
from steerlm_megatron.stages.evaluate import models_of
from steerlm_megatron.stages.pipeline import relative_to_run, what_is_read
from steerlm_megatron.stages.pipeline_run import Run
from steerlm_megatron.stages.pipeline_steps import steps_of
from steerlm_megatron.stages.session import Session

STEPS = steps_of(Config())


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_step_comes_after_what_it_needs_and_depends_on_keys_that_are_there(rounds: int) -> None:
    before: set[str] = set()
    steps = steps_of(Config(bootstrap=BootstrapConfig(rounds=rounds)))
    for name, step in steps.items():
        assert name == step.name and step.command in COMMANDS
        depends = step.depends_on(Config())
        assert depends.keys() <= KEYS.keys() and "tracking.wandb" not in depends and "run_dir" not in depends
        assert set(step.after) <= before, name
        before.add(name)
    assert set(steps["report"].after) == before - {"report"}


def run_of(**sections: Any) -> Run:
    """Return a run of a small model, whose folder nothing is written into."""
    attributes = {"names": ["quality", "humor"], "max_level": 4}
    config = from_container({"command": "run", "attributes": attributes, **sections})
    alone = Layout(rank=0, world_size=1, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1)
    return Run(config, Session(config, alone, RunFolder("run", "run", rank=1)), steps_of(config))


def test_folders_of_one_round_keep_their_names_in_a_run_of_several() -> None:
    one = run_of()
    names = {name: one.folder(name).name for name in STEPS}
    assert list(names.values()) == [
        "01-data", "02-base", "03-train_ap", "04-annotate", "05-annotated_data", "06-sft", "07-acsft", "08-bootstrap",
        "09-bootstrapped_data", "10-bootstrapped", "11-evaluate", "12-report",
    ]  # fmt: skip
    three = run_of(bootstrap={"rounds": 3})
    assert {name: three.folder(name).name for name in STEPS} == names
    assert [three.folder(name).name for name in three.steps if name not in STEPS] == [
        "08-bootstrap_2", "09-bootstrapped_data_2", "10-bootstrapped_2",
        "08-bootstrap_3", "09-bootstrapped_data_3", "10-bootstrapped_3",
    ]  # fmt: skip
    assert list(three.steps)[-5:] == [
        "bootstrap_3", "bootstrapped_data_3", "bootstrapped_3", "evaluate", "report"
    ]  # fmt: skip


def test_a_round_samples_from_the_model_of_the_round_before_and_trains_it() -> None:
    run = run_of(bootstrap={"rounds": 3}, sampling={"seed": 7})
    found = {name: step.config(run) for name, step in run.steps.items() if name.startswith(("bootstrap", "evaluate"))}
    models = ["run/07-acsft", "run/10-bootstrapped", "run/10-bootstrapped_2"]
    for number, model in enumerate(models, 1):
        end = f"_{number}" if number > 1 else ""
        sampled, trained = found[f"bootstrap{end}"], found[f"bootstrapped{end}"]
        assert (sampled.checkpoint, sampled.input) == (model, "run/04-annotate/train.jsonl")
        assert sampled.output == f"run/08-bootstrap{end}/bootstrap.jsonl" and sampled.sampling.seed == 6 + number
        assert trained.init_from == model and trained.data.train == f"run/09-bootstrapped_data{end}/shards/train"
        assert not trained.data.weights
    compared = models_of(found["evaluate"])
    assert list(compared) == ["sft", "acsft", "bootstrapped", "bootstrapped_2", "bootstrapped_3"]
    assert list(compared.values())[1:] == [*models, "run/10-bootstrapped_3"]


def test_a_round_may_train_on_a_share_of_annotated_data() -> None:
    run = run_of(bootstrap={"rounds": 2, "mix": 0.25})
    for name in ("bootstrapped", "bootstrapped_2"):
        data = run.steps[name].config(run).data
        assert data.weights == [0.75, 0.25]
        assert data.train == [
            f"run/09-{name.replace('ped', 'ped_data')}/shards/train", "run/05-annotated_data/shards/train"
        ]  # fmt: skip


def test_overrides_of_the_first_round_hold_for_the_later_ones() -> None:
    own = {"bootstrapped": {"train": {"steps": 5}, "optim": {"lr": 0.5}}, "bootstrapped_2": {"train": {"steps": 7}}}
    run = run_of(bootstrap={"rounds": 3}, pipeline=own)
    found = [run.steps[name].config(run) for name in ("bootstrapped", "bootstrapped_2", "bootstrapped_3")]
    assert [(one.train.steps, one.optim.lr) for one in found] == [(5, 0.5), (7, 0.5), (5, 0.5)]


def test_more_rounds_run_no_complete_step_again() -> None:
    one, two = run_of(), run_of(bootstrap={"rounds": 2})
    for name in ("acsft", "bootstrap", "bootstrapped", "evaluate"):
        read = [what_is_read(run.steps[name], run.steps[name].config(run), None, "run") for run in (one, two)]
        assert (read[0] == read[1]) == (name != "evaluate"), name


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
