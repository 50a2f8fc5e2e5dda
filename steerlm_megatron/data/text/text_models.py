"""What turns plain text into ids: SentencePiece, Hugging Face ``tokenizers`` (``hugging_face.py``), or bytes.

Owns: what all of these have in common (``TextModel``), SentencePiece's way of encoding a text as it is (no dummy
prefix, no clean-up) and of telling which of its ids are atomic, opening a path. Does not own: control strings, added
ids, files beside the model (``tokenizer.py``). Invariant: ``encode`` yields no id for which ``atomic`` says "never in
text".
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec

from steerlm_megatron.data.text.hugging_face import HuggingFaceModel
from steerlm_megatron.data.text.sentencepiece_json import MODEL, converted, is_converted, tokenizer_json
from steerlm_megatron.data.text.token_bytes import text_inside
from steerlm_megatron.data.text.word_cache import WordCache, applies
from steerlm_megatron.errors import UserError

MAX_TRAINING_CHARS = 100_000_000  # text beyond this is not read when training: SentencePiece holds its corpus in memory
BYTES = "bytes"  # tokenizer.path=bytes: one id per byte of UTF-8

_SPACE = "\u2581"  # how SentencePiece writes a blank
# Protocol Buffers merge a repeated sub-message into the earlier one, so appending these bytes to a serialised model
# overrides just the two fields.
_NO_CLEANUP = ModelProto(
    normalizer_spec=NormalizerSpec(add_dummy_prefix=False, remove_extra_whitespaces=False)
).SerializeToString()


class TextModel(Protocol):
    """A vocabulary of ids in ``[0, size)`` and the two ways through it."""

    kind: str  # sentencepiece | huggingface | bytes
    file_name: str | None  # what the model's file is called where it is kept; None: it has none
    data: bytes  # the file's content, untouched
    size: int
    unk_id: int  # -1: the model has none
    byte_ids: list[int]  # the ids of the 256 bytes, or nothing if the model has none
    words: WordCache | None  # its memory of words, where it encodes a text word by word
    guarded: tuple[str, ...]  # strings that ``encode`` would take for a token that is no text
    never: frozenset[int]  # the ids of these, which no text may become
    signs: tuple[str, ...]  # what ``decode`` makes something else of, such as the sign for a blank
    surfaces: Mapping[int, str]  # the text of an id, where ``decode`` gives another

    def encode(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """Ids of each text. ``TypeError`` or ``UnicodeEncodeError`` for a text that has no UTF-8."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; pieces that are not text (``<s>``) give nothing."""

    def token_bytes(self, i: int) -> bytes:
        """The bytes that one id stands for inside a text."""

    def atomic(self, text: str) -> tuple[int, bool] | None:
        """(id, whether ``encode`` may yield it) of the piece that stands for exactly ``text`` as a whole: a control or
        user-defined one. None where there is no such piece (an ordinary piece of that spelling does not count).
        """

    def losses(self) -> list[str]:
        """What of a text does not come back, by the setting of the model's file that loses it."""

    def plain_json(self) -> dict[str, Any]:
        """The content of a ``tokenizer.json`` that encodes a text as ``encode`` does."""


class SentencePieceModel:
    """A serialised SentencePiece model. ``source`` names it in errors."""

    kind: str = "sentencepiece"
    file_name: str | None = "tokenizer.model"
    guarded: tuple[str, ...] = ()  # the library tells apart pieces that are text from those that are not
    never: frozenset[int] = frozenset()
    signs: tuple[str, ...] = (_SPACE,)
    surfaces: Mapping[int, str] = {}

    def __init__(self, data: bytes, source: str = "") -> None:
        self.data = data
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(data + _NO_CLEANUP)
            proto = ModelProto.FromString(data)
            pieces = [piece.piece for piece in proto.pieces]
            for i, piece in enumerate(pieces):
                if isinstance(piece, bytes):  # what protobuf gives for a string that is no text
                    raise DecodeError(f"piece {i} of its vocabulary is not UTF-8")
        # SentencePiece raises UnicodeDecodeError where its message would quote a damaged piece.
        except (RuntimeError, OSError, UnicodeDecodeError, DecodeError) as error:
            raise UserError(f"{source or 'tokenizer'} is not a SentencePiece model: {error}") from None
        self.size = len(self.processor)
        self.unk_id = int(self.processor.unk_id())
        ids = [self.processor.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        self.byte_ids = ids if all(self.processor.is_byte(i) for i in ids) else []
        # The processor tells every type apart but NORMAL and USER_DEFINED.
        user_defined = ModelProto.SentencePiece.USER_DEFINED
        self._user_defined = frozenset(i for i, piece in enumerate(proto.pieces) if piece.type == user_defined)
        rule = proto.normalizer_spec
        self._normalizes = (rule.name or "user_defined") if rule.precompiled_charsmap else ""
        identity = not self._normalizes and rule.escape_whitespaces  # no character map; spaces become U+2581
        self.words: WordCache | None = None
        if applies(proto.trainer_spec.model_type, identity, bool(self.byte_ids)):
            assert len(pieces) == self.size
            self.words = WordCache(self.processor, "\0".join(pieces).encode())

    def encode(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=num_threads) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))

    def token_bytes(self, i: int) -> bytes:
        if self.processor.is_byte(i):
            return bytes([int(self.processor.id_to_piece(i)[3:-1], 16)])  # <0xAB>
        return text_inside(self.decode, i)

    def atomic(self, text: str) -> tuple[int, bool] | None:
        i = int(self.processor.piece_to_id(text))
        if i == self.unk_id or self.processor.id_to_piece(i) != text:
            return None
        if self.processor.is_control(i):
            return i, False
        return (i, True) if i in self._user_defined else None

    def plain_json(self) -> dict[str, Any]:
        """Return the content of a ``tokenizer.json`` that encodes texts as this does."""
        return tokenizer_json(self.data + _NO_CLEANUP, "the tokenizer")

    def losses(self) -> list[str]:
        found = [f"normalizer_spec {self._normalizes}: characters become others"] if self._normalizes else []
        return found if self.byte_ids else [*found, "vocabulary: it has no bytes for characters that it lacks"]


