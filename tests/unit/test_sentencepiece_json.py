"""A SentencePiece model as a tokenizer.json gives the model's tokens, and a folder that has such a model comes in."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from steerlm_megatron.data.text.sentencepiece_json import converted, is_converted, tokenizer_json
from steerlm_megatron.data.text.text_losses import SAMPLE
from steerlm_megatron.data.text.text_models import train_sentencepiece
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.base import prompts_of
from steerlm_megatron.stages.prompt_tokens import exported_tokenizer, text_difference
from steerlm_megatron.steer.records import Message

REAL = Path(__file__).parents[3] / "shared" / "data" / "mistral_v1.spm.model"
CORPUS = [
    "Tell me about the red fox, who lives in 1984 holes.", "The fox is red; it doesn't sleep.  Two  blanks.",
    "    def indented(lines):\n        return [line for line in lines]", "Hello, who are you? [INST] [/INST]",
]  # fmt: skip
TEXTS = [
    "Hello the fox",
    "  two  blanks ", " a\n\nb", "\u65e5\u672c\u8a9e \ufb01 \U0001f468\u200d\U0001f469", "tab\there", "", " ",
    *(" " * n + "x" for n in range(2, 24)), *("-" * n for n in range(1, 24)), *CORPUS,
    SAMPLE.replace("\u2581", "").replace("\x00", ""),
]  # fmt: skip
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ASKED = (Message("user", "Hello, fox"), Message("assistant", "I am red."), Message("user", "Who are you?"))


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def trained(**settings: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=out, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 420, "model_type": "bpe", "byte_fallback": True, **settings},
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module")
def llama_like() -> bytes:
    """A model with the settings of Llama's."""
    return trained(normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True)


def ids(content: dict[str, Any], text: str) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"model_type": "unigram", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {
            "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
            "user_defined_symbols": ["[INST]", "\n"], "control_symbols": ["<|end|>"],
        },
    ],
    ids=["llama", "no_prefix", "unigram", "symbols"],
)  # fmt: skip
def test_tokens_are_those_of_sentencepiece(settings: dict[str, Any]) -> None:
    data = trained(**settings)
    theirs, content = sentencepiece.SentencePieceProcessor(model_proto=data), tokenizer_json(data, "x")
    assert [text for text in TEXTS if ids(content, text) != theirs.encode(text)] == []


@pytest.mark.skipif(not REAL.exists(), reason="the published model is not on this machine")
def test_tokens_are_those_of_a_published_model() -> None:
    data = REAL.read_bytes()
    theirs, content = sentencepiece.SentencePieceProcessor(model_proto=data), tokenizer_json(data, "x")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    assert [t for t in TEXTS if tokenizer.encode(t, add_special_tokens=False).ids != theirs.encode(t)] == []


def test_words_have_no_such_file() -> None:
    with pytest.raises(UserError, match="x: a SentencePiece model of words or characters has no tokenizer.json"):
        tokenizer_json(trained(model_type="char", byte_fallback=False), "x")
    with pytest.raises(UserError, match="x is not a SentencePiece model"):
        tokenizer_json(b"\xff\xff", "x")


def folder_of(path: Path, data: bytes, **config: Any) -> Path:
    path.mkdir()
    (path / "tokenizer.model").write_bytes(data)
    (path / "config.json").write_text('{"model_type": "llama"}')
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": CHAT, **config}))
    return path


def test_a_folder_whose_model_has_no_such_file_is_refused(tmp_path: Path) -> None:
    for number, settings in enumerate(({}, {**PLAIN, "user_defined_symbols": ["[INST]"]})):
        folder = folder_of(tmp_path / f"{number}", trained(**settings))
        with pytest.raises(
            UserError, match=f"{number}/tokenizer.model: the library tokenizers would make other tokens"
        ):
            Tokenizer.from_path(folder)
    assert Tokenizer.from_path(folder / "tokenizer.model").model_kind == "sentencepiece"


@pytest.mark.parametrize("legacy", [True, False])
def test_a_folder_with_a_sentencepiece_model_alone_is_asked_as_transformers_asks_it(
    llama_like: bytes, tmp_path: Path, legacy: bool
) -> None:
    import transformers

    folder = folder_of(tmp_path / "llama", llama_like, legacy=legacy)
    assert is_converted(folder)
    theirs = transformers.LlamaTokenizer.from_pretrained(folder)
    template, tokenizer = prompts_of(folder, "checkpoint")
    assert template is not None and tokenizer.model_kind == "huggingface"
    plain = [{"role": m.role, "content": m.content} for m in ASKED]
    expected = theirs.apply_chat_template(plain, tokenize=True)["input_ids"]
    assert tokenizer.encode_segments(template.prefix(ASKED))[0] == expected
    blank = theirs.convert_tokens_to_ids("\u2581")
    assert (blank in expected[1:2] or theirs.convert_ids_to_tokens(expected[1]).startswith("\u2581")) == legacy


def test_added_tokens_of_a_folder_are_tokens(llama_like: bytes, tmp_path: Path) -> None:
    size = len(sentencepiece.SentencePieceProcessor(model_proto=llama_like))
    described = {str(size): {"content": "<|im_start|>", "special": True, "lstrip": False}}
    folder = folder_of(tmp_path / "llama", llama_like, added_tokens_decoder=described)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1}))
    tokenizer = Tokenizer.from_path(folder, ["<|im_start|>", "<|im_end|>", "<mine>"])
    assert tokenizer.controls == {"<|im_start|>": size, "<|im_end|>": size + 1, "<mine>": size + 2}
    assert tokenizer.added == {"<mine>": size + 2}
    assert tokenizer.decode(tokenizer.encode("<s> is  text")) == "<s> is  text"
    (folder / "tokenizer.json").write_text(json.dumps(converted(folder)))
    assert not is_converted(folder) and Tokenizer.from_path(folder).model_hash == tokenizer.model_hash


def test_a_sentencepiece_tokenizer_leaves_as_a_tokenizer_json() -> None:
    own = train_sentencepiece(CORPUS * 9, 400, ["<extra_id_0>", "<extra_id_1>"])
    for data in (own, trained(**PLAIN), trained(**PLAIN, model_type="unigram")):
        tokenizer = Tokenizer(data, ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"])
        theirs = exported_tokenizer(tokenizer)
        assert text_difference(tokenizer, theirs) is None
        other = tokenizers.Tokenizer.from_str(json.dumps(theirs))
        first, last = (tokenizer.control_id(text) for text in ("<extra_id_2>", "<extra_id_1>"))
        text = "<extra_id_2>Hello\n fox<extra_id_1>"
        assert other.encode(text).ids == [first, *tokenizer.encode("Hello\n fox"), last]
        assert other.decode(tokenizer.encode("Hello\n  fox")) == "Hello\n  fox"
        assert text_difference(tokenizer, {**theirs, "normalizer": {"type": "Lowercase"}}) is not None
