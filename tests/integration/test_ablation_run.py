"""``experiment=ablation`` from the corpus to its table, and again: nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli import run_here as run

# As short as possible: what the rows learn does not matter here.
SHORT = (
    "ablation.rows=[sft,shuffled]", "ablation.seeds=[3]", "data.demo_conversations=60",
    "train.row_tokens=256", "train.validate_every_steps=10", "evaluate.max_prompts=3",
    "evaluate.levels=[0,4]", "evaluate.attributes=[humor]", "sampling.max_tokens=4",
    "generation.max_sequence_tokens=256",
    *(f"pipeline.{kind}.train.epochs=0.1" for kind in ("base", "train_ap", "sft", "acsft", "bootstrapped")),
)  # fmt: skip

pytestmark = pytest.mark.integration


def test_an_ablation_ends_in_its_table_and_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ("run", "experiment=ablation", *SHORT, "run_dir=r")
    assert run(*ask) == 0
    said = capsys.readouterr()
    assert "control: shuffled labels" in said.err and "plain SFT" in said.err
    found = json.loads(Path("r/12-report/report.json").read_text())["ablation"]
    assert [row["name"] for row in found["rows"]] == ["sft", "shuffled"]
    assert (found["prompts"], found["seeds"]) == (3, [3])
    assert "humor" in found["rows"][1]["steering"]["attributes"] and set(found["ap"]) == {"regression"}
    lines = [json.loads(line) for line in Path("r/11-evaluate_shuffled_seed3/responses.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 3 and sum(line["best"] for line in lines) == 3
    assert {line["asked"]["humor"] for line in lines} == {0, 4} and all("quality" in line["measured"] for line in lines)

    # Another row trains that row alone.
    assert run(*ask, "ablation.rows=[sft,shuffled,partial]") == 0
    said = capsys.readouterr()
    done = [line for line in said.err.splitlines() if " done in " in line]
    names = [line.split()[5].rstrip(":") for line in done]
    assert names == ["annotated_data_partial_seed3", "acsft_partial_seed3", "evaluate_partial_seed3", "report"], done
