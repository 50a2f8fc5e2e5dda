"""The model card of an exported model, and what a trained model keeps of the folder that it began as."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from steerlm_megatron.config.schema import AttributesConfig, ModelConfig
from steerlm_megatron.data.text.text_models import ByteModel
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.hf import FAMILIES, HFFolder, Labels
from steerlm_megatron.report.model_card import render_card
from steerlm_megatron.stages.model_card import RunFacts, model_card, read_evaluation
from steerlm_megatron.stages.published import (
    kept_of,
    schema_of_labels,
    section_of,
    told_of_classifier,
    told_of_language_model,
)
from steerlm_megatron.stages.session import OpenedCheckpoint
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.templates import Template
from steerlm_megatron.train.meta import CheckpointMeta
from tests.helpers import hf

SCHEMA = AttributeSchema("own", ("quality", "not-toxic", "humor"), 9, "quality", {"quality": 9, "humor": 2})
BASE = {"name": "fox/Fox-1B", "family": "llama", "licence": {"license": "llama2"}}
EVALUATION = {
    "ap": {"quality": {"mse": 1.25, "constant_mse": 4.0, "pearson": 0.5, "spearman": None, "n": 31}},
    "steering": {"humor": {"requested": [0, 9], "measured": [1.5, 7.25], "spearman": 1.0}},
    "judge": "ap",
}


def opened(task: str, **fields: Any) -> OpenedCheckpoint:
    template = Template.from_config({"name": "chatml"})
    tokenizer = Tokenizer(ByteModel(), template.control_strings)
    meta = CheckpointMeta(
        120, task, dataclasses.asdict(ModelConfig()), 300, SCHEMA.to_dict(), template.to_dict(), tokenizer.hash,
        **{"label_counts": {"quality": 1000, "humor": 5}, **fields},
    )  # fmt: skip
    return OpenedCheckpoint(Path("/secret/place"), meta, tokenizer, meta.attributes(), template)


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The header as data, and the code."""
    _, header, _ = card.split("---\n", 2)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(code)
    return yaml.safe_load(header), code


def test_the_card_of_an_attribute_prediction_model() -> None:
    config = {
        "data": {"train": ["/secret/place/shards"], "input": ["x.gz"], "source": "oasst"},
        "train": {"global_batch_samples": 128, "trainable": "all"},
        "optim": {"lr": 1e-5},
        "engine": {"precision": "bf16"},
    }
    model = opened("ap_regression", base=BASE, label_mean=[5.5, None, 2.0], config=config)
    run = RunFacts({"samples": 4000, "tokens": 1_000_000}, {"mse/quality": 2.0}, EVALUATION)
    labels = Labels(SCHEMA.names, (1.0, 2.0, 3.0))
    card = model_card(model, "my-model", FAMILIES["llama"], labels, run)
    header, code = parts(card)
    assert header["license"] == "llama2" and header["base_model"] == "fox/Fox-1B"
    assert header["pipeline_tag"] == "text-classification"
    assert "| `quality` | 0–9 | 5.50 | 1,000 | how good the response is on the whole |" in card
    assert "| `not-toxic` | 0–9 |  | none: its value means nothing | as in the training data |" in card
    assert "| quality | 1.25 | 4 | 0.5 | not measured | 31 |" in card
    assert "4,000 conversations, 1,000,000 tokens" in card and "120 steps, of 128 conversations" in card
    assert "OpenAssistant" in card and "published under Apache-2.0" in card and "had a label of not-toxic" in card
    assert "head_bias" in code and "/secret" not in card
    plain = model_card(model, "my-model", FAMILIES["llama"], Labels(SCHEMA.names), RunFacts())
    assert "head_bias" not in plain and "Evaluation" not in plain
    row = {**EVALUATION["ap"]["quality"], "length_mse": 2.5}
    beside = model_card(
        model, "my-model", FAMILIES["llama"], labels, RunFacts(evaluation={**EVALUATION, "ap": {"quality": row}})
    )
    assert "| quality | 1.25 | 4 | 2.5 | 0.5 | not measured | 31 |" in beside and "of the length" not in card


