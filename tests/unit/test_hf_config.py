"""``config.json`` of ``transformers`` folders: read as every version writes it, written back, or refused by its key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.hf import FAMILIES, HFFolder, config_for, family_for, write_hf
from steerlm_megatron.model.hf.config_json import model_of
from tests.helpers import hf


def edit(folder: Path, **keys: Any) -> None:
    """Change keys of config.json; ``...`` takes one out."""
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("case", ["llama", "llama3.1", "llama_linear_tied", "nemotron"])
def test_version_4_says_rope_elsewhere(case: str, tmp_path: Path) -> None:
    hf.make(case, tmp_path)
    new = HFFolder.open(tmp_path, "init_from")
    rope = dict(new.config["rope_parameters"])
    base, share = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", ...)
    for kind in ("rope_type", "type"):
        scaling = {kind: rope["rope_type"], **{key: value for key, value in rope.items() if key != "rope_type"}}
        default = rope["rope_type"] == "default"
        edit(tmp_path, rope_parameters=..., rope_theta=base, rope_scaling=None if default else scaling)
        edit(tmp_path, partial_rotary_factor=share)
        old = HFFolder.open(tmp_path, "init_from")
        assert old.model == new.model
        assert config_for(old.model, old.family, hf.VOCAB, old.config) == old.config


def test_what_changed_is_updated_and_unknown_keys_survive(tmp_path: Path) -> None:
    hf.make("llama3.1", tmp_path)
    edit(tmp_path, of_somebody={"else": [1, None]}, torch_dtype="bfloat16", dtype=...)
    folder = HFFolder.open(tmp_path, "init_from")
    model = replace(folder.model, max_position=512, rotary_scaling_factor=16.0, init_std=0.5)
    config = config_for(model, folder.family, 99, folder.config)
    expected = json.loads(json.dumps(folder.config))
    expected["rope_parameters"]["factor"] = 16.0
    assert config == expected | {"vocab_size": 99, "max_position_embeddings": 512}
    write_hf(tmp_path / "out", [("x", torch.zeros(2))], config, torch.float32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"torch_dtype": "float32"}


def test_a_model_that_no_family_has_says_why() -> None:
    with pytest.raises(UserError, match=r"llama: not with model\.norm=layernorm; .*nemotron: not with model"):
        family_for(ModelConfig(norm="layernorm"))
    with pytest.raises(UserError, match=r"a mistral model cannot have model\.bias=True"):
        config_for(ModelConfig(bias=True), FAMILIES["mistral"], 10)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "yarn": ("llama", {"rope_scaling": YARN}, "rope_scaling.rope_type=yarn is not supported; supported: default"),
    "yarn, version 5": ("qwen2", {"rope_parameters": YARN}, "rope_parameters.rope_type=yarn is not supported"),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type=dynamic is not"),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=null is not a number, which"),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not one that this llama can"),
    "window": ("mistral", {"sliding_window": 0}, "sliding_window=0 is not a whole number above 0"),
    "no window of layers that have one": ("gemma2_tied", {"sliding_window": None}, "sliding_window=null is not"),
    "window of Qwen": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": "2", "layer_types": ...},
        'max_window_layers="2" is not a number',
    ),
    "layer types": (
        "qwen3", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["chunked_attention"] * 4},
        'layer_types=["chunked_attention", "chunked_attention", "chunked_attention", "chunked_attention"] is not',
    ),
    "too few layer types": ("gemma3_tied", {"layer_types": ["full_attention"]}, "for each of 4 layers"),
    "pattern": ("gemma3_tied", {"layer_types": ..., "sliding_window_pattern": 0}, "sliding_window_pattern=0 is"),
    "both directions": ("gemma2_tied", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
    "cap of scores": ("gemma3_tied", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not"),
    "cap below zero": ("gemma2_tied", {"final_logit_softcapping": -1.0}, "model.logit_softcap=-1.0 must be"),
    "gelu": ("gemma3_tied", {"hidden_activation": "gelu"}, 'hidden_activation="gelu" is not one that this gemma3_text'),
    "RoPE by layer": (
        "llama", {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "differs between kinds of la",
    ),
    "stretched windows": (
        "gemma3_tied", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters.sliding_attention.rope_type",
    ),
    "RoPE of one kind": ("gemma3_tied", {"rope_parameters": {"rope_theta": 1e4}}, "is not an object with full_att"),
    "RoPE twice": ("gemma3_tied", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "are both there: one of"),
    "local base": (
        "gemma3_tied", {"rope_parameters": ..., "rope_local_base_freq": "x"}, 'rope_local_base_freq="x" is not a',
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, 'hidden_act="gelu" is not one that this llama can have: "silu"'),
    "biases": ("llama", {"attention_bias": True}, "attention_bias=true with mlp_bias=false: either all linear layers"),
    "biases of Qwen 3": ("qwen3", {"attention_bias": True}, "attention_bias=true is not one that this qwen3 can have"),
    "a key is missing": ("llama", {"intermediate_size": ...}, "intermediate_size is missing"),
    "not a number": ("llama", {"num_hidden_layers": "4"}, "num_hidden_layers='4' is not a whole number"),
    "groups": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    "two at once": ("llama", {"hidden_act": "gelu", "hidden_size": ...}, "hidden_size is missing; hidden_act="),
    "auto_map": ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: the model is code of its own, which"),
    "quantised": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "has quantization_config (gptq): quant"),
    "architecture": ("llama", {"architectures": ["LlamaModel"]}, "LlamaModel is not supported; supported: LlamaForC"),
    "model_type": ("llama", {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not"),
    "vocabulary": ("llama", {"vocab_size": 94}, "model.embed_tokens.weight is [93, 32], config.json implies [94, 32]"),
    "untied": ("qwen2_tied", {"tie_word_embeddings": False}, "tensors that config.json implies are missing: lm_head.w"),
    "more layers": (
        "llama", {"num_hidden_layers": 5},
        "missing: model.layers.4.self_attn.q_proj.weight model.layers.4.self_attn.k_proj.weight ",
    ),
    "fewer layers": ("llama", {"num_hidden_layers": 3}, "does not imply are there: model.layers.3.input_layernorm.wei"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_represented_is_refused_by_its_key(kind: str, tmp_path: Path) -> None:
    case, keys, words = REFUSED[kind]
    hf.make(case, tmp_path)
    edit(tmp_path, **keys)
    with pytest.raises(UserError) as raised:
        HFFolder.open(tmp_path, "init_from")
    assert str(raised.value).startswith(f"init_from={tmp_path}: ") and words in str(raised.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": 256},
        {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 4},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4, "layer_types": ...},
    ],
)
def test_a_window_that_hides_nothing_is_fine(keys: dict[str, Any], tmp_path: Path) -> None:
    hf.make("qwen2" if "use_sliding_window" in keys else "mistral", tmp_path)
    edit(tmp_path, **keys)
    assert HFFolder.open(tmp_path, "init_from").model.sliding_window in (None, 256)


def test_windows_are_read_as_every_version_says_them(tmp_path: Path) -> None:
    """Qwen's ``max_window_layers``; Gemma's patterns; the window of the class where config.json has none."""
    for case, keys, window, full in (
        ("mistral", {"sliding_window": ...}, 4096, []),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, 64, [0, 1, 2]),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 3}, None, []),
        ("gemma2_tied", {}, 24, [1, 3]),
        ("gemma2_tied", {"sliding_window": ...}, 4096, [1, 3]),
        ("gemma3_tied", {}, 24, []),
        ("gemma3_tied", {"sliding_window_pattern": 3}, 24, [2]),
    ):
        hf.make(case, tmp_path)
        edit(tmp_path, layer_types=..., **keys)
        folder = HFFolder.open(tmp_path, "init_from")
        assert (folder.model.sliding_window, folder.model.full_attention_layers) == (window, full), (case, keys)


def test_gemmas_two_ropes_are_read_as_both_versions_say_them(tmp_path: Path) -> None:
    hf.make("gemma3_tied", tmp_path)
    new = HFFolder.open(tmp_path, "init_from")
    assert (new.model.rotary_base, new.model.rotary_local_base, new.model.rotary_scaling_factor) == (1e6, 1000, 8)
    edit(tmp_path, rope_parameters=..., rope_theta=1e6, rope_local_base_freq=1000)
    edit(tmp_path, rope_scaling={"rope_type": "linear", "factor": 8.0})
    old = HFFolder.open(tmp_path, "init_from")
    assert old.model == new.model
    assert config_for(old.model, old.family, hf.VOCAB, old.config) == old.config
    changed = replace(new.model, rotary_local_base=500.0, rotary_scaling="none", sliding_window=9, num_layers=5)
    for folder in (old, new):
        config = config_for(changed, folder.family, hf.VOCAB, folder.config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert model_of(config, folder.family) == (replace(changed, rotary_scaling_factor=1.0), [])
    plain = replace(changed, rotary_local_base=None, full_attention_layers=[])
    for model in (plain, replace(plain, sliding_window=None)):
        assert model_of(config_for(model, new.family, hf.VOCAB), new.family) == (
            replace(model, name=new.family.name, rotary_scaling_factor=1.0), [],
        )  # fmt: skip
    with pytest.raises(UserError, match=r"gemma3_text: not with model\.rotary_local_base=None"):
        family_for(replace(new.model, rotary_local_base=None))
    hf.make("gemma3_tied", tmp_path)
    edit(tmp_path, rope_parameters=...)
    absent = HFFolder.open(tmp_path, "init_from").model
    assert (absent.rotary_base, absent.rotary_local_base) == (1e6, 1e4), "of the class in transformers"


@pytest.mark.parametrize("case", ["llama3.1", "mistral", "qwen2", "gpt_neox", "gemma3_tied"])
def test_no_value_of_any_key_is_a_surprise(case: str, tmp_path: Path) -> None:
    """Whatever stands in config.json, the folder is opened or refused with words."""
    hf.make(case, tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    if case == "qwen2":
        whole |= {"use_sliding_window": True, "sliding_window": 10, "layer_types": None, "max_window_layers": 4}
    paths = [[key] for key in whole] + [["rope_parameters", key] for key in whole["rope_parameters"]]
    if case == "gemma3_tied":
        whole |= {"sliding_window_pattern": 2}
        paths += [["layer_types"], ["sliding_window_pattern"], ["rope_local_base_freq"]]
    paths += [["rope_scaling"], ["rope_theta"], ["quantization_config"]]
    opened = 0
    for path in paths:
        for value in (None, True, -1, 0, 3, 1.5, float("inf"), float("nan"), "x", "", [], [1], {}, {"a": 1}, {"a": {}}):
            config = json.loads(json.dumps(whole))
            where = config["rope_parameters"] if len(path) > 1 else config
            where[path[-1]] = value
            (tmp_path / "config.json").write_text(json.dumps(config))
            try:
                HFFolder.open(tmp_path, "init_from")
                opened += 1
            except UserError as error:
                assert str(error).startswith(f"init_from={tmp_path}: ")
    assert opened > 100  # of keys that nothing of ours depends on
