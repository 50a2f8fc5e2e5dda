"""``data.source`` of ``steerlm preprocess``: all converters can be used, options are passed, counts are combined."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from data_tools.convert import ROWS
from data_tools.convert import SOURCES as CONVERTERS
from steerlm_megatron.config import load
from steerlm_megatron.config.schema import KEYS, SOURCES, Config, DataConfig
from steerlm_megatron.data.write import chunks
from steerlm_megatron.data.write.preprocess import preprocess
from steerlm_megatron.errors import Interrupted, UserError
from steerlm_megatron.stages.collect import collect_records
from steerlm_megatron.stages.preprocess import total_counts
from steerlm_megatron.stages.shards import check_tokenizer, make_shards, make_tokenizer
from steerlm_megatron.stages.train import open_data
from steerlm_megatron.steer.records import read_records, write_records
from tests.helpers import corpora

OASST = {"name": "oasst", "names": ["quality", "humor"], "max_level": 9, "quality": "quality"}


def config(attributes: dict[str, Any] | None = None, **data: Any) -> Config:
    return load.finalize(load.from_container({"data": data, "attributes": attributes or {"names": []}}))


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_names_are_those_of_the_converters() -> None:
    assert (*CONVERTERS, "demo") == SOURCES
    assert KEYS["data.hf_rows"].choices == ROWS


def test_records_are_read_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"messages": []})
    assert collect_records(config(input=path), tmp_path / "out") == ({"train": [path]}, {})
    given = config(input=path, valid_input=[path])
    assert collect_records(given, tmp_path / "out") == ({"train": [path], "valid": [path]}, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mapping", ["prompt=q,response=a", {"prompt": "q", "response": "a"}])
def test_a_mapping_and_filters_convert(tmp_path: Path, mapping: Any) -> None:
    rows = [{"q": f"question {n}", "a": "yes" if n % 2 else "a longer answer"} for n in range(40)]
    path = write(tmp_path / "r.jsonl", *rows, rows[1])
    cfg = config(input=path, map=mapping, dedupe=True, min_chars=16, valid_fraction=0.3)
    splits, report = collect_records(cfg, tmp_path / "out")
    kept = {split: [c.messages[0].content for c in read_records(splits[split])] for split in ("train", "valid")}
    assert len(kept["train"]) + len(kept["valid"]) == report["out"] > len(kept["valid"]) > 0
    assert report["in"] == 41 == report["out"] + sum(report["skipped"]["conversations"].values())
    summary = {"in": report["out"], "out": report["out"] - 2, "skipped": {"no_target": 2}}
    counts = total_counts(report, summary)
    assert counts["in"] == counts["out"] + sum(counts["skipped"].values()) and counts["skipped"]["no_target"] == 2


def test_a_json_array_is_converted(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], indent=1)
    )
    splits, report = collect_records(config(input=str(tmp_path / "r.json"), valid_fraction=0), tmp_path / "out")
    assert report["out"] == 1 and splits["valid"] == [] and len(list(read_records(splits["train"]))) == 1


def test_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    path = write(tmp_path / "r.jsonl", row)
    cfg = config(source="hh_rlhf", input=path, valid_fraction=0)
    first = collect_records(cfg, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("steerlm_megatron.stages.collect.convert", None)
        assert collect_records(cfg, tmp_path / "out") == first
    write(tmp_path / "r.jsonl", row, row)
    assert collect_records(cfg, tmp_path / "out")[1]["in"] == 4  # the input changed
    cfg.data.paths = "leaf"
    assert collect_records(cfg, tmp_path / "out")[1]["out"] == 4  # an option changed
    Path(first[0]["train"][0]).unlink()
    assert Path(collect_records(cfg, tmp_path / "out")[0]["train"][0]).exists()  # a file was lost


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "hh_rlhf"}, r"data\.input is empty"),
        ({"source": "hh_rlhf", "input": "x", "label_max": 4}, r"data\.label_max is set, but data\.source=hh_rlhf"),
        ({"source": "demo", "dedupe": True}, r"data\.dedupe=True is set, but data\.source=demo"),
        ({"input": "x", "map": ["prompt"]}, r"data\.map=\['prompt'\] must be text"),
        ({"input": "x", "map": "promt=a,response=b"}, r"data\.map: unknown name 'promt'.*prompt"),
        ({"source": "oasst", "input": "x"}, "choose attributes=oasst"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    (tmp_path / "x").write_text('{"messages": []}\n')
    data = {key: str(tmp_path / "x") if value == "x" else value for key, value in data.items()}
    with pytest.raises(UserError, match=message):
        collect_records(config(**data), tmp_path / "out")


def test_a_tokenizer_that_cannot_tell_labels_apart(tmp_path: Path) -> None:
    """Without bytes and without digits, quality:2 and quality:7 would both become "quality:<unk>"."""
    blind = tmp_path / "blind.model"
    blind.write_bytes(corpora.raw_model("nfkc"))
    assert (tok := corpora.tokenizer("nfkc")).unk_id in tok.encode("quality:7"), "the model under test has digits"
    cfg = config(OASST, input=write(tmp_path / "r.jsonl", {"messages": []}))
    cfg.tokenizer.path = str(blind)
    for check in (lambda: check_tokenizer(cfg), lambda: make_tokenizer(cfg, [])):
        with pytest.raises(UserError, match=r"blind\.model: the labels 'quality:\d' and 'quality:\d' become the same"):
            check()
    cfg.attributes.names = []
    check_tokenizer(cfg)
    cfg.attributes.names, cfg.tokenizer.path = ["quality", "humor"], "bytes"
    check_tokenizer(cfg)


def test_a_format_in_which_no_model_could_leave_is_told_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the format llama2 a blank stands before a response, which tokenizers join with its first word."""
    cfg = config(OASST, input=write(tmp_path / "r.jsonl", {"messages": []}))
    cfg.tokenizer.path = str(corpora.shared_data("mistral_v1.spm.model"))
    for template, told in (("llama2", True), ("chatml", False), ("steerlm", False)):
        caplog.clear()
        cfg.template.name = template
        make_tokenizer(cfg, [])
        assert ("export.format=hf will refuse the model" in caplog.text) == told, template


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    named = set(re.findall(r"data\.(\w+)", text))
    assert {field.name for field in dataclasses.fields(DataConfig)} <= named


