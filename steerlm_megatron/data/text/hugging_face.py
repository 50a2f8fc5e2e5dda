"""A ``tokenizer.json`` of Hugging Face's ``tokenizers`` that encodes text as it is.

Owns: what is taken out of such a file, which of its ids no text may become, which of its tokens the library decodes to
something else than the text that gave them. Does not own: naming what cannot be kept even so (``text_losses.py``).
Invariant: with the strings in ``guarded`` kept from it, ``encode`` makes no special token of a text, unless a
normaliser turned other characters into one (those ids are in ``never``, for the caller to look for).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steerlm_megatron.data.text.text_losses import losses_of_file, text_parts
from steerlm_megatron.data.text.token_bytes import text_inside
from steerlm_megatron.data.text.word_cache import WordCache
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.prefix_blanks import ALWAYS, FIRST, UNLESS_BLANK

_SPACE = "\u2581"  # how SentencePiece writes a blank
_BYTE_PIECES = [f"<0x{b:02X}>" for b in range(256)]


class HuggingFaceModel:
    """A ``tokenizer.json``, made to encode text as it is.

    Taken out of it: the post-processor (``<s>`` in front), padding, truncation and dropout, the blank that Metaspace,
    ``Prepend`` or ``add_prefix_space`` put before a text and that the decoder takes away again, and the blanks that an
    added token swallows at its sides (``lstrip``, ``rstrip``). A special token is not found in text. An added token
    that is not special is a word of the vocabulary, and is found.
    """

    kind: str = "huggingface"
    file_name: str | None = "tokenizer.json"

    def __init__(self, data: bytes, source: str = "") -> None:
        self.data = data
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{source} is a Hugging Face tokenizer: pip install tokenizers") from None
        try:
            raw = json.loads(data)
            if not isinstance(raw, dict) or "model" not in raw:
                raise ValueError("it has no 'model'")
            self._raw = _as_it_is(raw)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._raw))
        except Exception as error:  # the library raises bare Exception for what it cannot read
            raise UserError(f"{source or 'tokenizer.json'} is not a Hugging Face tokenizer: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token.content: (i, token.special) for i, token in added.items()}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        self.unk_id = self._unknown(vocabulary)
        self.byte_ids = self._bytes(self._tokenizer.get_vocab(with_added_tokens=False))
        self._byte_of = {i: byte for byte, i in enumerate(self.byte_ids)}
        letters = _byte_letters() if _has_byte_letters(self._raw) else []
        self._letters = {letter: byte for byte, letter in enumerate(letters)}
        self.words: WordCache | None = None
        self.signs = tuple(dict.fromkeys(_signs(self._raw)))
        own = self._own_pieces()
        self.never = frozenset(i for text, (i, special) in self._added.items() if special and text in own) - {
            self.unk_id
        }
        spelt = [text for text, (_, special) in self._added.items() if special and text in own]
        unknown = [text for text, i in own.items() if i == self.unk_id]
        self.guarded = tuple(dict.fromkeys([*spelt, *unknown, *(text for text in _BYTE_PIECES if text in own)]))
        self.surfaces: Mapping[int, str] = dict(self._surfaces())

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceModel, (self.data,)  # the library's own pickle forgets that specials are not found in text

    def encode(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, i: int) -> bytes:
        if i in self.surfaces:
            return self.surfaces[i].encode()
        if i in self._byte_of:
            return bytes([self._byte_of[i]])
        piece = self._tokenizer.id_to_token(i) or ""
        if self._letters and piece not in self._added and all(char in self._letters for char in piece):
            return bytes(self._letters[char] for char in piece)
        return text_inside(self.decode, i)

    def atomic(self, text: str) -> tuple[int, bool] | None:
        found = self._added.get(text)
        if found is None:
            return None
        i, special = found
        return i, not special or i in self.never

    def plain_json(self) -> dict[str, Any]:
        """Return a copy of the file's content without what is taken out of it."""
        copy: dict[str, Any] = json.loads(json.dumps(self._raw))
        return copy

    def losses(self) -> list[str]:
        """What is lost of a text, by the setting of the file that loses it."""
        return losses_of_file(self._raw, self._tokenizer, bool(self.byte_ids))

    # -- what the file means ------------------------------------------------------------------------------------------

    def _unknown(self, vocabulary: dict[str, int]) -> int:
        model = self._raw["model"]
        if isinstance(model.get("unk_id"), int):  # Unigram's form
            return int(model["unk_id"])
        return int(vocabulary.get(model.get("unk_token") or "", -1))

    def _bytes(self, vocabulary: dict[str, int]) -> list[int]:
        """The ids of all bytes: pieces of byte fallback, or the letters by which ``ByteLevel`` writes bytes."""
        names = _BYTE_PIECES if self._raw["model"].get("byte_fallback") else []
        if not names and self._raw["model"].get("type") == "BPE" and _has_byte_letters(self._raw):
            names = _byte_letters()
        found = [vocabulary[name] for name in names if name in vocabulary]
        return found if len(found) == 256 else []

    def _own_pieces(self) -> dict[str, int]:
        """Pieces that the model itself may make of a text that spells them (merges need be there, for BPE)."""
        model = self._raw["model"]
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        if model.get("type") != "BPE" or model.get("ignore_merges"):
            return vocabulary
        pairs = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model.get("merges", [])]
        prefix = model.get("continuing_subword_prefix") or ""
        merged = {left + right.removeprefix(prefix) for left, right in pairs}
        return {text: i for text, i in vocabulary.items() if len(text) == 1 or text in merged}

    def _surfaces(self) -> Iterator[tuple[int, str]]:
        """Added tokens that stand in text and are decoded to something else than what they stand for.

        (``ByteLevel`` takes their letters for bytes, ``Metaspace`` their sign for a blank.)
        """
        for text, (i, special) in self._added.items():
            if special:
                continue
            decoded = self.decode([i])
            if decoded == text or self.encode([decoded], 1)[0] == [i]:
                continue  # with ``normalized``, it may be the sign that stands for a blank
            if self.encode([text], 1)[0] == [i]:
                yield i, text


