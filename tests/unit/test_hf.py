"""Models of ``transformers`` in and out: the same logits, the same bytes, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import Request, SamplingParams
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.hf import (
    FAMILIES,
    Family,
    HFFolder,
    config_for,
    family_for,
    hf_tensors,
    tables,
    write_hf,
)
from steerlm_megatron.model.hf.tables import Rows, Rule, by_group, heads, parameters
from steerlm_megatron.model.inputs import on_device
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.model.weights import fill, global_names, initialize
from steerlm_megatron.runtime import parallel
from steerlm_megatron.stages.train import engine_of
from tests.helpers import hf
from tests.helpers.engines import OPTIM, Case, bare, objective
from tests.helpers.fake_model import FakeTemplate, FakeTokenizer, limits
from tests.helpers.hf import ADDED, TOLERANCE, contents, filled, logits

INDEX = "model.safetensors.index.json"


@pytest.fixture
def cpu() -> Iterator[None]:
    """One rank."""
    parallel.initialize(ParallelConfig(), 1)
    yield


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        assert torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("case", hf.CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path, cpu: None) -> None:
    """Beyond ``original_max_position_embeddings`` too, documents packed into one row and alone."""
    model = hf.make(case, tmp_path)
    folder = HFFolder.open(tmp_path, "init_from")
    assert (folder.vocab_size, folder.precision, folder.head) == (hf.VOCAB, "fp32", "lm")
    gpt = filled(folder)
    for lengths in (hf.LENGTHS, (200,)):
        batch = hf.row(lengths)
        expected = hf.their_logits(model, batch)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits(gpt, batch), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", hf.CASES)
def test_what_goes_out_is_what_came_in(case: str, tmp_path: Path, cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    """Files and names as ``save_pretrained`` gives them, bit for bit, and loaded without a word."""
    hf.make(case, tmp_path / "in")
    folder = HFFolder.open(tmp_path / "in", "init_from")
    gpt = filled(folder)
    config = config_for(folder.model, folder.family, hf.VOCAB, folder.config)
    assert config == folder.config
    tensors = hf_tensors(gpt, folder.model, folder.family, hf.VOCAB)
    files = write_hf(tmp_path / "out", tensors, config, torch.float32)
    came = sorted(path.name for path in (tmp_path / "in").iterdir() if path.name != "generation_config.json")
    assert sorted(files) == sorted(path.name for path in (tmp_path / "out").iterdir()) == came
    for name in files:
        theirs, ours = ((tmp_path / side / name).read_bytes() for side in ("in", "out"))
        assert ours == theirs if name != "config.json" else json.loads(ours) == json.loads(theirs), name
    logging.enable_propagation()
    caplog.clear()
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logging.disable_propagation()
    assert not [record for record in caplog.records if record.name.startswith("transformers")]


@pytest.mark.parametrize("case", hf.CASES)
def test_a_model_of_ours_leaves_as_a_family_that_can_express_it(case: str, tmp_path: Path, cpu: None) -> None:
    """Without a config.json of theirs: all that the model is has to be in the new one."""
    hf.make(case, tmp_path / "in")
    came = HFFolder.open(tmp_path / "in", "init_from")
    family = family_for(came.model)
    assert family.name == ("llama" if case == "mistral" else came.family.name)
    gpt = initialize(build_model(came.model, ParallelConfig(), EngineConfig(), 77), came.model, 77, seed=1)
    tensors = hf_tensors(gpt.eval(), came.model, family, 77)
    write_hf(tmp_path / "out", tensors, config_for(came.model, family, 77), torch.float32)
    back = HFFolder.open(tmp_path / "out", "init_from")
    assert replace(back.model, name="") == replace(came.model, name="") and back.vocab_size == 77
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    batch = hf.row()
    batch.tokens_T %= 77
    found = predict_values(gpt, batch)
    assert found is not None
    torch.testing.assert_close(found[:, :77], hf.their_logits(theirs, batch), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["llama3.1", "qwen2_tied", "nemotron", "gemma3_tied"])
def test_bf16_in_shards_is_bf16_in_shards(case: str, tmp_path: Path, cpu: None) -> None:
    model = hf.make(case, tmp_path / "in", torch.bfloat16, shard="20KB")
    folder = HFFolder.open(tmp_path / "in", "init_from")
    assert folder.precision == "bf16"
    gpt = filled(folder, precision="bf16")
    tensors = hf_tensors(gpt, folder.model, folder.family, hf.VOCAB)
    config = config_for(folder.model, folder.family, hf.VOCAB, folder.config)
    files = write_hf(tmp_path / "out", tensors, config, torch.bfloat16, 20_000)
    assert len(files) > 5 and all((tmp_path / "out" / name).stat().st_size < 22_500 for name in files)
    same(contents(tmp_path / "out"), contents(tmp_path / "in"))
    index, theirs = (json.loads((tmp_path / side / INDEX).read_text()) for side in ("out", "in"))
    assert index["metadata"] == theirs["metadata"] and sorted(index["weight_map"]) == sorted(theirs["weight_map"])
    assert sorted(set(index["weight_map"].values())) == sorted(files[:-2])
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert again.dtype is torch.bfloat16 and not any(told.values())
    batch = hf.row()
    wide = hf.their_logits(model, batch)
    assert (logits(gpt, batch) - wide).std() < 0.05 * wide.std()


def test_an_engine_takes_a_folder_and_gives_it_back(tmp_path: Path, cpu: None) -> None:
    """bf16 weights that an engine has spread over its buffers, before any step."""
    hf.make("qwen3", tmp_path, torch.bfloat16)
    folder = HFFolder.open(tmp_path, "init_from")
    case, engine_config = Case("sft", micro_batches=1), EngineConfig(precision="bf16")
    gpt = build_model(folder.model, ParallelConfig(), engine_config, hf.VOCAB + ADDED)
    weights = folder.weights(gpt, hf.VOCAB + ADDED)
    engine = engine_of(engine_config)([gpt], objective(case), OPTIM["sft"], engine_config, 8)
    engine.fill(weights)
    (filled_model,) = bare(engine)
    out = hf_tensors(filled_model, folder.model, folder.family, hf.VOCAB)
    same({name: value.bfloat16() for name, value in out}, contents(tmp_path))


# Deliberately wrong tables


def changed(family: Family, ours: str, **fields: Any) -> Family:
    """The family with another rule for one module."""
    rules = tuple(replace(rule, **fields) if rule.ours.endswith(ours) else rule for rule in family.rules)
    assert rules != family.rules
    return replace(family, rules=rules)


def flat(model: ModelConfig, rows: int) -> list[Rows]:
    queries, groups, head, _ = heads(model)
    return [Rows(0, 0, queries * head), Rows(1, 0, groups * head), Rows(2, 0, groups * head)]


def interleaved(model: ModelConfig, rows: int) -> list[Rows]:
    """Rows of a head in the order of Meta's own Llama files, pairs beside each other."""
    half = heads(model)[2] // 2
    out = []
    for tensor, start, stop in by_group(model, rows):
        if tensor == 2:
            out.append(Rows(tensor, start, stop))
            continue
        for head in range(start, stop, 2 * half):
            order = [head + i // 2 + (i % 2) * half for i in range(2 * half)]
            out += [Rows(tensor, row, row + 1) for row in order]
    return out


def gate_and_up(family: Family) -> Family:
    rule = next(rule for rule in family.rules if rule.ours.endswith("linear_fc1"))
    return changed(family, "linear_fc1", theirs=rule.theirs[::-1])


WRONG: dict[str, Callable[[Family], Family]] = {
    "gate and up swapped": gate_and_up,
    "q, k, v flat": lambda family: changed(family, "linear_qkv", layout=flat),
    "RoPE interleaved": lambda family: changed(family, "linear_qkv", layout=interleaved),
    "norms swapped": lambda family: changed(
        changed(family, "input_layernorm", theirs=("model.layers.{}.post_attention_layernorm",)),
        "pre_mlp_layernorm",
        theirs=("model.layers.{}.input_layernorm",),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_is_far_beyond_the_tolerance(wrong: str, tmp_path: Path, cpu: None) -> None:
    model, batch = hf.make("llama3.1", tmp_path), hf.row()
    folder = HFFolder.open(tmp_path, "init_from")
    wrongly = replace(folder, family=WRONG[wrong](folder.family))
    difference = (logits(filled(wrongly), batch) - hf.their_logits(model, batch)).abs().max()
    assert difference > 1000 * TOLERANCE


def test_rope_scaling_shows_beyond_the_original_length(tmp_path: Path, cpu: None) -> None:
    model, batch = hf.make("llama3.1", tmp_path), hf.row()
    folder = HFFolder.open(tmp_path, "init_from")
    lost = replace(folder, model=replace(folder.model, rotary_scaling="none"))
    assert (logits(filled(lost), batch) - hf.their_logits(model, batch)).abs().max() > 1000 * TOLERANCE


def post_norms_swapped(family: Family) -> Family:
    """The norm after the attention in the place of the one before the MLP, as Llama has that name."""
    before, after = (f"model.layers.{{}}.{name}_layernorm" for name in ("pre_feedforward", "post_attention"))
    return changed(changed(family, "pre_mlp_layernorm", theirs=(after,)), "self_attn_bda.norm", theirs=(before,))


WRONG_OF_GEMMA: dict[str, dict[str, Any]] = {
    "embeddings": {"scale_embeddings": False},
    "norms": {"norm": "rmsnorm"},
    "activation": {"activation": "swiglu"},
    "scale of scores": {"query_pre_attn_scalar": None},
    "cap of scores": {"attention_softcap": None},
    "cap of logits": {"logit_softcap": None},
    "no window": {"sliding_window": None},
    "a window too wide": {"sliding_window": 25},
    "a window too narrow": {"sliding_window": 23},
    "layers with windows": {"full_attention_layers": [0, 3]},
    "RoPE of windows": {"rotary_local_base": None},
    "RoPE of other layers": {"rotary_scaling": "none"},
}


@pytest.mark.parametrize("case", ["gemma2_tied", "gemma3_tied"])
def test_all_that_gemma_has_shows_in_its_logits(case: str, tmp_path: Path, cpu: None) -> None:
    model, batch = hf.make(case, tmp_path), hf.row()
    folder, expected = HFFolder.open(tmp_path, "init_from"), hf.their_logits(model, batch)
    wrong = {name: replace(folder.model, **fields) for name, fields in WRONG_OF_GEMMA.items()}
    folders = {name: replace(folder, model=other) for name, other in wrong.items() if other != folder.model}
    assert len(folders) == {"gemma2_tied": 10, "gemma3_tied": 10}[case]
    for name in ("gate and up swapped", "q, k, v flat", "RoPE interleaved"):
        folders[name] = replace(folder, family=WRONG[name](folder.family))
    folders["norms swapped"] = replace(folder, family=post_norms_swapped(folder.family))
    for name, wrongly in folders.items():
        difference = (logits(filled(wrongly), batch) - expected).abs().max()
        assert difference > 100 * TOLERANCE, name


# Generation


class HexTokenizer(FakeTokenizer):
    """Ids of the models here as hexadecimal numbers; the last two are control tokens."""

    vocab_size = hf.VOCAB

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{i:02x}" for i in ids)

    def control_id(self, text: str) -> int:
        return {"<turn>": hf.VOCAB - 2, "<label>": hf.VOCAB - 1}[text]


@pytest.mark.parametrize("case", ["qwen2_window", "gemma2_tied", "gemma3_tied", "llama3.1"])
def test_greedy_responses_are_those_of_transformers(case: str, tmp_path: Path, cpu: None) -> None:
    """Prompts shorter and longer than the window, decoded in one batch far beyond it."""
    model = hf.make(case, tmp_path)
    folder = HFFolder.open(tmp_path, "checkpoint")
    gpt = build_model(folder.model, ParallelConfig(), EngineConfig(), hf.VOCAB, gather_logits=True)
    fill(folder.weights(gpt, hf.VOCAB))
    generator = Generator(gpt, HexTokenizer(), FakeTemplate(), limits(max_sequence_tokens=200))
    prompts = hf.row((40, 3, 70, 1)).tokens_T.split((40, 3, 70, 1))
    greedy = SamplingParams(temperature=0.0, max_tokens=60)
    found = generator.generate([Request(str(i), tuple(p.tolist()), greedy) for i, p in enumerate(prompts)])
    different = set()
    for prompt, result in zip(prompts, found, strict=True):
        expected = hf.greedy(model, prompt, 60, stop=hf.VOCAB - 2, banned=hf.VOCAB - 1)
        assert list(result.token_ids) == expected
        different |= set(expected)
    assert len(different) > 5


# The vocabulary


@pytest.mark.parametrize("case", ["llama", "qwen2_tied"])
def test_added_rows_are_the_mean_and_padding_is_zero(case: str, tmp_path: Path, cpu: None) -> None:
    model = hf.make(case, tmp_path)
    gpt = filled(HFFolder.open(tmp_path, "init_from"))
    tables_of_it = {"word_embeddings": model.get_input_embeddings(), "output_layer": model.get_output_embeddings()}
    seen = 0
    for name, parameter in gpt.named_parameters():
        for ours, theirs in tables_of_it.items():
            if ours in name:
                seen += 1
                assert torch.equal(parameter[: hf.VOCAB], theirs.weight)
                mean = theirs.weight.mean(0)
                torch.testing.assert_close(parameter[hf.VOCAB : hf.VOCAB + ADDED], mean.expand(ADDED, -1))
                assert len(parameter) == 128 and not parameter[hf.VOCAB + ADDED :].any()
    assert seen == (1 if case == "qwen2_tied" else 2)


def test_a_table_with_more_rows_than_the_tokenizer_is_kept(tmp_path: Path, cpu: None) -> None:
    hf.make("llama", tmp_path)
    folder = HFFolder.open(tmp_path, "init_from")
    gpt = filled(folder, 80)  # padded to 128 rows
    out = dict(hf_tensors(gpt, folder.model, folder.family, hf.VOCAB))
    same(out, contents(tmp_path))
    small = replace(folder, model=replace(folder.model, vocab_multiple=8))
    with pytest.raises(UserError, match=rf"init_from={tmp_path}.* has 80 rows, the file's 93 do not fit"):
        small.weights(build_model(small.model, ParallelConfig(), EngineConfig(), 80), 80)


def test_a_regression_head_is_not_in_the_folder(tmp_path: Path, cpu: None) -> None:
    hf.make("qwen2_tied", tmp_path)
    folder = HFFolder.open(tmp_path, "init_from")
    gpt = build_model(folder.model, ParallelConfig(), EngineConfig(), hf.VOCAB, attributes=3)
    given = {id(parameter) for parameter, _ in folder.weights(gpt, hf.VOCAB)}
    left = [name for name, parameter in global_names(gpt) if id(parameter) not in given]
    assert left == ["output_layer.regression.weight", "output_layer.regression.bias"]


def test_another_model_is_refused_before_anything_is_read(tmp_path: Path, cpu: None) -> None:
    hf.make("llama", tmp_path)
    folder = HFFolder.open(tmp_path, "init_from")
    gpt = build_model(replace(folder.model, qk_norm=True, ffn_hidden_size=64), ParallelConfig(), EngineConfig(), 93)
    with pytest.raises(UserError) as raised:
        folder.weights(gpt, 93)
    assert "linear_fc1.weight [128, 32] is [96, 32] in it" in str(raised.value)
    assert "layers.3.self_attention.q_layernorm.weight [8] is not in it" in str(raised.value)


@pytest.mark.parametrize("case", hf.CASES)
def test_the_list_of_our_parameters_is_that_of_the_model(case: str, tmp_path: Path, cpu: None) -> None:
    hf.make(case, tmp_path)
    folder = HFFolder.open(tmp_path, "init_from")
    gpt = build_model(folder.model, ParallelConfig(), EngineConfig(), 128, where="meta")
    assert parameters(folder.model, 128) == {name: tuple(p.shape) for name, p in global_names(gpt)}


# docs/models.md


def test_the_family_of_the_documentation_works(tmp_path: Path, cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of how a family is added is run, and at most 30 lines long."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*ARCEE[^`]*)```", page)
    assert len(example.splitlines()) <= 30
    names = dict(vars(tables))
    exec(example, names)
    monkeypatch.setitem(FAMILIES, "arcee", names["ARCEE"])
    monkeypatch.setitem(hf.CASES, "arcee", ("arcee", {}))
    model = hf.make("arcee", tmp_path)
    folder = HFFolder.open(tmp_path, "init_from")
    expected = hf.their_logits(model, hf.row())
    torch.testing.assert_close(logits(filled(folder), hf.row()), expected, rtol=0, atol=TOLERANCE)
    same(dict(hf_tensors(filled(folder), folder.model, folder.family, hf.VOCAB)), contents(tmp_path))


def test_every_family_has_rules_for_modules_that_are_there() -> None:
    for name, family in FAMILIES.items():
        assert name == family.name and isinstance(family.rules[0], Rule)
        model = replace(ModelConfig(**family.fixed), qk_norm=True)
        ours = {re.sub(r"\.\d+\.", ".{}.", key.rsplit(".", 1)[0]) for key in parameters(model, 10)}
        assert {rule.ours for rule in family.rules} <= ours


def test_the_batch_goes_in_as_it_is() -> None:
    """The row that is compared is packed: its positions start anew in every document."""
    here, packed = on_device(hf.row())
    assert packed.lengths == list(hf.LENGTHS) and int(here.positions_T.max()) == max(hf.LENGTHS) - 1


def test_the_text_part_of_a_model_that_sees_images(tmp_path: Path, cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {
        "vocab_size": hf.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 24, "query_pre_attn_scalar": 24,
        "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    images = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(2)
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    for key in ("layer_types", "rope_parameters", "rms_norm_eps"):  # published folders leave out what is usual
        del told["text_config"][key]
    path.write_text(json.dumps(told))
    folder = HFFolder.open(tmp_path, "init_from")
    assert (folder.family.name, folder.config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert re.search(
        r"sees images as well; \d+ tensors of multi_modal_projector vision_tower are left out", caplog.text
    )
    gpt, batch = filled(folder), hf.row()
    torch.testing.assert_close(logits(gpt, batch), hf.their_logits(model, batch), rtol=0, atol=1e-4)
    out = dict(hf_tensors(gpt, folder.model, folder.family, hf.VOCAB))
    same(out, dict(model.model.language_model.state_dict(prefix="model.")))
    path.write_text(json.dumps({**told, "text_config": {}}))
    with pytest.raises(UserError, match="Gemma3ForConditionalGeneration without text_config.model_type"):
        HFFolder.open(tmp_path, "init_from")