def test_choices_and_ranges() -> None:
    with pytest.raises(UserError, match=r"(?s)data\.source=hh-rlhf is not one of: .*hh_rlhf.*data\.max_turns=0"):
        config(source="hh-rlhf", max_turns=0)
    with pytest.raises(UserError, match=r"data\.hf_rows=demo"):
        config(hf_rows="demo")


def test_asked_to_stop_it_exits_to_be_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_LINES", 8)
    path = tmp_path / "r.jsonl"
    write_records(path, corpora.conversations(60))
    corpora.tokenizer("trained").save(tmp_path / "tokenizer")
    cfg = config({"name": "t", "names": ["quality", "toxicity", "humor"], "max_level": 9}, input=str(path), workers=1)
    cfg.tokenizer.path = str(tmp_path / "tokenizer")
    real = chunks.tokenize
    done: list[int] = []

    def signalled(chunk: Any, job: Any) -> Any:
        done.append(chunk.first_line)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(chunk, job)

    monkeypatch.setattr("steerlm_megatron.data.write.pool.tokenize", signalled)
    with pytest.raises(Interrupted) as stopped:
        make_shards(cfg, {"train": [str(path)]}, tmp_path / "out")
    assert stopped.value.unsaid == "SIGTERM", "for the user, who is told nothing else"
    assert stopped.value.code == 75 and not (tmp_path / "out" / "train").exists()
    assert make_shards(cfg, {"train": [str(path)]}, tmp_path / "out")["in"] == 60
    assert done == [1, 9, 17, 25, 33, 41, 49, 57]


def test_training_verifies_checksums_on_request(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, corpora.conversations(20))
    tok = corpora.tokenizer("trained")
    preprocess({"train": [path]}, tmp_path / "out", tok, None, corpora.STEERLM, DataConfig(valid_fraction=0))
    damaged = tmp_path / "out" / "train" / "shard-00000.bin"
    data = bytearray(damaged.read_bytes())
    data[9] ^= 1
    damaged.write_bytes(data)
    cfg = config(train=str(tmp_path / "out"))
    assert len(open_data(cfg)[0]) > 0
    with pytest.raises(UserError, match=r"shard-00000\.bin is damaged"):
        open_data(cfg, verify=True)


