"""A line that the fast parser accepts gives the record of ``steer.records``; all other lines are left to that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steerlm_megatron.data.write import fast_records
from steerlm_megatron.data.write.fast_records import FastRecords
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, parse_records, to_json
from tests.helpers import corpora

pytest.importorskip("msgspec")
SCHEMAS = {"three": corpora.SCHEMA, "nameless": AttributeSchema("none", (), 1), "none": None}
PATH = "folder/r.jsonl"


def slowly(line: bytes, schema: AttributeSchema | None) -> Conversation | None:
    try:
        found = list(parse_records(iter([(f"{PATH}:7", line)]), schema, "error", None))
    except UserError:
        return None
    return found[0][1] if found else None


def numbers(attributes: Any) -> list[tuple[str, str]]:
    """Return names and values to the last bit, so that -0.0 differs from 0.0."""
    return [(name, repr(float(value))) for name, value in (attributes or {}).items()]


def check(line: bytes, schema: AttributeSchema | None) -> bool:
    """Return whether the line is accepted; check the result if it is."""
    quick = FastRecords(PATH, schema).parse(line, 7)
    if quick is None:
        return False
    slow = slowly(line, schema)
    assert slow is not None, line
    assert quick.id == slow.id and type(quick.id) is str
    assert len(quick.messages) == len(slow.messages)
    for one, other in zip(quick.messages, slow.messages, strict=True):
        assert (one.role, one.content, one.weight) == (other.role, other.content, other.weight)
        assert type(one.weight) is int and numbers(one.attributes) == numbers(other.attributes)
    return True


# JSON is made as text, so that keys repeat, numbers have odd forms, and invalid JSON occurs too.
LITERALS = [
    "null",
    "true",
    "0",
    "1",
    "-0",
    "0.0",
    "-0.0",
    "1.0",
    "1e0",
    "9",
    "9.0001",
    "-1",
    "8.5",
    "1e400",
    "NaN",
    "01",
]
LITERALS += ["Infinity", "-Infinity", "[]", "{}", '""', '" \\n"', '"x"', '"\\ud800"', '"\\udc00x"', '"\\ud83d\\ude00"']
LITERALS += [
    "18446744073709551615",
    "18446744073709551616",
    "9" * 30,
    "9" * 400,
    "-" + "9" * 400,
    "1" * 5000,
    "1.",
    "+1",
    '"\\x"',
    '"a\tb"',
    "[1,]",
]
LITERALS += [
    '"\ufeff"',
    '"\x7f"',
    '"\\u0000"',
    "[[{}]]",
    '{"a": {"b": [NaN]}}',
    '{"a": "\\ud800"}',
    '{"a": null}',
    '{"quality": null, "b": {"c": null}}',
    "false",
    "tru",
    '"',
    '"é日🙂"',
]
LITERAL = st.sampled_from(LITERALS) | st.text(st.characters(codec="utf-8"), max_size=4).map(json.dumps)
ROLE = st.sampled_from(['"user"', '"assistant"', '"assistant"', '"system"', '"\\u0075ser"'])
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).map(json.dumps)


ODD_KEYS = ["other", "tool_calls", "function_call", "r\\u006fle", "train", "loss_weight", "mask"]


def objects(members: dict[str, st.SearchStrategy[str]], always: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Draw objects of these members in any order, where few repeat, few have any value, and few are unknown."""
    named = {name: st.tuples(st.just(json.dumps(name)), value) for name, value in members.items()}
    wild = st.tuples(
        st.sampled_from([*named, *ODD_KEYS]).map(lambda name: f'"{name}"'),
        LITERAL,
    )
    some = st.just([]) | st.just([]) | st.lists(st.one_of(*named.values()) | wild, max_size=2)
    base = st.tuples(*(named[name] for name in always)).map(list)
    return st.builds(lambda a, b: a + b, base, some).flatmap(st.permutations).map(written)


def written(pairs: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in pairs) + "}"


VALUES = st.lists(st.tuples(st.sampled_from(['"quality"', '"humor"', '"other"']), LITERAL), max_size=3).map(written)


