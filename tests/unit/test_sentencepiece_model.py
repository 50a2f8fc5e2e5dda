"""A tokenizer.json as a SentencePiece model, which llama.cpp's converter needs of Llama's and Gemma's kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from steerlm_megatron.data.text.sentencepiece_model import sentencepiece_model
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.stages.prompt_tokens import exported_tokenizer
from tests.helpers import corpora
from tests.unit.test_sentencepiece_json import CORPUS, PLAIN, REAL, TEXTS, trained

CONTROLS = ("<extra_id_1>", "<extra_id_2>")


def exported(data: bytes, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "some.model"
    path.write_bytes(data)
    return exported_tokenizer(Tokenizer.from_path(path, CONTROLS))


def llama_like() -> bytes:
    return trained(**PLAIN, split_digits=True)


@pytest.mark.parametrize("kind", ["llama", "user symbols", "mistral", "hf_metaspace"])
def test_it_gives_the_tokens_of_the_file(kind: str, tmp_path: Path) -> None:
    if kind == "mistral" and not REAL.is_file():
        pytest.skip(f"{REAL} is not here")
    if kind == "hf_metaspace":
        content = exported_tokenizer(corpora.tokenizer(kind))
    else:
        data = REAL.read_bytes() if kind == "mistral" else llama_like()
        if kind == "user symbols":
            data = trained(**PLAIN, user_defined_symbols=["[INST]", "[/INST]"], control_symbols=["<|end|>"])
        content = exported(data, tmp_path)
    found = sentencepiece_model(content)
    assert found is not None
    model = sentencepiece.SentencePieceProcessor(model_proto=found)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    texts = [text for text in TEXTS if "\0" not in text]
    assert [model.encode(text) for text in texts] == [
        theirs.encode(text, add_special_tokens=False).ids for text in texts
    ]
    # Pieces have the ids of the file; what was added behind them is no piece.
    assert model.vocab_size() == len(content["model"]["vocab"])
    assert all(model.id_to_piece(number) == text for text, number in content["model"]["vocab"].items())
    kinds = {piece.piece: piece.type for piece in ModelProto.FromString(found).pieces}
    assert kinds["<s>"] == kinds["</s>"] == ModelProto.SentencePiece.CONTROL
    assert kinds["<0x41>"] == ModelProto.SentencePiece.BYTE and kinds["<unk>"] == ModelProto.SentencePiece.UNKNOWN
    if kind == "user symbols":
        assert kinds["[INST]"] == ModelProto.SentencePiece.USER_DEFINED
        assert kinds["<|end|>"] == ModelProto.SentencePiece.CONTROL


def test_scores_decide_which_pair_is_merged_first(tmp_path: Path) -> None:
    """With one score for all pieces, as llama.cpp takes without this file, texts have other tokens."""
    content = exported(llama_like(), tmp_path)
    proto = ModelProto.FromString(sentencepiece_model(content) or b"")
    for piece in proto.pieces:
        piece.score = -1000.0
    equal = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    real = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(content))
    assert any(equal.encode(text) != real.encode(text) for text in CORPUS)


def test_what_no_such_model_is_like_has_none(tmp_path: Path) -> None:
    assert sentencepiece_model(exported_tokenizer(corpora.tokenizer("hf_byte_level"))) is None
    assert sentencepiece_model(exported(trained(**PLAIN, model_type="unigram", vocab_size=330), tmp_path)) is None
    content = exported(llama_like(), tmp_path)
    assert sentencepiece_model(content) is not None

    def changed(change: Any) -> bytes | None:
        other = copy.deepcopy(content)
        change(other)
        return sentencepiece_model(other)

    def gap(other: dict[str, Any]) -> None:
        vocabulary = other["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] += 5

    assert changed(gap) is None
    assert changed(lambda other: other["model"].update(byte_fallback=False)) is None
    assert changed(lambda other: other["model"].update(unk_token=None)) is None
    # A file that changes texts before it cuts them, or that lacks pairs which scores would merge.
    lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, content["normalizer"]]}
    assert changed(lambda other: other.update(normalizer=lower)) is None
    assert changed(lambda other: other["model"].update(merges=other["model"]["merges"][::2])) is None
