"""Users' errors: each gives one clear message and exit code 2, before any long work starts."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.config import load
from steerlm_megatron.config.schema import Config, ModelConfig, ParallelConfig
from steerlm_megatron.data.views import View
from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.resume import padding_differences
from steerlm_megatron.stages.session import check_layout
from steerlm_megatron.train.meta import CheckpointMeta
from tests.helpers.cli import run_here as run

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there, friend."}]}
LABELLED: dict[str, Any] = {
    "messages": [GOOD["messages"][0], {**GOOD["messages"][1], "attributes": {"quality": 5, "toxicity": 0}}]
}
TOKENIZER = ("tokenizer.train=true", "tokenizer.vocab_size=300")
TINY = (
    "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "train.row_tokens=256",
    "train.steps=1", "train.log_every_steps=1",
)  # fmt: skip


def write(path: Path, *records: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Return shards of twenty labelled records with a small tokenizer."""
    records = write(tmp_path / "ok.jsonl", *(LABELLED | {"id": str(i)} for i in range(20)))
    out = tmp_path / "shards"
    arguments = (f"data.input={records}", f"data.output_dir={out}", "data.valid_fraction=0", *TOKENIZER)
    assert run("preprocess", *arguments) == 0
    return str(out)


COMMAND_LINES = {
    "a misspelt key": (["train_sft", "train.stepz=1"], ["train.stepz: no such key", "train.steps"]),
    "a misspelt option": (["train_sft", "model=tyni"], ["model=tyni", "legal:", "tiny"]),
    "a group without an option": (["train_sft", "experiment=null"], ["group override", "string"]),
    "a misspelt command": (["trian_sft"], ["trian_sft", "train_sft"]),
    "a wrong type": (["train_sft", "train.steps=many"], ["train.steps", "many"]),
    "a pipeline step that is none": (
        ["run", "experiment=quickstart", "pipeline.acsfd.train.steps=1"], ["acsfd", "legal:", "acsft"],
    ),
    "a misspelt key of the last step": (
        ["run", "experiment=quickstart", "pipeline.evaluate.evaluate.max_promts=1"],
        ["pipeline.evaluate", "max_promts"],
    ),
    "tensor parallelism that does not divide the heads": (
        ["train_sft", "experiment=quickstart", "parallel.tensor=3"],
        ["parallel.tensor=3", "model.num_heads=4", "1 2 4"],
    ),
    "pipeline parallelism that does not divide the layers": (
        ["train_sft", "experiment=quickstart", "parallel.pipeline=3"],
        ["parallel.pipeline=3", "model.num_layers=4", "1 2 4"],
    ),
    "a list without brackets": (
        ["preprocess", "data.input=a.jsonl,b.jsonl"], ["data.input=a.jsonl,b.jsonl: several", "'data.input=[a.jsonl,b"],
    ),
    "a value that needs quotes": (
        ["preprocess", "data.map=prompt=q,response=a"], ["cannot read the value", "'data.map=\"prompt=q,response=a\"'"],
    ),
    "a list of values that need quotes": (
        ["preprocess", "data.labels=[quality>=6,humor<3]"], ["""'data.labels=["quality>=6","humor<3"]'"""],
    ),
    "no data": (["train_sft"], ["data.train is not set"]),
    "no input": (["preprocess", "data.output_dir=x", *TOKENIZER], ["data.input is empty"]),
    "an input that is not there": (
        ["preprocess", "data.input=nowhere.jsonl", "data.output_dir=x", *TOKENIZER], ["nowhere.jsonl", "no such file"],
    ),
    "a tokenizer that is not there": (
        ["run", "experiment=oasst", "data.input=ok.jsonl", "tokenizer.path=nowhere.model"], ["nowhere.model"],
    ),
    "a checkpoint that is not there": (
        ["annotate", "checkpoint=nowhere", "input=ok.jsonl", "output=x.jsonl"], ["checkpoint=nowhere"],
    ),
    "no checkpoint to serve": (["serve"], ["checkpoint is not set"]),
    "settings of an optimizer that cannot be": (
        ["train_sft", "optim.beta1=1.5", "optim.eps=-1", "optim.weight_decay=-0.1", "optim.clip_grad=-1",
         "train.seed=-1"],
        ["optim.beta1=1.5", "optim.eps=-1", "optim.weight_decay=-0.1", "optim.clip_grad=-1", "train.seed=-1"],
    ),
    "rows that context parallelism cannot split": (
        ["train_sft", "parallel.context=4", "train.row_tokens=1020"],
        ["train.row_tokens=1020", "multiple of 8", "parallel.context=4"],
    ),
    "half a pair of dimensions": (
        ["train_sft", "model.rotary_percent=0.3"], ["model.rotary_percent=0.3", "9 dimensions"],
    ),
    "layers of no window": (
        ["train_sft", "model.full_attention_layers=[4]", "model.rotary_local_base=9"],
        [
            "model.full_attention_layers needs model.sliding_window", "has 4; layers are 0 to 3",
            "model.rotary_local_base needs model.sliding_window",
        ],
    ),
    "keys of the other training command": (
        ["train_sft", "train.label_weights={quality: 2}"], ["train.label_weights=", "is of train_ap"],
    ),
    "an objective of the other training command": (
        ["train_ap", "train.objective=lm"], ["train.objective=lm", "train_sft"],
    ),
    "a weight that is none": (
        ["train_ap", "train.label_weights={quality: -1}", "train.label_weights.humor=nan"],
        ["label_weights.quality=-1", "label_weights.humor=nan"],
    ),
    "rows that sequence parallelism cannot split": (
        ["train_sft", "parallel.tensor=2", "parallel.sequence=true", "train.row_tokens=161",
         "train.micro_batch_rows=2"],
        ["train.row_tokens=161", "multiple of parallel.tensor=2"],
    ),
    "several wrong keys and values at once": (
        ["train_sft", "train.stepz=2", "optimm.lr=3", "engine=megatorn", "train.steps=abc", "model=tiny"],
        ["train.stepz: no such key; did you mean train.steps?", "did you mean optim.lr?", "did you mean megatron?",
         "train.steps: Value 'abc'"],
    ),
    "a wrong value among those of a multirun": (
        ["train_sft", "--multirun", "train.steps=1,2", "optim.lr=1e-3,x"], ["optim.lr: Value 'x'"],
    ),
    "numbers that no optimizer and no generator takes": (
        ["train_ap", "experiment=quickstart", "optim.beta2=1", "optim.weight_decay=-1", "optim.lr=inf", "train.seed=-1",
         "model.num_query_groups=-1", "train.label_weights.quality=nan", "train.label_weights={qualty:1}",
         "attributes.best.qualty=2"],
        ["optim.beta2=1.0", "optim.weight_decay=-1", "optim.lr=inf", "train.seed=-1", "model.num_query_groups=-1",
         "train.label_weights.quality=nan", "train.label_weights.qualty is not", "attributes.best.qualty is not"],
    ),
    "several things at once": (
        ["train_sft", "experiment=quickstart", "parallel.tensor=3", "engine.precision=fp8"],
        ["parallel.tensor=3", "engine.precision=fp8"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_command_line(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "ok.jsonl", GOOD)
    arguments, expected = COMMAND_LINES[case]
    assert run(*arguments) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and all(word in said for word in expected), said


def test_the_layout_is_compared_with_the_model_that_is_split() -> None:
    """Where a command opens a checkpoint, its model counts and not the configured one."""
    for command in ("serve", "annotate", "generate", "export", "evaluate", "bootstrap"):
        load.finalize(Config(command=command, parallel=ParallelConfig(tensor=8, pipeline=3)))
    with pytest.raises(UserError, match=r"parallel.tensor=8 must divide model.num_heads=4"):
        load.finalize(Config(command="train_sft", parallel=ParallelConfig(tensor=8)))
    with pytest.raises(UserError, match=r"parallel.tensor=8 must divide num_heads=4 .*checkpoint"):
        check_layout(ModelConfig(), ParallelConfig(tensor=8), "checkpoint")


def test_rows_of_padding_stay_what_they_were() -> None:
    """400 ids have 512 rows at parallel.tensor=1 and 768 at 3, which the checkpoint's optimizer has no state for."""
    model = ModelConfig(num_heads=6)
    saved = CheckpointMeta(9, "sft", asdict(model), 400, None, {}, "hash", parallel={"tensor": 1})

    def problems(tensor: int, view: View = "acsft") -> list[str]:
        return padding_differences(Config(model=model, parallel=ParallelConfig(tensor=tensor)), saved, view)

    assert problems(1) == problems(2) == problems(3, "ap") == []
    (problem,) = problems(3)
    assert "parallel.tensor=3, which pads the vocabulary to 768 rows" in problem
    assert "checkpoint: 512; that many have parallel.tensor=1 2)" in problem


RECORDS: dict[str, tuple[list[Any], list[str]]] = {
    "a torn line": ([GOOD, '{"messages": [{"role": "us'], ["bad.jsonl:2"]),
    "not an object": ([GOOD, "[1, 2]"], ["bad.jsonl:2"]),
    "no response": ([{"messages": GOOD["messages"][:1]}], ["bad.jsonl:1", "assistant"]),
    "an unknown attribute": (
        [{"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "attributes": {"qualty": 1}}]}],
        ["bad.jsonl:1", "qualty", "quality"],
    ),
    "a value outside the scale": (
        [GOOD, {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "attributes": {"quality": 12}}]}],
        ["bad.jsonl:2", "quality", "12", "9"],
    ),
    "a value that is no number": (
        ['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
         '"attributes": {"quality": NaN}}]}'],
        ["bad.jsonl:1"],
    ),
    "an empty corpus": ([], ["bad.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_records(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records, expected = RECORDS[case]
    path = write(tmp_path / "bad.jsonl", *records)
    assert run("preprocess", f"data.input={path}", "data.output_dir=x", *TOKENIZER) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and all(word in said for word in expected), said
    assert "text_models.py" not in said, "no stack either"
    assert not (tmp_path / "x" / "train").exists()


@pytest.mark.integration
def test_vocabulary_mismatch_and_wrong_schema(shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("train_sft", f"data.train={shards}", "run_dir=a", *TINY) == 0
    other = write(tmp_path / "other.jsonl", *({**LABELLED, "id": f"Of other words {i}: xyzzy"} for i in range(20)))
    assert run("preprocess", f"data.input={other}", "data.output_dir=o", "tokenizer.train=true",
               "tokenizer.vocab_size=320", "data.valid_fraction=0") == 0  # fmt: skip
    capfd.readouterr()
    assert run("train_sft", "data.train=o", "run_dir=b", "init_from=a", *TINY) == 2
    assert "vocabulary mismatch" in capfd.readouterr().err
    assert run("train_ap", f"data.train={shards}", "run_dir=c", "attributes=helpsteer", *TINY) == 2
    assert "preprocessed with" in capfd.readouterr().err
    assert run("annotate", "checkpoint=a", f"input={other}", "output=x.jsonl") == 2
    assert "needed is an attribute-prediction model (train_ap)" in capfd.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("serve", "checkpoint=a", f"server.port={port}") == 2
        assert str(port) in capfd.readouterr().err
    # A complete run is not overwritten by accident.
    assert run("train_sft", f"data.train={shards}", "run_dir=a", *TINY) == 2
    assert "overwrite" in capfd.readouterr().err


@pytest.mark.integration
def test_all_tokens_masked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    messages = [GOOD["messages"][0], {**GOOD["messages"][1], "weight": 0}]
    path = write(tmp_path / "masked.jsonl", *({"id": str(i), "messages": messages} for i in range(5)))
    assert run("preprocess", f"data.input={path}", "data.output_dir=x", "data.valid_fraction=0", *TOKENIZER) == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.integration
def test_a_run_goes_on_as_what_it_was(shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Settings that would make it another run are refused before a model is built; others may change."""
    few = write(tmp_path / "few.jsonl", *(LABELLED | {"id": str(i)} for i in range(15)))
    assert run("preprocess", f"data.input={few}", "data.output_dir=few", "data.valid_fraction=0",
               f"tokenizer.path={shards}/train") == 0  # fmt: skip
    common = (f"data.train={shards}", *TINY, "train.steps=2", "optim=tiny")
    assert run("train_sft", "run_dir=a", *common) == 0
    summary = tmp_path / "a" / "summary.json"
    killed = json.dumps({**json.loads(summary.read_text()), "status": "running"})
    refused = {
        "model.num_layers=4": ["model.num_layers=4 (checkpoint: 2)"],
        "model.bias=true": ["model.bias=True"],
        "train.seed=7": ["train.seed=7 (checkpoint: 1234)", "init_from=", "step_00000002"],
        "train.row_tokens=300": ["train.row_tokens=300 (checkpoint: 256)"],
        "attributes=none": ["task=sft (checkpoint: acsft)"],
        "train.objective=lm": ["task=lm"],
        "data.train=few": ["other shards in data.train"],
        "train.steps=1": ["train.steps=1", "2 steps behind"],
    }
    for change, words in refused.items():
        summary.write_text(killed)
        capfd.readouterr()
        assert run("train_sft", "run_dir=a", *common, change) == 2, change
        said = capfd.readouterr().err
        assert "Traceback" not in said and all(word in said for word in words), said
    summary.write_text(killed)
    capfd.readouterr()
    assert run("train_ap", "run_dir=a", *common) == 2
    assert "head 'regression' (checkpoint: 'lm')" in capfd.readouterr().err
    summary.write_text(killed)
    allowed = ("train.steps=3", "optim.lr=1e-4", "optim.min_lr=1e-5", "model.dropout=0.1", "engine.precision=bf16",
               "train.global_batch_samples=3", "train.micro_batch_rows=2", "train.save_every_steps=1")  # fmt: skip
    assert run("train_sft", "run_dir=a", *common, *allowed) == 0
    saved = json.loads((tmp_path / "a/checkpoints/step_00000003/meta.json").read_text())
    assert saved["config"]["train"]["steps"] == 3 and saved["config"]["data"]["train"] == shards
    assert run("export", "checkpoint=a", "output=x") == 0
    assert str(tmp_path) not in (tmp_path / "x" / "meta.json").read_text()


@pytest.mark.integration
def test_a_head_starts_nothing_but_a_head_of_its_attributes(
    shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = (f"data.train={shards}", *TINY)
    assert run("train_ap", "run_dir=a", *common) == 0
    assert run("train_ap", "run_dir=b", "init_from=a", *common) == 0
    capfd.readouterr()
    assert run("train_sft", "run_dir=c", "init_from=a", *common) == 2
    assert "init_from=a holds an attribute-prediction model" in capfd.readouterr().err
    message = {**GOOD["messages"][1], "attributes": {"quality": 3}}
    other = write(tmp_path / "h.jsonl", *({"id": str(i), "messages": [GOOD["messages"][0], message]} for i in range(9)))
    assert run("preprocess", f"data.input={other}", "data.output_dir=h", "data.valid_fraction=0",
               f"tokenizer.path={shards}/train", "attributes=helpsteer") == 0  # fmt: skip
    assert run("train_ap", "run_dir=d", "init_from=a", "data.train=h", "attributes=helpsteer", *TINY) == 2
    assert "init_from=a predicts" in capfd.readouterr().err  # the number of attributes is the same, but not their names