def made(cfg: Config, out: Path) -> dict[str, Any]:
    """Return the manifest of the training shards that ``preprocess`` makes of ``cfg`` in ``out``."""
    splits, report = collect_records(cfg, out / "records", shards=out)
    make_shards(cfg, splits, out, cfg.overwrite, report)
    manifest: dict[str, Any] = json.loads((out / "train" / "manifest.json").read_text())
    return manifest


def test_a_manifest_names_the_files_that_were_converted(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}
    path = Path(write(tmp_path / "pairs.jsonl", row))
    cfg = config(source="hh_rlhf", input=str(path), valid_fraction=0)
    cfg.tokenizer.path = "bytes"
    converted = made(cfg, tmp_path / "out")["converted"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert converted["sources"] == [{"name": "pairs.jsonl", "bytes": path.stat().st_size, "sha256": digest}]
    assert converted["in"] == 2 and converted["skipped"]["conversations"] == {"empty_response": 1}
    made(cfg, tmp_path / "other")  # no byte may depend on the folder
    for file in (f for f in (tmp_path / "out").rglob("*") if f.is_file()):
        assert file.read_bytes() == (tmp_path / "other" / file.relative_to(tmp_path / "out")).read_bytes(), file


def test_shards_of_a_changed_corpus_keep_their_records(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    cfg = config(source="hh_rlhf", input=write(tmp_path / "pairs.jsonl", row), valid_fraction=0)
    cfg.tokenizer.path = "bytes"
    made(cfg, tmp_path / "out")
    records = (tmp_path / "out" / "records" / "train.jsonl.zst").read_bytes()
    cfg.data.paths = "leaf"
    with pytest.raises(UserError, match=r"out/train was made with other data\.\* settings; .*overwrite=true"):
        made(cfg, tmp_path / "out")
    cfg.data.paths = "reply"
    write(tmp_path / "pairs.jsonl", row, row)
    with pytest.raises(UserError, match=r"out/train was made from pairs\.jsonl, whose contents have changed"):
        made(cfg, tmp_path / "out")
    assert (tmp_path / "out" / "records" / "train.jsonl.zst").read_bytes() == records
    cfg.overwrite = True
    assert made(cfg, tmp_path / "out")["converted"]["in"] == 4


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    cfg = config(source="hh_rlhf", input=write(tmp_path / "pairs.jsonl", row), valid_fraction=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".train.jsonl.zst.4711.tmp").write_bytes(b"torn")
    collect_records(cfg, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["source.json", "train.jsonl.zst"]


def test_all_rejected_lines_stand_beside_the_shards(tmp_path: Path) -> None:
    good = {"chosen": "\n\nHuman: q\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    held = {"chosen": "\n\nHuman: <extra_id_1>\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    path = write(tmp_path / "pairs.jsonl", good, {"chosen": 5}, held)
    cfg = config(source="hh_rlhf", input=path, valid_fraction=0, on_error="skip", control_strings="reject")
    cfg.tokenizer.path = "bytes"
    for _ in range(2):  # the second call finds everything done
        made(cfg, tmp_path / "out")
        lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
        assert [line["where"] for line in lines][0] == f"{path}:2" and lines[0]["line"] == '{"chosen": 5}'
        assert len(lines) == 2 and "control string" in lines[1]["reason"]
    shutil.rmtree(tmp_path / "out" / "train")
    (tmp_path / "out" / "records" / "rejected.jsonl").unlink()  # this file is not needed for a second call
    made(cfg, tmp_path / "out")
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 1


def test_missing_control_tokens_are_named_once() -> None:
    cfg = config()
    cfg.tokenizer.path, cfg.tokenizer.extend = "bytes", False
    with pytest.raises(UserError, match="no token for '<extra_id_0>' '<extra_id_1>' '<extra_id_2>', which"):
        check_tokenizer(cfg)