def message(role: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = {"role": role, "content": TEXT}
    labelled = {**members, "attributes": VALUES, "weight": st.sampled_from(["0", "1"]) | LITERAL}
    return objects(members, ("role", "content")) | objects(labelled, ("role", "content"))


TALKS = st.tuples(st.just('"user"'), st.just('"assistant"')).map(list)
TALKS = TALKS | TALKS.map(lambda roles: ['"system"', *roles]) | TALKS.map(lambda roles: roles * 2)
MESSAGES = (TALKS | st.lists(ROLE, max_size=4)).flatmap(
    lambda roles: st.tuples(*(message(st.just(role)) for role in roles)).map(lambda items: f"[{', '.join(items)}]")
)
RECORD = objects({"messages": MESSAGES, "id": LITERAL, "source": LITERAL}, ("messages",))
END = st.sampled_from(["\n", "\r\n", "", " \n", "\f\n", "\0\n", "x\n"])


@pytest.mark.parametrize("schema_name", SCHEMAS)
@settings(max_examples=300, deadline=None)
@given(
    record=RECORD, end=END, damage=st.none() | st.none() | st.tuples(st.integers(0), st.binary(min_size=1, max_size=2))
)
def test_odd_lines(schema_name: str, record: str, end: str, damage: tuple[int, bytes] | None) -> None:
    line = (record + end).encode("utf-8", "surrogatepass")
    if damage is not None:
        at = damage[0] % len(line)
        line = line[:at] + damage[1] + line[at + 1 :]
    check(line, SCHEMAS[schema_name])


TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"%s}]%s}\n'


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("key", ["attributes.quality", "attributes", "weight", "extra", "id", "source", "record_extra"])
@pytest.mark.parametrize("schema_name", SCHEMAS)
def test_every_literal_everywhere(schema_name: str, key: str, literal: str) -> None:
    if key in ("id", "source", "record_extra"):
        text = TALK % ("", f', "{key}": {literal}')
    elif key == "attributes.quality":
        text = TALK % (f', "attributes": {{"quality": {literal}}}', "")
    else:
        text = TALK % (f', "{key}": {literal}', "")
    check(text.encode(), SCHEMAS[schema_name])


@pytest.mark.parametrize("wrong", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf"])
@pytest.mark.parametrize("place", ["record_extra", "source", "key", "id", "content"])
def test_invalid_utf8_anywhere(place: str, wrong: bytes) -> None:
    mark = "?!"
    more = {"record_extra": f', "x": [{{"y": "{mark}"}}]', "key": f', "{mark}": 1'}.get(place, f', "{place}": "{mark}"')
    text = TALK % (more, "") if place == "content" else TALK % ("", more)
    assert not check(text.encode().replace(mark.encode(), wrong), None)


@settings(deadline=None)
@given(where=st.integers(0, 5000), digits=st.integers(4250, 4350), key=st.sampled_from(["id", "record_extra"]))
@example(where=0, digits=4300, key="record_extra")
@example(where=0, digits=4301, key="record_extra")
def test_integers_that_json_refuses(where: int, digits: int, key: str) -> None:
    text = TALK % ("", f', "pad": "{"x" * where}", "{key}": {"7" * digits}')
    check(text.encode(), None)


def test_what_is_common_is_taken(tmp_path: Path) -> None:
    for conversation in corpora.conversations(300):
        assert check((json.dumps(to_json(conversation)) + "\n").encode(), corpora.SCHEMA)
    for more in (
        ', "id": 5',
        ', "id": null',
        ', "id": "é", "source": "s", "topic": {"x": [1, null]}',
        ', "source": null',
    ):
        assert check((TALK % ("", more)).encode(), None), more
    assert check((TALK % (', "attributes": {"quality": 3, "humor": null}, "weight": 0', "")).encode(), corpora.SCHEMA)
    assert check((TALK % (', "attributes": {"any": 3e5}', "")).encode(), None)


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [{"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "system", "content": "b"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]}',
        '{"messages": []}',
        "[]",
        " ",
        TALK % (', "attributes": {"quality": 9.5}', ""),
        TALK % (', "attributes": {"kindness": 9}', ""),
        TALK % (', "weight": true', ""),
        TALK % (', "tool_calls": [{}]', ""),
        TALK % (', "function_call": {"name": "f"}', ""),
        TALK % ("", ', "id": true'),
        TALK % ("", ', "id": ["x"]'),
    ],
)
def test_what_is_wrong_is_left(line: str) -> None:
    assert not check(line.encode(), corpora.SCHEMA) and slowly(line.encode(), corpora.SCHEMA) is None


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \\n"}]}',
        TALK % (', "train": false', ""),
        TALK % (', "loss_weight": 0', ""),
        TALK % (', "mask": true', ""),
        TALK % (', "tool_calls": {"id": null}', ""),
        '{"messages": [{"role": "user", "content": "a", "attributes": {"quality": null}}, '
        '{"role": "assistant", "content": "b"}]}',
    ],
)
def test_what_needs_a_closer_look_is_left(line: str) -> None:
    assert not check(line.encode(), corpora.SCHEMA) and slowly(line.encode(), corpora.SCHEMA) is not None


def test_orders_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_records, "MOST_KINDS", 2)
    quick = FastRecords(PATH, None)
    for conversation in corpora.conversations(50):
        assert quick.parse(json.dumps(to_json(conversation)).encode(), 1) is not None
        assert len(quick.orders) <= 2


def test_without_msgspec_all_is_left() -> None:
    code = (
        "import sys\nsys.modules['msgspec'] = None\n"
        "from steerlm_megatron.data.write.fast_records import FastRecords\n"
        f"assert FastRecords('x', None).parse({(TALK % ('', '')).encode()!r}, 1) is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
