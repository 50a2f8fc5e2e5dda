"""Ids of words met before, so that most text need not go through SentencePiece.

BPE merges two neighbours only if the result is a piece. Where no piece of a model holds a space after another
character, nor a newline beside one, no merge ever crosses a place before a run of spaces or around a newline: the ids
of a text are the ids of its words end to end, exactly. Words repeat, and looking one up is several times faster than
encoding it.

Owns: for which models that holds, the memory of words. Does not own: the model (``tokenizer.py``). Invariants:
``encode`` gives what the model gives; memory is bounded.
"""

from __future__ import annotations

import re
from array import array
from typing import Any

_BPE = 2  # TrainerSpec.ModelType
_CROSSING = re.compile("[^\u2581]\u2581|\n.|.\n", re.DOTALL)
_WORDS = re.compile(r"\n| *+[^ \n]+| +")
_MOST_WORDS = 1 << 18  # of a generation; two are kept
_SHORT_CHARS = 200
_FEWEST_WORDS_PER_CHAR = 1 / 16  # longer text of longer words is hardly repeated (Chinese, base64): not looked up


def applies(model_type: int, identity: bool, pieces: list[str], has_bytes: bool) -> bool:
    """Whether the ids of a text are those of its words for this model.

    Args:
        model_type: of the trainer's specification (1 unigram, 2 BPE …).
        identity: whether text is taken as it is; a normaliser may join what stands on both sides of a word's start.
        pieces: the vocabulary.
        has_bytes: byte fallback, without which unknown neighbours become one unknown.
    """
    return model_type == _BPE and identity and has_bytes and not any(map(_CROSSING.search, pieces))


class WordCache:
    """Word → ids, filled as words are met. The words of the last generation are kept beside those of the present.

    Ids are held and given as the bytes of int32 numbers: joining those makes no object per id.
    """

    def __init__(self, processor: Any) -> None:
        """``processor``: a SentencePieceProcessor for which ``applies`` holds, without dummy prefix and clean-up."""
        self._processor = processor
        self._known: dict[str, bytes] = {}
        self._before: dict[str, bytes] = {}

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, int32. No text may hold U+2581, which is SentencePiece's own sign for a space."""
        split, find, join = _WORDS.findall, self._known.__getitem__, b"".join
        out = []
        later: list[tuple[int, list[str]]] = []  # texts with a word that is not known yet
        apart = []
        for i, text in enumerate(texts):
            words = split(text)
            ids = b""
            if len(text) > _SHORT_CHARS and len(words) < len(text) * _FEWEST_WORDS_PER_CHAR:
                apart.append(i)
            else:
                try:
                    ids = join(map(find, words))
                except KeyError:
                    later.append((i, words))
            out.append(ids)
        find = self._all(set().union(*(words for _, words in later))).__getitem__
        for i, words in later:
            out[i] = join(map(find, words))
        for i, ids in zip(apart, self._encode([texts[i] for i in apart]), strict=True):
            out[i] = ids
        return out

    def _all(self, words: set[str]) -> dict[str, bytes]:
        """The known words, which have all of ``words`` then; those that it lacked are encoded in one call."""
        if len(self._known) >= _MOST_WORDS:
            self._before = self._known
            self._known = {word: self._before[word] for word in words if word in self._before}
        known, before = self._known, self._before
        missing = words.difference(known)  # which looks up each of words, unlike words - known.keys()
        if before:
            known.update((word, before[word]) for word in missing if word in before)
            missing = missing.difference(known)
        fresh = list(missing)
        known.update(zip(fresh, self._encode(fresh), strict=True))
        return known

    def _encode(self, texts: list[str]) -> list[bytes]:
        if not texts:
            return []
        return [array("i", ids).tobytes() for ids in self._processor.encode(texts, num_threads=1)]

    def __getstate__(self) -> dict[str, Any]:
        return {"_processor": self._processor, "_known": {}, "_before": {}}
