"""Adapters: merged they compute the same; in the format of ``peft``, out and in; and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steerlm_megatron.config.load import finalize
from steerlm_megatron.config.schema import Config, EngineConfig, OptimConfig, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.hf import HFFolder, PeftFolder, base_of, hf_tensors, is_peft_folder
from steerlm_megatron.model.hf.peft import adapter_config, adapter_tensors, write_adapter
from steerlm_megatron.model.hf.tables import EMBEDDING, OUTPUT
from steerlm_megatron.model.lora import Lora, freeze, initial_std, is_adapter, merge
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.model.weights import fill, global_names, initial_weights
from steerlm_megatron.runtime import parallel
from steerlm_megatron.train.adam import head_rates, is_head, parameter_groups
from steerlm_megatron.train.schedule import build_schedule, rates_now
from tests.helpers import hf
from tests.helpers.engines import LORA, Case, adapter_weights, build, head_weights, make, step_batches

ADDED = 3
ROWS = (hf.VOCAB, hf.VOCAB + ADDED)
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
OURS = Lora(4, 6.0, ALL, rows=ROWS)
CASES = ("llama_linear_tied", "llama_biases", "nemotron", "gpt_neox", "gemma2_tied")


@pytest.fixture
def cpu() -> Iterator[None]:
    """One rank."""
    parallel.initialize(ParallelConfig(), 1)
    yield


def adapted(folder: HFFolder, lora: Lora, fresh: bool = False) -> PackedGPTModel:
    """A model with adapters that do something, unless they are ``fresh``, over a folder's weights."""
    vocab_size = hf.VOCAB + ADDED
    gpt = build_model(folder.model, ParallelConfig(), EngineConfig(), vocab_size, lora=lora)
    fill(initial_weights(gpt, folder.model, vocab_size, 3, within="-"))
    fill(folder.weights(gpt, vocab_size))
    if not fresh:
        fill(adapter_weights(gpt))
    freeze(gpt)
    return gpt.eval()


def row() -> Any:
    """Documents with tokens of the added rows among them."""
    batch = hf.row((40, 1, 23))
    tokens = batch.tokens_T.clone()
    tokens[::7] = torch.arange(len(tokens[::7])) % ADDED + hf.VOCAB
    return replace(batch, tokens_T=tokens)


def logits(gpt: PackedGPTModel, batch: Any) -> torch.Tensor:
    found = predict_values(gpt, batch)
    assert found is not None
    return found[:, : hf.VOCAB + ADDED]


@pytest.mark.parametrize("case", CASES)
def test_merged_is_the_same_and_new_adapters_are_nothing(case: str, tmp_path: Path, cpu: None) -> None:
    hf.make(case, tmp_path)
    folder = HFFolder.open(tmp_path, "init_from")
    plain = build_model(folder.model, ParallelConfig(), EngineConfig(), hf.VOCAB + ADDED)
    fill(folder.weights(plain, hf.VOCAB + ADDED))
    batch = row()
    base = logits(plain.eval(), batch)
    assert torch.equal(logits(adapted(folder, OURS, fresh=True), batch), base)
    gpt = adapted(folder, OURS)
    apart = logits(gpt, batch)
    assert float((apart - base).abs().max()) > 0.1
    merge(gpt)
    assert not any(is_adapter(name) for name, _ in gpt.named_parameters())
    assert {name for name, _ in gpt.named_parameters()} == {name for name, _ in plain.named_parameters()}
    torch.testing.assert_close(logits(gpt, batch), apart, rtol=0, atol=1e-5 * float(apart.abs().max()))


