"""steer.records: round trips, every suffix, every refusal with file and line, and atomic writing."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.messages import count_empty_replies
from steerlm_megatron.steer.records import (
    Conversation,
    Message,
    content_hash,
    expand_paths,
    from_json,
    read_json_lines,
    read_records,
    to_json,
    write_records,
)

SCHEMA = AttributeSchema("own", ("quality", "humor"), 9)
GOOD = {"id": "a", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}


def record(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "x", "messages": [{"role": role, "content": content} for role, content in messages], **more}


def reply(**keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r", **keys}]}


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.none() | st.booleans() | st.integers(-9, 9) | TEXT
EXTRA = st.dictionaries(st.sampled_from(["lang", "tree_id", "meta"]), JSON)
VALUES = st.none() | st.dictionaries(st.sampled_from(SCHEMA.names), st.floats(0, 9), min_size=1)
TURNS = st.lists(
    st.tuples(
        st.builds(Message, st.just("user"), TEXT, extra=EXTRA),
        st.builds(Message, st.just("assistant"), TEXT.map(lambda s: s + "."), VALUES, st.integers(0, 1), EXTRA),
    ),
    min_size=1,
    max_size=3,
)
NULL_KEYS = ["id", "source", "meta2", "attributes", "weight", "tool_calls", "function_call", "levels", "train", "mask"]
CONVERSATIONS = st.builds(
    lambda name, turns, source, extra: Conversation(name, tuple(m for turn in turns for m in turn), source, extra),
    TEXT,
    TURNS,
    TEXT,
    EXTRA,
)


@given(CONVERSATIONS)
def test_json_round_trip(conversation: Conversation) -> None:
    assert from_json(json.loads(json.dumps(to_json(conversation))), "f:1", SCHEMA) == conversation


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "deep" / f"records{suffix}"
    conversations = [
        Conversation(str(i), (Message("user", f"é\u2028\u0085{i}"), Message("assistant", "r" * i + ".")), "s", {"k": i})
        for i in range(3000)
    ]
    assert write_records(path, conversations) == 3000
    assert list(read_records(path)) == conversations
    assert len(list(read_json_lines(path))) == 3000
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    first = path.read_bytes()
    write_records(path, conversations)
    assert path.read_bytes() == first


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl.zst"
    write_records(path, [from_json(GOOD, "f:1")])

    def broken() -> Iterator[Conversation]:
        yield from_json(GOOD, "f:1")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert len(list(read_records(path))) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_lenient_where_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first, last = json.dumps(GOOD).encode(), json.dumps({**GOOD, "id": 7}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\n  \n" + last)
    assert [c.id for c in read_records(path)] == ["a", "7"]  # BOM, CRLF, blank lines, no last newline, number as id
    data = reply(attributes={"quality": 6.75, "humor": None}, weight=0, levels={"quality": 7})
    made = from_json(data, "dir/f.jsonl:3")
    assert made.id == "f.jsonl:3"
    assert made.messages[1] == Message("assistant", "r", {"quality": 6.75}, 0, {"levels": {"quality": 7}})
    assert from_json(reply(attributes={}), "f:1").messages[1].attributes is None
    assert from_json(reply(attributes={"other": 500}), "f:1", AttributeSchema("none", (), 9)).messages[1].attributes


def test_openais_variants_are_read_as_they_are() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    read = from_json(record(("developer", "S"), ("user", parts), ("assistant", parts[:1])), "f:1")
    assert [(m.role, m.content) for m in read.messages] == [("system", "S"), ("user", "ab"), ("assistant", "a")]


def test_several_files_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl.gz"):
        write_records(tmp_path / name, [Conversation(name, (Message("user", "q"), Message("assistant", "r")))])
    paths = [str(tmp_path / "*.jsonl*"), str(tmp_path / "b.jsonl")]
    assert [c.id for c in read_records(paths)] == ["a.jsonl.gz", "b.jsonl"]
    (tmp_path / "b.jsonl.d").mkdir()
    assert expand_paths(str(tmp_path / "b*")) == [str(tmp_path / "b.jsonl")]  # a glob matches no folders
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"b\.jsonl: may not be read by this user"):
        expand_paths(tmp_path / "b.jsonl")
    for bad, match in (([], "no input file"), (tmp_path, "is a folder"), (tmp_path / "c*.jsonl", "no such file")):
        with pytest.raises(UserError, match=match):
            expand_paths(bad)
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "missing.jsonl")  # the call raises, before anything is iterated


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"id": "x"}, r"no list 'messages' \(its keys: id\); set data.source or data.map"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["hi"]}, r"messages\[0\]='hi' must be an object"),
        (record(("human", "q")), "role='human'; legal: system user assistant"),
        (record(("user", None)), r"messages\[0\].content=None must be a string"),
        (record(("user", [{"type": "text"}])), "has a part that is no text"),
        (record(("user", [])), "must be a string"),
        (record(("user", "q"), ("tool", "4")), r"messages\[1\] calls or is a tool"),
        (reply(tool_calls=[{"id": "1"}]), r"messages\[1\] calls or is a tool"),
        (reply(content=None, tool_calls=[{"id": "1"}]), r"messages\[1\] calls or is a tool"),
        (record(("user", "q")), "no response"),
        (record(("assistant", "r")), "begins with an assistant"),
        (record(("system", "s"), ("assistant", "r"), ("user", "q"), ("assistant", "r")), "begins with an assistant"),
        (record(("system", "s")), "no user message"),
        (record(("user", "q"), ("system", "s"), ("assistant", "r")), r"messages\[1\] is a system message"),
        (record(("user", "\ud800"), ("assistant", "r")), "surrogate"),
        (record(("user", "q"), ("assistant", "r"), id=[1]), "id="),
        (record(("user", "q"), ("assistant", "r"), source=3), "source=3"),
        (reply(weight=2), "weight=2 must be 0"),
        (reply(weight="1"), "weight='1'"),
        (reply(weight=True), "weight=True"),
        (reply(attributes=[1]), "must be an object"),
        (reply(attributes={"humour": 1}), r"messages\[1\].attributes: unknown .* \(did you mean 'humor'"),
        (reply(attributes={"quality": 9.5}), r"outside 0\.\.9"),
        (reply(attributes={"quality": "9"}), "not a number"),
        ({"messages": [{"role": "user", "content": "q", "attributes": {"quality": 1}}]}, "is on a user message"),
        ({"messages": [{"role": "user", "content": "q", "weight": 1}]}, "is on a user message"),
    ],
)
def test_refusals_name_file_and_line(tmp_path: Path, data: dict[str, Any], match: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(data) + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(UserError, match=match) as caught:
        list(read_records(path, SCHEMA))
    assert str(caught.value).startswith(f"{path}:2: ")
    rejected: list[tuple[str, str]] = []
    assert len(list(read_records(path, SCHEMA, "skip", rejected))) == 2
    assert rejected == [(f"{path}:2", str(caught.value).removeprefix(f"{path}:2: "))]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{'id': 1}\n", "malformed JSON"),
        (b"[1]\n", "expected a JSON object, found list"),
        (b'{"id": "\xff"}\n', "invalid UTF-8 at byte 8"),
        (json.dumps(reply(attributes={"quality": float("nan")})).encode() + b"\n", "NaN is not a JSON number"),
        (json.dumps(reply(attributes={"quality": float("inf")})).encode() + b"\n", "Infinity is not a JSON number"),
        (b"[" * 200_000 + b"\n", "malformed JSON"),
        (json.dumps(GOOD).encode()[:-9], "torn last line"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: bytes, match: str) -> None:
    path = tmp_path / "my: bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line)
    with pytest.raises(UserError, match=match) as caught:
        list(read_records(path, SCHEMA))
    assert str(caught.value).startswith(f"{path}:3: ")
    rejected: list[tuple[str, str]] = []
    assert len(list(read_records(path, SCHEMA, "skip", rejected))) == 1
    assert [where for where, _ in rejected] == [f"{path}:3"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_empty_file(tmp_path: Path, content: bytes, on_error: Any) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="the file is empty"):
        list(read_records(path, on_error=on_error))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_cut_off_and_foreign_compressed_files(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole.jsonl{suffix}"
    write_records(whole, (from_json({**GOOD, "id": str(i * 7919)}, "f:1") for i in range(20_000)))
    cut = tmp_path / f"cut.jsonl{suffix}"
    cut.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl\.\w+:\d+: cannot be read"):
        list(read_records(cut))
    rejected: list[tuple[str, str]] = []
    assert 0 < len(list(read_records(cut, on_error="skip", rejected=rejected))) <= 20_000
    assert len(rejected) >= 1
    foreign = tmp_path / f"foreign.jsonl{suffix}"
    foreign.write_text(json.dumps(GOOD))
    for on_error in ("error", "skip"):
        with pytest.raises(UserError, match="foreign.jsonl.*cannot be read"):
            list(read_records(foreign, on_error=on_error))  # type: ignore[arg-type]


def test_several_frames_and_members(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode() + b"\n"
    (tmp_path / "a.zst").write_bytes(zstandard.compress(line[:20]) + zstandard.compress(line[20:] + line))
    (tmp_path / "a.gz").write_bytes(gzip.compress(line[:20]) + gzip.compress(line[20:] + line))
    assert len(list(read_records([tmp_path / "a.zst", tmp_path / "a.gz"]))) == 4


def test_prompts_need_no_response(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record(("user", "q"))) + "\n")
    assert len(next(read_records(path, require_response=False)).messages) == 1


@pytest.mark.parametrize("nothing", ["", " \n", "\t", "\u00a0\u2003"])
def test_a_reply_without_text_is_context(tmp_path: Path, nothing: str) -> None:
    path = tmp_path / "generated.jsonl"
    messages = [("user", "q"), ("assistant", nothing), ("user", "q2"), ("assistant", "r")]
    rows = [record(*messages), record(*messages[:2])]  # a file that has only such replies can be read too
    for row in rows:
        row["messages"][1] |= {"attributes": {"quality": 3}, "finish_reason": "stop", "weight": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, alone = read_records(path, SCHEMA)
    empty = Message("assistant", nothing, {"quality": 3}, 0, {"finish_reason": "stop"})
    assert whole.messages[1] == alone.messages[1] == empty and whole.messages[3].weight == 1
    assert count_empty_replies(whole.messages) == 1
    assert from_json(to_json(alone), "f:1", SCHEMA) == alone


SAYS = {"weight": (1, 0), "loss_weight": (1.0, 0.0), "train": (True, False), "training": (True, False)}
SAYS |= {"loss": (True, False), "mask": (False, True)}


@given(st.dictionaries(st.sampled_from(list(SAYS)), st.booleans(), max_size=3))
def test_whatever_says_that_a_reply_is_not_trained_is_a_weight(said: dict[str, bool]) -> None:
    data = reply(**{key: SAYS[key][0 if trained else 1] for key, trained in said.items()}, lang="en")
    if len(set(said.values())) == 2:
        with pytest.raises(UserError, match="contradict each other"):
            from_json(data, "f:1")
        return
    made = from_json(data, "f:1")
    assert made.messages[1] == Message("assistant", "r", None, 0 if False in said.values() else 1, {"lang": "en"})
    assert from_json(to_json(made), "f:1") == made


def test_what_only_looks_like_a_switch_is_kept() -> None:
    data = reply(loss=2.25, mask="User", train=None)
    data["messages"][0]["train"] = False  # a user's text is never trained
    made = from_json(data, "f:1")
    assert made.messages[1] == Message("assistant", "r", None, 1, {"loss": 2.25, "mask": "User", "train": None})
    assert made.messages[0] == Message("user", "q", extra={"train": False})
    with pytest.raises(UserError, match=r"messages\[1\].loss_weight=0.5 must be 0"):
        from_json(reply(loss_weight=0.5), "f:1")


NULLS = st.recursive(
    st.dictionaries(st.sampled_from(["quality", "id", "function"]), st.none(), min_size=1),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b"]), st.none() | inner, min_size=1),
    max_leaves=4,
)


@given(
    conversation=CONVERSATIONS,
    at=st.lists(st.tuples(st.integers(-1, 6), st.sampled_from(NULL_KEYS), NULLS), max_size=5),
    more=st.lists(st.tuples(st.integers(0, 6), NULLS), max_size=2),
)
def test_an_object_of_nothing_but_nulls_is_absent(
    conversation: Conversation, at: list[tuple[int, str, Any]], more: list[tuple[int, Any]]
) -> None:
    """Arrow gives every struct all keys: in the record (-1), in a message, and in the list of messages."""
    plain, filled = to_json(conversation), json.loads(json.dumps(to_json(conversation)))
    for index, key, nulls in at:
        for data, value in ((plain, None), (filled, nulls)):
            place = data["messages"][index % len(data["messages"])] if index >= 0 else data
            if key not in place:
                place[key] = value
    for index, nulls in more:
        filled["messages"].insert(index, nulls)
    assert from_json(filled, "f:1", SCHEMA) == from_json(plain, "f:1", SCHEMA)


def test_an_object_with_something_in_it_is_kept() -> None:
    deep = {"a": {"b": None, "c": [{"d": None}, {"d": 0}]}, "e": {}}
    assert from_json({**GOOD, "meta": deep}, "f:1").extra["meta"] == {"a": {"b": None, "c": [{"d": 0}]}, "e": {}}
    with pytest.raises(UserError, match=r"messages\[0\].attributes is on a user message"):
        from_json({"messages": [{"role": "user", "content": "q", "attributes": {"quality": 1, "humor": None}}]}, "f:1")
    nested: Any = 1
    for _ in range(3000):
        nested = {"a": nested}
    with pytest.raises(UserError, match="f:1: the record is nested too deep"):
        from_json({**GOOD, "meta": nested}, "f:1")


def test_content_hash_is_of_the_text_alone() -> None:
    base = from_json(reply(), "f:1")
    relabelled = from_json({**reply(weight=0, attributes={"quality": 1}), "id": "y"}, "g:2")
    assert content_hash(base) == content_hash(relabelled)
    swapped = Conversation("x", (Message("user", "q:1"), Message("assistant", "")))
    assert content_hash(swapped) != content_hash(Conversation("x", (Message("user", "q"), Message("assistant", ":1"))))


def test_unknown_on_error() -> None:
    with pytest.raises(UserError, match="on_error='ignore'"):
        read_records("x", on_error="ignore")  # type: ignore[arg-type]
