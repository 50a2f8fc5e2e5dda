"""The bytes of tokens, joined, are the text, for any model and any division of characters."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.data.text.text_models import ByteModel, HuggingFaceModel
from steerlm_megatron.data.text.tokenizer import Tokenizer

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab é→😀\n\t ▁Ġ\ufffd")), max_size=30
)
CONTROLS = ("<extra_id_0>", "<extra_id_1>")


def byte_level() -> HuggingFaceModel:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    library.train_from_iterator(["hello wörld 😀😃 → déjà vu " * 20], trainer)
    return HuggingFaceModel(library.to_str().encode())


def byte_fallback() -> HuggingFaceModel:
    vocabulary = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}}
    for piece in ("\u2581", "h", "e", "l", "o", "é", "he", "\u2581he"):
        vocabulary[piece] = len(vocabulary)
    raw = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocabulary,
                  "merges": ["h e", "\u2581 he"]},
    }  # fmt: skip
    return HuggingFaceModel(json.dumps(raw).encode())


TOKENIZERS = {
    "sentencepiece": Tokenizer.train([f"hello world {i} how are you" for i in range(100)], 400, CONTROLS),
    "byte-level": Tokenizer(byte_level(), CONTROLS),
    "byte fallback": Tokenizer(byte_fallback(), CONTROLS),
    "bytes": Tokenizer(ByteModel(), CONTROLS),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_joined_they_are_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) == text:  # a model may lack a character
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_they_are_the_text_of_all_whole_tokens_and_part_of_a_character_of_others(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    cut = 0
    for i in range(tokenizer.vocab_size):
        own, shown = tokenizer.token_bytes(i), tokenizer.decode([i])
        if "\ufffd" not in shown:
            assert own.decode().endswith(shown)
        else:
            cut += 1
            assert own and own.decode("utf-8", "replace") == shown
    assert cut >= 128, "bytes that are no character are among them"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_emoji_in_pieces(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("🦭")
    assert len(ids) > 1
    assert b"".join(map(tokenizer.token_bytes, ids)) == "🦭".encode()