def test_only_adapters_and_a_head_are_trained(cpu: None) -> None:
    (chunk,) = build(Case("ap", lora=LORA))
    trained = {name for name, p in chunk.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b", "rows", "weight", "bias"}
    assert {name for name in trained if not is_adapter(name)} == {
        "output_layer.regression.weight",
        "output_layer.regression.bias",
    }
    assert "output_layer.rows" not in trained, "a regression head has no vocabulary"


def test_adapters_start_as_nothing_with_a_random_a(cpu: None) -> None:
    case = Case("sft", lora=replace(LORA, rank=16))
    (chunk,) = build(case)
    start = {name: v for (name, p), v in zip(global_names(chunk), [None] * 999, strict=False) if is_adapter(name)}
    drawn = dict(zip([n for n, _ in global_names(chunk)], initial_weights(chunk, case.model, 300, 5), strict=True))
    for name in start:
        value = drawn[name][1]
        if name.endswith("lora_a"):
            assert value.std() == pytest.approx(initial_std(value.shape), rel=0.1)
        else:
            assert not value.any()


def test_recomputation_without_trained_rows_trains_all_layers(cpu: None) -> None:
    """Nothing below the first adapter has a gradient, which recomputation takes for a reason to have none above."""
    losses = {}
    for kind in ("none", "full"):
        engine = make(Case("sft", lora=replace(LORA, rows=(0, 0)), recompute=kind))
        losses[kind] = [engine.train_step(step_batches(step)).loss for step in range(3)]
    assert losses["full"] == losses["none"] and len(set(losses["none"])) == 3


# ---- peft


def exported(gpt: PackedGPTModel, folder: HFFolder, lora: Lora, target: Path) -> None:
    """Write the adapter of a model that is whole on this rank."""
    params = {name: p.detach() for name, p in global_names(gpt)}
    names = [EMBEDDING] if folder.model.tie_embeddings else [EMBEDDING, OUTPUT]
    tables = {name: params[name][slice(*lora.rows)] + params[f"{name.removesuffix('weight')}rows"] for name in names}
    adapters = {name: p for name, p in params.items() if name.endswith(("lora_a", "lora_b"))}
    target.mkdir()
    config = adapter_config(folder.family, lora, str(folder.folder), names, lora.rows)
    write_adapter(target, adapter_tensors(folder.family, folder.model, adapters, tables), config)


def their_logits(base: Path, adapter: Path, batch: Any) -> torch.Tensor:
    peft = pytest.importorskip("peft", reason="peft is not installed (setup.py[dev])")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if model.get_input_embeddings().weight.shape[0] < hf.VOCAB + ADDED:
        model.resize_token_embeddings(hf.VOCAB + ADDED)
    return hf.their_logits(peft.PeftModel.from_pretrained(model, adapter).eval(), batch)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_goes_out_and_it_comes_in_again(case: str, tmp_path: Path, cpu: None) -> None:
    hf.make(case, tmp_path / "base")
    base = HFFolder.open(tmp_path / "base", "init_from")
    gpt, batch = adapted(base, OURS), row()
    exported(gpt, base, OURS, tmp_path / "adapter")
    assert is_peft_folder(tmp_path / "adapter") and not is_peft_folder(tmp_path / "base")
    assert base_of(tmp_path / "adapter") == str(tmp_path / "base")
    expected = logits(gpt, batch)
    back = PeftFolder.open_adapter(tmp_path / "adapter", "init_from", base)
    assert back.lora == OURS and back.in_one_piece and back.vocab_size == hf.VOCAB + ADDED
    merged = build_model(back.model, ParallelConfig(), EngineConfig(), hf.VOCAB + ADDED)
    fill(back.weights(merged, hf.VOCAB + ADDED))
    torch.testing.assert_close(logits(merged.eval(), batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    again = build_model(back.model, ParallelConfig(), EngineConfig(), hf.VOCAB + ADDED, lora=back.lora)
    fill(initial_weights(again, back.model, hf.VOCAB + ADDED, 3, within="-"))
    fill(back.apart(again, hf.VOCAB + ADDED))
    torch.testing.assert_close(logits(again.eval(), batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    ours, theirs = dict(global_names(gpt)), dict(global_names(again))
    halves = [name for name in ours if name.endswith(("lora_a", "lora_b"))]
    assert halves and all(torch.equal(ours[name], theirs[name]) for name in halves)
    theirs_L = their_logits(tmp_path / "base", tmp_path / "adapter", batch)
    torch.testing.assert_close(theirs_L, expected, rtol=0, atol=1e-4)


FOREIGN: dict[str, dict[str, Any]] = {
    "two of three, of one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "all, rslora": {"target_modules": "all-linear", "use_rslora": True},
    "one half of the gate": {"target_modules": ["gate_proj", "o_proj"], "lora_alpha": 3},
    "tables": {"target_modules": ["down_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["k_proj"], "trainable_token_indices": {"embed_tokens": [3, 9, 50]}},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_adapters_of_others_come_in(kind: str, tmp_path: Path, cpu: None) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (setup.py[dev])")
    hf.make("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **FOREIGN[kind]}))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "adapter")
    batch = hf.row((30, 20))
    expected = hf.their_logits(model.eval(), batch)
    base = HFFolder.open(tmp_path / "base", "init_from")
    assert float((expected - hf.their_logits(model.get_base_model().eval(), batch)).abs().max()) >= 0
    found = PeftFolder.open_adapter(tmp_path / "adapter", "init_from", base)
    assert found.in_one_piece == (kind not in ("tables", "tokens"))
    merged = build_model(found.model, ParallelConfig(), EngineConfig(), hf.VOCAB)
    fill(found.weights(merged, hf.VOCAB))
    torch.testing.assert_close(logits(merged.eval(), batch)[:, : hf.VOCAB], expected, rtol=0, atol=1e-4)
    again = build_model(found.model, ParallelConfig(), EngineConfig(), hf.VOCAB, lora=found.lora)
    fill(initial_weights(again, found.model, hf.VOCAB, 3, within="-"))
    fill(found.apart(again, hf.VOCAB))
    torch.testing.assert_close(logits(again.eval(), batch)[:, : hf.VOCAB], expected, rtol=0, atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora=true"),
    "biases": ({"bias": "all"}, 'bias="all"'),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "another kind": ({"peft_type": "IA3"}, "peft_type=IA3"),
    "another base": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    "no rank": ({"r": None}, "r=None"),
    "another rank": ({"r": 5}, r"no A \[5, 32\] with a B"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_represented_is_refused_by_its_key(kind: str, tmp_path: Path, cpu: None) -> None:
    hf.make("llama", tmp_path / "base", num_hidden_layers=1)
    base = HFFolder.open(tmp_path / "base", "init_from")
    exported(adapted(base, OURS), base, OURS, tmp_path / "adapter")
    change, said = REFUSED[kind]
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"init_from=.*{said}"):
        PeftFolder.open_adapter(tmp_path / "adapter", "init_from", base)


def test_other_tensors_are_named_and_pickles_refused(tmp_path: Path, cpu: None) -> None:
    hf.make("llama", tmp_path / "base", num_hidden_layers=1)
    base = HFFolder.open(tmp_path / "base", "checkpoint")
    exported(adapted(base, OURS), base, OURS, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, path)
    with pytest.raises(UserError, match=r"lm_head.lora_A.weight; read are adapters of down_proj gate_proj"):
        PeftFolder.open_adapter(tmp_path / "adapter", "checkpoint", base)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(UserError, match="is cut short"):
        PeftFolder.open_adapter(tmp_path / "adapter", "checkpoint", base)
    path.rename(path.with_name("adapter_model.bin"))
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle"):
        PeftFolder.open_adapter(tmp_path / "adapter", "checkpoint", base)


def test_a_merged_model_leaves_as_the_base_does(tmp_path: Path, cpu: None) -> None:
    hf.make("llama", tmp_path / "base", num_hidden_layers=1)
    base = HFFolder.open(tmp_path / "base", "init_from")
    gpt = adapted(base, OURS)
    merge(gpt)
    out = dict(hf_tensors(gpt, base.model, base.family, hf.VOCAB + ADDED))
    assert out.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


# ---- the head's learning rate


def test_the_head_has_a_rate_of_its_own_on_the_same_schedule(cpu: None) -> None:
    optim = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, head_lr=2e-2, weight_decay=0.1)
    (chunk,) = build(Case("ap"))
    groups = parameter_groups(chunk, optim)
    assert [(g["wd_mult"], g.get("max_lr"), g.get("min_lr")) for g in groups] == [
        (1.0, None, None), (0.0, None, None), (1.0, 2e-2, pytest.approx(2e-3)), (0.0, 2e-2, pytest.approx(2e-3)),
    ]  # fmt: skip
    head = {id(p) for name, p in chunk.named_parameters() if is_head(f"module.module.{name}")}
    assert {id(p) for g in groups[2:] for p in g["params"]} == head and len(head) == 2
    assert len(parameter_groups(chunk, replace(optim, head_lr=None))) == 2
    optimizer = torch.optim.AdamW(groups)
    schedule = build_schedule(optimizer, optim, 8)
    for _ in range(8):
        schedule.step(increment=1)
        lr, told = rates_now(schedule)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr, lr, 20 * lr, 20 * lr])
        assert told == {"head_lr": pytest.approx(20 * lr)}
    assert rates_now(build_schedule(optimizer, replace(optim, head_lr=None), 8))[1] == {}
    assert head_rates(replace(optim, lr=0.0, min_lr=0.0))["min_lr"] == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"command": "train_sft", "optim.head_lr": 1e-3}, "optim.head_lr=0.001 is of train_ap"),
        ({"command": "train_ap", "train.trainable": "lora"}, "name it with init_from="),
        ({"command": "train_sft", "lora.rank": 4}, "lora.rank=4 does nothing without train.trainable=lora"),
        ({"command": "train_sft", "lora.targets": ["q_proj"]}, "lora.targets=.*must name some of: linear_qkv"),
        ({"command": "export", "export.adapter": True}, "an adapter alone has format=hf"),
        ({"command": "export", "export.base": "x"}, "export.base=x is of export.adapter=true"),
    ],
)
def test_keys_that_do_nothing_are_refused(keys: dict[str, Any], said: str) -> None:
    config = Config()
    for key, value in keys.items():
        owner: Any = config
        *sections, name = key.split(".")
        for section in sections:
            owner = getattr(owner, section)
        setattr(owner, name, value)
    with pytest.raises(UserError, match=said):
        finalize(config, alone=True)


def test_head_weights_are_left_alone_by_adapters(cpu: None) -> None:
    (chunk,) = build(Case("ap", lora=LORA))
    (expected, _), *_ = [head_weights(chunk)[0]]
    merge(chunk)
    assert torch.equal(chunk.output_layer.regression.weight, expected)
