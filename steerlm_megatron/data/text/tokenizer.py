"""A tokenizer wrapped so that text in equals text out and control tokens come from templates only.

Owns: the ids of control strings, what is added to a model's vocabulary, and the files that describe a tokenizer (the
untouched model, and ``steerlm_tokenizer.json``: what we add to it). Does not own: the models (``text_models.py``),
which strings are control strings (``steer.templates``). Invariants: ``encode`` never yields a control id, whatever the
text looks like; every piece of text is encoded on its own with no dummy prefix and no white-space clean-up, so that
``decode(encode(x)) == x`` wherever the model can represent the characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from steerlm_megatron.data.text.text_models import (
    SentencePieceModel,
    TextModel,
    make_model,
    open_model,
    train_sentencepiece,
)
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_bytes_atomic
from steerlm_megatron.observe.log import warn_once

if TYPE_CHECKING:
    from steerlm_megatron.config.schema import TokenizerConfig
    from steerlm_megatron.steer.templates import Segment

META_FILE = "steerlm_tokenizer.json"
FORMAT = 2

_REPLACEMENT = "\ufffd"


def _saved_in(path: str | Path) -> str | Path:
    """Return the folder that ``Tokenizer.save`` wrote for a checkpoint, or for a run, all of whose checkpoints have the
    same one; ``path`` itself for anything else.
    """
    folder = Path(path)
    if (folder / META_FILE).is_file():
        return path
    found = [*folder.glob(f"checkpoints/*/tokenizer/{META_FILE}"), *folder.glob(f"tokenizer/{META_FILE}")]
    return max(found).parent if found else path


class Tokenizer:
    """A text model plus added ids. Immutable once made.

    Added ids follow the model's own vocabulary: first ``"\\n"`` if the model cannot represent it (ordinary text, never
    a control), then the control strings for which the model has no piece that stands for that very string
    (SentencePiece: CONTROL or USER_DEFINED; Hugging Face: an added token).
    """

    def __init__(
        self,
        model: TextModel | bytes,
        control_strings: Sequence[str] = (),
        added: Mapping[str, int] | None = None,
        source: str = "",
    ) -> None:
        """``model``: a text model, or a serialised SentencePiece one. ``added``: ids fixed earlier, which are kept."""
        if any(not text for text in control_strings):
            raise UserError("a control string of the template is empty; it must be at least one character")
        self._model: TextModel = SentencePieceModel(model, source) if isinstance(model, bytes) else model
        self._base_size = self._model.size
        self._bytes = self._model.byte_ids
        self._added: dict[str, int] = dict(added or {})
        if "\n" not in self._added and not self._survives("a\nb"):
            self._add("\n")
        self._controls: dict[str, int] = {}
        self._matchable: dict[str, int] = {}  # controls that the model itself would find inside text
        for text in dict.fromkeys(control_strings):
            own = None if text in self._added else self._model.atomic(text)
            if own is None:
                self._controls[text] = self._added.get(text) or self._add(text)
                continue
            self._controls[text], in_text = own
            if in_text:
                self._matchable[text] = own[0]
        self._never = self._model.never | frozenset(self._matchable.values())  # what no text may become
        if not self._never.isdisjoint(self._bytes):
            byte = next(byte for byte, i in enumerate(self._bytes) if i in self._never)
            raise UserError(_no_spelling(bytes([byte]).decode("latin-1")))
        self._surface = dict(self._model.surfaces)
        self._surface |= {i: text for text, i in (*self._added.items(), *self._controls.items())}
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
        """The tokenizer that ``cfg`` names (see ``from_path``), or (``train``) a SentencePiece one trained here.

        ``UserError`` if it lacks control strings and ``cfg.extend`` is false.
        """
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
        tokenizer = cls.from_path(cfg.path, control_strings)
        lacking = [text for text in control_strings if text in tokenizer.added]
        if lacking and not cfg.extend:
            raise UserError(
                f"tokenizer.path={cfg.path} has no token for {' '.join(map(repr, lacking))}, which template and labels "
                "need; set tokenizer.extend=true to add them after its vocabulary, or choose another template"
            )
        return tokenizer

    @classmethod
    def from_path(cls, path: str | Path, control_strings: Sequence[str] = ()) -> Tokenizer:
        """A SentencePiece file, a Hugging Face ``tokenizer.json`` or its folder, a folder written by ``save`` or a
        checkpoint or run folder with one in it (control strings that it lacks are added), or ``bytes``.
        """
        path = _saved_in(path)
        if not (Path(path) / META_FILE).is_file():
            opened = cls(open_model(path), control_strings, source=str(path))
            if opened.losses:
                warn_once(
                    __name__, f"tokenizer.path={path} does not keep every text as it is: {'; '.join(opened.losses)}"
                )
            return opened
        saved = cls.load(path)
        missing = [text for text in control_strings if text not in saved._controls]
        if not missing:
            return saved
        return cls(saved._model, (*saved._controls, *missing), saved._added, source=str(path))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        control_strings: Sequence[str] = (),
        out_path: str | Path | None = None,
    ) -> Tokenizer:
        """Train a SentencePiece model (``text_models.train_sentencepiece``), written to ``out_path`` if given."""
        model = train_sentencepiece(texts, vocab_size, control_strings)
        if out_path is not None:
            write_bytes_atomic(out_path, model)
        return cls(model, control_strings)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read what ``save`` wrote. ``UserError`` if a file is missing or the model is not the one that was saved."""
        folder = Path(folder)
        data = b""
        try:
            meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            if not isinstance(meta, dict) or meta.get("format") != FORMAT:
                raise UserError(f"{folder / META_FILE}: format {FORMAT} expected; write it again with this version")
            if meta["file"] is not None:
                data = (folder / meta["file"]).read_bytes()
        except OSError as error:
            raise UserError(f"{folder} holds no tokenizer: {error.strerror}: {error.filename}") from None
        except ValueError as error:
            raise UserError(f"{folder / META_FILE} is not valid JSON: {error}") from None
        if hashlib.sha256(data).hexdigest() != meta["model_sha256"]:
            raise UserError(f"{folder / meta['file']} is not the model that {META_FILE} describes (sha256 differs)")
        model = make_model(meta["kind"], data, str(folder))
        return cls(model, tuple(meta["controls"]), meta["added"], source=str(folder))

    def save(self, folder: str | Path) -> None:
        """Write the model's file and ``steerlm_tokenizer.json`` into ``folder``, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model = self._model
        if model.file_name is not None:
            write_bytes_atomic(folder / model.file_name, model.data)
        sha256 = hashlib.sha256(model.data).hexdigest()
        meta = {"format": FORMAT, "file": model.file_name, "model_sha256": sha256, **self._describe()}
        write_bytes_atomic(folder / META_FILE, (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode())

    # -- facts --------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids, added ones included: every id is in ``[0, vocab_size)``."""
        return self._base_size + len(self._added)

    @property
    def base_size(self) -> int:
        """Number of the model's own ids."""
        return self._base_size

    @property
    def added(self) -> dict[str, int]:
        """What was added after the model's vocabulary: string → id."""
        return dict(self._added)

    @property
    def files(self) -> list[str]:
        """Names of the files that ``save`` writes."""
        return [name for name in (self._model.file_name, META_FILE) if name is not None]

    @property
    def unk_id(self) -> int:
        """The id of what the model cannot represent; -1 if it has none."""
        return self._model.unk_id

    @property
    def controls(self) -> dict[str, int]:
        """Control string → id."""
        return dict(self._controls)

    @property
    def hash(self) -> str:
        """SHA-256 over the model and all that is added to it: equal hashes encode everything alike."""
        digest = hashlib.sha256(self._model.data)
        digest.update(json.dumps(self._describe(), sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def model_kind(self) -> str:
        """``sentencepiece``, ``huggingface`` or ``bytes``."""
        return self._model.kind

    @property
    def model_data(self) -> bytes:
        """The model's file, untouched; nothing for ``bytes``, which has none."""
        return self._model.data

    def plain_json(self) -> dict[str, Any]:
        """Return the content of a ``tokenizer.json`` that encodes a text as it is.

        Raises:
            UserError: a model of bytes, or a SentencePiece model of words or characters, which have none.
        """
        return self._model.plain_json()

    @property
    def model_hash(self) -> str:
        """SHA-256 of the model alone, whatever is added to it."""
        return hashlib.sha256(self._model.data).hexdigest()

    @cached_property
    def losses(self) -> tuple[str, ...]:
        """What does not come back of a text that is encoded and decoded, by the setting of the model that loses it."""
        model = self._model
        back = {sign: self.decode(self.encode(sign)) for sign in model.signs}
        signs = [f"decoder: {sign!r} comes back as {text!r}" for sign, text in back.items() if text != sign]
        unwritten = [text for text in model.guarded if self.unk_id in self._literals[text]]
        tokens = [f"vocabulary: {text!r} is a token of its own, and cannot be spelt" for text in unwritten]
        return (*model.losses(), *signs, *tokens)

    def control_id(self, text: str) -> int:
        """The id of a control string. ``KeyError`` (our bug) if the template never announced it."""
        return self._controls[text]

    def _describe(self) -> dict[str, Any]:
        model = self._model
        return {"kind": model.kind, "controls": self._controls, "added": self._added, "base_size": self._base_size}

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
        if self._never:
            # A model whose normalisation makes a control string out of other characters (full-width letters, say).
            out = [
                ids if self._never.isdisjoint(ids) else self._encode_by_character(text)
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
        """``encode_segments_batch`` with arrays for lists of ids."""
        texts = list(dict.fromkeys([s.text for segments in documents for s in segments if not s.control]))
        ids, counts = self.encode_flat(texts)
        part_of = dict(zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True)) if texts else {}
        control = {text: np.array([i], np.int32) for text, i in self._controls.items()}
        out = []
        for segments in documents:
            parts = [control[segment.text] if segment.control else part_of[segment.text] for segment in segments]
            out.append((np.concatenate([_NO_IDS, *parts]), list(map(len, parts))))
        return out

    def encode_flat(self, texts: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """``encode_batch`` as one array of ids, end to end, and how many each text has: what a corpus takes."""
        words = self._model.words
        if words is None or self._never:
            return _flat(self.encode_batch(texts))
        together = "".join(texts)
        literals = [literal for literal in self._literals if literal in together]
        odd = [i for i, text in enumerate(texts) if any(literal in text for literal in literals)] if literals else []
        try:
            ids, counts = words.encode(_with(texts, dict.fromkeys(odd, "")))
        except (TypeError, UnicodeEncodeError):
            self._encode_plain(texts, num_threads=1)  # which says what is wrong
            raise
        if odd:
            parts = np.split(ids, np.cumsum(counts)[:-1])
            for i in odd:
                parts[i] = np.array(self.encode(texts[i]), np.int32)
            ids, counts = np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts))
        return ids, counts

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
                out.append(self._model.decode(run))
                run = []
            out.append(surface)
        if run:
            out.append(self._model.decode(run))
        return "".join(out)

    def token_bytes(self, i: int) -> bytes:
        """The bytes that one id stands for inside a text: of part of a character, that part. Joined, those of a text's
        ids are its UTF-8."""
        surface = self._surface.get(i) if 0 <= i < self.vocab_size else _REPLACEMENT
        return self._model.token_bytes(i) if surface is None else surface.encode()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _encode_plain(self, texts: list[str], num_threads: int) -> list[list[int]]:
        try:
            return self._model.encode(texts, num_threads)
        except (TypeError, UnicodeEncodeError):  # what the libraries make of a text that has no UTF-8
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    where = f"{error.reason} at character {error.start}"
                    raise UserError(f"text {text[:40]!r} is not valid Unicode ({where}); clean it first") from None
            raise

    def _encode_by_character(self, text: str) -> list[int]:
        ids: list[int] = []
        for char in text:
            literal = self._literals.get(char)
            ids.extend(literal if literal is not None else self._encode_character(char))
        return ids

    def _encode_character(self, char: str) -> list[int]:
        ids = self._model.encode([char], 1)[0]
        if self._never.isdisjoint(ids):
            return ids
        return self._encode_bytes(char)  # the control string is this single character

    def _encode_bytes(self, text: str) -> list[int]:
        ids = [self._bytes[b] for b in text.encode()] if self._bytes else [self.unk_id]
        if ids == [-1] or not self._never.isdisjoint(ids):
            raise UserError(_no_spelling(text))
        return ids

    def _survives(self, text: str) -> bool:
        return self._model.decode(self._model.encode([text], 1)[0]) == text

    def _add(self, text: str) -> int:
        self._added[text] = self.vocab_size
        return self._added[text]

    def _make_literals(self) -> dict[str, list[int]]:
        """Substrings that must not reach the model as they are, and the ids they get instead."""
        literals: dict[str, list[int]] = {}
        for sign in self._model.signs:
            if self._bytes and not self._survives(sign):
                literals[sign] = self._encode_bytes(sign)
        if "\n" in self._added:
            literals["\n"] = [self._added["\n"]]
        for text in (*self._matchable, *self._model.guarded):
            literals[text] = [i for char in text for i in (literals.get(char) or self._encode_character(char))]
        return literals


_NO_IDS = np.zeros(0, np.int32)


def _no_spelling(text: str) -> str:
    return (
        f"the tokenizer cannot write the text {text!r} other than with a control token (in tokenizer.json: "
        "added_tokens, special); choose a tokenizer in which no special token is a character of text"
    )


def _flat(ids: list[list[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    counts = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(counts.sum())), counts


def _with(texts: list[str], others: Mapping[int, str]) -> list[str]:
    """``texts``, with others at some places."""
    return [others.get(i, text) for i, text in enumerate(texts)] if others else texts