def prefix_rule(raw: dict[str, Any]) -> str | None:
    """Return when the tokenizer of a file puts a blank before a text, as ``steer/prefix_blanks.py`` names the rule;
    None for one that does not.
    """
    for part in text_parts(raw, "normalizer"):
        if part["type"] == "Prepend" and part.get("prepend") == _SPACE:
            return ALWAYS
    for part in text_parts(raw, "pre_tokenizer"):
        if part["type"] == "Metaspace":
            scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
            return {"always": UNLESS_BLANK, "first": FIRST}.get(scheme)
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            return UNLESS_BLANK
    return None


def _has_byte_letters(raw: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in text_parts(raw))


def _byte_letters() -> list[str]:
    """The letters of ``ByteLevel`` for the bytes 0 to 255: printable Latin-1 stands for itself, the rest moves up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = (chr(0x100 + number) for number in range(256))
    return [chr(byte) if byte in printable else next(moved) for byte in range(256)]


def _signs(raw: dict[str, Any]) -> Iterator[str]:
    """Strings that the decoder makes something else of: where a text has them, they would not come back."""
    for part in text_parts(raw, "decoder"):
        if part["type"] == "Metaspace":
            yield part.get("replacement", "\u2581")
        elif part["type"] == "Replace" and part.get("pattern", {}).get("String"):
            yield part["pattern"]["String"]


def _as_it_is(raw: dict[str, Any]) -> dict[str, Any]:
    """A ``tokenizer.json`` without what adds to a text or takes from it."""
    decoder = _blanks_first(_without(raw.get("decoder"), "Strip"))
    if raw.get("decoder") is None:
        decoder = _matching_decoder(raw)
    return {
        **raw,
        "added_tokens": list(_added_as_they_are(raw)),
        "model": {**raw["model"], "dropout": None} if raw["model"].get("dropout") else raw["model"],
        "post_processor": None,
        "normalizer": _without(raw.get("normalizer"), "Prepend", "Strip"),
        "pre_tokenizer": _no_prefix(raw.get("pre_tokenizer")),
        "decoder": _no_prefix(decoder),
    }


def _added_as_they_are(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The added tokens, without pieces that stand for bytes: as text as well, one id would mean two texts."""
    model, vocabulary = raw["model"], raw["model"].get("vocab") or {}
    own = vocabulary if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    of_bytes = set(_BYTE_PIECES) if model.get("byte_fallback") else set()
    letters = _has_byte_letters(raw)
    for token in raw.get("added_tokens") or []:
        text, special = token["content"], token.get("special")
        if text in own and (text in of_bytes or (letters and not special and not text.isascii())):
            continue
        yield token if special else {**token, "lstrip": False, "rstrip": False}


def _without(part: Any, *types: str) -> Any:
    """A component without its members of the given types; None if nothing is left."""
    if not isinstance(part, dict):
        return part
    if part.get("type") in types:
        return None
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in part:
            part = {**part, key: [kept for kept in (_without(p, *types) for p in part[key]) if kept is not None]}
    return part


def _no_prefix(part: Any) -> Any:
    """A component, and those inside it, with no blank put before a text."""
    if isinstance(part, list):
        return [_no_prefix(p) for p in part]
    if not isinstance(part, dict):
        return part
    part = {key: _no_prefix(value) if isinstance(value, dict | list) else value for key, value in part.items()}
    if part.get("type") == "Metaspace":
        part.pop("add_prefix_space", None)  # the name of older versions
        part["prepend_scheme"] = "never"
    elif "add_prefix_space" in part:
        part["add_prefix_space"] = False
    return part


def _blanks_first(decoder: Any) -> Any:
    """A decoder that turns signs into blanks before bytes into text: a sign spelt in bytes is one of the text's."""
    steps = list(text_parts({"decoder": decoder}, "decoder"))
    first = [step for step in steps if len(next(_signs({"decoder": step}), "")) == 1]
    rest = [step for step in steps if step not in first]
    if not first or rest == steps[len(first) :]:
        return decoder
    return {"type": "Sequence", "decoders": [*first, *rest]}


def _matching_decoder(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The decoder that a file without one needs: the library would put a blank between all pieces."""
    parts = list(text_parts(raw))
    if _has_byte_letters(raw):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    blanks = [part for part in parts if part["type"] == "Metaspace"]
    if (parts and not blanks) or raw["model"].get("type") not in ("BPE", "Unigram"):
        return None  # its pieces may be words, between which the blanks belong
    return {"type": "Sequence", "decoders": [*blanks, {"type": "ByteFallback"}, {"type": "Fuse"}]}
