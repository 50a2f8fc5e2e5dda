"""Preprocessing: counts add up, malformed input is named or listed, splits share no prompts, published files work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.write.preprocess import REJECTED_FILE, preprocess, training_texts
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.records import Conversation, Message, read_json_lines, write_records
from tests.helpers import corpora


def run(inputs: dict, output: Path, schema=corpora.SCHEMA, progress=None, tok: Tokenizer | None = None, **data):
    cfg = DataConfig(**{"valid_fraction": 0.0, **data})
    return preprocess(inputs, output, tok or corpora.tokenizer("trained"), schema, corpora.STEERLM, cfg, progress)


def adds_up(counts: dict) -> bool:
    return counts["in"] == counts["out"] + sum(counts["skipped"].values())


@pytest.fixture
def records(tmp_path) -> Path:
    path = tmp_path / "in" / "train.jsonl"
    write_records(path, corpora.conversations(600, seed=1))
    return path


def test_two_splits_given(records: Path, tmp_path) -> None:
    valid = records.with_name("valid.jsonl.zst")
    write_records(valid, corpora.conversations(30, seed=2))
    seen: list[tuple[int, int]] = []
    out = run({"train": [records], "valid": [valid]}, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert adds_up(out) and all(adds_up(counts) for counts in out["splits"].values())
    assert out["in"] == 630 and seen[-1] == (630, 630) and sorted(seen) == seen
    for split, source in (("train", "train.jsonl"), ("valid", "valid.jsonl.zst")):
        dataset = ShardDataset.open(tmp_path / "out" / split, verify=True)
        counts = dataset.manifest["counts"]
        assert counts == out["splits"][split] and len(dataset) == counts["out"]
        assert [s["name"] for s in dataset.manifest["sources"]] == [source]
        assert counts["tokens"] == sum(len(dataset.document(i).tokens_T) for i in range(len(dataset)))
        assert counts["target_tokens"] == sum(
            int(s.loss_mask_T.sum()) for i in range(len(dataset)) if (s := dataset.sample(i, "acsft"))
        )
        assert counts["labelled_turns"] == sum(
            int((~np.isnan(s.values_PA)).any(axis=1).sum())
            for i in range(len(dataset))
            if (s := dataset.sample(i, "ap"))
        )
        assert counts["unk_tokens"] == 0
    assert not (tmp_path / "out" / REJECTED_FILE).exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "valid"]


def test_same_input_same_bytes(records: Path, tmp_path) -> None:
    for name in ("a", "b"):
        run({"train": [records]}, tmp_path / name, valid_fraction=0.2, shard_tokens=20_000)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_dealt_splits_share_no_prompt(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(
        path,
        (
            Conversation(f"{n}-{k}", (Message("user", f"prompt {n}"), Message("assistant", f"answer {k}")))
            for n in range(200)
            for k in range(3)
        ),
    )
    out = run({"train": [path]}, tmp_path / "out", valid_fraction=0.2)
    sides = {}
    for split in ("train", "valid"):
        dataset = ShardDataset.open(tmp_path / "out" / split)
        sides[split] = {dataset.document(i).id.split("-")[0] for i in range(len(dataset))}
        assert len(dataset) == 3 * len(sides[split])
    assert adds_up(out) and out["out"] == 600
    assert not sides["train"] & sides["valid"] and 20 < len(sides["valid"]) < 60
    other = run({"train": [path]}, tmp_path / "other", valid_fraction=0.2, split_seed=11)
    assert other["splits"]["valid"]["out"] != 0
    dataset = ShardDataset.open(tmp_path / "other" / "valid")
    assert {dataset.document(i).id.split("-")[0] for i in range(len(dataset))} != sides["valid"]


def test_bad_lines_are_named_or_set_aside(records: Path, tmp_path) -> None:
    lines = records.read_text().splitlines(keepends=True)[:20]
    bad = json.loads(lines[4])
    bad["messages"] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "attributes": {"qualty": 1}},
    ]
    lines[4] = json.dumps(bad) + "\n"
    lines[9] = "{not json\n"
    records.write_text("".join(lines))
    with pytest.raises(UserError, match=r"train\.jsonl:5: .*qualty"):
        run({"train": [records]}, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
    out = run({"train": [records]}, tmp_path / "out", on_error="skip")
    assert adds_up(out) and out["in"] == 20 and out["skipped"]["rejected"] == 2
    rejected = [entry for _, entry in read_json_lines(tmp_path / "out" / REJECTED_FILE)]
    assert [entry["where"].rpartition(":")[2] for entry in rejected] == ["5", "10"]
    assert "qualty" in rejected[0]["reason"]


def test_conversations_without_target_are_counted(tmp_path) -> None:
    def conversation(name: str, weight: int) -> Conversation:
        return Conversation(name, (Message("user", "q"), Message("assistant", "a", {"quality": 1}, weight)))

    path = tmp_path / "r.jsonl"
    write_records(path, [conversation("a", 0), conversation("b", 1), conversation("c", 0)])
    out = run({"train": [path]}, tmp_path / "out")
    assert adds_up(out) and out["skipped"] == {"no_target": 2} and out["out"] == 1
    write_records(path, [conversation("a", 0)])
    with pytest.raises(UserError, match=r"r\.jsonl.*all tokens are masked"):
        run({"train": [path]}, tmp_path / "out")
    path.write_text("[1]\n")
    with pytest.raises(
        UserError, match=r"all tokens are masked.* 1 are malformed.*; the first: .*r\.jsonl:1: expected"
    ):
        run({"train": [path]}, tmp_path / "out", on_error="skip")
    assert len(ShardDataset.open(tmp_path / "out" / "train")) == 1


def test_unknown_characters_are_counted(records: Path, tmp_path) -> None:
    write_records(records, [Conversation("a", (Message("user", "river"), Message("assistant", "日 stone 語")))])
    out = run({"train": [records]}, tmp_path / "out", tok=corpora.tokenizer("nfkc"))
    assert out["splits"]["train"]["unk_tokens"] == 2


def test_errors(records: Path, tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        run({"train": [tmp_path / "none.jsonl"]}, tmp_path / "out")
    with pytest.raises(UserError, match=r"data\.input"):
        run({}, tmp_path / "out")
    with pytest.raises(UserError, match=r"data\.valid_fraction=1"):
        run({"train": [records]}, tmp_path / "out", valid_fraction=1.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.output_dir=.*; name a folder that can be written"):
        run({"train": [records]}, tmp_path / "file" / "out")
    records.write_text("")
    with pytest.raises(UserError, match="empty"):
        run({"train": [records]}, tmp_path / "out")


def test_a_tokenizer_trained_on_the_corpus(records: Path, tmp_path) -> None:
    texts = training_texts([records], corpora.SCHEMA, corpora.STEERLM, DataConfig())
    tok = Tokenizer.train(texts, 500, corpora.STEERLM.control_strings)
    out = run({"train": [records]}, tmp_path / "out", tok=tok)
    assert out["splits"]["train"]["unk_tokens"] == 0
    assert ShardDataset.open(tmp_path / "out" / "train").tokenizer.hash == tok.hash


@pytest.mark.parametrize("model", ["mistral", "fairseq2"])
def test_real_text(tmp_path, model: str) -> None:
    rows = [row for _, row in read_json_lines(corpora.shared_data("dolly_3k.jsonl.zst"))][:400]
    path = tmp_path / "dolly.jsonl.gz"
    write_records(
        path,
        (
            Conversation(
                str(n), (Message("user", f"{row['instruction']}\n{row['input']}"), Message("assistant", row["output"]))
            )
            for n, row in enumerate(rows)
        ),
    )
    tok = corpora.tokenizer(model)
    out = run({"train": [path]}, tmp_path / "out", schema=None, tok=tok, on_error="skip")
    assert adds_up(out)
    dataset = ShardDataset.open(tmp_path / "out" / "train")
    if model == "mistral":
        texts = {str(n): row for n, row in enumerate(rows)}
        for index in range(len(dataset)):
            document = dataset.document(index)
            assert f"Assistant\n{texts[document.id]['output']}\n" in tok.decode(document.tokens_T)
    plan = dataset.plan("sft", 1024, 1)
    assert plan.report()["fill"] > 0.9


def _line(messages: list[dict], **extra) -> bytes:
    return json.dumps({"messages": messages, **extra}).encode() + b"\n"


_USER = {"role": "user", "content": "river"}
_REPLY = {"role": "assistant", "content": "stone"}
BAD_LINES = {
    "invalid UTF-8 at byte": _line([_USER, _REPLY]).replace(b"river", b"riv\xff"),
    "NaN is not a JSON number": _line([_USER, _REPLY | {"attributes": {"quality": 1}}]).replace(b"1}", b"NaN}"),
    "outside 0..9": _line([_USER, _REPLY | {"attributes": {"quality": 10}}]),
    "attribute quality=-0.5 is outside": _line([_USER, _REPLY | {"attributes": {"quality": -0.5}}]),
    "begins with an assistant message": _line([_REPLY, _USER, _REPLY]),
    "has no response": _line([_USER]),
    "id='a' occurred before": _line([_USER, _REPLY], id="a"),
    "malformed JSON": b"{]\n",
    "torn last line": _line([_USER, _REPLY])[:-9],
}


def test_every_kind_of_bad_line_is_named(tmp_path) -> None:
    good = _line([_USER, _REPLY], id="a")
    path = tmp_path / "r.jsonl"
    for reason, line in BAD_LINES.items():
        path.write_bytes(good + line)
        with pytest.raises(UserError, match=rf"r\.jsonl:2: .*{reason}"):
            run({"train": [path]}, tmp_path / "out")
    path.write_bytes(good + b"".join(BAD_LINES.values()))
    out = run({"train": [path]}, tmp_path / "out", on_error="skip")
    assert out["out"] == 1 and out["skipped"] == {"rejected": len(BAD_LINES)} and adds_up(out)
    rejected = [entry for _, entry in read_json_lines(tmp_path / "out" / REJECTED_FILE)]
    assert [entry["where"] for entry in rejected] == [f"{path}:{n}" for n in range(2, len(BAD_LINES) + 2)]
    assert all(reason in entry["reason"] for reason, entry in zip(BAD_LINES, rejected, strict=True))
    shown = [line.decode("utf-8", "replace").rstrip("\n") for line in BAD_LINES.values()]
    assert [entry["line"] for entry in rejected] == shown
    manifest = ShardDataset.open(tmp_path / "out" / "train").manifest
    assert manifest["policies"]["on_error"] == {"policy": "skip", "records": len(BAD_LINES)}
