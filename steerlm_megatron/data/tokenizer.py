"""The SentencePiece tokenizer, wrapped so that text in equals text out and control tokens come from templates only.

Owns: text ↔ ids, the ids of control strings, training a model, and the two files that describe a tokenizer
(``tokenizer.model``: the untouched SentencePiece model; ``tokenizer.json``: what we add to it). Does not own: which
strings are control strings (``steer.templates``). Invariants: ``encode`` never yields a control id, whatever the text
looks like; every piece of text is encoded on its own with no dummy prefix and no white-space clean-up, so that
``decode(encode(x)) == x`` wherever the model can represent the characters.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from steerlm_megatron.data.word_cache import WordCache, applies
from steerlm_megatron.errors import UserError

if TYPE_CHECKING:
    from steerlm_megatron.config.schema import TokenizerConfig
    from steerlm_megatron.steer.templates import Segment

MODEL_FILE = "tokenizer.model"
META_FILE = "tokenizer.json"
FORMAT = 1
MAX_TRAINING_CHARS = 100_000_000  # text beyond this is not read when training: SentencePiece holds its corpus in memory

_SPACE = "\u2581"  # SentencePiece's own sign for a blank; in text it would decode to a blank
_REPLACEMENT = "\ufffd"
_TYPE_USER_DEFINED = 4  # ModelProto.SentencePiece.Type
# A serialised `normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}`. Protocol Buffers merge a
# repeated sub-message into the earlier one, so appending these bytes to a model overrides just the two fields.
_NO_CLEANUP = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class Tokenizer:
    """A SentencePiece model plus added ids. Immutable once made.

    Added ids follow the model's own vocabulary: first ``"\\n"`` if the model cannot represent it (ordinary text,
    never a control), then the control strings for which the model has no CONTROL or USER_DEFINED piece of that very
    string.
    """

    def __init__(
        self,
        model: bytes,
        control_strings: Sequence[str] = (),
        added: Mapping[str, int] | None = None,
        source: str = "",
    ) -> None:
        """``model``: a serialised SentencePiece model. ``added``: ids fixed earlier (``tokenizer.json``), kept."""
        if any(not text for text in control_strings):
            raise UserError("a control string of the template is empty; it must be at least one character")
        self._model = model
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model + _NO_CLEANUP)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{source or 'tokenizer'} is not a SentencePiece model: {error}") from None
        self._base_size = len(self._sp)
        self._bytes = self._byte_ids()
        self._words = self._word_cache()
        self._added: dict[str, int] = dict(added or {})
        if "\n" not in self._added and self._sp.decode(self._sp.encode("a\nb")) != "a\nb":
            self._add("\n")
        self._controls: dict[str, int] = {}
        for text in dict.fromkeys(control_strings):
            self._controls[text] = self._control_piece(text)
        # Controls that the model itself would find inside text. CONTROL pieces and added ids never come out of
        # sp.encode.
        self._matchable = {
            text: i for text, i in self._controls.items() if i < self._base_size and not self._sp.is_control(i)
        }
        self._matchable_ids = frozenset(self._matchable.values())
        self._surface = {i: text for text, i in (*self._added.items(), *self._controls.items())}
        self._literals = self._make_literals()
        self._special = (
            re.compile("(" + "|".join(re.escape(t) for t in sorted(self._literals, key=len, reverse=True)) + ")")
            if self._literals
            else None
        )

    # -- construction -------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls, cfg: TokenizerConfig, control_strings: Sequence[str], training_texts: Iterable[str] | None = None
    ) -> Tokenizer:
        """The tokenizer that ``cfg`` names: a ``.model`` file, a folder with one, or (``train``) one trained here."""
        if cfg.train:
            if cfg.path:
                raise UserError(
                    f"tokenizer.path={cfg.path} and tokenizer.train=true exclude each other; drop one of them"
                )
            if training_texts is None:
                raise UserError("tokenizer.train=true needs a corpus to train on; run it with `steerlm preprocess`")
            return cls.train(training_texts, cfg.vocab_size, control_strings)
        if not cfg.path:
            raise UserError("tokenizer.path=null: name a SentencePiece model, or set tokenizer.train=true")
        return cls.from_path(cfg.path, control_strings)

    @classmethod
    def from_path(cls, path: str | Path, control_strings: Sequence[str] = ()) -> Tokenizer:
        """Open a SentencePiece model file, or a folder written by ``save`` (control strings it lacks are added)."""
        path = Path(path)
        if path.is_dir():
            saved = cls.load(path)
            missing = [text for text in control_strings if text not in saved._controls]
            if not missing:
                return saved
            return cls(saved._model, (*saved._controls, *missing), saved._added, source=str(path))
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer.path={path} cannot be read: {error.strerror}; name a SentencePiece model"
            ) from None
        return cls(model, control_strings, source=str(path))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        control_strings: Sequence[str] = (),
        out_path: str | Path | None = None,
    ) -> Tokenizer:
        """Train a BPE model with byte fallback; deterministic in (texts, vocab_size, control_strings).

        ``vocab_size`` is a ceiling: a small corpus yields a smaller model. Control strings become CONTROL pieces, which
        SentencePiece never matches in text. At most ``MAX_TRAINING_CHARS`` characters are read.
        Errors: ``UserError`` for a corpus without text, or a ``vocab_size`` too small for bytes and characters.
        """
        model_writer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_training_lines(texts),
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
            message = str(error)
            if "sentences_.empty" in message:
                raise UserError(
                    "tokenizer.train=true found no text in data.input; give a corpus with messages"
                ) from None
            needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
            if needed:
                raise UserError(
                    f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes, the control strings and the corpus's "
                    f"characters need {needed[1]}; set tokenizer.vocab_size to more than that"
                ) from None
            raise UserError(f"the tokenizer cannot be trained (tokenizer.vocab_size={vocab_size}): {message}") from None
        model = model_writer.getvalue()
        if out_path is not None:
            _write_atomically(Path(out_path), model)
        return cls(model, control_strings)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read what ``save`` wrote. ``UserError`` if a file is missing or the model is not the one that was saved."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            model = (folder / MODEL_FILE).read_bytes()
        except OSError as error:
            raise UserError(f"{folder} holds no tokenizer: {error.strerror}: {error.filename}") from None
        except ValueError as error:
            raise UserError(f"{folder / META_FILE} is not valid JSON: {error}") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UserError(f"{folder / META_FILE}: format {FORMAT} expected; write it again with this version")
        if hashlib.sha256(model).hexdigest() != meta["model_sha256"]:
            raise UserError(f"{folder / MODEL_FILE} is not the model that {META_FILE} describes (sha256 differs)")
        return cls(model, tuple(meta["controls"]), meta["added"], source=str(folder))

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.model`` and ``tokenizer.json`` into ``folder``, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / MODEL_FILE, self._model)
        meta = {"format": FORMAT, "model_sha256": hashlib.sha256(self._model).hexdigest(), **self._describe()}
        _write_atomically(folder / META_FILE, (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode())

    # -- facts --------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids, added ones included: every id is in ``[0, vocab_size)``."""
        return self._base_size + len(self._added)

    @property
    def unk_id(self) -> int:
        return int(self._sp.unk_id())

    @property
    def controls(self) -> dict[str, int]:
        """Control string → id."""
        return dict(self._controls)

    @property
    def hash(self) -> str:
        """SHA-256 over the model and all that is added to it: equal hashes encode everything alike."""
        digest = hashlib.sha256(self._model)
        digest.update(json.dumps(self._describe(), sort_keys=True).encode())
        return digest.hexdigest()

    def control_id(self, text: str) -> int:
        """The id of a control string. ``KeyError`` (our bug) if the template never announced it."""
        return self._controls[text]

    def _describe(self) -> dict[str, Any]:
        return {"controls": self._controls, "added": self._added, "base_size": self._base_size}

    # -- text to ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; never a control id. ``UserError`` for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """``[encode(text) for text in texts]``, in one call of the C++ encoder."""
        special = self._special
        if special is None:
            return self._encode_plain(texts, num_threads)
        pieces: list[str] = []  # what the model encodes
        plan: list[list[str] | None] = []  # per text: None, or its parts: plain text and literals in turn
        for text in texts:
            parts = special.split(text)
            if len(parts) == 1:
                plan.append(None)
                pieces.append(text)
            else:
                plan.append(parts)
                pieces.extend(parts[::2])
        encoded = iter(self._encode_plain(pieces, num_threads))
        out = []
        for parts_or_none in plan:
            ids = next(encoded)
            if parts_or_none is not None:
                for literal in parts_or_none[1::2]:
                    ids = ids + self._literals[literal] + next(encoded)
            out.append(ids)
        if self._matchable_ids:
            # A model whose normalisation makes a control string out of other characters (full-width letters, say).
            out = [
                ids if self._matchable_ids.isdisjoint(ids) else self._encode_by_character(text)
                for text, ids in zip(texts, out, strict=True)
            ]
        return out

    def encode_segments(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """Ids of the segments joined, and the number of ids of each segment. A control segment is exactly one id."""
        return self.encode_segments_batch([segments])[0]

    def encode_segments_batch(
        self, documents: Sequence[Sequence[Segment]], num_threads: int = 1
    ) -> list[tuple[list[int], list[int]]]:
        """``encode_segments`` of each document; every distinct text of the batch is encoded once."""
        texts = list(dict.fromkeys(s.text for segments in documents for s in segments if not s.control))
        ids_of = dict(zip(texts, self.encode_batch(texts, num_threads), strict=True))
        out = []
        for segments in documents:
            ids: list[int] = []
            lengths = []
            for segment in segments:
                part = [self._controls[segment.text]] if segment.control else ids_of[segment.text]
                ids.extend(part)
                lengths.append(len(part))
            out.append((ids, lengths))
        return out

    def encode_documents(self, documents: Sequence[Sequence[Segment]]) -> list[tuple[npt.NDArray[np.int32], list[int]]]:
        """``encode_segments_batch`` with arrays for lists of ids: what a corpus takes."""
        texts = list(dict.fromkeys([s.text for segments in documents for s in segments if not s.control]))
        ids_of = dict(zip(texts, self._encode_to_bytes(texts), strict=True))
        control = {text: array("i", [i]).tobytes() for text, i in self._controls.items()}
        out = []
        for segments in documents:
            parts = [control[text] if is_control else ids_of[text] for text, is_control, _, _, _ in segments]
            out.append((np.frombuffer(b"".join(parts), np.int32), [len(part) >> 2 for part in parts]))
        return out

    def _encode_to_bytes(self, texts: list[str]) -> list[bytes]:
        """``encode_batch`` as int32 numbers."""
        if self._words is None or self._matchable_ids:
            return [array("i", ids).tobytes() for ids in self.encode_batch(texts)]
        literals = tuple(self._literals)
        plain = [text for text in texts if not any(literal in text for literal in literals)]
        try:
            ids_of = dict(zip(plain, self._words.encode(plain), strict=True))
        except (TypeError, UnicodeEncodeError):
            self._encode_plain(plain, num_threads=1)  # which says what is wrong
            raise
        return [ids_of[text] if text in ids_of else array("i", self.encode(text)).tobytes() for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``. Control ids give their strings, bytes that are not UTF-8 (and ids we lack) give U+FFFD."""
        out: list[str] = []
        run: list[int] = []
        for i in ids:
            i = int(i)
            surface = self._surface.get(i) if 0 <= i < self.vocab_size else _REPLACEMENT
            if surface is None:
                run.append(i)
                continue
            if run:
                out.append(self._sp.decode(run))
                run = []
            out.append(surface)
        if run:
            out.append(self._sp.decode(run))
        return "".join(out)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _encode_plain(self, texts: list[str], num_threads: int) -> list[list[int]]:
        try:
            if self._words is not None and num_threads == 1:
                return [array("i", ids).tolist() for ids in self._words.encode(texts)]
            return self._sp.encode(texts, num_threads=num_threads) if texts else []
        except (TypeError, UnicodeEncodeError):  # what sentencepiece makes of a text that has no UTF-8
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    where = f"{error.reason} at character {error.start}"
                    raise UserError(f"text {text[:40]!r} is not valid Unicode ({where}); clean it first") from None
            raise

    def _word_cache(self) -> WordCache | None:
        """A memory of words where the model is one that encodes a text word by word."""
        pieces = [self._sp.id_to_piece(i) for i in range(self._base_size)]
        spec: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}}  # the trainer's and the normaliser's
        end = 0  # of the pieces, which come first: tens of thousands, skipped without taking them apart
        while self._model[end : end + 1] == b"\n" and self._model[end + 1] < 0x80:
            end += 2 + self._model[end + 1]
        for number, value in _fields(self._model[end:]):
            if number in spec and isinstance(value, bytes):
                spec[number] |= dict(_fields(value))
        model_type = spec[2].get(3, 1)
        assert isinstance(model_type, int)
        identity = not spec[3].get(2) and spec[3].get(5, 1) == 1  # no character map; spaces become U+2581
        return WordCache(self._sp) if applies(model_type, identity, pieces, bool(self._bytes)) else None

    def _encode_by_character(self, text: str) -> list[int]:
        ids: list[int] = []
        for char in text:
            literal = self._literals.get(char)
            ids.extend(literal if literal is not None else self._encode_character(char))
        return ids

    def _encode_character(self, char: str) -> list[int]:
        ids = list(self._sp.encode(char))
        if self._matchable_ids.isdisjoint(ids):
            return ids
        return self._encode_bytes(char)  # the control string is this single character

    def _encode_bytes(self, text: str) -> list[int]:
        return [self._bytes[b] for b in text.encode()] if self._bytes else [self.unk_id]

    def _byte_ids(self) -> list[int]:
        ids = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        return ids if all(self._sp.is_byte(i) for i in ids) else []

    def _add(self, text: str) -> int:
        self._added[text] = self.vocab_size
        return self._added[text]

    def _control_piece(self, text: str) -> int:
        if text in self._added:
            return self._added[text]
        i = int(self._sp.piece_to_id(text))
        if i != self.unk_id and self._sp.id_to_piece(i) == text:
            if self._sp.is_control(i) or _piece_type(self._model, i) == _TYPE_USER_DEFINED:
                return i
        return self._add(text)

    def _make_literals(self) -> dict[str, list[int]]:
        """Substrings that must not reach ``sp.encode`` as they are, and the ids they get instead."""
        literals: dict[str, list[int]] = {}
        if self._bytes:
            literals[_SPACE] = self._encode_bytes(_SPACE)
        if "\n" in self._added:
            literals["\n"] = [self._added["\n"]]
        for text in self._matchable:
            literals[text] = [i for char in text for i in (literals.get(char) or self._encode_character(char))]
        return literals


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


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _piece_type(model: bytes, index: int) -> int:
    """Type of piece ``index`` in a serialised ModelProto (field 1 repeated: {1: piece, 2: score, 3: type = NORMAL}).

    The Python API tells every type apart but NORMAL and USER_DEFINED; reading the file needs no protobuf package.
    """
    seen = 0
    for field, value in _fields(model):
        if field == 1 and isinstance(value, bytes):
            if seen == index:
                return next((v for f, v in _fields(value) if f == 3 and isinstance(v, int)), 1)
            seen += 1
    return 1


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a Protocol Buffers message; fixed-width values come as bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at

    at = 0
    while at < len(data):
        key, at = varint(at)
        wire = key & 7
        if wire == 0:
            value, at = varint(at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = varint(at)
        else:
            size = {1: 8, 5: 4}[wire]
        yield key >> 3, data[at : at + size]
        at += size
