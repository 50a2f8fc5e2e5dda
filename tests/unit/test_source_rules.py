"""Rules for all sources: trained replies, speakers, absent values, and files by name."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.convert import Options, convert
from data_tools.oasst import OASST
from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.shards import ShardReader
from steerlm_megatron.data.write.preprocess import preprocess
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, read_records
from tests.helpers import corpora

SCHEMA = AttributeSchema("own", ("quality", "humor"), 4)
MAP = "turns=conversations,text=value,speaker=from"
SOURCES = ("messages", "sharegpt", "nemo", "map")
SAYS = [{}, {"weight": 0}, {"weight": 1}, {"loss_weight": 0}, {"train": False}, {"loss": False}, {"mask": True}]
SAYS += [{"train": True}, {"weight": None}, {"train": None, "mask": False}]
CONTEXT = [
    said in ({"weight": 0}, {"loss_weight": 0}, {"train": False}, {"loss": False}, {"mask": True}) for said in SAYS
]
REPLY = st.tuples(st.sampled_from(["fine", "yes.", "", " ", "\n\t", "\u00a0"]), st.integers(0, len(SAYS) - 1))
FAST = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def row_of(source: str, replies: list[tuple[str, dict[str, Any]]], labels: bool = True) -> dict[str, Any]:
    """Return questions with replies, and keys that say whether each reply is trained, in a source's format."""
    turns: list[dict[str, Any]] = []
    for number, (text, said) in enumerate(replies):
        if source == "messages":
            label = {"attributes": {"quality": 3.0}} if labels else {}
            turns.append({"role": "user", "content": f"q{number}"})
            turns.append({"role": "assistant", "content": text, **label, **said})
        else:
            names = ("User", "Assistant") if source == "nemo" else ("human", "gpt")
            label = {"label": "quality:3"} if source == "nemo" and labels else {}
            turns.append({"from": names[0], "value": f"q{number}"})
            turns.append({"from": names[1], "value": text, **label, **said})
    if source == "messages":
        return {"messages": turns}
    return {"conversations": turns, **({"mask": "User", "system": ""} if source == "nemo" else {})}


def converted(folder: Path, source: str, rows: list[Any], **options: Any) -> tuple[list[Conversation], dict[str, Any]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if source == "map":
        source, options["map"] = "messages", MAP
    schema = OASST if source == "oasst" else SCHEMA
    report = convert(source, [str(path)], str(folder / "out"), schema, Options(valid_fraction=0.0, **options))
    assert report["in"] == report["out"] + sum(report["skipped"]["conversations"].values())
    counted = ("trained_replies", "context_replies", "repeated_replies_avoided", "filtered_replies")
    assert report["reply_occurrences"] == sum(report[name] for name in counted)
    return list(read_records(report["train"]["file"], schema)), report


@pytest.mark.parametrize("source", SOURCES)
@FAST
@given(replies=st.lists(REPLY, min_size=1, max_size=4))
def test_weight_0_and_empty_replies_are_context_in_every_source(
    tmp_path: Path, source: str, replies: list[tuple[str, int]]
) -> None:
    rows = [row_of(source, [(text, SAYS[said]) for text, said in replies]), row_of(source, [("anchor", {})])]
    found, report = converted(tmp_path, source, rows, paths="leaf")
    expected = [int(bool(text.strip()) and not CONTEXT[said]) for text, said in replies]
    empty = sum(not text.strip() for text, _ in replies)
    assert report["empty_replies"] == empty
    if empty == len(replies):
        assert report["skipped"]["conversations"] == {"empty_response": 1} and len(found) == 1
        return
    kept = [message for message in found[0].messages if message.role == "assistant"]
    assert [message.weight for message in kept] == expected
    assert [message.content for message in kept] == [text for text, _ in replies]
    assert report["trained_replies"] == sum(expected) + 1


@FAST
@given(conversations=st.lists(st.lists(REPLY, min_size=1, max_size=3), min_size=1, max_size=5))
def test_shards_and_views_have_no_target_in_context(tmp_path: Path, conversations: list[list[tuple[str, int]]]) -> None:
    """No trained token or label target comes from a reply of weight 0 or without text."""
    rows = [row_of("messages", [(text, SAYS[said]) for text, said in replies]) for replies in conversations]
    rows.append(row_of("messages", [("anchor", {})]))
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({**row, "id": str(i)}) + "\n" for i, row in enumerate(rows)))
    data = DataConfig(valid_fraction=0.0, workers=1)
    tok, schema = corpora.tokenizer("bytes"), AttributeSchema("own", ("quality",), 4)
    summary = preprocess({"train": [str(path)]}, tmp_path / "shards", tok, schema, corpora.STEERLM, data)
    trained = [[bool(text.strip()) and not CONTEXT[said] for text, said in replies] for replies in conversations]
    empty = sum(not text.strip() for replies in conversations for text, _ in replies)
    assert summary.get("empty_replies", 0) == empty
    assert summary["in"] == len(rows) == summary["out"] + summary["skipped"].get("no_target", 0)
    assert summary["skipped"].get("no_target", 0) == sum(not any(each) for each in trained)
    reader = ShardReader(tmp_path / "shards" / "train")
    assert reader.manifest["policies"]["empty_replies"] == {"policy": "context", "messages": empty}
    documents = [reader.document(i) for i in range(len(reader))]
    assert [document.id for document in documents] == [str(i) for i, each in enumerate([*trained, [True]]) if any(each)]
    for document in documents:
        replies = [*conversations, [("anchor", 0)]][int(document.id)]
        weights = document.turns_N["weight"][document.turns_N["role"] == 1]
        assert weights.tolist() == [int(w) for w in ([*trained, [True]][int(document.id)])]
        mask = np.zeros(len(document.tokens_T), bool)
        for start, end in document.spans:
            mask[start:end] = True
        for turn, (text, _) in zip(document.turns_N[document.turns_N["role"] == 1], replies, strict=True):
            body = mask[turn["text_start"] : turn["text_end"]]
            assert body.all() and len(body) == len(text) if turn["weight"] else not body.any()


