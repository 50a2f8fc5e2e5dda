"""steer.lines handles byte order marks, and names files that are not text and errors of lines that are nearly JSON."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_tools.rows import read_files
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.lines import parse_object
from steerlm_megatron.steer.records import raw_lines, read_records

GOOD = {"id": "a", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
LINE = json.dumps(GOOD).encode()
BOM = b"\xef\xbb\xbf"


def lines_of(count: int) -> list[bytes]:
    return [json.dumps({**GOOD, "id": f"{number}"}).encode() for number in range(count)]


@given(marks=st.lists(st.booleans(), min_size=1, max_size=6), end=st.sampled_from([b"\n", b"\r\n"]), last=st.booleans())
def test_a_byte_order_mark_may_begin_any_line(
    tmp_path_factory: pytest.TempPathFactory, marks: list[bool], end: bytes, last: bool
) -> None:
    path = tmp_path_factory.mktemp("bom") / "joined.jsonl"
    lines = lines_of(len(marks))
    data = end.join(BOM + line if mark else line for mark, line in zip(marks, lines, strict=True))
    path.write_bytes(data + end * last)
    assert [record.id for record in read_records(path)] == [str(number) for number in range(len(marks))]
    for size in (1, 7, 64):  # with any size of parts, a mark counts only where a line begins
        pieces = [piece for _, piece in raw_lines(str(path), size) if piece]
        assert b"".join(pieces) == end.join(lines) + end * last or size < len(BOM)
    inside = {**GOOD, "messages": [{"role": "user", "content": "\ufeffq"}, {"role": "assistant", "content": "r\ufeff"}]}
    path.write_text(json.dumps(inside, ensure_ascii=False), encoding="utf-8")
    assert [m.content for m in next(read_records(path)).messages] == ["\ufeffq", "r\ufeff"]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", LINE)
    return buffer.getvalue()


FOREIGN: list[tuple[bytes, str]] = [
    (b"PAR1" + bytes(20), "a Parquet file.*data.source=hf"),
    (b"ARROW1\0\0" + bytes(20), "an Arrow file.*data.source=hf"),
    (b"\xff\xff\xff\xff\x10\0\0\0", "an Arrow stream.*data.source=hf"),
    (gzip.compress(LINE), r"compressed with gzip.*\.gz"),
    (zstandard.compress(LINE), r"compressed with zstd.*\.zst"),
    (zipped(), "a zip archive.*unpack"),
    *((pickle.dumps([GOOD], protocol), "a Python pickle") for protocol in range(2, 6)),
    *((LINE.decode().encode(code), "text in UTF-") for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
    (b"BZh91AY", "bzip2"),
    (b"\xfd7zXZ\0\0", "xz"),
    (b"SQLite format 3\0", "SQLite"),
]


@pytest.mark.parametrize(("content", "match"), FOREIGN, ids=[f"{n} {match}" for n, (_, match) in enumerate(FOREIGN)])
@pytest.mark.parametrize("wrapped", ["plain", "gz", "zst"])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, match: str, wrapped: str) -> None:
    path = tmp_path / {"plain": "a.jsonl", "gz": "a.jsonl.gz", "zst": "a.jsonl.zst"}[wrapped]
    compress = {"plain": bytes, "gz": gzip.compress, "zst": zstandard.compress}[wrapped]
    path.write_bytes(compress(content))
    for on_error in ("error", "skip"):  # an error that concerns the whole file is never skipped
        with pytest.raises(UserError, match=match) as caught:
            list(read_records(path, on_error=on_error, rejected=[]))  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"{path} ")
        with pytest.raises(UserError, match=match):
            list(read_files([str(path)], on_error, []))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (str(GOOD), "a Python dict.*json.dumps"),
        (str({"a": True, "b": None}), "a Python dict"),
        (json.dumps(GOOD) + ",", "a comma stands after the object"),
        (json.dumps(GOOD)[:-1] + ",}", "a comma stands before a closing bracket"),
        (json.dumps(GOOD).replace("]", ", ]"), "a comma stands before a closing bracket"),
        ("[", "only begins a value of several lines"),
        ("{", "only begins a value of several lines"),
        ("[ {", "only begins a value of several lines"),
        (json.dumps(GOOD) + json.dumps(GOOD), "more than one value stands in the line"),
        (json.dumps(GOOD) + "\r" + json.dumps(GOOD), "more than one value stands in the line"),
        ('{"a": "x\ty"}', "a tab or another control character"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "Infinity is not a JSON number"),
        ("[1]", "expected a JSON object, found list"),
        ("id,text", "malformed JSON: Expecting value"),
    ],
)
def test_what_is_nearly_json_is_named(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(UserError, match=match) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:1: ")
    rejected: list[tuple[str, str]] = []
    assert len(list(read_records(path, on_error="skip", rejected=rejected))) == 1 and len(rejected) == 1


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=3), VALUE), cut=st.integers(1, 200))
def test_a_cut_off_line_is_torn_or_malformed(value: dict[str, Any], cut: int) -> None:
    text = json.dumps(value)
    assert parse_object(text, "f:1") == value
    if cut < len(text):
        with pytest.raises(UserError, match=r"f:1: (torn last line|malformed JSON)"):
            parse_object(text[:-cut], "f:1", complete=False)
