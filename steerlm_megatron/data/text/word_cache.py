"""Ids of words met before, so that most text need not go through SentencePiece.

BPE merges two neighbours only if the result is a piece of the vocabulary, and that piece holds the two characters which
met, side by side. So no merge ever crosses a place between two characters that stand side by side in no piece: the ids
of a text are the ids of what stands between such places, its *words*, end to end, exactly. (For Llama's and Mistral's
models these are a word with the space before it, a run of punctuation, a digit.) Words repeat, and looking one up is
many times faster than encoding it.

All is done for many texts at once, in numpy: places by a table of pairs of bytes, words of up to ``_SHORT`` bytes as
two 64-bit numbers in a hash table that holds them whole (there are no false matches), longer ones in a dictionary.

Owns: for which models that holds, where words begin, the memory of words. Does not own: the model (``text_models.py``).
Invariants: ``encode`` gives what the model gives; memory is bounded.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BPE = 2  # TrainerSpec.ModelType
_SPACE = "\u2581"  # how a model writes a space
_SHORT = 15  # bytes of a word that fit into 128 bits beside its length
_MOST_BYTES_PER_WORD = 32
_SLICE = 1 << 17  # words looked up at a time
_MOST_WORDS = 1 << 19  # remembered; then all are forgotten
_MOST_IDS = 1 << 22  # of all words remembered, likewise
_SLOT_BITS = 20  # of the hash table: twice the words
_MIX = [np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]  # odd, as random as any
_FOLD, _TOP = np.uint64(29), np.uint64(64 - _SLOT_BITS)
# By a word's length: what of the 8 bytes at its start, and of the 8 after those, is the word's.
_FIRST = np.array([256 ** min(n, 8) - 1 for n in range(_SHORT + 1)], np.uint64)
_SECOND = np.array([256 ** max(n - 8, 0) - 1 for n in range(_SHORT + 1)], np.uint64)
_LENGTH = np.array([n << 56 for n in range(_SHORT + 1)], np.uint64)


def applies(model_type: int, identity: bool, has_bytes: bool) -> bool:
    """Whether the ids of a text are those of its words for this model.

    Args:
        model_type: of the trainer's specification (1 unigram, 2 BPE …). Unigram weighs a text as a whole.
        identity: whether text is taken as it is; a normaliser may join what stands on both sides of a word's start.
        has_bytes: byte fallback, without which unknown neighbours become one unknown.
    """
    return model_type == _BPE and identity and has_bytes


def places(pieces: bytes) -> Array:
    """bool [65536]: whether a word may begin between byte ``i & 255`` and byte ``i >> 8`` of UTF-8.

    ``pieces``: all of the vocabulary, with any byte that is in none of them in between.
    """
    raw = np.frombuffer(pieces.replace(_SPACE.encode(), b" "), np.uint8)
    free = np.ones(1 << 16, np.bool_)
    free[_pairs(raw)] = False
    free.reshape(256, 256)[0x80:0xC0] = False  # inside a character
    return free


def _pairs(data_N: Array) -> Array:
    """uint16 [N - 1]: each byte with its successor."""
    pairs = data_N[1:].astype(np.uint16)
    pairs <<= 8
    pairs |= data_N[:-1]
    return pairs


def ragged(starts_N: Array, counts_N: Array) -> Array:
    """int64 [sum of counts]: ``starts[0], starts[0] + 1, …`` (``counts[0]`` of them), then those of ``starts[1]`` …"""
    ends = np.cumsum(counts_N, dtype=np.int64)
    out = np.arange(int(ends[-1]) if len(ends) else 0)
    out += np.repeat(starts_N - ends + counts_N, counts_N)
    return out


def _eights(buffer: bytes, starts_N: Array) -> tuple[Array, Array]:
    """The 8 bytes from each start on and the 8 after those, as numbers. ``buffer`` has 16 more bytes than text."""
    eights = np.ndarray((len(buffer) - 8,), "<u8", buffer, strides=(1,))  # from every byte on
    begin, end = int(starts_N[0]), int(starts_N[-1]) + 9
    if end - begin > _MOST_BYTES_PER_WORD * len(starts_N):
        return eights[starts_N], eights[starts_N + 8]
    copy, starts_N = np.ascontiguousarray(eights[begin:end]), starts_N - begin  # gathering is faster from aligned ones
    return copy.take(starts_N), copy.take(starts_N + 8)


class WordCache:
    """Word → ids, filled as words are met. Threads take turns."""

    def __init__(self, processor: Any, pieces: bytes) -> None:
        """``processor``: a SentencePieceProcessor for which ``applies`` holds, without dummy prefix and clean-up.
        ``pieces``: as in ``places``.
        """
        self._processor = processor
        self._places = places(pieces)
        self._lock = threading.Lock()
        self._table: _Table | None = None

    def encode(self, texts: list[str]) -> tuple[Array, Array]:
        """Ids of all texts end to end (int32), and how many each has (int64 [texts]).

        No text may hold U+2581, which is SentencePiece's own sign for a space. A lone surrogate is a
        ``UnicodeEncodeError``.
        """
        encoded = [text.encode() for text in texts]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), dtype=np.int64)
        size = int(ends[-1]) if len(ends) else 0
        buffer = b"".join([*encoded, bytes(16)])
        offsets = np.concatenate((_ZERO, ends))
        begins = np.empty(size, np.bool_)
        begins[1:] = self._places.take(_pairs(np.frombuffer(buffer, np.uint8, size))) if size else False
        begins[offsets[offsets < size]] = True
        starts = np.flatnonzero(begins)
        sizes = np.diff(starts, append=size)
        parts, counts = [], [_ZERO]
        with self._lock:
            for at in range(0, len(starts), _SLICE):
                ids, count = self._slice(buffer, starts[at : at + _SLICE], sizes[at : at + _SLICE])
                parts.append(ids)
                counts.append(count)
        before = np.cumsum(np.concatenate(counts), dtype=np.int64)  # ids before each word, and of all
        return np.concatenate([_NO_IDS, *parts]), np.diff(before[np.searchsorted(starts, offsets)])

    def _slice(self, buffer: bytes, starts: Array, sizes: Array) -> tuple[Array, Array]:
        """Ids of some words, and how many each has."""
        if self._table is None or not self._table.has_room():
            self._table = None  # first, for two of them need not be in memory
            self._table = _Table()
        table = self._table
        try:
            entries, fresh = table.find(buffer, starts, sizes)
            words = [buffer[start : start + size].decode() for start, size in fresh]
            table.fill(self._processor.encode(words, num_threads=1) if words else [])
        except BaseException:
            self._table = None  # it has words without ids
            raise
        counts = table.counts.take(entries)
        return table.ids.take(ragged(table.starts.take(entries), counts)), counts

    def __getstate__(self) -> dict[str, Any]:
        return {"_processor": self._processor, "_places": self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._table = threading.Lock(), None


class _Table:
    """Numbers for words, from 1 on, and their ids.

    ``find`` numbers words; those that are new get their ids by ``fill``, in the order of their numbers.
    """

    def __init__(self) -> None:
        most = _MOST_WORDS + 1
        self._slots = np.zeros(1 << _SLOT_BITS, np.int32)  # → number; 0: empty
        self._first, self._second = np.zeros(most, np.uint64), np.zeros(most, np.uint64)  # of number
        self._long: dict[bytes, int] = {}
        self._count = self._filled = 1
        self.starts, self.counts = np.zeros(most, np.int64), np.zeros(most, np.int32)  # of number: where its ids are
        self.ids = np.zeros(1 << 16, np.int32)
        self._size = 0  # ids in use

    def has_room(self) -> bool:
        """Whether a slice of new words would fit."""
        return self._count + _SLICE <= _MOST_WORDS and self._size < _MOST_IDS

    def find(self, buffer: bytes, starts_N: Array, sizes_N: Array) -> tuple[Array, list[tuple[int, int]]]:
        """The numbers of words, and (start, size) of those that are new, of each once."""
        first, second = _eights(buffer, starts_N)
        lengths = np.minimum(sizes_N, _SHORT)
        first &= _FIRST.take(lengths)
        second &= _SECOND.take(lengths)
        second |= _LENGTH.take(lengths)
        long = np.flatnonzero(sizes_N > _SHORT)
        first[long] = second[long] = 0  # as entry 0, which no short word is
        numbers, new = self._number(first, second)
        fresh = list(zip(starts_N[new].tolist(), sizes_N[new].tolist(), strict=True))
        known = self._long
        for index, start, size in zip(long.tolist(), starts_N[long].tolist(), sizes_N[long].tolist(), strict=True):
            word = buffer[start : start + size]
            number = known.get(word)
            if number is None:
                number = known[word] = self._count
                self._count += 1
                fresh.append((start, size))
            numbers[index] = number
        return numbers, fresh

    def _number(self, first_N: Array, second_N: Array) -> tuple[Array, Array]:
        """The numbers of short words, and the indices of those that are new, in the order of their numbers."""
        slots = self._slots
        mixed = first_N * _MIX[0]
        mixed ^= second_N * _MIX[1]
        mixed ^= mixed >> _FOLD
        mixed *= _MIX[2]
        slot = (mixed >> _TOP).astype(np.int64)
        numbers = slots.take(slot)
        new = [np.zeros(0, np.int64)]
        open_ = np.flatnonzero(self._differ(numbers, first_N, second_N))
        while len(open_):
            empty = numbers[open_] == 0
            absent, taken = open_[empty], open_[~empty]
            # Words that meet an empty slot write themselves into it; who stands there afterwards has it.
            claims = np.arange(1, len(absent) + 1, dtype=np.int32)
            slots[slot[absent]] = claims
            won = absent[slots[slot[absent]] == claims]
            given = np.arange(self._count, self._count + len(won), dtype=np.int32)
            self._count += len(won)
            slots[slot[won]] = given
            self._first[given], self._second[given] = first_N[won], second_N[won]
            new.append(won)
            slot[taken] = (slot[taken] + 1) & (len(slots) - 1)
            numbers[open_] = again = slots[slot[open_]]
            open_ = open_[self._differ(again, first_N[open_], second_N[open_])]
        return numbers, np.concatenate(new)

    def _differ(self, numbers_N: Array, first_N: Array, second_N: Array) -> Array:
        """bool [N]: whether a number is another word's (or none)."""
        differ = self._first.take(numbers_N) != first_N
        differ |= self._second.take(numbers_N) != second_N
        return differ

    def fill(self, ids: list[list[int]]) -> None:
        """Ids of the new words."""
        assert self._filled + len(ids) == self._count
        counts = np.fromiter(map(len, ids), np.int32, len(ids))
        total = int(counts.sum())
        while self._size + total > len(self.ids):
            self.ids = np.concatenate((self.ids, np.zeros_like(self.ids)))
        self.ids[self._size : self._size + total] = np.fromiter(chain.from_iterable(ids), np.int32, total)
        filled = slice(self._filled, self._count)
        self.counts[filled] = counts
        self.starts[filled] = self._size + np.cumsum(counts) - counts
        self._size, self._filled = self._size + total, self._count


_ZERO = np.zeros(1, np.int64)
_NO_IDS = np.zeros(0, np.int32)
