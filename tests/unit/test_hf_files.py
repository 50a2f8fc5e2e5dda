"""Files of ``transformers`` folders: what is refused, what is written, and the memory that reading takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steerlm_megatron.config.schema import ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.hf import HFFolder, is_hf_folder, write_hf
from steerlm_megatron.runtime import parallel
from tests.helpers import hf
from tests.helpers.hf import TOLERANCE, contents, filled, logits

INDEX = "model.safetensors.index.json"


@pytest.fixture
def cpu() -> None:
    """One rank."""
    parallel.initialize(ParallelConfig(), 1)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        HFFolder.open(folder, "checkpoint")
    assert str(raised.value).startswith(f"checkpoint={folder}: ")
    return str(raised.value)


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = contents(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_are_missing_or_extra_or_of_another_shape_are_all_named(tmp_path: Path) -> None:
    hf.make("llama", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.norm.weight", "model.layers.2.self_attn.k_proj.weight"):
            tensors[f"{name}.old"] = tensors.pop(name)
        tensors["lm_head.weight"] = torch.zeros(hf.VOCAB, 31)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # nothing needs it

    resave(tmp_path, change)
    said = refused(tmp_path)
    assert "are missing: model.layers.2.self_attn.k_proj.weight model.norm.weight;" in said
    assert "are there: model.layers.2.self_attn.k_proj.weight.old model.norm.weight.old;" in said
    assert said.endswith("lm_head.weight is [93, 31], config.json implies [93, 32]")


def test_a_tied_output_layer_may_be_there_if_it_is_the_embedding(tmp_path: Path, cpu: None) -> None:
    model = hf.make("qwen2_tied", tmp_path)
    resave(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    folder = HFFolder.open(tmp_path, "checkpoint")
    expected = hf.their_logits(model, hf.row())
    torch.testing.assert_close(logits(filled(folder), hf.row()), expected, rtol=0, atol=TOLERANCE)
    resave(tmp_path, lambda tensors: tensors["lm_head.weight"][92].mul_(1.5))
    assert "tie_word_embeddings=true, and the files hold a lm_head.weight that is not model.embed" in refused(tmp_path)


@pytest.mark.parametrize("bytes_left", [0, 4, 100, -1, -5])
def test_a_truncated_shard_is_named(bytes_left: int, tmp_path: Path) -> None:
    hf.make("llama", tmp_path, shard="20KB")
    shard = tmp_path / sorted(path.name for path in tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, bytes_left if bytes_left >= 0 else shard.stat().st_size + bytes_left)
    assert f"{shard.name} is cut short" in refused(tmp_path)


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    hf.make("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (b"\x10" + b"\0" * 7 + b"not JSON but 16b", b"\x02" + b"\0" * 7 + b"[]", whole + b"x"):
        path.write_bytes(damaged)
        assert "model.safetensors " in refused(tmp_path)
    path.write_bytes(whole.replace(b'"F32"', b'"F16"', 1))
    assert "the header's bytes of" in refused(tmp_path)
    path.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"pickle")
    assert "pickles (pytorch_model-00001-of-00001.bin), which may run code" in refused(tmp_path)
    assert f"M.from_pretrained('{tmp_path}', dtype='auto').save_pretrained(" in refused(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    hf.make("llama", tmp_path, shard="20KB")
    path = tmp_path / INDEX
    index = json.loads(path.read_text())
    places = index["weight_map"]
    name, other = "model.norm.weight", next(file for file in places.values() if file != places["model.norm.weight"])

    def lie(change: Callable[[dict[str, str]], object]) -> str:
        told = dict(places)
        change(told)
        path.write_text(json.dumps({"weight_map": told}))
        return refused(tmp_path)

    assert f"{name} is in {places[name]}, and not {other}" in lie(lambda told: told.update({name: other}))
    assert f"{name} is in {places[name]}, and not in the index" in lie(lambda told: told.pop(name))
    assert f"more is not in {other}" in lie(lambda told: told.update(more=other))
    assert "names files that are not there: gone.safetensors" in lie(lambda told: told.update(x="gone.safetensors"))
    assert "names a file that is not in the folder" in lie(lambda told: told.update(x="../model.safetensors"))
    for text in ("[", "[]", "{}", '{"weight_map": [1]}'):
        path.write_text(text)
        assert "is not an index of safetensors files" in refused(tmp_path)


def test_what_is_a_folder_of_theirs(tmp_path: Path) -> None:
    assert not is_hf_folder(tmp_path) and not is_hf_folder(tmp_path / "gone")
    for text, yes in (("{", False), ("[]", False), ('{"a": 1}', False), ("3", False), ('{"model_type": "x"}', True)):
        (tmp_path / "config.json").write_text(text)
        assert is_hf_folder(tmp_path) is yes
    (tmp_path / "meta.json").write_text("{}")
    assert not is_hf_folder(str(tmp_path))
    for text in ("[", "[]"):
        (tmp_path / "config.json").write_text(text)
        assert "config.json is not" in refused(tmp_path)
    assert "config.json cannot be read: No such file" in refused(tmp_path / "gone")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_float16_counts_as_fp32_and_other_types_are_refused(dtype: torch.dtype, tmp_path: Path, cpu: None) -> None:
    model = hf.make("llama", tmp_path, dtype)
    if dtype is torch.float64:
        assert "model.norm.weight is of type F64; read are F32 F16 BF16" in refused(tmp_path)
        return
    folder = HFFolder.open(tmp_path, "checkpoint")
    assert folder.precision == "fp32"
    expected = hf.their_logits(model, hf.row())
    torch.testing.assert_close(logits(filled(folder), hf.row()), expected, rtol=0, atol=TOLERANCE)


# Writing


def test_weights_that_stand_there_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    with pytest.raises(UserError, match=r"holds weights already \(model-00001-of-00002\.safetensors\)"):
        write_hf(tmp_path, [("x", torch.zeros(2))], {}, torch.float32)


@pytest.mark.parametrize("moment", ["tensors", "shard", "rename", "config"])
def test_nothing_half_written_is_left(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerlm_megatron.model.hf import write

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(4):
            yield f"t{i}", torch.zeros(100)
        if moment == "tensors":
            raise KeyError("t4")

    places = {"shard": "save_file", "rename": "move_into_place", "config": "write_json_atomic"}
    if moment in places:
        monkeypatch.setattr(write, places[moment], full)
    with pytest.raises(KeyError if moment == "tensors" else UserError) as raised:
        write_hf(tmp_path / "out", tensors(), {}, torch.float32, 400)
    if moment != "tensors":
        assert f"{tmp_path}/out: could not be written, and nothing was left there: [Errno 28]" in str(raised.value)
    assert list((tmp_path / "out").iterdir()) == []


# Memory and time of a larger model


def test_a_rank_holds_its_part_and_one_tensor(tmp_path: Path) -> None:
    """Private memory of a process that fills a model of 200 MB from a file: the model, and next to nothing else."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 128}
    hf.make("llama", tmp_path, **shape)
    program = f"""
import torch
from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.hf import HFFolder
from steerlm_megatron.model.weights import fill
from steerlm_megatron.runtime import parallel
parallel.initialize(ParallelConfig(), 1)
folder = HFFolder.open({str(tmp_path)!r}, "init_from")
gpt = build_model(folder.model, ParallelConfig(), EngineConfig(), {hf.VOCAB})
def private():
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines["RssAnon"].split()[0]) // 1024
before = most = private()
for parameter, value in folder.weights(gpt, {hf.VOCAB}):
    with torch.no_grad():
        parameter.copy_(value)
    most = max(most, private())
sizes = [p.nbytes // 2**20 for p in gpt.parameters()]
print("MB", sum(sizes), max(sizes), most - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = re.search(r"MB (\d+) (\d+) (\d+)", done.stdout)
    assert found is not None
    model, largest, used = map(int, found.groups())
    assert model > 150 and used <= model + 2 * largest + 16, (model, largest, used)
    shutil.rmtree(tmp_path)


def test_the_files_bytes_are_looked_at_by_their_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.make("llama", tmp_path, shard="20KB")

    def no_reading(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("steerlm_megatron.model.hf.folder.safe_open", no_reading)
    HFFolder.open(tmp_path, "init_from")


def test_the_headers_are_those_that_the_library_reads(tmp_path: Path) -> None:
    hf.make("llama", tmp_path)
    found = HFFolder.open(tmp_path, "init_from").tensors
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {name: (s.dtype, list(s.shape)) for name, s in found.items()} == {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
        }
