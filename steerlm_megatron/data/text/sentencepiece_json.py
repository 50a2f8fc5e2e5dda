"""A SentencePiece model as the content of a ``tokenizer.json``, which the library ``tokenizers`` reads.

Owns: the translation of a model, and that of a Hugging Face folder that has a SentencePiece model alone. Does not own:
what is taken out of such a file (``hugging_face.py``). Invariant: texts get the tokens that SentencePiece gives them,
and control strings of the model or of the folder are special tokens.

SentencePiece merges the pair of neighbours whose piece has the highest score; ``tokenizers`` the pair that comes first
in a list. The list of all pairs that make a piece, in the order of their pieces' scores, is therefore the same rule;
pieces of one score (runs of blanks in Llama's and Mistral's models) follow each other by their ids.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from steerlm_megatron.data.text.text_losses import SAMPLE
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import read_json_object

MODEL = "tokenizer.model"
_SPACE = "\u2581"  # how SentencePiece writes a blank
_KIND = ModelProto.SentencePiece
_TRIED = 16  # symbols of a model that are tried


def is_converted(folder: Path) -> bool:
    """Return whether a folder is one of Hugging Face whose tokenizer is a SentencePiece model alone."""
    beside = any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))
    return beside and (folder / MODEL).is_file() and not (folder / "tokenizer.json").is_file()


def converted(folder: Path) -> dict[str, Any]:
    """Return the content of the ``tokenizer.json`` that such a folder lacks: its SentencePiece model with the tokens
    that ``tokenizer_config.json`` and ``added_tokens.json`` add.

    Text gets the blank in front that the model asks for (``add_dummy_prefix``): before each stretch of text between
    special tokens, or with ``legacy=false`` in ``tokenizer_config.json`` at the start of the whole alone.

    Raises:
        UserError: a file cannot be read, or is none of its kind.
    """
    names = (MODEL, "tokenizer_config.json", "added_tokens.json")
    content: dict[str, Any] = json.loads(_converted(folder, tuple(_stamp(folder / name) for name in names)))
    return content


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4)
def _converted(folder: Path, stamps: tuple[tuple[int, int] | None, ...]) -> str:
    """Return :func:`converted`'s result as JSON, which no caller can change for another one."""
    config = read_json_object(folder / "tokenizer_config.json")
    try:
        data = (folder / MODEL).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / MODEL} cannot be read: {error.strerror}") from None
    told, legacy = str(folder / MODEL), config.get("legacy") is not False
    if not _is_faithful(data, tokenizer_json(data, told)):
        raise UserError(
            f"{told}: the library tokenizers would make other tokens of some texts than this SentencePiece model does "
            "(it normalises texts, or has symbols of its own); name the file itself (tokenizer.path), or a folder with "
            "a tokenizer.json"
        )
    content = tokenizer_json(data, told, config.get("add_prefix_space"), legacy)
    vocabulary = {token["content"]: token for token in content["added_tokens"]}
    for token in _added(config, read_json_object(folder / "added_tokens.json")):
        vocabulary[token["content"]] = token
    content["added_tokens"] = sorted(vocabulary.values(), key=lambda token: int(token["id"]))
    return json.dumps(content)


def _is_faithful(data: bytes, content: dict[str, Any]) -> bool:
    """Return whether a translated model makes SentencePiece's tokens of what texts are made of."""
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    other = tokenizers.Tokenizer.from_str(json.dumps(content))
    other.encode_special_tokens = True
    symbols = [token["content"] for token in content["added_tokens"] if not token["special"]]
    text = SAMPLE.replace(_SPACE, "").replace("\0", "") + "".join(f"a{symbol}b" for symbol in symbols[:_TRIED])
    return bool(other.encode(text, add_special_tokens=False).ids == model.encode(text))


def _added(config: dict[str, Any], added: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tokens that a folder adds to its model."""
    described = config.get("added_tokens_decoder")
    entries = described if isinstance(described, dict) else {}
    known = {str(entry.get("content")): (i, entry) for i, entry in entries.items() if isinstance(entry, dict)}
    special = [value for key, value in config.items() if key.endswith("_token")]
    named = {str(value.get("content") if isinstance(value, dict) else value) for value in special}
    for text, i in added.items():
        if text not in known and isinstance(i, int):
            known[text] = (str(i), {"special": True})
    for text, (i, entry) in known.items():
        if not i.isdecimal() or not text:
            continue
        flags = {key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
        yield {"id": int(i), "content": text, **flags, "special": bool(entry.get("special", False)) or text in named}


def tokenizer_json(data: bytes, source: str, prefix: bool | None = None, legacy: bool = True) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` of a serialised SentencePiece model.

    Args:
        source: names the model in errors.
        prefix: whether a blank is put before texts; None: as the model says.
        legacy: whether before each stretch of text between special tokens, or before the first alone.

    Raises:
        UserError: it is no such model, or one of words or characters.
    """
    try:
        proto = ModelProto.FromString(data)
    except DecodeError as error:
        raise UserError(f"{source} is not a SentencePiece model: {error}") from None
    kind = proto.trainer_spec.model_type
    if kind not in (TrainerSpec.BPE, TrainerSpec.UNIGRAM) or not proto.pieces:
        raise UserError(f"{source}: a SentencePiece model of words or characters has no tokenizer.json")
    rule = proto.normalizer_spec
    if prefix is None:
        prefix = rule.add_dummy_prefix
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    atoms = (_KIND.CONTROL, _KIND.UNKNOWN, _KIND.USER_DEFINED)
    first = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.piece, **flags, "special": piece.type != _KIND.USER_DEFINED}
            for i, piece in enumerate(proto.pieces)
            if piece.type in atoms
        ],
        "normalizer": _normalizer(proto, prefix and legacy),
        "pre_tokenizer": first if prefix and not legacy else None,
        "post_processor": None,
        "decoder": _decoder(prefix),
        "model": _bpe(proto) if kind == TrainerSpec.BPE else _unigram(proto),
    }


def _normalizer(proto: ModelProto, prefix: bool) -> dict[str, Any]:
    rule = proto.normalizer_spec
    steps: list[dict[str, Any]] = []
    if rule.precompiled_charsmap:
        charsmap = base64.b64encode(rule.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rule.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unknown(proto: ModelProto) -> int | None:
    return next((i for i, piece in enumerate(proto.pieces) if piece.type == _KIND.UNKNOWN), None)


def _bpe(proto: ModelProto) -> dict[str, Any]:
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merged = {piece.piece: piece.score for piece in proto.pieces if piece.type == _KIND.NORMAL}
    pairs = [
        (-score, vocabulary[text], text[:at], text[at:])
        for text, score in merged.items()
        for at in range(1, len(text))
        if text[:at] in merged and text[at:] in merged
    ]
    unknown = _unknown(proto)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else proto.pieces[unknown].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [[left, right] for *_, left, right in sorted(pairs)],
    }


def _unigram(proto: ModelProto) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": _unknown(proto),
        "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }
