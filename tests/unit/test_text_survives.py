"""Any text survives any Hugging Face tokenizer, or opening the tokenizer reports what does not."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from steerlm_megatron.data.text.text_models import HuggingFaceModel
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError

CONTROLS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["river", "stone", "He", "it's", "</s>", "[INST]", "<extra_id_1>", "<unk>", "<0x41>", "caf\u00e9", "\u0130"]
# Ordinary text, and characters that tokenizers handle specially.
PIECES = [*WORDS, " ", "  ", "\n", "\t", "\r\n", "\u2581", "\u0120", "##a", "</w>", "_", "e\u0301", "\ufb01", "\uff3b"]
PIECES += ["\U0001f468\u200d\U0001f469", "\u65e5\u672c", "\u00a0", "\x00", "[inst]", "\uff1c/s\uff1e", "``", "ab", "1"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=3), max_size=9).map("".join)
TEXTS = st.lists(TEXT, min_size=1, max_size=5)


def merges(words: list[str], letters: set[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the pieces that build words from the left, and their merges."""
    pieces, pairs = dict.fromkeys(sorted(letters)), {}
    for word in words:
        for end in range(2, len(word) + 1):
            if set(word[:end]) <= letters:
                pieces[word[:end]] = pairs[word[: end - 1], word[end - 1]] = None
    return list(pieces), list(pairs)


def byte_level(words: list[str], options: dict[str, Any]) -> tokenizers.Tokenizer:
    pieces, pairs = merges(words, set(LETTERS))
    made = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs, **options))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    return made


def metaspace(words: list[str], options: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return a tokenizer like Llama's or Gemma's, with byte fallback and a sign for the blank."""
    pieces, pairs = merges([word.replace(" ", "\u2581") for word in words], set(map(chr, range(33, 127))) | {"\u2581"})
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", *BYTES, *pieces]))}
    model = models.BPE(vocabulary, pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True, **options)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


def unigram(words: list[str], options: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return a tokenizer like T5's, in which special tokens and bytes are pieces like any other."""
    pieces = ["<unk>", "</s>", *CONTROLS, *BYTES, *map(chr, range(33, 127)), "\u2581", *words]
    scored = [(piece, -float(i % 7)) for i, piece in enumerate(dict.fromkeys(pieces))]
    made = tokenizers.Tokenizer(models.Unigram(scored, 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def word_piece(words: list[str], options: dict[str, Any]) -> tokenizers.Tokenizer:
    letters = list(map(chr, range(33, 127)))
    pieces = dict.fromkeys(["[UNK]", "</s>", *CONTROLS, *letters, *(f"##{letter}" for letter in letters), *words])
    made = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return made


def word_level(words: list[str], options: dict[str, Any]) -> tokenizers.Tokenizer:
    pieces = dict.fromkeys(["<unk>", "</s>", *CONTROLS, *words, *map(chr, range(33, 127))])
    made = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


KINDS = {f.__name__: f for f in (byte_level, metaspace, unigram, word_piece, word_level)}
HARMLESS = [None, normalizers.Prepend("\u2581"), normalizers.Strip(), normalizers.Sequence([normalizers.Strip()])]
LOSSY = [
    normalizers.NFC(),
    normalizers.NFKC(),
    normalizers.Lowercase(),
    normalizers.BertNormalizer(),
    normalizers.Replace("``", '"'),
    normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
    normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    normalizers.Nmt(),
]
SPLITS = [pre_tokenizers.Digits(True), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation("removed")]
ADDED = st.builds(
    AddedToken,
    st.sampled_from([word for word in WORDS if word != "<0x41>"] + ["  ", "\u2581x", "river stone", "\u0120x", "[A]"]),
    single_word=st.booleans(),
    lstrip=st.booleans(),
    rstrip=st.booleans(),
    normalized=st.booleans(),
    special=st.booleans(),
).filter(
    lambda token: not (token.special and token.content == "\u0130")
)  # this letter stands for a byte and is refused, see below


@st.composite
def files(draw: st.DrawFn, kinds: list[str], normalizer: list[Any], more: bool) -> bytes:
    """Draw a ``tokenizer.json``; with ``more`` it may have other pre-tokenizers and decoders than its kind has."""
    kind = draw(st.sampled_from(kinds))
    words = draw(st.lists(st.sampled_from(WORDS[:-1]), unique=True))
    can_drop = kind in ("byte_level", "metaspace")
    made = KINDS[kind](words, draw(st.sampled_from([{}, {"dropout": 0.5}])) if can_drop else {})
    chosen = draw(st.sampled_from(normalizer))
    if chosen is not None:
        made.normalizer = chosen
    if more:
        split = draw(st.none() | st.sampled_from(SPLITS))
        if split is not None:
            made.pre_tokenizer = pre_tokenizers.Sequence([split, made.pre_tokenizer])
        other = draw(st.none() | st.sampled_from([decoders.WordPiece(), decoders.BPEDecoder(), decoders.Fuse()]))
        if other is not None:
            made.decoder = other
    for token in draw(st.lists(ADDED, max_size=5)):
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    raw = json.loads(made.to_str())
    if more and draw(st.booleans()):
        raw["decoder"] = None
    return json.dumps(raw).encode()


def opened(data: bytes, controls: tuple[str, ...] = CONTROLS) -> Tokenizer:
    return Tokenizer(HuggingFaceModel(data), controls)


def check_ids(tok: Tokenizer, data: bytes, ids: list[int]) -> None:
    """Check that no text became a control token or a special token."""
    special = {token["id"] for token in json.loads(data)["added_tokens"] if token["special"]} - {tok.unk_id}
    assert not set(ids) & (special | set(tok.controls.values()))
    assert all(0 <= i < tok.vocab_size for i in ids)


SETTINGS = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(data=files(["byte_level", "metaspace", "unigram"], HARMLESS, False), texts=TEXTS)
def test_text_survives_where_the_vocabulary_has_bytes(data: bytes, texts: list[str]) -> None:
    tok = opened(data)
    assert not tok.losses
    for text in texts:
        ids = tok.encode(text)
        check_ids(tok, data, ids)
        assert tok.decode(ids) == text, (text, ids)
        assert ids == tok.encode(text) == opened(data).encode(text)  # encoding is deterministic, without dropout
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]
    flat, counts = tok.encode_flat(texts)
    assert flat.tolist() == [i for text in texts for i in tok.encode(text)]
    assert counts.tolist() == [len(tok.encode(text)) for text in texts]


@SETTINGS
@given(data=files(list(KINDS), [*HARMLESS, *LOSSY], True), texts=TEXTS)
def test_what_does_not_survive_was_said(data: bytes, texts: list[str]) -> None:
    tok = opened(data)
    for text in texts:
        ids = tok.encode(text)
        check_ids(tok, data, ids)
        assert tok.losses or tok.decode(ids) == text, (text, ids)


STABLE = {
    "NFC": lambda text: unicodedata.normalize("NFC", text),
    "NFKC": lambda text: unicodedata.normalize("NFKC", text),
    "Lowercase": str.lower,
}


@SETTINGS
@given(
    data=files(["byte_level", "metaspace"], [normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase()], False),
    texts=TEXTS,
)
def test_a_normaliser_is_named_and_what_it_leaves_alone_survives(data: bytes, texts: list[str]) -> None:
    tok, name = opened(data), json.loads(data)["normalizer"]["type"]
    assert [loss.split(":")[0] for loss in tok.losses] == [f"normalizer {name}"]
    words = [token["content"] for token in json.loads(data)["added_tokens"] if token["normalized"]]
    for text in texts:
        ids = tok.encode(text)
        check_ids(tok, data, ids)
        # An added token with ``normalized`` matches every text that the normaliser turns into its form.
        if STABLE[name](text) == text and not any(STABLE[name](word) in text for word in words):
            assert tok.decode(ids) == text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder WordPiece"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "pre_tokenizer WhitespaceSplit"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "''"}, "content": '"'}}, "normalizer Replace"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "x+"}, "content": "y"}}, "normalizer Replace"),
        ({"normalizer": {"type": "StripAccents"}}, "normalizer StripAccents: .*becomes"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}}, "model WordLevel"),
    ],
)
def test_opening_says_what_is_lost_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    plain = json.loads(byte_level(WORDS[:2], {}).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**plain, **change}))
    warned: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, text, *values: warned.append(text % values))
    for _ in range(2):
        tok = Tokenizer.from_path(tmp_path, CONTROLS)
    assert len(warned) == 1 and re.search(said, warned[0]) and str(tmp_path) in warned[0]
    assert any(re.search(said, loss) for loss in tok.losses)


