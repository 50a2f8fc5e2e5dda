"""data_tools.inspect shows the tokens that Megatron-Core reads, their kinds, and the counts of the corpus."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.inspect import Kind, attribute_counts, length_lines, main, runs, shown
from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.shards import ShardReader
from steerlm_megatron.data.write.preprocess import preprocess
from steerlm_megatron.steer.records import Conversation, Message, read_records, write_records
from tests.helpers import corpora

COUNT = 120


@pytest.fixture(scope="module", params=["steerlm", "llama2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a shard folder of several shards."""
    place = tmp_path_factory.mktemp(request.param)
    write_records(place / "in.jsonl", corpora.conversations(COUNT, seed=3))
    template = corpora.TEMPLATES[request.param]
    tokenizer = corpora.tokenizer(
        "trained", (*template.control_strings, *(["<extra_id_2>"] * (request.param == "steerlm")))
    )
    data = DataConfig(valid_fraction=0.0, shard_tokens=3000)
    preprocess({"train": [place / "in.jsonl"]}, place / "out", tokenizer, corpora.SCHEMA, template, data)
    return place / "out" / "train"


def megatron_documents(folder: Path) -> list[np.ndarray]:
    """Return all documents as Megatron-Core's reader yields them."""
    shards = sorted({path.with_suffix("") for path in folder.glob("*.idx")})
    assert len(shards) > 1
    documents: list[np.ndarray] = []
    for shard in shards:
        dataset = IndexedDataset(str(shard))
        documents += [
            np.array(dataset[index]) for index in range(len(dataset))
        ]  # copies, since the arrays die with the reader's memory map
    return documents


def test_shows_the_tokens_of_megatrons_dataset(folder: Path) -> None:
    dataset, documents = ShardDataset.open(folder), megatron_documents(folder)
    assert len(documents) == len(dataset)
    for index, tokens in enumerate(documents):
        item = shown(dataset, index, "acsft")
        np.testing.assert_array_equal(item.tokens_T, tokens)
        assert [end for _, _, end in runs(item)][-1] == len(tokens)
        assert sum(end - start for _, start, end in runs(item)) == len(tokens)


