"""A model that writes labels is trained, and taken wherever one with a regression head is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerlm_megatron.steer.records import read_records
from steerlm_megatron.train.meta import read_meta
from tests.helpers.cli import run_here as run
from tests.helpers.commands import summary

pytestmark = pytest.mark.integration
MODEL = ("experiment=quickstart", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64",
         "train.row_tokens=512", "train.validate_rows=2")  # fmt: skip
DATA = ("init_from=run/02-base", "data.train=run/01-data/shards")


@pytest.fixture(autouse=True)
def in_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(trained)
    yield


@pytest.fixture(scope="module")
def trained(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the shared run, a generative model and some records."""
    folder = tmp_path_factory.mktemp("generative")
    (folder / "run").symlink_to(work / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("train_ap", *MODEL, *DATA, "ap.kind=generative", "train.steps=2", "run_dir=ap") == 0
        lines = Path("run/01-data/records/valid.jsonl").read_text().splitlines()
        Path("some.jsonl").write_text("\n".join(lines[:12]) + "\n")
    return folder


def test_it_learns_to_write_labels_and_nothing_else() -> None:
    meta = read_meta(next(Path("ap/checkpoints").glob("step_*")))
    assert (meta.task, meta.head, meta.predicts, meta.conditioned) == ("ap_generative", "lm", True, False)
    assert len(meta.label_mean) == 5 and meta.metric is not None
    counts = summary(Path("ap"))["counts"]
    assert counts["samples"] > 50 and summary(Path("ap"))["metrics"]["best_valid_loss"] > 0


def annotated(checkpoint: str, decode: str) -> Path:
    """Annotate the records by a checkpoint, unless they have been, and return the file."""
    output = Path(f"{checkpoint}_{decode}.jsonl")
    if not output.exists():
        common = (
            f"checkpoint={checkpoint}",
            "input=some.jsonl",
            f"output={output}",
            f"run_dir=by_{checkpoint}_{decode}",
        )
        assert run("annotate", *common, f"scoring.decode={decode}") == 0
    return output


def test_annotate_writes_levels_or_expected_values() -> None:
    found = {}
    for decode in ("greedy", "expected"):
        messages = [m for r in read_records(annotated("ap", decode)) for m in r.messages if m.role == "assistant"]
        found[decode] = [m.attributes or {} for m in messages]
        assert all(m.extra["levels"] == {n: round(v) for n, v in (m.attributes or {}).items()} for m in messages)
        assert all(0 <= value <= 4 for one in found[decode] for value in one.values())
    assert all(value == int(value) for one in found["greedy"] for value in one.values())
    assert any(value != int(value) for one in found["expected"] for value in one.values())
    assert [set(one) for one in found["greedy"]] == [set(one) for one in found["expected"]]


@pytest.mark.parametrize(
    ("checkpoint", "decode", "words"),
    [
        ("ap", "expected", "generative, expected level"),
        ("run/03-train_ap", "greedy", "regression head"),
    ],
)
def test_an_evaluation_and_its_report_say_the_kind(checkpoint: str, decode: str, words: str) -> None:
    folder = f"evaluate_{checkpoint.replace('/', '_')}_{decode}"
    said = (f"ap_checkpoint={checkpoint}", f"scoring.decode={decode}", f"run_dir={folder}")
    assert run("evaluate", "input=some.jsonl", *said) == 0
    found = json.loads(Path(folder, "evaluation.json").read_text())
    assert found["ap_model"] == words and len(found["ap"]) == 5
    assert run("report", f"input={folder}", f"run_dir={folder}_report") == 0
    assert json.loads(Path(f"{folder}_report/report.json").read_text())["ap_model"] == words
    assert f"The model's kind: {words}." in Path(f"{folder}_report/report.html").read_text()


def test_it_filters_what_is_bootstrapped() -> None:
    drawing = ("sampling.max_tokens=64", "sampling.temperature=9")
    assert run("bootstrap", "checkpoint=run/07-acsft", "ap_checkpoint=ap", "input=run/04-annotate/train.jsonl",
               "output=bootstrap.jsonl", "bootstrap.prompts=12", "run_dir=bootstrap", *drawing) == 0  # fmt: skip
    values = [record.messages[-1].attributes for record in read_records("bootstrap.jsonl")]
    assert values and all(value in range(5) for one in values for value in (one or {"": -1}).values())


REFUSED = {
    "a language model is needed": (
        ("generate", "checkpoint=ap", "input=some.jsonl", "output=x.jsonl"),
        "checkpoint=ap holds an attribute-prediction model (task 'ap_generative'), needed is a language model "
        "(train_sft)",
    ),
    "a predictor is needed": (
        ("annotate", "checkpoint=run/07-acsft", "input=some.jsonl", "output=x.jsonl"),
        "needed is an attribute-prediction model (train_ap)",
    ),
    "nothing to decode": (
        ("bootstrap", "checkpoint=run/07-acsft", "ap_checkpoint=run/03-train_ap", "input=run/04-annotate/train.jsonl",
         "output=x.jsonl", "scoring.decode=expected"),
        "has a regression head, which gives values itself: leave scoring.decode out",
    ),
    "no base of SFT": (
        ("train_sft", *MODEL, "init_from=ap", "data.train=run/01-data/shards", "train.steps=1"),
        "init_from=ap holds an attribute-prediction model, which writes labels after responses",
    ),
    "no language model of a head": (
        ("train_ap", *MODEL, "init_from=run/03-train_ap", "data.train=run/01-data/shards", "ap.kind=generative"),
        "init_from=run/03-train_ap holds an attribute-prediction model, which has no output layer for tokens",
    ),
    "no folder of transformers": (
        ("export", "checkpoint=ap", "output=hf", "export.format=hf"),
        "is a generative attribute-prediction model: a chat template asks for responses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, words = REFUSED[name]
    assert run(*command, f"run_dir=refused_{name.replace(' ', '_')}") == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_an_export_of_ours_scores_alike() -> None:
    assert run("export", "checkpoint=ap", "output=small", "run_dir=export") == 0
    assert annotated("small", "expected").read_bytes() == annotated("ap", "expected").read_bytes()
