"""What is read of run folders for a report: figures, lineage, training curves, differing keys, and what is lacking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.write.preprocess import preprocess
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.cost import CostMeter, total
from steerlm_megatron.report.write import write_report
from steerlm_megatron.stages.report_lineage import distributions, followed, lineage, read_yaml, step_folders
from steerlm_megatron.stages.report_runs import (
    compared,
    differing_keys,
    names_of,
    of_pipeline,
    read_runs,
    training_curve,
)
from steerlm_megatron.steer.attributes import AttributeSchema
from tests.helpers import corpora
from tests.helpers.cli import run_here

SCHEMA = AttributeSchema("own", ("quality", "humor"), 4)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content)
    path.write_text(text, encoding="utf-8")


def step(root: Path, name: str, command: str, counts: dict[str, Any] | None = None, **config: Any) -> Path:
    """Make the folder of a step that is complete."""
    folder = root / name
    write(folder / "config.yaml", {"command": command, **config})
    write(folder / "summary.json", {"status": "complete", "command": command, "counts": counts or {}, "wall_sec": 2.0})
    return folder


def trained(folder: Path, losses: list[float], **meta: Any) -> None:
    lines = [{"step": i, "loss": loss, "tokens_per_sec": 100.0 * i} for i, loss in enumerate(losses, 1)]
    lines.append({"step": len(losses), "valid/loss": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "checkpoints/step_00000003/meta.json", {"step": len(losses), "sha256": folder.name, **meta})


def shards(folder: Path, values: list[float]) -> None:
    record = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "attributes": {"quality": 0.0}},
    ]
    lines = []
    for number, value in enumerate(values):
        record[1]["attributes"] = {"quality": value}
        lines.append(json.dumps({"id": str(number), "messages": record}) + "\n")
    path = folder.parent / f"{folder.name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    data = DataConfig(valid_fraction=0.0, workers=1)
    preprocess({"train": [str(path)]}, folder / "shards", corpora.tokenizer("bytes"), SCHEMA, corpora.STEERLM, data)


def a_run(root: Path, rate: float = 1e-3, gain: float = 0.0) -> Path:
    """Make a folder of ``steerlm run`` with the files that a report reads."""
    write(
        root / "config.yaml", {"command": "run", "run_dir": str(root), "optim": {"lr": rate}, "data": {"source": "x"}}
    )
    versions = {"versions": {"steerlm_megatron": "1", "torch": "2"}}
    write(root / "summary.json", {"status": "complete", "command": "run", "timings": {"data": 1.0}, **versions})
    shards(step(root, "01-data", "preprocess", {"in": 4, "out": 3}, data={"source": "oasst", "input": ["/c/o.jsonl"]}),
           [0.0, 2.5, 3.9])  # fmt: skip
    ap = step(root, "03-train_ap", "train_ap", init_from="owner/base", data={"train": f"{root}/01-data/shards/train"})
    base = {"name": "owner/base", "revision": "0123456789abcdef", "licence": {"license": "mit"}}
    trained(ap, [2.0, 1.0], base=base, label_counts={"quality": 3}, loader={"consumed_samples": 6, "tokens": 70})
    model = step(root, "07-acsft", "train_sft", init_from="owner/base", data={"train": f"{root}/01-data/shards/train"})
    trained(model, [3.0, 2.0])
    evaluated = step(root, "11-evaluate", "evaluate", ap_checkpoint=f"{root}/03-train_ap",
                     evaluate={"models": {"acsft": f"{root}/07-acsft"}, "prompts": "p.jsonl"})  # fmt: skip
    write(evaluated / "evaluation.json", {
        "judge": "the AP", "judges": {"ap": "the AP"}, "quality_attribute": "quality", "max_level": 4,
        "quality": {"acsft": 2.0}, "quality_detail": {"acsft": {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 6}},
    })  # fmt: skip
    lines = []
    for number in range(6):
        measured = {"quality": 2.0 + gain + number % 2}
        lines.append({"model": "acsft", "prompt": f"p{number}", "asked": {"quality": 4}, "best": True,
                      "text": f"answer {number}", "measured": measured, "judges": {"ap": measured}})  # fmt: skip
    (evaluated / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = [{"id": f"p{n}", "messages": [{"role": "user", "content": f"question {n}"}]} for n in range(6)]
    (evaluated / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return a_run(folder / "a"), a_run(folder / "b", 2e-3, 1.0)


def test_a_run_folder_has_all_that_its_steps_left(runs: tuple[Path, Path]) -> None:
    (run,) = read_runs([str(runs[0])])
    results = run.results
    assert run.name == "a" and not run.lacking and not run.broken
    assert results["quality"] == {"acsft": 2.0} and len(results["responses"]) == 6
    assert results["prompt_texts"]["p3"] == "question 3" and results["timings"] == {"data": 1.0}
    assert results["training"]["03-train_ap"]["loss"] == [[1, 2.0], [2, 1.0]]
    assert results["training"]["03-train_ap"]["valid"] == [[2, 1.5]]
    assert results["training"]["03-train_ap"]["tokens_per_sec"] == 150.0
    assert results["distributions"]["quality"]["01-data"] == {"mean": pytest.approx(6.4 / 3), "levels": [1, 0, 1, 0, 1]}
    assert set(results["distributions"]) == {"quality"}, "of humor there is no value"
    told = {one["name"]: one for one in results["lineage"]["steps"]}
    assert list(told) == ["01-data", "03-train_ap", "07-acsft", "11-evaluate"]
    assert (told["01-data"]["in"], told["01-data"]["out"]) == (4, 3)
    assert told["03-train_ap"]["from"] == ["owner/base", "01-data"] and told["03-train_ap"]["labels"] == 3
    assert (told["03-train_ap"]["conversations"], told["03-train_ap"]["tokens"]) == (6, 70)
    assert told["11-evaluate"]["from"] == ["03-train_ap", "07-acsft", "p.jsonl"]
    sources = {one["name"]: (one["kind"], one["licence"]) for one in results["lineage"]["sources"]}
    assert sources["OpenAssistant Conversations (OASST): o.jsonl"] == ("corpus", "Apache-2.0")
    assert sources["owner/base at 0123456789ab"] == ("base model", "mit")
    assert of_pipeline(runs[0], {"07-acsft"})["training"].keys() == {"07-acsft"}


def test_lineage_is_followed_from_a_single_step_and_after_a_move(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (run,) = read_runs([str(runs[0] / "11-evaluate")])
    assert [one["name"] for one in run.results["lineage"]["steps"]] == [
        "01-data", "03-train_ap", "07-acsft", "11-evaluate"
    ]  # fmt: skip
    for name in ("config.yaml", "summary.json"):  # the configurations name the folder from which the run was moved
        for path in runs[0].rglob(name):
            target = tmp_path / "moved" / path.relative_to(runs[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text().replace(str(runs[0]), "/gone/run"))
    steps, made = followed(tmp_path / "moved")
    assert lineage(steps, made)["steps"][1]["from"] == ["owner/base", "01-data"]
    assert [path.name for path in step_folders(tmp_path / "moved", {"07-acsft"})] == ["07-acsft"]
    assert distributions(steps) == {}


def test_runs_are_compared_with_the_first_one(runs: tuple[Path, Path], tmp_path: Path) -> None:
    results = compared(read_runs([str(path) for path in runs]))
    found = results["comparison"]
    assert found["runs"] == ["a", "b"] and found["quality"][0]["verdict"] == "above"
    assert found["quality"][0]["difference"]["value"] == 1.0 and found["quality"][0]["paired"]
    assert [(one["key"], one["values"]) for one in found["config"]] == [("optim.lr", {"a": "0.001", "b": "0.002"})]
    html, data = write_report(tmp_path, results)
    page, text = html.read_text(), html.with_suffix(".md").read_text()
    for words in ("Configuration: what differs", "the same 6 prompts", "b: ACSFT", "What was trained on what"):
        assert words in page, words
    assert "Not measured in this run" not in page and "<h2>What was expected" not in page
    assert "| optim.lr | 0.001 | 0.002 |" in text and "| b | a | ap | acsft | quality | 1.000" in text
    assert json.loads(data.read_text())["responses"]["of"] == 12


def test_costs_and_levels_of_runs_stand_beside_each_other(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = read_runs([str(path) for path in runs])
    meters = [CostMeter(), CostMeter()]
    meters[1].add(5e12, trained=70)
    for run, meter in zip(found, meters, strict=True):
        run.results["cost"] = {"07-acsft": total([meter.share()])}
    found[1].results["cost"]["03-train_ap"] = total([meters[1].share()])
    results = compared(found)
    html, data = write_report(tmp_path, results)
    page, text = html.read_text(), html.with_suffix(".md").read_text()
    assert set(json.loads(data.read_text())["comparison"]["cost"]) == {"a", "b"}
    assert "What the runs cost" in page and "levels of quality in the data of each run" in page
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    by_run = {row[0]: row for row in rows if len(row) == 11 and row[0] in ("a", "b")}
    assert by_run["a"][7] == "–" and by_run["b"][7] == "10 T" and by_run["b"][5] == "140", "the sum of its two steps"
    assert [row[1] for row in rows if row[0] == "07-acsft" and len(row) == 12] == ["a", "b"]


def test_what_a_run_lacks_is_a_line_and_not_a_crash(runs: tuple[Path, Path], tmp_path: Path) -> None:
    broken, failed = tmp_path / "broken", tmp_path / "failed"
    step(tmp_path, "broken", "evaluate")
    (broken / "evaluation.json").write_text("{")
    step(tmp_path, "failed", "train_sft")
    write(failed / "summary.json", {"status": "failed", "error": "OSError: no space", "command": "train_sft"})
    found = {run.name: run for run in read_runs([str(runs[0]), str(broken), str(failed)])}
    assert "cannot be read as an evaluation" in found["broken"].broken[0]
    assert found["failed"].lacking[0] == "The run is not complete (failed: OSError: no space)."
    assert "nothing was measured" in found["failed"].lacking[1]
    page = write_report(tmp_path / "shown", compared(list(found.values())))[0].read_text()
    assert "failed: The run is not complete" in page and "cannot be read as an evaluation" in page
    with pytest.raises(UserError, match="broken/evaluation.json cannot be read as an evaluation"):
        read_runs([str(broken)])


def test_inputs_that_are_no_runs_are_refused_together(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="input=x: there is no such folder.*\ninput=y: there is"):
        read_runs(["x", str(runs[0]), "y"])
    with pytest.raises(UserError, match="no run folder: it has neither evaluation.json nor a summary.json"):
        read_runs([str(runs[0]), str(tmp_path)])
    with pytest.raises(UserError, match="names one run twice"):
        read_runs([str(runs[0]), f"{runs[0]}/../a"])
    step(tmp_path, "alone", "export")
    (tmp_path / "alone/summary.json").unlink()
    assert names_of(["x/a/11-evaluate", "y/b/11-evaluate", "z"]) == [
        "a/11-evaluate",
        "b/11-evaluate",
        f"{Path.cwd().name}/z",
    ]


def test_keys_differ_by_value_and_not_by_the_place_of_the_run(runs: tuple[Path, Path]) -> None:
    (first, second) = read_runs([str(path) for path in runs])
    for run in (first, second):
        run.config |= {"checkpoint": f"{run.folder}/03-train_ap/checkpoints", "run_dir": str(run.folder)}
    second.config["extra"] = {"key": [1, 2]}
    second.summary["versions"] = {**second.summary["versions"], "torch": "3"}
    found = {one["key"]: one["values"] for one in differing_keys([first, second])}
    assert found == {
        "optim.lr": {"a": "0.001", "b": "0.002"}, "extra.key": {"a": None, "b": "[1, 2]"},
        "version of torch": {"a": "2", "b": "3"},
    }  # fmt: skip


def test_long_curves_keep_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 1.0 / i}) + "\n" for i in range(1, 5001)))
    curve = training_curve(path)
    assert len(curve["loss"]) == 300 and curve["loss"][0][0] == 1 and curve["loss"][-1][0] == 5000
    path.write_text('{"step": 1, "samples": 3}\n')
    assert training_curve(path) == {}
    assert read_yaml(tmp_path / "none.yaml") == {}
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="bad.yaml cannot be read"):
        read_yaml(tmp_path / "bad.yaml")


def test_the_command_takes_a_list(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert run_here("report", f"input=[{runs[0]},{runs[1]}]", f"run_dir={tmp_path}/two") == 0
    assert (tmp_path / "two/report.md").read_text().startswith("# Comparison of 2 runs\n")
    assert run_here("report", "input=[1,2]", f"run_dir={tmp_path}/no") == 2
    assert not (tmp_path / "no").exists()