@pytest.mark.parametrize("source", ["nemo", "sharegpt", "map"])
@pytest.mark.parametrize("name", ["Tool", "tool", "function", "function_call", "Observation", "ipython", "Critic"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_third_speaker_is_never_the_assistant(tmp_path: Path, source: str, name: str, at: int) -> None:
    row = row_of(source, [("r0", {}), ("r1", {})])
    row["conversations"].insert(at, {"from": name, "value": '{"t": 21}'})
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{name}"):
        converted(tmp_path, source, [row_of(source, [("anchor", {})]), row])
    found, report = converted(tmp_path, source, [row_of(source, [("anchor", {})]), row], on_error="skip")
    assert len(found) == 1 and report["skipped"]["conversations"] == {"rejected": 1}


@pytest.mark.parametrize("source", ["nemo", "sharegpt", "map"])
def test_only_a_tool_and_the_user_are_not_a_conversation(tmp_path: Path, source: str) -> None:
    row = row_of(source, [("r0", {})])
    row["conversations"][1]["from"] = "Tool"
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*Tool"):
        converted(tmp_path, source, [row])


@pytest.mark.parametrize("source", ["nemo", "sharegpt", "map"])
def test_a_system_speaker_is_the_system(tmp_path: Path, source: str) -> None:
    row = row_of(source, [("r0", {})])
    row["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    found, _ = converted(tmp_path, source, [row])
    assert [m.role for m in found[0].messages] == ["system", "user", "assistant"]


@given(
    names=st.lists(st.sampled_from(["User", "Assistant", "Me", "You", "gpt"]), min_size=2, max_size=2, unique=True),
    mask=st.sampled_from(["user", "USER", "User ", "me", "Human", "", None, "User", "Me"]),
)
@FAST
def test_a_mask_names_a_speaker(tmp_path: Path, names: list[str], mask: str | None) -> None:
    turns = [{"from": name, "value": f"t{i}"} for i, name in enumerate(names)]
    row = {"system": "S", "mask": mask, "conversations": turns}
    if mask and mask not in names:
        with pytest.raises(UserError, match=rf"mask '{mask}' names no speaker.*; speakers: {' '.join(names)}"):
            converted(tmp_path, "nemo", [row])
    elif mask == names[0] or (not mask and names[0] == "User"):
        found, _ = converted(tmp_path, "nemo", [row])
        assert [m.role for m in found[0].messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize("source", SOURCES)
def test_structs_that_arrow_fills_with_nulls_are_absent(tmp_path: Path, source: str) -> None:
    plain = row_of(source, [("r0", {}), ("r1", {"weight": 0})], labels=False)
    filled = copy.deepcopy(plain)
    turns = filled["messages" if source == "messages" else "conversations"]
    for turn in turns:
        for key in ("attributes", "tool_calls", "function_call", "label", "train", "mask", "weight", "meta"):
            turn.setdefault(key, {"id": None, "inner": {"name": None}})
    filled |= {"id": {"a": None}, "source": {"b": None}, "extra": {"c": {"d": None}}}
    expected, got = (converted(tmp_path, source, [row])[0] for row in (plain, filled))
    assert [(m.role, m.content, m.weight, m.attributes) for m in got[0].messages] == [
        (m.role, m.content, m.weight, m.attributes) for m in expected[0].messages
    ]
    assert got[0].id == expected[0].id


def node(name: str, role: str, *replies: Any, **keys: Any) -> dict[str, Any]:
    return {"message_id": name, "text": f"text {name}", "role": role, "lang": "en", **keys, "replies": list(replies)}


@FAST
@given(gone=st.sets(st.sampled_from(["a1", "a2", "u1", "b1"]), max_size=3), nulls=st.booleans())
def test_a_deleted_message_takes_only_what_is_below_it(tmp_path: Path, gone: set[str], nulls: bool) -> None:
    def made(name: str, role: str, *replies: Any) -> dict[str, Any]:
        if name not in gone:
            return node(name, role, *replies, deleted=False)
        left = {"text": None, "role": None, "labels": {"quality": {"value": None}}} if nulls else {"text": ""}
        return node(name, role, *replies) | left | {"deleted": True}

    below = made("u1", "prompter", made("b1", "assistant"))
    root = node("r", "prompter", made("a1", "assistant", below), made("a2", "assistant"), node("a3", "assistant"))
    found, report = converted(tmp_path, "oasst", [{"message_tree_id": "r", "prompt": root}])
    texts = {m.content.removeprefix("text ") for c in found for m in c.messages if m.role == "assistant"}
    kept = {"a3"} | ({"a2"} - gone) | ({"a1"} - gone) | ({"b1"} if not gone & {"a1", "u1", "b1"} else set())
    assert texts == kept and report["rejected_lines"] == 0
    assert report["messages"] == report["messages_used"] + sum(report["skipped"]["messages"].values())


# Files of data sets by name, with a stand-in for the package's results


@pytest.mark.parametrize(
    ("name", "content", "reader"),
    [
        ("train.parquet", b"PAR1rest", "parquet"),
        ("noname", b"PAR1rest", "parquet"),
        ("train.arrow", b"ARROW1\0\0", "arrow"),
        ("shard.dat", b"\xff\xff\xff\xff\0\0", "arrow"),
        ("rows.jsonl", b"{}", "json"),
        ("rows.json.gz", b"\x1f\x8b", "json"),
        ("rows.csv", b"a,b", "csv"),
        ("rows.tsv", b"a\tb", "csv"),
    ],
)
def test_a_file_that_exists_is_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, reader: str
) -> None:
    calls: list[Any] = []

    def load(*args: Any, **keys: Any) -> Any:
        calls.append((args, keys))
        return {"train": [row_of("messages", [("r", {})], labels=False)]}

    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    path = tmp_path / name
    path.write_bytes(content)
    for named in (str(path), str(tmp_path / f"{name[:3]}*")):
        report = convert("hf", [named], str(tmp_path / "out"), None, Options(valid_fraction=0.0))
        assert report["out"] == 1
    more = {"delimiter": "\t"} if name.endswith(".tsv") else {}
    assert calls == [((reader,), {"data_files": {"train": str(path)}, "split": None, **more})] * 2
    with pytest.raises(UserError, match="data.hf_subset=x is set, but .* is one file"):
        convert("hf", [str(path)], str(tmp_path / "out"), None, Options(subset="x"))
    for missing in (f"{name[:3]}gone.parquet", str(tmp_path / "gone"), "./gone"):
        with pytest.raises(UserError, match="no such file"):
            convert("hf", [missing], str(tmp_path / "out"), None)
    (tmp_path / "other.bin").write_bytes(b"what")
    with pytest.raises(UserError, match=r"other\.bin: a file of a kind that data\.source=hf does not read"):
        convert("hf", [str(tmp_path / "other.bin")], str(tmp_path / "out"), None)
