"""The word cache gives what SentencePiece gives, is used only where it can, and is bounded."""

from __future__ import annotations

import pickle

import corpora
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.data import word_cache
from steerlm_megatron.data.tokenizer import Tokenizer
from steerlm_megatron.data.word_cache import WordCache, applies
from steerlm_megatron.errors import UserError

WORDS = [
    "river",
    "stone",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    ",",
    ".",
    "é",
    "日本語",
    "🙂",
    "<0x0A>",
    "a\u0301",
    "\u00a0",
    "x" * 90,
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8"), max_size=6), max_size=30).map("".join)


def plain(tok: Tokenizer, text: str) -> list[int]:
    """What the model itself gives."""
    return tok._model.processor.encode(text)


@pytest.mark.parametrize("name", ["trained", "mistral"])
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_words_end_to_end_are_the_text(name: str, texts: list[str]) -> None:
    tok = corpora.tokenizer(name)
    assert tok._model.words is not None
    texts = [text.replace("\u2581", "") for text in texts]  # kept from the model by the tokenizer
    assert tok.encode_batch(texts) == [plain(tok, text) for text in texts]
    assert [np.frombuffer(ids, np.int32).tolist() for ids in tok._encode_to_bytes(texts)] == tok.encode_batch(texts)


def test_the_last_generation_of_words_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MOST_WORDS", 20)
    tok = corpora.tokenizer("trained")
    cache = WordCache(tok._model.processor)
    for turn in range(30):
        texts = [f"river stone {turn * 10 + n} lamp\n{n}" for n in range(5)]
        assert [np.frombuffer(ids, np.int32).tolist() for ids in cache.encode(texts)] == [plain(tok, t) for t in texts]
        assert len(cache._known) <= 20 + 20
    assert " stone" in cache._known


def test_text_of_long_words_is_not_kept() -> None:
    tok = corpora.tokenizer("trained")
    cache = WordCache(tok._model.processor)
    text = "abcdefghij" * 40
    assert np.frombuffer(cache.encode([text])[0], np.int32).tolist() == plain(tok, text) and not cache._known


def test_models_for_which_it_does_not_hold() -> None:
    pieces = ["a", "\u2581", "\u2581\u2581", "\u2581a", "\n"]
    assert applies(2, True, pieces, True)
    assert not applies(1, True, pieces, True), "unigram: ties may fall otherwise"
    assert not applies(2, False, pieces, True), "a normaliser may join words"
    assert not applies(2, True, pieces, False), "unknown neighbours are one"
    for crossing in ("a\u2581", "\u2581a\u2581b", "\na", "a\n", "\n\n"):
        assert not applies(2, True, [*pieces, crossing], True), crossing
    for name in ("nfkc", "user_defined"):
        assert corpora.tokenizer(name)._model.words is None


def test_a_copy_for_another_process_encodes_alike() -> None:
    tok = corpora.tokenizer("trained")
    tok.encode("river stone")
    copy = pickle.loads(pickle.dumps(tok))
    assert copy._model.words is not None and not copy._model.words._known
    assert copy.hash == tok.hash and copy.encode("river stone\n lamp") == tok.encode("river stone\n lamp")


def test_a_lone_surrogate_is_named() -> None:
    segments = corpora.STEERLM.prefix([corpora.Message("user", "x \ud800 y")])
    with pytest.raises(UserError, match="not valid Unicode"):
        corpora.tokenizer("trained").encode_documents([segments])
