"""Streamed text equals the final text for any division of bytes into tokens, at constant cost per token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.generate.text import Detokenizer, ResponseText, character_of_each_byte

# Tokens with parts of characters, also in wrong order, beside complete text and literal U+FFFD.
PIECES = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from([bytes([b]) for b in "é→😀\ufffd".encode()]),
    st.sampled_from([b"\x80", b"\xf0", b"\xf0\x9f", b"\x98\x80", b"\x9f\x98\x80\xf0", b"\xed\xa0\x80", b"\xc3"]),
    st.text("ab é→😀\ufffd\n", min_size=1, max_size=4).map(str.encode),
)


def lossy(pieces: Sequence[bytes]) -> Callable[[Sequence[int]], str]:
    """Decode like byte-level BPE: one U+FFFD for each maximal part of a character."""
    return lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", "replace")


def per_byte(pieces: Sequence[bytes]) -> Callable[[Sequence[int]], str]:
    """Decode like SentencePiece: one U+FFFD for each byte that is of no character."""

    def decode(ids: Sequence[int]) -> str:
        data, text = b"".join(pieces[i] for i in ids), ""
        while data:
            for size in (1, 2, 3, 4):
                try:
                    text += data[:size].decode()
                except UnicodeDecodeError:
                    continue
                break
            else:
                text, size = text + "\ufffd", 1
            data = data[size:]
        return text

    return decode


def all_or_nothing(pieces: Sequence[bytes]) -> Callable[[Sequence[int]], str]:
    """Decode like Hugging Face's byte fallback: if a run of byte tokens is invalid, each becomes U+FFFD."""

    def decode(ids: Sequence[int]) -> str:
        text, run = "", b""
        for piece in (*(pieces[i] for i in ids), b""):
            if len(piece) == 1:
                run += piece
                continue
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            text, run = text + piece.decode("utf-8", "replace"), b""
        return text

    return decode


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=60), st.sampled_from([lossy, per_byte]))
def test_streamed_is_the_text_for_any_bytes(pieces: list[bytes], kind: Callable[..., Callable[..., str]]) -> None:
    decode = kind(pieces)
    ids = list(range(len(pieces)))
    text = ResponseText(decode, (), "")
    streamed = "".join(text.push(i) for i in ids)
    whole, rest = text.finish(ids, False)
    assert streamed + rest == whole == decode(ids)
    assert ResponseText(decode, (), "").finish(ids, False) == (whole, whole)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=30), st.sampled_from([lossy, per_byte]))
def test_each_byte_belongs_to_a_character(pieces: list[bytes], kind: Callable[..., Callable[..., str]]) -> None:
    data = b"".join(pieces)
    text = kind([data])([0])
    characters = character_of_each_byte(data, text)
    assert len(characters) == len(data) and characters == sorted(characters)
    assert set(characters) == set(range(len(text)))
    for i, char in enumerate(text):
        own = bytes(byte for byte, of in zip(data, characters, strict=True) if of == i)
        assert own == char.encode() or char == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.text("aé→😀\ufffd ", min_size=1, max_size=80), st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_whole_characters_come_out_whole_however_they_are_cut(text: str, sizes: list[int]) -> None:
    data, pieces = text.encode(), []
    while data:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[:size])
        data = data[size:]
    detokenizer = Detokenizer(lossy(pieces))
    assert "".join(detokenizer.push(i) for i in range(len(pieces))) + detokenizer.rest() == text


