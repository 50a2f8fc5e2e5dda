"""Classifiers of ``transformers`` in and out: the same values, the same bytes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.hf import (
    HFFolder,
    Labels,
    classifier_config,
    config_for,
    family_for,
    hf_tensors,
    place_bias,
    unfit,
    unnamed,
    without_code,
    write_hf,
)
from steerlm_megatron.model.hf.classifier import folded
from steerlm_megatron.model.hf.labels import classifier_keys, labels_of
from steerlm_megatron.model.hf.tables import CUSTOM_CLASSIFIERS
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.model.weights import fill, global_names
from steerlm_megatron.runtime import parallel
from tests.helpers import hf

CASES = ("llama3.1", "qwen2_tied", "qwen3", "nemotron", "gpt_neox", "gemma2_tied", "gemma3_tied")
BASED = [(case, True) for case in ("llama_biases", "qwen3", "nemotron", "gpt_neox")] + [("mistral", False)]
NAMES = ("helpful", "correct", "humor")


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    """One rank."""
    parallel.initialize(ParallelConfig(), 1)
    yield


def filled(folder: HFFolder) -> PackedGPTModel:
    assert folder.labels is not None
    gpt = build_model(folder.model, ParallelConfig(), EngineConfig(), hf.VOCAB, attributes=len(folder.labels.names))
    for parameter in gpt.parameters():
        parameter.data.fill_(float("nan"))  # what is not filled is seen
    fill(folder.weights(gpt, hf.VOCAB))
    return gpt.eval()


def values(gpt: PackedGPTModel, batch: Any) -> torch.Tensor:
    """[documents, A] at the last token of each document."""
    found = predict_values(gpt, replace(batch, pool_P=batch.cu_seqlens[1:].long() - 1))
    assert found is not None
    return found


@torch.no_grad()
def theirs(model: Any, batch: Any) -> torch.Tensor:
    bounds = batch.cu_seqlens.tolist()
    rows = [model(batch.tokens_T[None, a:b]).logits[0].float() for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.stack(rows)


def edit(folder: Path, **keys: Any) -> None:
    """Change keys of config.json; ``...`` takes one out."""
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("case", CASES)
def test_a_classifier_comes_in_and_goes_out(case: str, tmp_path: Path) -> None:
    model = hf.make(case, tmp_path / "in", values=3)
    folder = HFFolder.open(tmp_path / "in", "checkpoint")
    assert (folder.head, folder.labels) == ("regression", Labels(tuple(unnamed(3))))
    assert not folder.model.head_bias
    gpt, batch = filled(folder), hf.row()
    expected = theirs(model, batch)
    assert expected.std() > 0.1
    torch.testing.assert_close(values(gpt, batch), expected, rtol=0, atol=1e-4)
    config = config_for(folder.model, folder.family, hf.VOCAB, folder.config)
    assert config == folder.config
    write_hf(tmp_path / "out", hf_tensors(gpt, folder.model, folder.family, hf.VOCAB), config, torch.float32)
    before, after = ((tmp_path / side / "model.safetensors").read_bytes() for side in ("in", "out"))
    assert before == after


@pytest.mark.parametrize(("case", "based"), BASED)
def test_a_head_with_a_bias_goes_out(case: str, based: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a LayerNorm the values are ours; with an RMSNorm they are ours less the bias that config.json names."""
    hf.make(case, tmp_path / "in")
    base = HFFolder.open(tmp_path / "in", "init_from")
    gpt = build_model(base.model, ParallelConfig(), EngineConfig(), hf.VOCAB, attributes=3).eval()
    fill(base.weights(gpt, hf.VOCAB))
    head = gpt.output_layer.regression
    torch.manual_seed(1)
    fill([(head.weight, 0.2 * torch.randn(3, 32)), (head.bias, torch.tensor([6.1, 0.25, -2.0]))])
    family = base.family if based else family_for(base.model)
    instead, bias = place_bias(gpt, torch.float32)
    assert (bias is None) == (case in ("nemotron", "gpt_neox")) == bool(instead)
    kept = base.config if based else None
    config = classifier_config(base.model, family, hf.VOCAB, Labels(NAMES, bias), {"more": 1}, kept)
    write_hf(tmp_path / "out", hf_tensors(gpt, base.model, family, hf.VOCAB, instead), config, torch.float32)
    model, told = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == family.classifier and not any(told.values())
    assert (model.config.num_labels, model.config.id2label[1], model.config.label2id) == (
        3, "correct", {"helpful": 0, "correct": 1, "humor": 2}
    )  # fmt: skip
    assert model.config.problem_type == "regression" and model.config.steerlm["more"] == 1
    batch = hf.row()
    expected = values(gpt, batch)
    found = theirs(model.eval(), batch) + torch.tensor(model.config.steerlm.get("head_bias", 0.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    back = HFFolder.open(tmp_path / "out", "checkpoint")
    assert back.labels == Labels(NAMES, bias) and back.model.head_bias == (bias is not None)
    again = filled(back)
    torch.testing.assert_close(values(again, batch), expected, rtol=0, atol=1e-4)
    ours = dict(global_names(gpt))
    moved = {name for name, p in global_names(again) if not torch.equal(p, ours[name])}
    assert moved == set(instead)


def test_a_head_without_a_bias_needs_nothing(tmp_path: Path) -> None:
    hf.make("qwen2_tied", tmp_path / "in")
    base = HFFolder.open(tmp_path / "in", "init_from")
    model = replace(base.model, head_bias=False)
    gpt = build_model(model, ParallelConfig(), EngineConfig(), hf.VOCAB, attributes=3)
    assert place_bias(gpt, torch.float32) == ({}, None) and gpt.output_layer.regression.bias is None


def test_the_final_norm_holds_a_bias_if_it_can() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, norm = torch.randn(3, 64, generator=generator), torch.randn(64, generator=generator)
    bias = torch.tensor([6.0, 0.0, -3.0])
    for dtype, limit in ((torch.float32, 2e-5), (torch.bfloat16, 4e-3)):
        small = weight * 0.05
        found = folded(small, bias, norm * 0, dtype)
        if found is None:
            assert dtype is torch.bfloat16
            continue
        change = small.to(dtype).double() @ found.double()
        torch.testing.assert_close(change.float(), bias, rtol=0, atol=limit)
    dependent = torch.stack([weight[0], weight[0], weight[1]])
    assert folded(dependent, bias, norm, torch.float32) is None
    assert folded(torch.zeros(3, 64), bias, norm, torch.float32) is None
    nothing = folded(torch.zeros(3, 64), bias * 0, norm, torch.float32)
    assert nothing is not None and torch.equal(nothing, norm)


def test_a_reward_model_with_a_gate_gives_the_values_of_its_head(tmp_path: Path) -> None:
    """Of a class with code of its own, whose head and trunk are known, the code is not needed."""
    (name, custom), *_ = CUSTOM_CLASSIFIERS.items()
    model = hf.make("llama3.1", tmp_path, values=5)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{custom.head}.weight"] = tensors.pop("score.weight")
    tensors |= {"reward_transform_matrix": torch.eye(5), "gating.layers.0.weight": torch.ones(4, 32)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit(tmp_path, architectures=[name], auto_map={"AutoModelForSequenceClassification": "x.Y"}, id2label={"0": "L"})
    folder = HFFolder.open(tmp_path, "checkpoint")
    assert folder.labels == Labels(tuple(unnamed(5))) and folder.custom is custom
    gpt, batch = filled(folder), hf.row()
    torch.testing.assert_close(values(gpt, batch), theirs(model, batch), rtol=0, atol=1e-4)
    config = without_code(folder.config, folder.labels, folder.family)
    write_hf(tmp_path / "out", hf_tensors(gpt, folder.model, folder.family, hf.VOCAB), config, torch.float32)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(theirs(plain, batch), theirs(model, batch), rtol=0, atol=1e-4)
    edit(tmp_path, architectures=["LlamaForOther"])
    with pytest.raises(UserError, match="auto_map: the model is code of its own"):
        HFFolder.open(tmp_path, "checkpoint")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "classes": ({"problem_type": "single_label_classification"}, "problem_type=single_label_classification: its outp"),
    "labels": ({"id2label": {"0": "a", "1": "b"}}, "score.weight is [3, 32], config.json implies [2, 32]"),
    "one name": ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "id2label has one name for several labels: a a b"),
    "no numbers": ({"id2label": {"a": "b"}}, "id2label is not an object from the numbers 0, 1, … to names"),
    "none said": ({"id2label": ..., "label2id": ...}, "score.weight is [3, 32], config.json implies [2, 32]"),
    "odd number": ({"id2label": ..., "num_labels": "3"}, "num_labels='3' is not a whole number above 0"),
    "bias": ({"steerlm": {"head_bias": [1, 2]}}, "steerlm.head_bias is not a list of 3 numbers"),
    "another": ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification is not supported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_gives_no_values_is_refused(kind: str, tmp_path: Path) -> None:
    keys, words = REFUSED[kind]
    hf.make("llama3.1", tmp_path, values=3)
    edit(tmp_path, **keys)
    with pytest.raises(UserError) as raised:
        HFFolder.open(tmp_path, "checkpoint")
    assert str(raised.value).startswith(f"checkpoint={tmp_path}: ") and words in str(raised.value)


def test_labels_are_what_transformers_takes_them_for() -> None:
    assert labels_of({"num_labels": 1})[0].names == ("LABEL_0",)
    named = classifier_keys(("b", "a"))
    assert labels_of(named) == (Labels(("b", "a")), []) and named["label2id"] == {"b": 0, "a": 1}
    assert labels_of({**named, "steerlm": {"head_bias": [1, 2.5]}})[0].bias == (1.0, 2.5)
    assert labels_of(named, count=3)[0].names == tuple(unnamed(3))


def test_a_classifier_does_not_fill_another_model(tmp_path: Path) -> None:
    hf.make("llama3.1", tmp_path, values=3)
    folder = HFFolder.open(tmp_path, "checkpoint")
    model = replace(folder.model, head_bias=True)
    gpt = build_model(model, ParallelConfig(), EngineConfig(), hf.VOCAB, attributes=2)
    with pytest.raises(UserError, match=r"regression.weight \[2, 32\] is \[3, 32\] in it; .*bias \[2\] is not in it"):
        folder.weights(gpt, hf.VOCAB)
    assert unfit(folder.model, folder.family) == []
    language = build_model(folder.model, ParallelConfig(), EngineConfig(), hf.VOCAB)
    with pytest.raises(UserError, match=r"output_layer.weight \[128, 32\] is not in it"):
        folder.weights(language, hf.VOCAB)
