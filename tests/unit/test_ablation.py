"""An ablation: its steps and what each takes, its controls, its table over prompts and seeds, and its report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steerlm_megatron.config.ablation import ROWS
from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.load import from_container
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.intervals import Resamples, mean_over_seeds
from steerlm_megatron.observe.runfolder import RunFolder
from steerlm_megatron.report.terminal import terminal_table
from steerlm_megatron.report.write import write_report
from steerlm_megatron.runtime.parallel import Layout
from steerlm_megatron.stages.ablation_report import Responses, ablation
from steerlm_megatron.stages.label_controls import partial_labels, shuffled_labels
from steerlm_megatron.stages.pipeline_run import Run
from steerlm_megatron.stages.pipeline_steps import steps_of
from steerlm_megatron.stages.session import Session
from steerlm_megatron.steer.records import Conversation, Message
from tests.helpers.cli import run_here


def run_of(**sections: Any) -> Run:
    attributes = {"names": ["quality", "humor"], "max_level": 4}
    config = from_container({"command": "run", "attributes": attributes, "evaluate": {"judge": "demo"}, **sections})
    alone = Layout(rank=0, world_size=1, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1)
    return Run(config, Session(config, alone, RunFolder("run", "run", rank=1)), steps_of(config))


# ---- steps


@pytest.mark.parametrize("rows", [list(ROWS), ["bootstrapped"], ["sft"], ["generative", "shuffled"]])
@pytest.mark.parametrize("judge", ["demo", "ap"])
def test_every_step_comes_after_what_its_configuration_names(rows: list[str], judge: str) -> None:
    run = run_of(ablation={"rows": rows, "seeds": [5]}, bootstrap={"rounds": 2}, evaluate={"judge": judge})
    before: list[str] = []
    for name, step in run.steps.items():
        assert name == step.name and step.command in COMMANDS and set(step.after) <= set(before), name
        config = step.config(run)
        named = [config.init_from, config.checkpoint, config.ap_checkpoint, config.input, config.data.train]
        named += [config.evaluate.models.sft, config.evaluate.models.acsft]
        folders = {str(run.folder(other)): other for other in run.steps}
        for path in (one for some in named if some for one in ([some] if isinstance(some, str) else some)):
            owner = next(other for folder, other in folders.items() if f"{path}/".startswith(f"{folder}/"))
            assert owner in step.after, f"{name} takes {path}"
        before.append(name)
    assert len({str(run.folder(name)) for name in run.steps}) == len(run.steps)
    assert ("train_ap_judge" in run.steps) == (judge == "ap")
    assert set(run.steps["report"].after) == set(before) - {"report"}


def test_rows_share_what_does_not_differ() -> None:
    run = run_of(ablation={"rows": list(ROWS), "seeds": [1, 2, 3]}, bootstrap={"rounds": 2})
    made = Counter(step.kind for step in run.steps.values())
    assert made["data"] == made["base"] == 1
    assert made["train_ap"] == made["annotate"] == 3 * 2, "one of each kind per seed"
    assert made["evaluate"] == 3 * (2 + 8) and made["bootstrapped"] == 3 * 2


def test_rows_differ_in_what_they_are_about() -> None:
    run = run_of(ablation={"rows": list(ROWS), "seeds": [7]}, sampling={"seed": 3})
    found = {name: step.config(run) for name, step in run.steps.items()}
    assert found["sft_seed7"].attributes.names == [] and found["acsft_human_seed7"].attributes.names
    data = {row: found[f"acsft_{row}_seed7"].data.train for row in ("human", "predicted", "shuffled", "partial")}
    assert len(set(map(str, data.values()))) == 4 and data["human"] == found["sft_seed7"].data.train
    assert (found["train_ap_seed7"].ap.kind, found["train_ap_generative_seed7"].ap.kind) == ("regression", "generative")
    assert all(config.train.seed == 7 for name, config in found.items() if "sft_" in name or "train_ap" in name)
    seeds = [found[name].sampling.seed for name in ("bootstrap_seed7", "evaluate_sft_seed7", "evaluate_human_seed7")]
    assert seeds == [7000, 7000, 7000] and found["data"].train.seed != 7


def test_overrides_hold_for_a_kind_a_row_and_one_step() -> None:
    own = {"acsft": {"train": {"steps": 5}}, "acsft_human": {"train": {"steps": 6}},
           "acsft_human_seed2": {"train": {"steps": 7}}}  # fmt: skip
    run = run_of(ablation={"rows": ["human", "predicted"], "seeds": [1, 2]}, pipeline=own)
    steps = [
        run.steps[f"acsft_{name}"].config(run).train.steps for name in ("predicted_seed1", "human_seed1", "human_seed2")
    ]
    assert steps == [5, 6, 7]


def test_the_share_of_a_part_is_in_the_fingerprint_of_its_row_alone() -> None:
    one, two = (run_of(ablation={"rows": ["partial", "predicted"], "seeds": [1], "partial": p}) for p in (0.5, 0.25))
    differing = [
        name for name, step in one.steps.items()
        if step.depends_on(step.config(one)) != two.steps[name].depends_on(two.steps[name].config(two))
    ]  # fmt: skip
    assert differing == ["annotated_data_partial_seed1"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"rows": ["sft"], "seeds": []}, "ablation.seeds"),
        ({"rows": ["sft"], "seeds": [1, 1]}, "ablation.seeds"),
    ],
)
def test_seeds_that_cannot_be_are_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_of(ablation=section)


def test_a_row_that_does_not_exist_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("run", "experiment=ablation", "ablation.rows=[sft,best]") == 2
    assert "has best, which is not one of: sft human predicted" in capsys.readouterr().err
    assert run_here("run", "experiment=ablation", "pipeline.acsft_shufled.train.epochs=3.0", "run_dir=nowhere") == 2
    said = capsys.readouterr().err
    assert "acsft_shufled unknown; legal: data base" in said and "did you mean acsft_shuffled?" in said


# ---- controls


def records(count: int) -> list[Conversation]:
    return [
        Conversation(
            f"r{i}",
            (
                Message("user", f"q{i}"),
                Message("assistant", f"a{i}", {"quality": float(i), "humor": i / 2}),
                Message("user", "more"),
                Message("assistant", "context", None, 0),
            ),
        )
        for i in range(count)
    ]


def labels(some: list[Conversation]) -> list[Any]:
    return [message.attributes for record in some for message in record.messages if message.role == "assistant"]


def test_shuffled_labels_are_those_that_were_there_at_other_texts() -> None:
    before = records(50)
    after = shuffled_labels(before, seed=3)
    assert [[m.content for m in r.messages] for r in after] == [[m.content for m in r.messages] for r in before]
    assert Counter(map(str, labels(after))) == Counter(map(str, labels(before)))
    moved = sum(a != b for a, b in zip(labels(after)[::2], labels(before)[::2], strict=True))
    assert moved > 40 and labels(after)[1::2] == [None] * 50
    assert shuffled_labels(before, 3) == after != shuffled_labels(before, 4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_part_of_the_labels_stays(share: float) -> None:
    before = records(400)
    after = partial_labels(before, share, seed=3)
    kept = sum(len(one or {}) for one in labels(after))
    assert kept == pytest.approx(800 * share, abs=60 if 0 < share < 1 else 0)
    for old, new in zip(labels(before), labels(after), strict=True):
        assert new is None or (new and new.items() <= old.items())
    assert partial_labels(before[200:], share, 3) == after[200:], "a record's labels depend on no other record"


# ---- the table


def test_an_interval_over_seeds_and_prompts_covers_the_mean() -> None:
    rng, held, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        table = rng.normal(0, 1, (1, 40)) + rng.normal(0, 0.1, (8, 1)) + rng.normal(0, 0.5, (8, 40))
        low, high = mean_over_seeds(table, resamples=400)
        held += low <= 0 <= high
    assert 0.9 <= held / trials <= 0.99


def test_an_interval_of_one_seed_is_that_over_prompts() -> None:
    values = np.random.default_rng(1).normal(size=(1, 60))
    over_prompts = Resamples(range(60)).mean(values[0])
    assert mean_over_seeds(values) == pytest.approx((over_prompts["low"], over_prompts["high"]), abs=0.05)
    assert all(np.isnan(mean_over_seeds(values[:, :1])))


BEST = {"quality": 4, "humor": 0}


def responses(row: str, seed: int, quality: float, slope: float, prompts: int = 30) -> list[dict[str, Any]]:
    """Return measured responses at the best levels and on the curve of humor, with noise that each prompt keeps."""
    rng = np.random.default_rng(len(row) * 10 + seed)
    lines = []
    for asked in (BEST, {"quality": 4, "humor": 2}, {"quality": 4, "humor": 4}):
        for prompt in range(prompts):
            noise = float(rng.normal(0, 0.1))
            measured = {"quality": quality + prompt % 3 + noise, "humor": slope * asked["humor"] + noise}
            lines.append({"prompt": f"p{prompt}", "asked": asked, "best": asked is BEST, "measured": measured})
    return lines


def table() -> dict[str, Any]:
    rows = {
        "sft": (1.0, None), "human": (1.5, 0.5), "predicted": (1.5, 0.8), "bootstrapped": (1.2, 0.8),
        "bootstrapped_2": (1.6, 0.8), "shuffled": (1.0, 0.0),
    }  # fmt: skip
    found: Responses = {
        (row, seed): [
            {**line, "asked": None} if slope is None else line
            for line in responses(row, seed, quality, slope or 0.0)
            if slope is not None or line["best"]
        ]
        for row, (quality, slope) in rows.items()
        for seed in (1, 2)
    }
    return ablation(found, tuple(rows), (1, 2), "quality")


def test_rows_are_compared_over_prompts_and_seeds() -> None:
    found = table()
    by_name = {row["name"]: row for row in found["rows"]}
    assert (found["prompts"], found["seeds"]) == (30, [1, 2])
    assert {name: (row.get("over"), row.get("gain", {}).get("verdict")) for name, row in by_name.items()} == {
        "sft": (None, None), "human": ("sft", "higher"), "predicted": ("human", "not told apart"),
        "bootstrapped": ("predicted", "lower"), "bootstrapped_2": ("bootstrapped", "higher"),
        "shuffled": ("predicted", "lower"),
    }  # fmt: skip
    assert by_name["human"]["gain"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert "steering" not in by_name["sft"]
    humor = {name: row["steering"]["attributes"]["humor"] for name, row in by_name.items() if "steering" in row}
    assert humor["predicted"]["mean"] == pytest.approx(0.8, abs=0.02) and humor["predicted"]["verdict"] == "steers"
    assert humor["shuffled"]["mean"] == pytest.approx(0.0, abs=0.02) and humor["shuffled"]["verdict"] == "flat"
    assert len(humor["human"]["by_seed"]) == 2


def test_prompts_that_a_seed_lacks_are_left_out() -> None:
    lines = {("sft", seed): responses("sft", seed, 1.0, 0.0) for seed in (1, 2)}
    lines["sft", 2] = [line for line in lines["sft", 2] if line["prompt"] != "p3"]
    assert ablation(lines, ("sft",), (1, 2), "quality")["prompts"] == 29


def test_a_report_has_the_table_beside_the_papers(tmp_path: Path) -> None:
    found = table() | {"ap": {"<b>": {"quality": {"mse_by_seed": [0.5, 0.7], "mse": 0.6, "constant_mse": 1.0, "n": 9}}}}
    html, path = write_report(tmp_path, {"ablation": found, "judge": "demo"})
    page = html.read_text()
    assert "Ablation" in page and "102.7" in page and "not told apart" in page and "control: shuffled labels" in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "Not measured in this run: the quality" not in page, "an ablation has no section without numbers"
    data = json.loads(path.read_text())
    assert {name: check["held"] for name, check in data["checks"].items()} == {
        "ablation_order": False, "control_flat": True, "conditioned_steers": True, "kinds_beat_constant": True,
    }  # fmt: skip
    console = Console(width=80, record=True, file=(tmp_path / "said").open("w"))
    console.print(terminal_table(data))
    said = console.export_text()
    assert "…" not in said and "+ bootstrapping, round 2" in said
