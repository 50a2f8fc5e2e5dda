"""Bootstrapping as commands: filters over the parts of an array, resuming, several rounds in one pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.steer.records import read_records
from tests.helpers.cli import run_here
from tests.helpers.commands import TINY, steerlm, summary

pytestmark = pytest.mark.integration
MODELS = ("checkpoint=run/07-acsft", "ap_checkpoint=run/03-train_ap", "sampling.max_tokens=24",
          "sampling.temperature=9", "input=some.jsonl")  # fmt: skip
FILTERED = (
    "bootstrap.responses_per_prompt=5", "bootstrap.combinations=frequency", "bootstrap.drop_duplicates=all",
    "bootstrap.max_repetition=0.5", "bootstrap.repetition_ngram=1", "bootstrap.keep_best=2",
    "bootstrap.write_dropped=true",
)  # fmt: skip


@pytest.fixture
def records(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with some annotated records, and with the models of the shared run."""
    (tmp_path / "run").symlink_to(work / "run")
    monkeypatch.chdir(tmp_path)
    lines = (work / "run/04-annotate/train.jsonl").read_text().splitlines()[:9]
    Path("some.jsonl").write_text("\n".join(lines) + "\n")


def test_filters_of_an_array_that_was_interrupted_are_those_of_one_process(
    records: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = ("bootstrap", *MODELS, *FILTERED)
    assert run_here(*shared, "output=one.jsonl", "run_dir=one") == 0
    part = ("output=parts.jsonl", "run_dir=parts", "array.tasks=2")
    assert run_here(*shared, *part, "array.task=1") == 0
    generate = Generator.generate

    def breaks_off(generator: Generator, requests: Any, progress: Any) -> Any:
        def take(result: Any) -> None:
            progress(result)
            took.append(result)
            if len(took) == 7:
                raise MemoryError("in the middle")

        took: list[Any] = []
        return generate(generator, requests, take)

    with monkeypatch.context() as broken:
        broken.setattr(Generator, "generate", breaks_off)
        assert run_here(*shared, *part, "array.task=0") != 0
    entries = sum(len(p.read_text().splitlines()) for p in Path("parts").glob("journal-*/part-*.jsonl"))
    drawn = summary(Path("one"))["counts"]["in"] - summary(Path("one"))["counts"]["skipped"].get("repeated_prompt", 0)
    assert drawn // 2 + 7 <= entries < drawn, "what was drawn is kept"
    assert run_here(*shared, *part[:2]) == 0  # draws the rest, and filters all of it
    for name in ("{}.jsonl", "{}/dropped.jsonl", "{}/bootstrap.json"):
        one, parts = (Path(name.format(folder)).read_bytes() for folder in ("one", "parts"))
        assert one == parts, name

    counts, found = summary(Path("parts"))["counts"], json.loads(Path("parts/bootstrap.json").read_text())
    kept, dropped = list(read_records("parts.jsonl")), list(read_records("parts/dropped.jsonl"))
    assert counts["in"] == 45 == counts["out"] + sum(counts["skipped"].values()) and counts["out"] == len(kept)
    left_out = found["counts"]["left_out"]
    assert len(left_out) > 1 and found["counts"] == {
        "drawn": drawn, "kept": len(kept), "left_out": left_out
    } and len(kept) + len(dropped) == drawn  # fmt: skip
    for reason, count in left_out.items():
        assert counts["skipped"][reason] == count == sum(record.extra["dropped"] == reason for record in dropped)
    of_prompt = [record.id.rpartition("/")[0] for record in kept]
    assert max(map(of_prompt.count, of_prompt)) <= 2, "the best two of a prompt"
    texts = [record.messages[-1].content for record in kept]
    assert len(set(texts)) == len(texts) and all(text.strip() for text in texts)
    scored = {"labels", "not_best", "off_target"}
    assert all((d.messages[-1].attributes is not None) == (d.extra["dropped"] in scored) for d in dropped)


def test_the_default_writes_what_ended_with_predicted_values_and_nothing_else(
    records: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("bootstrap", *MODELS, "output=out.jsonl", "run_dir=usual") == 0
    assert "responses drawn, " in capsys.readouterr().err
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    for line in lines:
        assert list(line) == ["id", "messages", "source", "requested"] and line["source"] == "bootstrap"
        assert list(line["messages"][-1]) == ["role", "content", "attributes", "levels"]
        assert all(m["weight"] == 0 for m in line["messages"][:-1] if m["role"] == "assistant")
    assert not Path("usual/dropped.jsonl").exists()
    assert set(summary(Path("usual"))["counts"]["skipped"]) <= {"repeated_prompt", "unfinished", "empty"}
    assert run_here("report", "input=usual", "run_dir=page") == 0
    page = Path("page/report.html").read_text()
    assert "best combinations, drawn uniformly" in page and "annotated responses" in page
    none = ("bootstrap.labels=['quality>=9']", "output=none.jsonl", "run_dir=none", "bootstrap.write_dropped=true")
    capsys.readouterr()
    assert run_here("bootstrap", *MODELS, *none) == 2
    said = capsys.readouterr().err
    assert "responses is of use (" in said and "not quality>=9" in said and not Path("none.jsonl").exists()
    assert list(read_records("none/dropped.jsonl")), "they can be looked at"


def test_a_second_round_follows_the_first(work: Path, tmp_path: Path) -> None:
    """The steps of the first round stay as they are but for the one that trains, which ``mix`` changes."""
    shutil.copytree(work / "run", tmp_path / "run", symlinks=True)
    more = ("bootstrap.rounds=2", "bootstrap.mix=0.5", "pipeline.bootstrapped.train.steps=2",
            "pipeline.bootstrap_2.sampling.max_tokens=48", "pipeline.bootstrap_2.sampling.temperature=9")  # fmt: skip
    said = steerlm("run", *TINY, "run_dir=run", "parallel.data=2", *more, cwd=tmp_path).stderr
    assert said.count("complete, skipped") == 9 and "15 steps: data base " in said
    assert "sample at the best attribute values, score (round 2)" in said
    run = tmp_path / "run"
    for name in ("10-bootstrapped", "10-bootstrapped_2"):
        assert len(summary(run / name)["counts"]["corpora"]) == 2, "sampled and annotated rows"
    report = json.loads((run / "12-report/report.json").read_text())
    assert list(report["quality"]) == ["sft", "acsft", "bootstrapped", "bootstrapped_2"]
    assert [one["round"] for one in report["bootstrap"]] == [1, 2]
    assert report["bootstrap"][1]["counts"]["kept"] == len(list(read_records(run / "08-bootstrap_2/bootstrap.jsonl")))
    assert "Bootstrapped responses: round 2" in (run / "12-report/report.html").read_text()