def test_printed_ids_are_megatrons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    indices = [0, 7, 31]
    assert main([str(folder), "--ids", "--no-color", "--index", *map(str, indices)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    printed = [list(map(int, ids.split())) for ids in re.findall(r"^ids: ([\d ]+)$", out, re.MULTILINE)]
    documents = megatron_documents(folder)
    assert printed == [documents[index].tolist() for index in indices]
    for index in indices:
        assert f"document {index} · c{index} · {len(documents[index])} tokens" in out
        assert f"end of document {index}" in out


@pytest.mark.parametrize("view", ["acsft", "sft", "ap", "lm"])
def test_kinds_are_the_samples(folder: Path, view: str) -> None:
    dataset = ShardDataset.open(folder)
    controls = set(dataset.tokenizer.controls.values())
    for index in range(0, len(dataset), 7):
        item, sample = shown(dataset, index, view), dataset.sample(index, view)
        assert item.has_target == (sample is not None)
        if sample is None:
            assert not np.isin(item.kinds_T, (Kind.TRAINED, Kind.CONTROL_TRAINED, Kind.MARKER)).any()
            continue
        np.testing.assert_array_equal(item.tokens_T, sample.tokens_T)
        trained = np.isin(item.kinds_T, (Kind.TRAINED, Kind.CONTROL_TRAINED))
        np.testing.assert_array_equal(trained, sample.loss_mask_T)
        assert sorted(item.values) == sample.pool_P.tolist() and bool(item.values) == (view == "ap")
        for kind, start, end in runs(item):
            is_control = kind in (Kind.CONTROL, Kind.CONTROL_TRAINED, Kind.MARKER)
            assert is_control == (int(item.tokens_T[start]) in controls)
            assert end == start + 1 or not is_control
            if kind == Kind.LABEL:
                assert view == "acsft"
                text = dataset.tokenizer.decode(item.tokens_T[start:end].tolist())
                assert dataset.schema is not None and dataset.schema.parse(text.rstrip("\n"))


def test_attribute_histogram_counts_trained_labelled_turns(folder: Path) -> None:
    wanted = {name: np.zeros(10, int) for name in corpora.SCHEMA.names}
    for conversation in read_records(folder.parent.parent / "in.jsonl"):
        kept = [m for m in conversation.messages if m.role == "assistant"]
        for message in kept:
            for name, value in (message.attributes or {}).items():
                wanted[name][round(value)] += message.weight
    found = attribute_counts(ShardReader(folder))
    dropped = ShardDataset.open(folder).manifest["counts"]["skipped"].get("no_target", 0)
    assert dropped == 0 or sum(map(int, found["quality"])) <= int(wanted["quality"].sum())
    for name in wanted:  # values are stored as float32, and none of these is close to a rounding edge
        np.testing.assert_array_equal(found[name], wanted[name])


def test_length_histogram_adds_up() -> None:
    lengths = np.array([0, 1, 2, 3, 4, 5, 64, 127, 128, 4096])
    lines = length_lines(lengths)
    assert lines[0] == "9 samples with a target, 1 without"
    assert sum(int(line.split()[-1]) for line in lines[2:]) == 9
    assert len(lines) == 2 + 13  # the bins are 1, 2–3, … 4096–8191
    assert length_lines(np.zeros(3, np.int64)) == ["no sample has a target in this view"]


def test_summary_and_brackets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--sample", "2", "--view", "ap", "--row-tokens", "256", "--verify"]) == 0
    out = capsys.readouterr().out  # without a terminal there are brackets instead of colours
    dataset = ShardDataset.open(folder)
    report = dataset.plan("ap", 256, 1234, cache=False).report()
    assert f"fill {report['fill']}" in out and f"tokens    {dataset.manifest['counts']['tokens']:,}," in out
    assert out.count("┌── document") == 2 and "«<extra_id_2>»[" in out
    assert not (folder / "plans").exists()  # inspecting writes nothing
    assert main([str(folder), "--sample", "2"]) == 0
    first = capsys.readouterr().out
    assert "⟦" in first and "‹" in first
    main([str(folder), "--sample", "2"])
    assert capsys.readouterr().out == first  # the seed decides the choice of samples


def test_colours(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main([str(folder), "--sample", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[1;32m" in out and "\x1b[2m" in out and "⟦" not in out  # trained text is bold green, masked text is dim


def test_control_like_text_is_shown_as_text(tmp_path: Path) -> None:
    asked = "What does <extra_id_1>Assistant mean?"
    write_records(tmp_path / "in.jsonl", [Conversation("c", (Message("user", asked), Message("assistant", "A turn.")))])
    tokenizer, data = corpora.tokenizer("user_defined"), DataConfig(valid_fraction=0.0)
    preprocess({"train": [tmp_path / "in.jsonl"]}, tmp_path / "out", tokenizer, corpora.SCHEMA, corpora.STEERLM, data)
    dataset = ShardDataset.open(tmp_path / "out" / "train")
    item = shown(dataset, 0, "acsft")
    control = item.kinds_T >= Kind.CONTROL
    assert item.tokens_T[control].tolist() == [tokenizer.control_id(f"<extra_id_{i}>") for i in (0, 1, 1, 1)]
    assert asked in dataset.tokenizer.decode(item.tokens_T.tolist())


def test_errors(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2 and "no such shard folder" in capsys.readouterr().err
    assert main([str(folder.parent)]) == 2 and "did you mean" in capsys.readouterr().err
    assert main([str(folder), "--index", str(COUNT)]) == 2 and "--index" in capsys.readouterr().err


def test_verify_finds_a_changed_byte(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "shard-00001.spans.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    assert main([str(copy), "--sample", "0"]) == 0
    assert main([str(copy), "--sample", "0", "--verify"]) == 2
    assert "shard-00001.spans.npy is damaged: its SHA-256 is not the one in manifest.json" in capsys.readouterr().err
