"""The recipe ``experiment=smollm2_oasst`` from its first step to its exports, on a random model of the same family."""

from __future__ import annotations

import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm_megatron.config import compose, load
from steerlm_megatron.stages.collect import collect_records
from steerlm_megatron.steer.records import read_records
from tests.helpers.cli import run_here as run
from tests.helpers.commands import summary
from tests.helpers.conversion import shared
from tests.integration.test_hf_base import WORDS
from tests.integration.test_hf_base import folder as folder

ROOT = Path(__file__).parents[2]
RECIPE = "experiment=smollm2_oasst"
LABELS = ("quality", "helpfulness", "creativity", "humor", "toxicity", "violence", "not_appropriate")
# As short as possible: this test does not depend on what is learned.
SHORT = (
    "train.steps=2", "train.validate_every_steps=2", "train.validate_rows=1", "data.valid_fraction=0.3",
    "sampling.max_tokens=6", "generation.max_sequence_tokens=512", "bootstrap.prompts=12", "evaluate.max_prompts=2",
    "evaluate.levels=[0,9]", "evaluate.attributes=[quality]", "evaluate.examples=1", "pipeline.train_ap.train.steps=2",
    "pipeline.train_ap.train.validate_every_steps=2", "pipeline.bootstrapped.train.steps=1",
)  # fmt: skip

pytestmark = pytest.mark.integration


def write_messages(path: Path, trees: int = 16) -> None:
    """Write flat OASST messages: in each tree a prompt with one labelled reply and one of another language."""
    rng, rows = random.Random(1), []
    for tree in range(trees):
        common = {"message_tree_id": f"{tree}", "tree_state": "ready_for_export", "deleted": False}
        labels = {"name": list(LABELS), "value": [round(rng.random(), 2) for _ in LABELS], "count": [3] * len(LABELS)}
        prompt = {"role": "prompter", "text": f"{WORDS[tree % 4]} ({tree})", "parent_id": None, "lang": "en"}
        reply = {"role": "assistant", "text": WORDS[(tree + 1) % 4], "parent_id": f"{tree}", "labels": labels}
        rows += [
            {"message_id": f"{tree}", **prompt, **common},
            {"message_id": f"{tree}a", **reply, "lang": "en", **common},
            {"message_id": f"{tree}b", **reply, "lang": "de", **common},
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_recipe_runs_from_a_published_model_to_folders_of_its_kind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    monkeypatch.chdir(tmp_path)
    write_messages(Path("oasst.jsonl"))
    assert run("run", RECIPE, f"init_from={folder}", "data.input=oasst.jsonl", "run_dir=run", *SHORT) == 0
    counts = summary(Path("run/01-data"))["counts"]
    assert counts["out"] == 16, "replies of another language are left out"
    report = json.loads(Path("run/12-report/report.json").read_text())
    assert set(report["ap"]) == set(LABELS) and list(report["steering"]) == ["quality"]
    assert all("length_mse" in row for row in report["ap"].values())
    export = ("export.format=hf", "export.evaluation=run/11-evaluate")
    assert run("export", "checkpoint=run/03-train_ap", "output=ap", "run_dir=x1", *export) == 0
    assert run("export", "checkpoint=run/10-bootstrapped", "output=model", "run_dir=x2", *export) == 0
    assert transformers.AutoModelForSequenceClassification.from_pretrained("ap").config.num_labels == 7
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, quality=3)
    assert "Hi<|im_end|>" in asked
    assert "of the length" in Path("ap/README.md").read_text()
    check_measuring_example(capsys)


def check_measuring_example(capsys: pytest.CaptureFixture[str]) -> None:
    """What the example measures with ``transformers`` alone are ``annotate``'s values of the same responses."""
    example = runpy.run_path(str(ROOT / "examples" / "steer_with_transformers.py"))["main"]
    Path("prompts.txt").write_text(f"{WORDS[0]}\n\n{WORDS[1]}\n")

    def said(*more: str) -> str:
        capsys.readouterr()
        example(["model", "--prompts", "prompts.txt", "--levels", "0", "9", "--max-tokens", "6", *more])
        return capsys.readouterr().out

    *measured, last = said("--predictor", "ap").splitlines()
    assert last.startswith("rank correlation of level and mean: ")
    answers = [text.removesuffix("\n") for text in re.split(r"^quality=\d: ", said(), flags=re.MULTILINE)[1:]]
    messages = [
        [{"role": "user", "content": WORDS[i % 2]}, {"role": "assistant", "content": answer}]
        for i, answer in enumerate(answers)
    ]
    rows = [{"id": f"{i}", "messages": each} for i, each in enumerate(messages)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("annotate", "checkpoint=ap", "input=answers.jsonl", "output=scored.jsonl", "run_dir=scored") == 0
    found = [record.messages[-1].attributes for record in read_records("scored.jsonl")]
    values = [attributes["quality"] for attributes in found if attributes]
    for line, level, pair in zip(measured, (0, 9), (values[:2], values[2:]), strict=True):
        assert line == f"quality={level}: measured {sum(pair) / 2:.2f} over 2 responses"


def test_the_real_release_has_what_the_recipe_needs(tmp_path: Path) -> None:
    source = shared("oasst1_en_val_messages.jsonl.zst")
    config = load.from_container(
        compose.composed("run", [RECIPE, "init_from=SmolLM2", f"data.input={source}", "run_dir=run"])
    )
    assert config.tokenizer.path == "SmolLM2"
    splits, report = collect_records(config, tmp_path)
    first: dict[str, set[str]] = {}
    labelled = 0
    for split, files in splits.items():
        records = list(read_records(files[0]))
        first[split] = {record.messages[0].content for record in records}
        labelled += sum(bool(m.attributes) and m.weight > 0 for r in records for m in r.messages)
    assert labelled > 400 and report["skipped"]["messages"].get("language", 0) == 0
    assert first["train"] and first["valid"] and not first["train"] & first["valid"]
    assert 0.2 < len(first["valid"]) / sum(map(len, first.values())) < 0.4


def test_make_asks_for_the_corpus_before_anything_is_fetched(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "smollm2.sh"), sys.executable, "", "1"],
        cwd=tmp_path, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "OASST=FILE" in done.stderr and "OpenAssistant/oasst1" in done.stderr
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "smollm2.sh"), sys.executable, "nowhere.jsonl", "1"],
        cwd=tmp_path, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "nowhere.jsonl: no such file" in done.stderr
    assert not any(tmp_path.iterdir())