SINGLE = st.one_of(
    st.integers(0, 255).map(lambda b: bytes([b])),
    st.sampled_from([bytes([b]) for b in "é→😀".encode()]),
    st.text("ab é→😀", min_size=2, max_size=3).map(str.encode),
)
CHARACTERS = st.text("é→😀", min_size=1).map(lambda text: [bytes([b]) for b in text.encode()])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(SINGLE.map(lambda piece: [piece]), CHARACTERS), max_size=20))
def test_one_text_where_later_bytes_change_how_earlier_ones_are_shown(runs: list[list[bytes]]) -> None:
    pieces = [piece for run in runs for piece in run]
    decode, ids = all_or_nothing(pieces), list(range(len(pieces)))
    text = ResponseText(decode, (), "")
    streamed = "".join(text.push(i) for i in ids)
    whole, rest = text.finish(ids, False)
    assert streamed + rest == whole == ResponseText(decode, (), "").finish(ids, False)[0]
    if "\ufffd" not in decode(ids):
        assert whole == decode(ids)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4),
    st.sampled_from(["", "\n", "ab"]),
    st.booleans(),
    st.sampled_from(["", "\n", "a"]),
)
def test_stop_strings_prefix_and_suffix(
    tokens: list[str], stops: list[str], suffix: str, by_control: bool, prefix: str
) -> None:
    text = ResponseText(lambda ids: "".join(tokens[i] for i in ids), stops, suffix, prefix=prefix)
    streamed, seen = "", 0
    for i in range(len(tokens)):
        streamed += text.push(i)
        seen = i + 1
        if text.stopped_at is not None:
            break
    whole, rest = text.finish(list(range(seen)), by_control)
    # Expected: the first token that completes a stop string ends the text where the earliest stop string begins.
    grown, expected = "", None
    for i, token in enumerate(tokens):
        grown += token.removeprefix(prefix) if i == 0 else token
        hits = [grown.find(stop) for stop in stops if stop in grown]
        if hits:
            expected = grown[: min(hits)]
            break
    if expected is None:
        expected = grown.removesuffix(suffix) if by_control else grown
        assert text.stopped_at is None
    else:
        assert text.stopped_at == len(expected)
    assert streamed + rest == whole == expected
    assert whole.startswith(streamed)


@pytest.mark.parametrize(
    ("tokens", "streamed", "whole"),
    [
        (["\n", " ", " Hi", "."], ["", "", "Hi", "."], "Hi."),
        (["\n  Hi"], ["Hi"], "Hi"),
        (["\n", " Hi"], ["", "\n Hi"], "\n Hi"),  # it only looked like the prefix
        ([" ", "\n  Hi"], [" ", "\n  Hi"], " \n  Hi"),
        (["\n", " "], ["", ""], "\n "),
        (["\n  ", "\n  x"], ["", "\n  x"], "\n  x"),
    ],
)
def test_a_prefix_comes_in_several_tokens_or_does_not_come(tokens: list[str], streamed: list[str], whole: str) -> None:
    text = ResponseText(lambda ids: "".join(tokens[i] for i in ids), (), "", prefix="\n  ")
    assert [text.push(i) for i in range(len(tokens))] == streamed
    ids = list(range(len(tokens)))
    assert text.finish(ids, False) == (whole, whole.removeprefix("".join(streamed)))
    at_once = ResponseText(lambda ids: "".join(tokens[i] for i in ids), (), "", prefix="\n  ")
    assert at_once.finish(ids, False) == (whole, whole)


@pytest.mark.parametrize("kind", [lossy, per_byte, all_or_nothing])
@pytest.mark.parametrize("piece", [b"\x80", b"\xf0", b"\xf0\x9f", b"\xef\xbf\xbd", b"\x98\x80\xf0\x9f"])
def test_stray_bytes_are_sent_as_they_come_and_decoded_a_few_times(
    kind: Callable[..., Callable[..., str]], piece: bytes
) -> None:
    count = 3000
    decode, decoded = kind([piece] * count), 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    text = ResponseText(counted, (), "")
    streamed = ""
    for i in range(count):
        streamed += text.push(i)
        assert len(streamed) >= (i + 1) // 3 - 4, "text is held back"
    assert decoded < 40 * count
    assert text.finish(list(range(count)), False)[0].startswith(streamed)


def test_long_stop_strings_cost_no_more_per_token() -> None:
    stops = ["a" * 1000 + end for end in "bcdefghijklmnop"]
    text = ResponseText(lambda ids: "a" * len(ids), stops, "")
    begin = time.process_time()
    for i in range(4000):
        text.push(i)
    assert time.process_time() - begin < 10
    assert text.finish(list(range(4000)), False)[0] == "a" * 4000