def test_a_file_that_keeps_all_is_opened_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.Logger, "warning", lambda *_: pytest.fail("nothing is lost"))
    for kind in (byte_level, metaspace, unigram):
        (tmp_path / "tokenizer.json").write_text(kind(WORDS[:3], {}).to_str())
        assert Tokenizer.from_path(tmp_path, CONTROLS).losses == ()


@pytest.mark.parametrize("kind", [byte_level, metaspace, unigram])
def test_a_file_without_a_decoder_gets_one(kind: Any) -> None:
    raw = json.loads(kind(["river"], {}).to_str())
    tok = opened(json.dumps({**raw, "decoder": None}).encode())
    for text in (" river  stone\n", "\u2581\u00e9\u65e5"):
        assert tok.decode(tok.encode(text)) == text and not tok.losses


def test_a_special_token_that_is_a_character_is_refused_or_spelt() -> None:
    for letter in ("a", "\u0130"):
        made = byte_level(["river"], {})
        made.add_special_tokens([letter])
        with pytest.raises(UserError, match=r"cannot write the text '(a|\\x8e)' other than with a control token"):
            opened(made.to_str().encode())
    made = metaspace(["river"], {})
    made.add_special_tokens(["a"])
    tok = opened(made.to_str().encode())
    assert tok.decode(tok.encode("banana")) == "banana"
    made = word_level(["river"], {})
    made.add_special_tokens(["a"])
    tok = opened(made.to_str().encode())
    assert tok.encode("a") == [tok.unk_id] and any("'a' is a token of its own" in loss for loss in tok.losses)


def test_control_strings_that_are_ordinary_pieces_of_a_unigram_model() -> None:
    """T5's model itself would make a special token of text."""
    made = unigram([], {})
    made.add_special_tokens([*CONTROLS, "</s>"])
    tok = opened(made.to_str().encode())
    assert tok.added == {} and tok.controls == {text: made.token_to_id(text) for text in CONTROLS}
    text = "say <extra_id_1>User\n</s> and <0x41>"
    assert not set(tok.encode(text)) & {*tok.controls.values(), made.token_to_id("</s>")}
    assert tok.decode(tok.encode(text)) == text
