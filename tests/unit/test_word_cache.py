"""The word cache gives SentencePiece's ids, is used only where it may be, and is bounded."""

from __future__ import annotations

import functools
import io
import pickle
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.data.text import word_cache
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.text.word_cache import WordCache, applies
from steerlm_megatron.errors import UserError
from tests.helpers import corpora

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


PIECES = "\0".join(
    corpora.tokenizer("trained")._model.processor.id_to_piece(i) for i in range(corpora.tokenizer("trained").base_size)
).encode()


def plain(tok: Tokenizer, text: str) -> list[int]:
    """Return the ids of the model itself."""
    return tok._model.processor.encode(text)


def lists(ids: Any, counts: Any) -> list[list[int]]:
    assert len(ids) == counts.sum()
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] if len(counts) else []


@functools.cache
def crossing() -> Tokenizer:
    """Return a model whose pieces have spaces and punctuation after letters, and a symbol across a newline."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpora.training_text()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        split_by_whitespace=False,
        split_by_unicode_script=False,
        user_defined_symbols=["e\n", "stone, "],
        minloglevel=2,
    )
    return Tokenizer(model.getvalue(), corpora.CONTROLS)


def tokenizer(name: str) -> Tokenizer:
    return crossing() if name == "crossing" else corpora.tokenizer(name)


@pytest.mark.parametrize("name", ["trained", "mistral", "crossing"])
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_words_end_to_end_are_the_text(name: str, texts: list[str]) -> None:
    tok = tokenizer(name)
    assert tok._model.words is not None
    texts = [text.replace("\u2581", "") for text in texts]  # the tokenizer keeps these characters from the model
    assert lists(*tok._model.words.encode(texts)) == lists(*tok.encode_flat(texts)) == [plain(tok, t) for t in texts]


@pytest.mark.parametrize("limit", ["words", "ids"])
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(word_cache, "_SLICE", 7)
    monkeypatch.setattr(word_cache, "_MOST_WORDS", 20 if limit == "words" else 10_000)
    monkeypatch.setattr(word_cache, "_MOST_IDS", 50 if limit == "ids" else 10_000)
    tok, tables = corpora.tokenizer("trained"), []
    cache = WordCache(tok._model.processor, PIECES)
    for turn in range(30):
        texts = [f"river stone {turn * 10 + n} lamp\n{n}" + "stone" * n for n in range(5)]
        assert lists(*cache.encode(texts)) == [plain(tok, text) for text in texts]
        assert cache._table is not None
        assert cache._table._count <= 20 + 1 if limit == "words" else cache._table._size < 50 + 7 * 40
        tables.append(cache._table)
    assert len(set(map(id, tables))) > 1


@pytest.mark.parametrize("bytes_per_word", [0, word_cache._MOST_BYTES_PER_WORD])
@settings(deadline=None)
@given(texts=st.lists(TEXTS, max_size=30))
def test_few_slots_do_not_mix_words(bytes_per_word: int, texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_cache, "_MOST_BYTES_PER_WORD", bytes_per_word)
        patch.setattr(word_cache, "_TOP", np.uint64(62))  # all words start their search at four of a million slots
        tok = corpora.tokenizer("trained")
        cache = WordCache(tok._model.processor, PIECES)
        texts = [text.replace("\u2581", "") for text in texts]
        for _ in range(2):
            assert lists(*cache.encode(texts)) == [plain(tok, text) for text in texts]


def test_an_error_on_the_way_leaves_no_word_without_ids() -> None:
    tok = corpora.tokenizer("trained")
    cache = WordCache(tok._model.processor, PIECES)

    class Failing:
        def encode(self, words: list[str], num_threads: int) -> list[list[int]]:
            raise KeyboardInterrupt

    cache._processor = Failing()
    with pytest.raises(KeyboardInterrupt):
        cache.encode(["river stone"])
    cache._processor = tok._model.processor
    assert lists(*cache.encode(["river stone"])) == [plain(tok, "river stone")]


def test_words_are_short_where_pieces_allow() -> None:
    free = word_cache.places("\0".join(["a", "b", "▁a", "ab", "é", "1"]).encode()).reshape(256, 256)
    for left, right, may_begin in ((" ", "a", False), ("a", " ", True), ("a", "b", False), ("b", "a", True)):
        assert free[ord(right), ord(left)] == may_begin, (left, right)
    assert not free[0x80:0xC0].any(), "inside a character"


def test_models_for_which_it_does_not_hold() -> None:
    assert applies(2, True, True)
    assert not applies(1, True, True), "unigram: ties may fall otherwise"
    assert not applies(2, False, True), "a normaliser may join words"
    assert not applies(2, True, False), "unknown neighbours are one"
    for name in ("nfkc", "user_defined"):
        assert corpora.tokenizer(name)._model.words is None


def test_a_copy_for_another_process_encodes_alike() -> None:
    tok = corpora.tokenizer("trained")
    tok.encode("river stone")
    copy = pickle.loads(pickle.dumps(tok))
    assert copy._model.words is not None and copy._model.words._table is None
    assert copy.hash == tok.hash and copy.encode("river stone\n lamp") == tok.encode("river stone\n lamp")


def test_a_lone_surrogate_is_named() -> None:
    segments = corpora.STEERLM.prefix([corpora.Message("user", "x \ud800 y")])
    with pytest.raises(UserError, match="not valid Unicode"):
        corpora.tokenizer("trained").encode_documents([segments])
