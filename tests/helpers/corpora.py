"""Small corpora and tokenizer models, made when they are needed, for the tests of ``steerlm_megatron.data``."""

from __future__ import annotations

import functools
import io
import json
import os
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from steerlm_megatron.data.text.text_models import ByteModel, HuggingFaceModel
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import Template

SCHEMA = AttributeSchema("test", ("quality", "toxicity", "humor"), 9)
STEERLM = Template.from_config({"name": "steerlm", "system": "You are kind."})
LLAMA2 = Template.from_config({"name": "llama2", "system": "You are kind."})
LLAMA2_BARE = Template.from_config({"name": "llama2"})
CHATML = Template.from_config({"name": "chatml", "system": "You are kind."})
TEMPLATES = {"steerlm": STEERLM, "llama2": LLAMA2, "llama2_bare": LLAMA2_BARE, "chatml": CHATML}
CONTROLS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
TOKENIZERS = ("trained", "nfkc", "user_defined", "mistral", "fairseq2", "hf_metaspace", "hf_byte_level", "bytes")

_WORDS = (
    "river stone bread lamp quiet garden system user assistant quality toxicity humor extra id you are kind "
    "seven train paper yellow window market horse cloud green letter music number winter a the of to and"
).split()


def shared_data(name: str) -> Path:
    """Return the path of a file of the shared data folder; the test is skipped where it is absent."""
    folder = Path(os.environ.get("STEERLM_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / name).is_file():
        pytest.skip(f"{folder / name} is not there (set STEERLM_SHARED_DATA)")
    return folder / name


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words)).capitalize() + "."


@functools.cache
def training_text() -> tuple[str, ...]:
    rng = random.Random(0)
    lines = [sentence(rng, rng.randint(3, 12)) for _ in range(400)]
    return (*lines, *(f"quality:{i},toxicity:{9 - i},humor:{i}\nSystem\nUser\nAssistant\n" for i in range(10)))


def _train_raw(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in training_text() for line in text.split("\n") if line),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


@functools.cache
def raw_model(name: str) -> bytes:
    """Train a model: ``nfkc`` normalises newlines away and has no bytes, ``user_defined`` has control strings as
    pieces.
    """
    if name == "nfkc":
        return _train_raw(vocab_size=200, normalization_rule_name="nmt_nfkc")
    assert name == "user_defined"
    return _train_raw(
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=[*CONTROLS, "[INST]", "[/INST]"],
    )


@functools.cache
def hugging_face(name: str) -> bytes:
    """Return a ``tokenizer.json``. ``hf_metaspace`` is like Llama's (a blank in front, byte fallback, ``<s>`` put
    first, special tokens). ``hf_byte_level`` is like GPT-2's, with ``<extra_id_1>`` as a special and ``[INST]`` as an
    ordinary added token.
    """
    if name == "hf_metaspace":
        tok = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tok.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        )
        tok.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("\u2581", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
                tokenizers.decoders.Strip(" ", 1, 0),
            ]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    else:
        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tok.decoder = tokenizers.decoders.ByteLevel()
        special = ["<|endoftext|>", "<extra_id_1>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if name == "hf_byte_level" else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(training_text(), trainer)
    if name == "hf_metaspace":
        tok.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        raw = json.loads(tok.to_str())  # as in Llama's file, byte pieces are ordinary entries of the vocabulary
        raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["content"].startswith("<0x")]
        return json.dumps(raw).encode()
    tok.add_tokens(["[INST]", "[/INST]"])
    tok.enable_truncation(8)
    tok.enable_padding()
    return tok.to_str().encode()


@functools.cache
def tokenizer(name: str, control_strings: tuple[str, ...] = CONTROLS) -> Tokenizer:
    if name == "mistral":
        return Tokenizer.from_path(shared_data("mistral_v1.spm.model"), control_strings)
    if name == "fairseq2":
        return Tokenizer.from_path(shared_data("fairseq2_test.spm"), control_strings)
    if name == "trained":
        return Tokenizer.train(training_text(), 450, control_strings)
    if name == "bytes":
        return Tokenizer(ByteModel(), control_strings)
    if name.startswith("hf_"):
        return Tokenizer(HuggingFaceModel(hugging_face(name)), control_strings)
    return Tokenizer(raw_model(name), control_strings)


def conversations(count: int, seed: int = 0, max_turns: int = 4, labelled: float = 0.7) -> list[Conversation]:
    """Return varied conversations: with and without system, several turns, weights 0, partial labels, ending with
    users.
    """
    rng = random.Random(seed)
    out = []
    for number in range(count):
        messages = [Message("system", "Be brief.")] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, max_turns)):
            messages.append(Message("user", sentence(rng, rng.randint(1, 12)) + "\n\nPlease  answer."))
            names = [name for name in SCHEMA.names if rng.random() < 0.8]
            attributes = {name: round(rng.random() * 9, 3) for name in names} if rng.random() < labelled else None
            weight = int(rng.random() < 0.8)
            messages.append(Message("assistant", sentence(rng, rng.randint(1, 20)), attributes or None, weight))
        if rng.random() < 0.2:
            messages.append(Message("user", "And then?"))
        out.append(Conversation(f"c{number}", tuple(messages)))
    return out
