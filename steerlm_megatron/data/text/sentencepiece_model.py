"""The content of a ``tokenizer.json`` as a SentencePiece model, for programs that read no other form.

Owns: the translation, the other way round from ``sentencepiece_json.py``. Does not own: what is in the file
(``hugging_face.py``). Invariant: a model that is returned gives texts the tokens of the file, on a sample of what texts
are made of and of the vocabulary's own pieces.

llama.cpp's converter takes the scores of a Llama's pieces from ``tokenizer.model``. Without that file it
gives all pieces one score, and texts other tokens than the model was trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from steerlm_megatron.data.text.text_losses import SAMPLE

_SPACE = "\u2581"  # how SentencePiece writes a blank
_KIND = ModelProto.SentencePiece
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_TRIED = 500  # pieces of the vocabulary that are tried


def sentencepiece_model(content: Mapping[str, Any]) -> bytes | None:
    """Return the serialised SentencePiece model of the ``tokenizer.json`` ``content``; None for one that no such model
    is like: of bytes, of words, or one that cuts or changes texts first.
    """
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or _SPACE not in model["vocab"]:
        return None
    pieces = sorted(model["vocab"].items(), key=lambda pair: int(pair[1]))
    if [number for _, number in pieces] != list(range(len(pieces))) or model.get("unk_token") not in model["vocab"]:
        return None
    data = _proto([text for text, _ in pieces], model, content["added_tokens"]).SerializeToString()
    return data if _is_faithful(data, content, [text for text, _ in pieces]) else None


def _proto(pieces: Iterable[str], model: Mapping[str, Any], added: Iterable[Mapping[str, Any]]) -> ModelProto:
    """Return the model of ``pieces`` in the order of their ids. The sooner a pair is merged, the higher is its piece's
    score; pieces that no pair makes come last. (That no other pair makes them either is tried by ``_is_faithful``.)
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    special = {token["content"]: bool(token["special"]) for token in added}
    proto = ModelProto()
    for number, text in enumerate(pieces):
        kind = _KIND.NORMAL
        if text == model["unk_token"]:
            kind, proto.trainer_spec.unk_id, proto.trainer_spec.unk_piece = _KIND.UNKNOWN, number, text
        elif text in special:
            kind = _KIND.CONTROL if special[text] else _KIND.USER_DEFINED
        elif _BYTE.fullmatch(text):
            kind = _KIND.BYTE
        proto.pieces.add(piece=text, score=-float(ranks.get(text, len(ranks))), type=kind)
    proto.trainer_spec.model_type = TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    for name in ("bos_id", "eos_id", "pad_id"):
        setattr(proto.trainer_spec, name, -1)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    return proto


def _is_faithful(data: bytes, content: Mapping[str, Any], pieces: list[str]) -> bool:
    """Return whether a SentencePiece model gives texts the tokens of the file."""
    try:
        ours = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:  # two pieces are alike, say
        return False
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    tried = "".join(pieces[:: max(1, len(pieces) // _TRIED)])
    return all(
        theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
        for text in (SAMPLE.replace(_SPACE, "").replace("\0", ""), tried.replace(_SPACE, " "))
    )