class ByteModel:
    """One id per byte of UTF-8: for tests, and for what no vocabulary was made for."""

    kind: str = "bytes"
    file_name: str | None = None
    data, size, unk_id = b"", 256, -1
    guarded: tuple[str, ...] = ()
    never: frozenset[int] = frozenset()
    signs: tuple[str, ...] = ()
    surfaces: Mapping[int, str] = {}

    def __init__(self) -> None:
        self.byte_ids = list(range(256))
        self.words: WordCache | None = None

    def encode(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, i: int) -> bytes:
        return bytes([i])

    def atomic(self, text: str) -> tuple[int, bool] | None:
        return None

    def losses(self) -> list[str]:
        return []

    def plain_json(self) -> dict[str, Any]:
        raise UserError("a tokenizer of bytes has no tokenizer.json; train with a SentencePiece or Hugging Face one")


def open_model(path: str | Path, key: str = "tokenizer.path") -> TextModel:
    """What ``path`` means: ``bytes``, a SentencePiece file, a ``tokenizer.json``, or a folder with one of them. The
    SentencePiece model of a Hugging Face folder is read as the ``tokenizer.json`` that it stands for.
    """
    if str(path) == BYTES:  # a file or folder of that name is ./bytes
        return ByteModel()
    path = Path(path)
    if is_converted(path):
        return HuggingFaceModel(json.dumps(converted(path)).encode(), str(path / MODEL))
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{key}={path}: the folder has neither {' nor '.join(names)}")
        path = found
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{key}={path} cannot be read: {error.strerror}; name a SentencePiece model, a Hugging Face tokenizer "
            f"folder, or {BYTES}"
        ) from None
    return make_model("huggingface" if path.suffix == ".json" else "sentencepiece", data, str(path))


def make_model(kind: str, data: bytes, source: str) -> TextModel:
    """A model of ``kind`` from its file's content."""
    if kind == "bytes":
        return ByteModel()
    if kind == "huggingface":
        return HuggingFaceModel(data, source)
    if kind == "sentencepiece":
        return SentencePieceModel(data, source)
    raise UserError(f"{source}: tokenizer of kind {kind!r}; this version knows sentencepiece, huggingface and bytes")


def train_sentencepiece(texts: Iterable[str], vocab_size: int, control_strings: Sequence[str]) -> bytes:
    """A BPE model with byte fallback; deterministic in (texts, vocab_size, control_strings).

    ``vocab_size`` is a ceiling: a small corpus yields a smaller model. Control strings become CONTROL pieces, which
    SentencePiece never matches in text. At most ``MAX_TRAINING_CHARS`` characters are read. Errors: ``UserError`` for a
    corpus without text, or a ``vocab_size`` too small for bytes and characters.
    """
    model_writer = io.BytesIO()
    failed: list[Exception] = []

    def lines() -> Iterator[str]:
        # An exception that passes through the C++ trainer comes out with a stack trace in its text.
        try:
            yield from _training_lines(texts)
        except Exception as error:
            failed.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model_writer,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            control_symbols=list(dict.fromkeys(t for t in control_strings if t not in ("<s>", "</s>", "<unk>"))),
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 24,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        message = str(error)
        if "sentences_.empty" in message:
            raise UserError("tokenizer.train=true found no text in data.input; give a corpus with messages") from None
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
        if needed:
            raise UserError(
                f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes, the control strings and the corpus's "
                f"characters need {needed[1]}; set tokenizer.vocab_size to more than that"
            ) from None
        raise UserError(f"the tokenizer cannot be trained (tokenizer.vocab_size={vocab_size}): {message}") from None
    if failed:
        raise failed[0]
    return model_writer.getvalue()


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the corpus (a newline is a symbol of its own anyway), up to ``MAX_TRAINING_CHARS``."""
    chars = 0
    for text in texts:
        for line in text.split("\n"):
            if line.strip():
                yield line
                chars += len(line)
        if chars >= MAX_TRAINING_CHARS:
            return