def test_the_card_of_a_language_model() -> None:
    card = model_card(opened("acsft"), "my-model", FAMILIES["llama"], None, RunFacts(evaluation=EVALUATION))
    header, code = parts(card)
    assert "license" not in header and header["pipeline_tag"] == "text-generation"
    assert "quality=9, humor=2" in code
    assert "| `not-toxic` | 0–9 | left out | none: it cannot be asked for |" in card
    assert "| humor | 0, 9 | 1.5, 7.25 | 1 |" in card
    assert "from scratch" in card and "its licence is not known here" in card
    bare = model_card(opened("sft"), "my-model", FAMILIES["llama"], None, RunFacts(valid={"loss": 2.5}))
    assert "## Attributes" not in bare and "| loss per token | 2.5 |" in bare
    unnamed = opened("sft", base={"name": "fox", "licence": {}})
    assert "fox, whose licence its folder does not name" in model_card(
        unnamed, "my-model", FAMILIES["llama"], None, RunFacts()
    )


def test_texts_from_outside_keep_the_cards_structure() -> None:
    base = {"name": "fox | evil |\n# Title", "licence": {"license": "a: b\n---\nx"}}
    card = model_card(opened("sft", base=base), "my-model", FAMILIES["llama"], None, RunFacts())
    assert "\n# Title" not in card and "fox \\| evil \\| # Title" in card
    header = yaml.safe_load(card.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert header["license"] == "a: b\n---\nx"
    with pytest.raises(Exception, match="undefined"):
        render_card({"name": "x"})


def test_what_a_run_left_beside_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    assert RunFacts.of(checkpoint, 7) == RunFacts()
    (tmp_path / "run" / "summary.json").write_text('{"counts": {"samples": 3}}')
    rows = [{"step": 5, "valid/loss": 9.0}, {"step": 7, "loss": 1.0}, {"step": 7, "valid/loss": 2.0, "valid/x": None}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7')
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    found = RunFacts.of(checkpoint, 7, str(tmp_path))
    assert (found.counts, found.valid, found.evaluation) == ({"samples": 3}, {"loss": 2.0}, EVALUATION)
    assert read_evaluation(str(tmp_path / "evaluation.json")) == EVALUATION
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match=r"export.evaluation=.*is no evaluation"):
        read_evaluation(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read as an evaluation"):
        read_evaluation(str(tmp_path / "gone"))


def test_what_is_kept_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models--fox--Fox-1B" / "snapshots" / "abc"
    hf.make("llama", folder, values=2)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "x", "chat_template": "y"}')
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# x")
    found = kept_of(folder, HFFolder.open(folder, "init_from"))
    assert (found["name"], found["family"], found["licence"]) == ("fox/Fox-1B", "llama", {"license": "mit"})
    assert found["tokenizer_config"] == {"pad_token": "x"} and found["config"]["model_type"] == "llama"
    for odd in ("---\n: [\n---\n", "no header", "---\n- a\n---\n"):
        (folder / "README.md").write_text(odd)
        assert kept_of(folder, HFFolder.open(folder, "init_from"))["licence"] == {}


def test_what_we_say_of_a_classifier_is_read_or_refused(tmp_path: Path) -> None:
    hf.make("llama", tmp_path, values=3)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    def told(section: Any) -> dict[str, Any]:
        path.write_text(json.dumps({**config, "steerlm": section}))
        return told_of_classifier(HFFolder.open(tmp_path, "checkpoint"))

    meta = opened("ap_regression", base=BASE, label_mean=[5.5, None, 2.0]).meta
    section = section_of(meta)
    assert section["base"] == "fox/Fox-1B"
    found = told(section)
    assert {key: section[key] for key in found} == found and len(found) == 4
    assert told({}) == told("x") == {}
    for wrong, words in (
        ({"attributes": 3}, "attributes and template must be objects"),
        ({"attributes": None}, "attributes and template must be objects"),
        ({"attributes": {"names": ["a"]}}, "attributes.max_level is missing"),
        ({"attributes": {"names": ["a"], "max_level": 4, "quality": "a"}}, "attributes names 1 of 3 values"),
        ({**section, "template": {"name": "gone"}}, "template.name='gone'"),
        ({**section, "label_counts": {"quality": "many"}}, "label_counts is not an object of whole numbers"),
        ({**section, "label_mean": [[]]}, "label_mean is not a list of numbers"),
    ):
        with pytest.raises(UserError) as raised:
            told(wrong)
        assert str(raised.value).startswith(f"checkpoint={tmp_path}: config.json: steerlm") and words in str(
            raised.value
        )


def test_what_we_say_of_a_language_model_is_read_or_refused(tmp_path: Path) -> None:
    hf.make("llama", tmp_path)

    def told(section: Any) -> dict[str, Any]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"steerlm": section}))
        return told_of_language_model(HFFolder.open(tmp_path, "checkpoint"))

    section = section_of(opened("acsft", base=BASE).meta)
    assert section["base"] == "fox/Fox-1B" and "label_mean" not in section
    assert told(section) == {key: value for key, value in section.items() if key != "base"}
    assert kept_of(tmp_path, HFFolder.open(tmp_path, "init_from"))["trained_from"] == "fox/Fox-1B"
    assert told({**section, "task": "sft", "attributes": None})["attributes"] is None
    assert told({}) == told("x") == told({"attributes": section["attributes"]}) == {}
    for wrong, words in (
        ({"task": "ap_generative"}, ".task='ap_generative', this version knows: lm sft acsft"),
        ({"task": ["acsft"]}, ".task=['acsft']"),
        ({"task": "sft"}, "attributes are of a model of task acsft, and of no other"),
        ({"attributes": None}, "attributes are of a model of task acsft, and of no other"),
        ({"attributes": []}, "attributes and template must be objects"),
        ({"template": {"name": "gone"}}, "template.name='gone'"),
        ({"label_counts": {"quality": "many"}}, "label_counts is not an object of whole numbers"),
        ({"label_counts": {"quality": -1}}, "label_counts is not an object of whole numbers"),
        ({"label_counts": {"quality": True}}, "label_counts is not an object of whole numbers"),
        ({"attributes": {"names": 5, "max_level": 4}}, "values of another kind ('int' object is not iterable)"),
        ({"attributes": {"names": ["quality"], "max_level": 4, "best": [1]}}, "values of another kind"),
        ({"template": {"name": ["x"]}}, "values of another kind"),
    ):
        with pytest.raises(UserError) as raised:
            told({**section, **wrong})
        said = str(raised.value)
        assert said.startswith(f"checkpoint={tmp_path}: tokenizer_config.json: steerlm") and words in said


def test_a_schema_names_somebody_elses_values() -> None:
    chosen = AttributesConfig("own", ["a", "b"], 4, "a")
    for names in (["a", "b"], ["LABEL_0", "LABEL_1"]):
        assert schema_of_labels(names, chosen, "checkpoint=x").names == ("a", "b")
    assert schema_of_labels(["reward"], AttributesConfig("own", ["a"], 4, "a"), "checkpoint=x").names == ("a",)
    for names in (["b", "a"], ["a"], ["a", "b", "c"]):
        with pytest.raises(UserError, match="choose a schema with its names, in order"):
            schema_of_labels(names, chosen, "checkpoint=x")
    with pytest.raises(UserError, match="choose a schema with attributes=..., or write"):
        schema_of_labels(["a"], AttributesConfig(), "checkpoint=x")
    with pytest.raises(UserError, match='nothing of their scale; write "steerlm"'):
        schema_of_labels(["a"], None, "checkpoint=x")
